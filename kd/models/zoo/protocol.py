"""The images that a network was trained on and the classes of its outputs; the interface of a zoo.

Each library publishes this with its weights in a form of its own; here it is one value.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from torch import nn

from dsdistill.harness.data.preprocess import Preprocess

Shape = tuple[int, int, int]  # height, width, channels of an image
Interpolation = Literal["bilinear", "bicubic"]
SOURCES = ("timm", "hf-hub", "local-dir", "torchvision", "hf")  # prefixes of published networks


@dataclass(frozen=True)
class PretrainedConfig:
    """The images that a network was trained on, and the classes of its outputs.

    Attributes:
        mean, std: One value per channel, for images in [0, 1]: (image - mean) / std.
        size: Height and width of the images.
        interpolation: Interpolation by which images are resized to that size.
        crop: Side of the centre crop as a share of the side of the resized image: 224 of 256 is
            0.875. Not used for teachers, whose images are cropped already.
        classes: Class names in the order of the outputs, with synonyms separated by commas; or
            only their number, where no names are known.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    interpolation: Interpolation
    crop: float
    classes: tuple[str, ...] | int

    @property
    def count(self) -> int:
        """Number of classes."""
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    def preprocess(self, channels: int | None = None) -> Preprocess:
        """The normalisation; for another number of channels, each gets the mean of the values."""
        mean, std = (np.asarray(values, np.float32) for values in (self.mean, self.std))
        if channels is not None and channels != len(mean):
            mean, std = (np.full(channels, v.mean(), np.float32) for v in (mean, std))
        return Preprocess("standardise", mean, std)


class Zoo(Protocol):
    """The functions of a module that knows published networks; all raise `UserError`."""

    def check(self, name: str, /) -> None:
        """Refuse an unknown name, and suggest the closest known ones."""
        ...

    def pretrained_config(self, name: str, /) -> PretrainedConfig:
        """The images that the published weights expect, and their classes."""
        ...

    def origin(self, name: str, /) -> str:
        """Address or folder of the published weights."""
        ...

    def network(
        self,
        name: str,
        channels: int,
        classes: int,
        *,
        pretrained: bool = False,
        config: Mapping[str, Any] | None = None,
    ) -> nn.Module:
        """Build a network, for images of `channels` channels where the library can."""
        ...

    def input_shape(self, network: nn.Module, shape: Shape, /) -> Shape:
        """The shape to which images of `shape` must be resized."""
        ...

    def config(self, name: str, network: nn.Module, /) -> dict[str, Any] | None:
        """Values needed beside the name to build the network again."""
        ...


def nearest_interpolation(name: str) -> Interpolation:
    """The closest interpolation for tensors: bicubic for smooth kernels, bilinear for others.

    Args:
        name: A library's name: `bicubic`, `lanczos`, `bilinear`, `nearest`, `random`, ...
    """
    return "bicubic" if name.lower() in ("bicubic", "lanczos") else "bilinear"
