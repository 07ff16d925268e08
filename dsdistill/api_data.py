"""Data of calls from Python: a caller's arrays as a data set, and files as arrays."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from dsdistill.harness import paths
from dsdistill.harness.data import arrays, datasets
from dsdistill.harness.data.arrays import ArrayLike
from dsdistill.harness.data.datasets import Splits
from dsdistill.harness.data.labeled_images import LabeledImages
from dsdistill.harness.errors import UserError, name_arguments
from dsdistill.harness.runs import progress as progress_display

Pair = tuple[ArrayLike, ArrayLike]  # images and labels
DATA_NAME = "arrays"  # name of a caller's data in provenance and reports
# How messages of the commands read to who calls a function.
_PHRASES = {
    "--resume goes on": "the same call goes on",
    "--out": "checkpoint",
    "start the command once, with --hosts none": "call it in one process",
}
_TEXTS = ("preprocess", "networks", "outer", "optimizer", "schedule", "by")


class ImageData(NamedTuple):
    """A data set as arrays.

    Attributes:
        train, test: (n, h, w, c) images and (n,) class indices.
        validation: The data's own validation part; None where it has none.
        classes: Class names, in the order of the indices.
    """

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray] | None
    classes: tuple[str, ...]


def load_data(
    data: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    channels: Literal[1, 3] | None = None,
    root: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> ImageData:
    """Read a folder of images, an `.npz` file or a named data set into arrays.

    Args:
        data: A folder with one folder of images per class, an `.npz` file, or `digits`, `mnist`,
            `fashion-mnist`, `cifar10`, `cifar100` or `svhn`. Without a test part, a fifth of the
            images becomes one.
        image_size: Height and width in pixels to which images are resized.
        channels: 1 makes all images grayscale, 3 makes them colour.
        root: Folder of the named data sets, downloaded when missing; by default `DSDISTILL_DATA`.
        progress: Whether to say what was read as what.

    Raises:
        UserError: If the data are missing or unreadable; a ValueError of one line.
    """
    with call(progress):
        splits = datasets.load(
            os.fspath(data),
            root=paths.data_root() if root is None else Path(root),
            image_size=image_size,
            validation_fraction=0,
            channels=channels,
        )
        train, validation, test = (
            (part.images(), part.labels) for part in (splits.train, splits.validation, splits.test)
        )
        own = validation if splits.brings_validation else None
        return ImageData(train, test, own, splits.train.classes)


@contextlib.contextmanager
def call(progress: bool) -> Iterator[None]:
    """The surroundings of a call from Python: silent if asked, messages about arguments."""
    with progress_display.silenced(not progress), name_arguments(_PHRASES, _TEXTS):
        yield


def as_splits(
    images: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str] | None,
    validation: Pair | None,
    fraction: float,
    test: Pair | None = None,
) -> Splits:
    """Check a caller's arrays, and make training, validation and test images of them.

    Args:
        images, labels: Training images and their labels.
        classes: Class names in label order; by default the distinct labels, sorted.
        validation: Images held out by the caller; None to hold a share out of the training images.
        fraction: That share.
        test: Test images; None for none.

    Raises:
        UserError: If an array or the fraction breaks a rule.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"validation_fraction must be in [0, 1), got {fraction}")
    train = arrays.labeled_images(images, labels, classes)
    own = None if validation is None else _part("validation", validation, train)
    none = train.select(np.zeros(0, np.int64))
    held_out = none if test is None else _part("test", test, train)
    return datasets.split(DATA_NAME, train, own, held_out, fraction)


def _part(name: str, pair: Pair, train: LabeledImages) -> LabeledImages:
    """Images of another part, with the classes and the shape of the training images."""
    part = arrays.labeled_images(*pair, train.classes)
    if part.shape != train.shape:
        raise UserError(f"{name} images must be {train.shape}, as in train, got {part.shape}")
    return part
