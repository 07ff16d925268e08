"""An `.npz` file with images and labels as a data set."""

from pathlib import Path

import numpy as np

from dsdistill.harness.labeled import DataError, Labeled


def read(path: Path) -> Labeled:
    """Images (n, h, w) or (n, h, w, c), labels (n,), and class names under `classes` if given.

    Raises:
        DataError: If the file cannot be read, or its arrays are not what they should be.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            members = {name: file[name] for name in file.files}
    except Exception as error:  # numpy raises OSError, ValueError, BadZipFile, zlib.error, EOFError
        raise DataError(f"{path} is not a readable .npz: {error}") from error
    # What is no array is given as its bytes.
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
    return Labeled(_checked_range(path, images), labels.astype(np.int64), names)


def _class_names(path: Path, names: np.ndarray | None, k: int) -> tuple[str, ...]:
    if names is None:
        return tuple(str(label) for label in range(k))
    try:
        words = names.tolist() if names.ndim == 1 and names.dtype.kind in "US" else []
    except (ValueError, SystemError):  # NumPy keeps numbers that are no characters
        words = []
    # As file names are: bytes that are no UTF-8 stay apart.
    words = [w.decode(errors="surrogateescape") if isinstance(w, bytes) else w for w in words]
    if not words or len(set(words)) < len(words):
        raise DataError(f"{path}: classes must be a list of distinct names")
    if len(words) < k:
        raise DataError(f"{path}: label {k - 1} but only {len(words)} class names")
    return tuple(words)


def _checked_range(path: Path, images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind not in "fiub":
        raise DataError(f"{path}: images must be uint8 or floats, got {images.dtype}")
    images = images.astype(np.float32)
    if not np.isfinite(images).all():
        bad = int(np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(1))[0])
        raise DataError(f"{path}: image {bad} has NaN or infinite values")
    if images.min() < 0 or images.max() > 1:
        raise DataError(
            f"{path}: images must be uint8, or floats in [0, 1], "
            f"got {images.min():.3g} to {images.max():.3g}"
        )
    return images
