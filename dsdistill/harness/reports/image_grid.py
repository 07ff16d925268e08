"""A picture of one or two sets of images, without their preprocessing, class by class."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.files import write_bytes
from dsdistill.harness.reports import plot_style
from dsdistill.harness.text import MAX_NAME_CHARACTERS, shorten

MAX_ROWS, MAX_COLUMNS = 20, 10  # a grid of a thousand classes is unreadable
MAX_CHARACTERS_PER_IMAGE = 10  # of a name above images
MARGIN_INCHES = 0.06
MAX_SIDE_PIXELS = 256  # side of an image before it is drawn, at about 80 pixels


@dataclass(frozen=True, eq=False)
class GridSide:
    """Half of a picture, or all of it.

    Attributes:
        title: Title above the images.
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
    path: Path,
    left: GridSide,
    right: GridSide | None,
    classes: tuple[str, ...],
    preprocess: Preprocess,
) -> None:
    """Write a PNG with one or two sets of images side by side, class by class.

    Args:
        path: Path of the PNG.
        left, right: The sets, whose preprocessing is undone for the picture; None for one set.
        classes: Names. Up to `MAX_ROWS` rows are drawn; where that leaves classes out, it says so.
        preprocess: The preprocessing of the sets.
    """
    sides = (left,) if right is None else (left, right)
    columns = _count_columns(sides, len(classes))
    with plot_style.plain_text():
        pixels = _render(sides, classes, columns, preprocess)
    gray = (pixels == pixels[..., :1]).all()  # a third smaller, in the file and in a page
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if gray else pixels).save(buffer, "png", optimize=True)
    write_bytes(path, buffer.getvalue())


def _count_columns(sides: tuple[GridSide, ...], classes: int) -> int:
    """Number of images per class: the largest, or of many classes the usual one.

    Classes of learned labels differ in size, and one large class would leave the rest no room.
    """
    counts = [len(row) for side in sides for row in side.rows(classes)]
    return max(1, max(counts) if classes <= MAX_ROWS else int(np.median(counts)))


def _render(
    sides: tuple[GridSide, ...], classes: tuple[str, ...], columns: int, preprocess: Preprocess
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw the picture; every class that is shown has its place, even without images.

    Up to `MAX_ROWS` classes have a row each, and their names beside it. Of more, as many share a
    row as have room in it, each with its name above its first image.

    Args:
        sides: The halves, or the whole.
        classes: Names of all classes.
        columns: Images of a class that are shown.
        preprocess: The preprocessing of both sets.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    per_row = MAX_COLUMNS // columns if len(classes) > MAX_ROWS else 1
    shown = classes[: MAX_ROWS * per_row]
    count = -(-len(shown) // per_row)
    _, h, w, _ = _downsample(sides[0].images[:1]).shape
    above = 3 * h // 10 + 1 if per_row > 1 else 0  # room for names
    size = (len(sides) * per_row * columns * 0.55 + 2.2, count * 0.55 * (1 + above / h) + 0.6)
    figure = Figure(
        figsize=(max(size[0], 5), max(size[1], 2)),
        dpi=100 if above else 150,  # hundreds of photographs would take 5 MB
    )
    # A grid that is higher than wide fills no half of the figure: all stand together, and what is
    # left empty is cut off.
    figure.set_layout_engine("compressed", w_pad=2 * MARGIN_INCHES)
    grids = figure.subplots(1, len(sides), squeeze=False)[0]
    for axes, side in zip(grids, sides, strict=True):
        rows = [_downsample(preprocess.invert(row)) for row in side.rows(len(shown))]
        tiled = tile(rows, columns, per_row, above)
        axes.imshow(
            tiled.squeeze(-1) if tiled.shape[-1] == 1 else tiled, cmap="gray", vmin=0, vmax=1
        )
        axes.set_title(plot_style.label(side.title), fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
        if above:
            for i, name in enumerate(shown):
                left, bottom = i % per_row * columns * (w + 1), i // per_row * (h + 1 + above)
                text = shorten(name, min(MAX_CHARACTERS_PER_IMAGE * columns, MAX_NAME_CHARACTERS))
                axes.text(left, bottom + above - 1.5, text, fontsize=6, va="bottom")
    if not above:
        middles = [(row + 0.5) * (h + 1) - 1 for row in range(count)]
        grids[0].set_yticks(middles, list(map(plot_style.label, shown)), fontsize=7)
        grids[0].tick_params(length=0)
    if len(shown) < len(classes):
        figure.supxlabel(f"the first {len(shown):,} of {len(classes):,} classes", fontsize=9)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=MARGIN_INCHES)
    return np.asarray(Image.open(buffer).convert("RGB"))


def _downsample(images: Float[np.ndarray, "m h w c"]) -> Float[np.ndarray, "m h2 w2 c2"]:
    """Reduce images to at most `MAX_SIDE_PIXELS` per side, and other channels than 3 to gray."""
    rows, columns = (-(-side // MAX_SIDE_PIXELS) for side in images.shape[1:3])
    thin = images[:, ::rows, ::columns]
    return thin if thin.shape[-1] in (1, 3) else thin.mean(-1, keepdims=True)


def tile(
    rows: list[Float[np.ndarray, "m h w c"]], columns: int, per_row: int = 1, above: int = 0
) -> Float[np.ndarray, "H W c"]:
    """Arrange images in a grid with one white pixel between them, clipped to [0, 1].

    Args:
        rows: Images of each class; a class may have fewer than `columns`.
        columns: Number of images per class; more are left out.
        per_row: Number of classes per row of the grid.
        above: White pixels above each row of the grid.
    """
    _, h, w, c = rows[0].shape
    lines, step = -(-len(rows) // per_row), h + 1 + above
    grid = np.ones((lines * step - 1, per_row * columns * (w + 1) - 1, c), np.float32)
    for i, row in enumerate(rows):
        line, first = i // per_row, i % per_row * columns
        for j, image in enumerate(row[:columns]):
            top, left = line * step + above, (first + j) * (w + 1)
            grid[top : top + h, left : left + w] = np.clip(image, 0, 1)
    return grid
