"""Plain arrays as labelled images, with every rule checked.

Images are uint8, or numbers in [0, 1] with 0 black and 1 white, channels last. Labels are integers
or names.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from dsdistill.harness.data.labeled_images import DataError, LabeledImages
from dsdistill.harness.runs import progress
from dsdistill.harness.text import quote

ArrayLike = Any  # whatever numpy.asarray takes, such as an array of JAX or a CPU tensor of torch


def labeled_images(
    images: ArrayLike, labels: ArrayLike, classes: Sequence[str] | None = None
) -> LabeledImages:
    """Check images and labels of a caller.

    Args:
        images: (n, h, w) or (n, h, w, 1 or 3): uint8, uint16, bool, or floats in [0, 1].
        labels: (n,) integers or names.
        classes: Class names in label order. By default the distinct labels, sorted. Integers are
            positions in it, unless all names in it are integers themselves.

    Raises:
        DataError: If an array has another shape, type or range, or a label is none of the classes.
    """
    pixels = check_images(np.asarray(images))
    given = np.asarray(labels)
    if given.shape != (len(pixels),) or given.dtype.kind not in "iuUO":
        raise DataError(
            f"labels must be {len(pixels)} integers or names, one per image, got {given.dtype} "
            f"{given.shape}"
        )
    if given.dtype.kind == "O" and not all(isinstance(label, str) for label in given):
        raise DataError("labels must be integers or names, got objects of other types")
    if classes is None:
        values, indices = np.unique(given, return_inverse=True)
        return LabeledImages(pixels, indices.astype(np.int64), tuple(map(str, values.tolist())))
    names = tuple(map(str, classes))
    if len(set(names)) < len(names):
        raise DataError(f"classes must be distinct names, got {len(names)} with repetitions")
    return LabeledImages(pixels, _positions(given, names), names)


def check_images(images: np.ndarray, where: str = "") -> np.ndarray:
    """Return images as (n, h, w, c), uint8 or float32 in [0, 1]; refuse others.

    Args:
        images: (n, h, w) or (n, h, w, 1 or 3).
        where: Where they come from, for messages.

    Raises:
        DataError: If shape, type or range is another.
    """
    shaped = images[..., None] if images.ndim == 3 else images
    if shaped.ndim != 4 or shaped.shape[-1] not in (1, 3) or 0 in shaped.shape:
        first = shaped.ndim == 4 and shaped.shape[1] in (1, 3)
        remedy = ": put the channels last with images.transpose(0, 2, 3, 1)" if first else ""
        raise DataError(
            f"{where}images must be (n, h, w) or (n, h, w, 1 or 3), got {shaped.shape}{remedy}"
        )
    return _check_range(shaped, where)


def _positions(labels: np.ndarray, classes: tuple[str, ...]) -> Int[np.ndarray, " n"]:
    """Position of each label's class."""
    k = len(classes)
    if labels.dtype.kind in "iu" and not all(name.lstrip("-").isdecimal() for name in classes):
        if len(labels) and (labels.min() < 0 or labels.max() >= k):
            raise DataError(
                f"labels must be from 0 to {k - 1} for {k} classes, got {labels.min()} to "
                f"{labels.max()}"
            )
        return labels.astype(np.int64)
    position = {name: i for i, name in enumerate(classes)}
    values, inverse = np.unique(labels, return_inverse=True)
    unknown = [str(value) for value in values.tolist() if str(value) not in position]
    if unknown:
        raise DataError(f"label {quote(unknown[0])} is none of the {k} classes")
    return np.array([position[str(v)] for v in values.tolist()], np.int64)[inverse]


def _check_range(images: np.ndarray, where: str) -> np.ndarray:
    """Convert images to uint8, or to float32 in [0, 1]; refuse images of unknown range.

    Integers that are all 0 or 1 count as bilevel images, as booleans do.
    """
    if images.dtype == np.uint8:
        return images
    rule = f"{where}images must be uint8, uint16, bool, or floats in [0, 1]"
    if images.dtype.kind not in "fiub":
        raise DataError(f"{rule}, got {images.dtype}")
    if not np.isfinite(images).all():
        bad = int(np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(1))[0])
        raise DataError(f"{where}image {bad} has NaN or infinite values")
    low, high = images.min().item(), images.max().item()
    if low >= 0 and high <= 1:
        return images.astype(np.float32, copy=False)
    got = f"got {images.dtype} from {low:.9g} to {high:.9g}"
    if images.dtype.kind == "f":
        raise DataError(f"{rule}, {got}: rescale them so that 0 is black and 1 is white")
    # Bytes are often stored in wider integers.
    if low >= 0 and high <= 255:
        raise DataError(f"{rule}, {got}: if they are bytes, use images.astype(numpy.uint8)")
    if images.dtype != np.uint16:
        raise DataError(f"{rule}, {got}: give bytes as uint8, or 16 bits of 0 to 65535 as uint16")
    progress.note(f"{where}16-bit images, {low} to {high}, are divided by 65535")
    return images.astype(np.float32) / np.float32(65535)
