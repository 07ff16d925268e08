"""Data set in an `.npz` file of images and labels."""

from pathlib import Path

import numpy as np

from dsdistill.harness.data.arrays import check_images
from dsdistill.harness.data.labeled_images import DataError, LabeledImages


def read(path: Path, *, labelled: bool = True) -> LabeledImages:
    """Read `images` (n, h, w) or (n, h, w, c), `labels` (n,), and class names in `classes`, if any.

    Args:
        path: The file.
        labelled: Whether there must be labels; otherwise all images are of one class.

    Raises:
        DataError: If the file cannot be read, or an array has the wrong shape, type or range.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            members = {name: file[name] for name in file.files}
    except Exception as error:  # numpy raises OSError, ValueError, BadZipFile, zlib.error, EOFError
        raise DataError(f"{path} is not a readable .npz: {error}") from error
    # NumPy returns the bytes of a member that is not an array.
    arrays = {name: a for name, a in members.items() if isinstance(a, np.ndarray)}
    if labelled and not {"images", "labels"} <= arrays.keys():
        raise DataError(f"{path} must hold arrays 'images' and 'labels', has {sorted(arrays)}")
    if "images" not in arrays:
        raise DataError(f"{path} must hold an array 'images', has {sorted(arrays)}")
    images = check_images(arrays["images"], f"{path}: ")
    if not labelled:
        return LabeledImages(images, np.zeros(len(images), np.int64), ("0",))
    labels = arrays["labels"]
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: labels must be {len(images)} integers, got {labels.dtype} {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= len(images):
        raise DataError(
            f"{path}: labels must count the classes from 0 on, got {labels.min()} to "
            f"{labels.max()} for {len(images)} images"
        )
    names = _class_names(path, arrays.get("classes"), int(labels.max()) + 1)
    return LabeledImages(images, labels.astype(np.int64), names)


def _class_names(path: Path, names: np.ndarray | None, k: int) -> tuple[str, ...]:
    if names is None:
        return tuple(str(label) for label in range(k))
    try:
        words = names.tolist() if names.ndim == 1 and names.dtype.kind in "US" else []
    except (ValueError, SystemError):  # NumPy keeps numbers that are no characters
        words = []
    # As for file names: bytes that are not UTF-8 stay distinct.
    words = [w.decode(errors="surrogateescape") if isinstance(w, bytes) else w for w in words]
    if not words or len(set(words)) < len(words):
        raise DataError(f"{path}: classes must be a list of distinct names")
    if len(words) < k:
        raise DataError(f"{path}: label {k - 1} but only {len(words)} class names")
    return tuple(words)
