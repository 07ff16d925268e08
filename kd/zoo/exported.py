"""A program that `torch.export` has saved, as a teacher: `FILE.pt2`.

It gives logits and nothing else: it cannot be trained, and none of its layers can be tapped. An
archive may hold pickled or compiled parts, which run code when they are read; one that does is
refused.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.errors import UserError
from kd.zoo.wants import Shape

SUFFIX = ".pt2"
CARD = "model.json"  # the extra file that says what the program wants and what it answers


class Exported(nn.Module):
    """A program that maps images to logits, in the mode in which it was exported."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def train(self, mode: bool = True) -> "Exported":
        # The mode is part of the program, whose own `train` raises.
        self.training = mode
        return self

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.program(images)


@dataclass(frozen=True, eq=False)
class Program:
    """What a file holds.

    Attributes:
        network: The program.
        shape: Of the images it takes; height and width are those of `like` where it takes any.
        classes: Number of its outputs.
        card: What an exporter wrote beside it in the form of a run's `model.json`; else empty.
    """

    network: Exported
    shape: Shape
    classes: int
    card: Mapping[str, Any]


def load(path: Path, like: Shape) -> Program:
    """Read a program and try it.

    Args:
        path: A file that `torch.export.save` wrote.
        like: Shape of the data's images.

    Raises:
        UserError: If the file is missing or damaged, or holds more than a program, or a program
            that does not map any number of images, each for itself, to logits.
    """
    _check_archive(path)
    extra = {CARD: ""}
    try:
        saved = torch.export.load(path, extra_files=extra)
        network = Exported(saved.module())
    except Exception as error:  # a foreign file has many ways to fail
        raise UserError(f"{path} is not a program that can be read: {_first(error)}") from error
    shape = _shape(path, saved, like)
    classes = _try(path, network, shape)
    return Program(network, shape, classes, _card(path, extra[CARD]))


def _check_archive(path: Path) -> None:
    """Refuse a file that is no archive, or one that would run code when it is read."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            running = [name for name in archive.namelist() if _may_run(archive, name)]
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a whole {SUFFIX} file: {_first(error)}") from error
    if running:
        raise UserError(f"{path} holds more than a program and tensors: {running[0]} may run code")


def _may_run(archive: zipfile.ZipFile, name: str) -> bool:
    """Whether reading this member would run code: compiled, or pickled and not tensors alone."""
    folder, _, last = name.rpartition("/")
    if "/aotinductor" in folder or last.startswith(("custom_obj_", "opaque_obj_")):
        return True
    if folder.endswith(("/weights", "/constants")) and last.endswith("_config.json"):
        entries = json.loads(archive.read(name))["config"].values()
        return any(entry["use_pickle"] for entry in entries)  # raw bytes by default
    if not last.endswith(".pt"):
        return False
    content = archive.read(name)
    if not content:
        return False
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # whatever it is, it is not tensors alone
        return True
    return False


def _shape(path: Path, saved: torch.export.ExportedProgram, like: Shape) -> Shape:
    """The shape of the images it takes; that of the data where an axis may have any length."""
    inputs = [
        node.meta["val"]
        for node in saved.graph.nodes
        if node.op == "placeholder" and node.name in saved.graph_signature.user_inputs
    ]
    if len(inputs) != 1 or inputs[0].ndim != 4:
        raise UserError(f"{path} does not take one batch of images (n, c, h, w)")
    n, c, h, w = inputs[0].shape
    if isinstance(n, int):
        raise UserError(
            f"{path} takes exactly {n} images at once: export it with a dynamic batch size"
        )
    sizes = zip((h, w, c), like, strict=True)
    h, w, c = (own if isinstance(own, int) else ours for own, ours in sizes)
    return h, w, c


def _try(path: Path, network: Exported, shape: Shape) -> int:
    """The number of logits; an image's must not depend on the others of its batch."""
    h, w, c = shape
    images = torch.rand(3, c, h, w, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            first, second = network(images[:2]), network(images[[0, 2]])
    except Exception as error:  # a program raises whatever it likes
        raise UserError(f"{path} cannot take {h}x{w} images: {_first(error)}") from error
    if not isinstance(first, Tensor) or first.ndim != 2 or len(first) != 2:
        raise UserError(f"{path} does not answer with logits (n, k)")
    # Rounding may differ between batches by some ulp; batch norm in training mode, by far more.
    if not torch.allclose(first[0], second[0], rtol=1e-3, atol=1e-3 * float(first.abs().max())):
        raise UserError(
            f"{path} was exported in training mode: its answer to an image depends on the other "
            "images; call eval() on the network before the export"
        )
    return first.shape[1]


def _card(path: Path, text: str | bytes) -> Mapping[str, Any]:
    if not text:
        return {}
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"the {CARD} inside {path} is no JSON: {error}") from error


def _first(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
