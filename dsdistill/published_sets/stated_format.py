"""Format of a published set, as the options of `dsdistill evaluate` state it."""

from dataclasses import dataclass
from typing import Literal

PixelKind = Literal[
    "auto",
    "standardised",
    "imagenet",
    "signed",
    "unit",
    "bytes",
    "zca",
    "zca-mtt",
    "zca-rfad",
    "zca-frepo",
]
LabelKind = Literal["auto", "index", "one-hot", "centred", "probabilities", "logits"]
AxisOrder = Literal["auto", "nchw", "nhwc"]


@dataclass(frozen=True)
class StatedFormat:
    """Format of a published set as the user states it; evidence decides where it is `auto`.

    Attributes:
        pixels: Standardised by `mean` and `std`, standardised by ImageNet's constants, in [-1, 1],
            in [0, 1], 0 to 255, or whitened in one of four ways.
        labels: Class indices, one-hot rows, rows that sum to 0, rows that sum to 1, or any rows.
        mean, std: Mean and deviation of the training images in [0, 1], one value per channel, for
            standardised pixels; None: constants of the project or the data.
        layout: Order of the images' axes.
        tiles: Number of smaller images in each row and column of a published one; None: evidence
            decides.
    """

    pixels: PixelKind = "auto"
    labels: LabelKind = "auto"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    layout: AxisOrder = "auto"
    tiles: int | None = None
