"""The options of `kd synthesize`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from dsdistill.harness.help_page import Layout, Shown, format_default
from kd.options.shared import (
    NamesArg,
    require,
)
from kd.synthesis import settings as synthesis_settings

if TYPE_CHECKING:
    pass


def _by_method(name: str, more: str = "") -> Shown:
    """The default of a number of `kd synthesize`, for each method that has one."""
    pairs = [
        f"{format_default(value)} with --method {method}"
        for method, numbers in synthesis_settings.DEFAULTS.items()
        if (value := _synthesis_default(numbers, name)) is not None
    ]
    return Shown(default="; ".join(pairs) + more)


def _synthesis_default(numbers: Mapping[str, Any], name: str) -> float | None:
    if name == "bn_weight" and numbers[name] is None:
        return synthesis_settings.GENERATOR_BN_WEIGHT
    return numbers.get(name)


@dataclass(frozen=True)
class SynthesizeOptions:
    """Make images from a trained student's weights alone, for another student to learn from.

    No data are read, only the folder of the run. kd train SET --teacher RUN trains on the set.
    """

    LAYOUT: ClassVar = Layout(
        groups={
            "Images": "method images seed",
            "Weights of the loss": "bn_weight tv_weight balance_weight",
            "Optimizer": "steps batch_size lr width",
            "Output and resuming": "out resume",
            "Code of your own": "trust_module",
            "Hardware": "device",
        },
        examples=(
            "kd synthesize runs/teacher --images 5000 --out runs/images",
            "kd synthesize runs/teacher --method generator --width 32 --out runs/images",
        ),
    )

    run: Annotated[
        tyro.conf.Positional[Path | None], Shown("RUN", "with --resume that of the set")
    ] = None
    """Folder of a finished run of images, whose student is asked"""

    method: synthesis_settings.Method = "inversion"
    """inversion: optimise the pixels of each batch until the network calls the images their classes
    and their statistics are those that its batch norm layers have kept (DeepInversion); generator:
    train a network that makes such images from noise (DAFL)"""

    images: int = synthesis_settings.IMAGES
    """Number of images, spread over the classes"""

    seed: int = 0
    """Seed of the noise that the images start from"""

    bn_weight: Annotated[
        float | None, _by_method("bn_weight", "; without batch norm the generator does without")
    ] = None
    """Weight of the distance between the statistics of the images and those of the batch norm
    layers; 0 leaves it out, as for networks without such layers"""

    tv_weight: Annotated[float | None, _by_method("tv_weight")] = None
    """Weight of the total variation, which makes images smooth; of inversion"""

    balance_weight: Annotated[float | None, _by_method("balance_weight")] = None
    """Weight of the balance of the classes; of the generator"""

    steps: Annotated[int | None, _by_method("steps")] = None
    """Steps for each batch of images; of the generator, in all"""

    batch_size: Annotated[int | None, _by_method("batch_size")] = None
    """Images whose statistics are compared; of large networks as many as memory holds"""

    lr: Annotated[float | None, _by_method("lr")] = None
    """Learning rate of Adam, for pixels or for the generator's weights"""

    width: Annotated[int | None, _by_method("width")] = None
    """Channels of the generator's last hidden layer"""

    out: Annotated[Path | None, Shown("DIR", "the next free runs/kd-<run>-images-<n>")] = None
    """Folder of the set"""

    resume: bool = False
    """Continue the set in --out; the result is the same to the bit"""

    trust_module: NamesArg = None
    """Code that the run may name as its network, as module:attribute with its arguments; what only
    a file names is never imported"""

    device: Annotated[str, Shown("DEVICE")] = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N"""

    @property
    def source(self) -> Path:
        """Folder of the run that is asked."""
        assert self.run is not None
        return self.run

    @property
    def settings(self) -> synthesis_settings.SynthesisSettings:
        """The numbers of the synthesis, with the defaults of the method.

        Raises:
            UserError: With the option, the rule and the value.
        """
        names = {name for numbers in synthesis_settings.DEFAULTS.values() for name in numbers}
        given = {name: getattr(self, name) for name in sorted(names)}
        return synthesis_settings.resolve(self.method, self.images, given)

    def check(self) -> None:
        """Refuse values out of range and options that the method does not use.

        Raises:
            UserError: With the option, the rule and the value.
        """
        require(self.seed >= 0, "--seed must be 0 or more", self.seed)
        require(not self.resume or self.out is not None, "--resume needs --out", self.out)
        if not self.resume:
            require(self.run is not None, "RUN, the folder of a finished run, is missing", "none")
            _ = self.settings
