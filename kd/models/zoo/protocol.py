"""What a network was made for: how an image must be prepared for it, and what its outputs mean.

Published weights come with this knowledge, each library in its own form; here it is one value.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from torch import nn

from dsdistill.harness.data.preprocess import Preprocess

Shape = tuple[int, int, int]  # height, width, channels of an image
Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class PretrainedConfig:
    """How images must look for a network, and what its outputs mean.

    Attributes:
        mean, std: One value a channel, subtracted and divided by, of images in [0, 1].
        size: Height and width.
        interpolation: How images are resized to that size.
        crop: Side of the centre crop as a share of the side of the resized image: 224 of 256 is
            0.875. Where images are cropped already, as a teacher's are, nothing uses it.
        classes: Names in the order of the outputs, in which commas part synonyms; or only their
            number, where no names are known.
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
        """The normalisation; for another number of channels each gets the mean over its own."""
        mean, std = (np.asarray(values, np.float32) for values in (self.mean, self.std))
        if channels is not None and channels != len(mean):
            mean, std = (np.full(channels, v.mean(), np.float32) for v in (mean, std))
        return Preprocess("standardise", mean, std)


class Zoo(Protocol):
    """What a module that knows published networks has; all raise `UserError`."""

    def check(self, name: str, /) -> None:
        """Refuse an unknown name, with the nearest known ones."""
        ...

    def pretrained_config(self, name: str, /) -> PretrainedConfig:
        """What the published weights want."""
        ...

    def origin(self, name: str, /) -> str:
        """Where the published weights lie."""
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
        """A network for images of so many channels, if it can be made for them."""
        ...

    def input_shape(self, network: nn.Module, shape: Shape, /) -> Shape:
        """The shape to which images of `shape` must be brought."""
        ...

    def config(self, name: str, network: nn.Module, /) -> dict[str, Any] | None:
        """What is needed beside the name to make the network again."""
        ...


def nearest_interpolation(name: str) -> Interpolation:
    """The nearest that a tensor can be resized with: smooth kernels are bicubic, others bilinear.

    Args:
        name: As a library calls it: `bicubic`, `lanczos`, `bilinear`, `nearest`, `random`, ...
    """
    return "bicubic" if name.lower() in ("bicubic", "lanczos") else "bilinear"
