"""What the commands take. Frozen values; the texts below are the help pages."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dsdistill.harness import places
from dsdistill.harness.errors import UserError

# The names that the help pages show for values.
Name = Annotated[str | None, tyro.conf.arg(metavar="NAME|RUN")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]
Count = Annotated[int | None, tyro.conf.arg(metavar="N")]
Number = Annotated[float | None, tyro.conf.arg(metavar="X")]


@dataclass(frozen=True)
class Train:
    """Train a student on labels alone, or from a teacher."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[DATA]")] = "digits"
    """Data set name or path; folder of a dsdistill run; distilled .safetensors file."""
    student: Annotated[str, tyro.conf.arg(metavar="NAME|RUN")] = "convnet"
    """convnet, mlp, with a width as convnet:32; any timm name; or an earlier run's folder."""
    teacher: Name = None
    """Folder of an earlier run, or a timm name (its published weights are loaded)."""
    temperature: float = 4.0
    """T of the teacher's and the student's softened predictions."""
    alpha: float = 0.9
    """Share of the teacher: alpha T² KL(teacher || student) + (1 - alpha) CE."""
    pretrained: bool = False
    """Start a timm student from its published weights."""
    out: Folder = None
    """Folder of the run; by default the next free runs/kd-STUDENT-DATA-N."""
    resume: bool = False
    """Continue the unfinished run in --out."""
    epochs: Count = None
    """By default as in the recipe for this kind of data."""
    batch_size: Count = None
    """Images a step; by default as in the recipe."""
    lr: Number = None
    """Largest learning rate; by default as in the recipe."""
    weight_decay: Number = None
    """By default as in the recipe."""
    seed: int = 0
    """Of the initial weights and of the order of the images."""
    preprocess: Literal["standardise", "zca", "none"] | None = None
    """By default standardise, or what the pretrained or the earlier student was made for."""
    image_size: Count = None
    """Resize images to this height and width."""
    validation_fraction: Number = None
    """Share of the training images held out for validation; by default 0.1."""
    data_root: Path = field(default_factory=places.data_root)
    """Where data sets lie or are downloaded to."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            UserError: With the option, the rule and the value.
        """
        _require(0 <= self.alpha <= 1, "--alpha must be in [0, 1]", self.alpha)
        _require(0 < self.temperature < float("inf"), _positive("temperature"), self.temperature)
        for name in ("epochs", "batch_size", "image_size"):
            value = getattr(self, name)
            rule = f"--{name.replace('_', '-')} must be at least 1"
            _require(value is None or value >= 1, rule, value)
        _require(self.lr is None or 0 < self.lr < float("inf"), _positive("lr"), self.lr)
        decay = self.weight_decay
        _require(
            decay is None or 0 <= decay < float("inf"), "--weight-decay must be 0 or more", decay
        )
        _require(self.seed >= 0, "--seed must be 0 or more", self.seed)
        _require(not self.resume or self.out is not None, "--resume needs --out", self.out)


@dataclass(frozen=True)
class Evaluate:
    """Judge a trained student on test images."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a finished run."""
    data: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[DATA]")] = None
    """Data set to test on; by default the one it was trained for."""
    teacher: Name = None
    """To measure the agreement with; by default the one it was trained with."""
    data_root: Path = field(default_factory=places.data_root)
    """Where data sets lie or are downloaded to."""
    device: str = "cpu"
    """Where accuracy is measured; latency is always the CPU's."""
    json: bool = False
    """Print one JSON object instead of a table."""


def _require(holds: bool, rule: str, got: object) -> None:
    if not holds:
        raise UserError(f"{rule}, got {got}")


def _positive(name: str) -> str:
    return f"--{name} must be positive and finite"
