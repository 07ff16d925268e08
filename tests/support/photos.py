"""Folders of small photographs, as people have them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 8
Draw = Callable[[], np.ndarray]


def shaded(rng: np.random.Generator, shade: float, deviation: float) -> Draw:
    """Noise around a brightness."""
    return lambda: rng.normal(shade, deviation, (SIDE, SIDE, 3))


def write(folder: Path, classes: Mapping[str, Draw], *, train: int, test: int = 6) -> None:
    """Write PNGs in class folders; the first of each class and part is grayscale.

    Args:
        folder: Where `train/` and `test/` are made.
        classes: Class -> what draws its next image, with values around 0 to 255.
        train, test: Number of images of each class in these parts.
    """
    for part, count in (("train", train), ("test", test)):
        for name, draw in classes.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(draw().clip(0, 255).astype(np.uint8))
                image = image.convert("L") if i == 0 else image
                image.save(folder / part / name / f"{i}.png")
