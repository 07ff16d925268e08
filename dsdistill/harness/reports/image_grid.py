"""A picture of two sets of images side by side, without their preprocessing: one row per class."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.files import write_bytes
from dsdistill.harness.reports import plot_style

MAX_ROWS, MAX_COLUMNS = 20, 10  # a grid of a thousand classes is unreadable
MARGIN_INCHES = 0.06
MAX_SIDE_PIXELS = 256  # side of an image before it is drawn, at about 80 pixels


@dataclass(frozen=True, eq=False)
class GridSide:
    """Half of a picture.

    Attributes:
        title: Title above this half.
        images: Preprocessed images.
        labels: Class of each image.
    """

    title: str
    images: Float[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"]

    def rows(self, classes: int) -> list[Float[np.ndarray, "m h w c"]]:
        """The first `MAX_COLUMNS` images of each class."""
        return [self.images[self.labels == c][:MAX_COLUMNS] for c in range(classes)]


def write(
    path: Path, left: GridSide, right: GridSide, classes: tuple[str, ...], preprocess: Preprocess
) -> None:
    """Write a PNG with two sets of images side by side, one row per class.

    Args:
        path: Path of the PNG.
        left, right: The two sets, whose preprocessing is undone for the picture.
        classes: Names; the first `MAX_ROWS` are shown.
        preprocess: The preprocessing of both sets.
    """
    count = min(len(classes), MAX_ROWS)
    sides = (left, right)
    columns = max(1, *(len(row) for side in sides for row in side.rows(count)))
    with plot_style.plain_text():
        pixels = _render(sides, classes[:count], columns, preprocess)
    gray = (pixels == pixels[..., :1]).all()  # a third smaller, in the file and in a page
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if gray else pixels).save(buffer, "png", optimize=True)
    write_bytes(path, buffer.getvalue())


def _render(
    sides: tuple[GridSide, GridSide], classes: tuple[str, ...], columns: int, preprocess: Preprocess
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw the picture; every class has a row, even without images."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(classes)
    size = (2 * columns * 0.55 + 2.2, count * 0.55 + 0.6)
    figure = Figure(figsize=(max(size[0], 5), max(size[1], 2)), dpi=150)
    # A grid that is higher than wide fills no half of the figure: both stand together, and what is
    # left empty is cut off.
    figure.set_layout_engine("compressed", w_pad=2 * MARGIN_INCHES)
    both = figure.subplots(1, 2)
    for axes, side in zip(both, sides, strict=True):
        tiled = tile([_downsample(preprocess.invert(row)) for row in side.rows(count)], columns)
        axes.imshow(
            tiled.squeeze(-1) if tiled.shape[-1] == 1 else tiled, cmap="gray", vmin=0, vmax=1
        )
        axes.set_title(plot_style.label(side.title), fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
    height = _downsample(sides[0].images[:1]).shape[1] + 1
    middles = [(row + 0.5) * height - 1 for row in range(count)]
    both[0].set_yticks(middles, list(map(plot_style.label, classes)), fontsize=7)
    both[0].tick_params(length=0)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=MARGIN_INCHES)
    return np.asarray(Image.open(buffer).convert("RGB"))


def _downsample(images: Float[np.ndarray, "m h w c"]) -> Float[np.ndarray, "m h2 w2 c2"]:
    """Reduce images to at most `MAX_SIDE_PIXELS` per side, and other channels than 3 to gray."""
    rows, columns = (-(-side // MAX_SIDE_PIXELS) for side in images.shape[1:3])
    thin = images[:, ::rows, ::columns]
    return thin if thin.shape[-1] in (1, 3) else thin.mean(-1, keepdims=True)


def tile(rows: list[Float[np.ndarray, "m h w c"]], columns: int) -> Float[np.ndarray, "H W c"]:
    """Arrange images in a grid with one white pixel between them, clipped to [0, 1].

    Args:
        rows: Images of each row; a row may be shorter than `columns`.
        columns: Number of images per row.
    """
    _, h, w, c = rows[0].shape
    grid = np.ones((len(rows) * (h + 1) - 1, columns * (w + 1) - 1, c), np.float32)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = i * (h + 1), j * (w + 1)
            grid[top : top + h, left : left + w] = np.clip(image, 0, 1)
    return grid
