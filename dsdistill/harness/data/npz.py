"""Data set in an `.npz` file of images and labels."""

from pathlib import Path

import numpy as np

from dsdistill.harness.data.labeled_images import DataError, LabeledImages
from dsdistill.harness.runs import progress


def read(path: Path) -> LabeledImages:
    """Read `images` (n, h, w) or (n, h, w, c), `labels` (n,), and class names in `classes`, if any.

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
    if not {"images", "labels"} <= arrays.keys():
        raise DataError(f"{path} must hold arrays 'images' and 'labels', has {sorted(arrays)}")
    images, labels = arrays["images"], arrays["labels"]
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise DataError(
            f"{path}: images must be (n, h, w) or (n, h, w, 1 or 3), got {images.shape}"
        )
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
    return LabeledImages(_check_range(path, images), labels.astype(np.int64), names)


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


def _check_range(path: Path, images: np.ndarray) -> np.ndarray:
    """Convert images to uint8, or to float32 in [0, 1]; refuse images of unknown range.

    Integers that are all 0 or 1 count as bilevel images, as booleans do.
    """
    if images.dtype == np.uint8:
        return images
    rule = f"{path}: images must be uint8, uint16, bool, or floats in [0, 1]"
    if images.dtype.kind not in "fiub":
        raise DataError(f"{rule}, got {images.dtype}")
    if not np.isfinite(images).all():
        bad = int(np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(1))[0])
        raise DataError(f"{path}: image {bad} has NaN or infinite values")
    low, high = images.min().item(), images.max().item()
    if low >= 0 and high <= 1:
        return images.astype(np.float32)
    got = f"got {images.dtype} from {low:.9g} to {high:.9g}"
    if images.dtype.kind == "f":
        raise DataError(f"{rule}, {got}: rescale them so that 0 is black and 1 is white")
    # Bytes are often stored in wider integers.
    if low >= 0 and high <= 255:
        raise DataError(f"{rule}, {got}: if they are bytes, save images.astype(numpy.uint8)")
    if images.dtype != np.uint16:
        raise DataError(f"{rule}, {got}: save bytes as uint8, or 16 bits of 0 to 65535 as uint16")
    progress.note(f"{path}: 16-bit images, {low} to {high}, are divided by 65535")
    return images.astype(np.float32) / np.float32(65535)
