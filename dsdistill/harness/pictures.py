"""The distilled images in a grid, as the eye knows them: one row a class, before and after."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from dsdistill.harness.preprocess import Preprocess
from dsdistill.harness.runs import write_bytes

MOST_ROWS, MOST_COLUMNS = 20, 10  # a grid of a thousand classes is no picture


def write_grid(
    path: Path,
    before: Float[np.ndarray, "n h w c"],
    after: Float[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, " n"],
    classes: tuple[str, ...],
    preprocess: Preprocess,
) -> None:
    """Write a PNG with the images before and after distillation side by side.

    Args:
        path: Of the PNG.
        before, after: Preprocessed images; the preprocessing is undone for the picture.
        labels: Class of each image, the same on both sides.
        classes: Names; the first `MOST_ROWS` are shown.
        preprocess: As stored with the set.
    """
    from matplotlib.figure import Figure

    shown = [
        np.flatnonzero(labels == c)[:MOST_COLUMNS] for c in range(min(len(classes), MOST_ROWS))
    ]
    columns = max(map(len, shown))
    size = (2 * columns * 0.55 + 2.2, len(shown) * 0.55 + 0.6)
    figure = Figure(figsize=(max(size[0], 5), max(size[1], 2)), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, images, title in ((left, before, "before"), (right, after, "after")):
        tiled = tile([preprocess.invert(images[rows]) for rows in shown], columns)
        axes.imshow(
            tiled.squeeze(-1) if tiled.shape[-1] == 1 else tiled, cmap="gray", vmin=0, vmax=1
        )
        axes.set_title(title, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set_visible(False)
    height = before.shape[1] + 1
    middles = [(row + 0.5) * height - 1 for row in range(len(shown))]
    left.set_yticks(middles, classes, fontsize=7)
    left.tick_params(length=0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_bytes(path, buffer.getvalue())


def tile(rows: list[Float[np.ndarray, "m h w c"]], columns: int) -> Float[np.ndarray, "H W c"]:
    """Images in a grid with one white pixel between them, clipped to [0, 1].

    Args:
        rows: The images of each row; a row may be shorter than `columns`.
        columns: Images a row.
    """
    _, h, w, c = rows[0].shape
    grid = np.ones((len(rows) * (h + 1) - 1, columns * (w + 1) - 1, c), np.float32)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = i * (h + 1), j * (w + 1)
            grid[top : top + h, left : left + w] = np.clip(image, 0, 1)
    return grid
