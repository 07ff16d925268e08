"""Image data sets by name or path, split once into training, validation and test images.

The validation images are held out of the training set by a fixed seed, so every method,
learner and seed sees the same split and nothing is ever chosen on the test images.
"""

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dsdistill.harness.errors import UserError, unknown
from dsdistill.harness.labeled import TEST_FRACTION, DataError, Labeled, stratified

# Our name -> (class in torchvision.datasets, argument that chooses the part, its two values).
TORCHVISION = {
    "mnist": ("MNIST", "train", (True, False)),
    "fashion-mnist": ("FashionMNIST", "train", (True, False)),
    "cifar10": ("CIFAR10", "train", (True, False)),
    "cifar100": ("CIFAR100", "train", (True, False)),
    "svhn": ("SVHN", "split", ("train", "test")),
}
NAMES = ("digits", *TORCHVISION)


@dataclass(frozen=True, eq=False)
class Splits:
    """One data set in three parts; `digest` is the SHA-256 of its training images and labels."""

    name: str
    train: Labeled
    validation: Labeled
    test: Labeled
    digest: str


def load(
    data: str,
    *,
    root: Path,
    image_size: int | None = None,
    validation_fraction: float = 0.1,
) -> Splits:
    """Load a data set and split it.

    Args:
        data: `digits`; a torchvision name of `TORCHVISION`; a folder of class folders, with or
            without `train/` and `val/` inside; or an `.npz` file with `images` and `labels`.
        root: Where torchvision's data sets lie or are downloaded to, and where folders are cached.
        image_size: Images are resized to this height and width. None keeps an array's size and
            is refused for folders whose images differ in size.
        validation_fraction: Share of the training images held out for validation, in [0, 1).

    Raises:
        DataError: With one line that says what was looked for and what was found.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation fraction must be in [0, 1), got {validation_fraction}")
    if image_size is not None and image_size < 1:
        raise UserError(f"image size must be at least 1 pixel, got {image_size}")
    train, test = _read(data, root, image_size)
    sha256 = digest(train)
    rest, held = stratified(train.labels, validation_fraction)
    _require_every_class(train.select(rest), data)
    return Splits(_short_name(data), train.select(rest), train.select(held), test, sha256)


def _read(data: str, root: Path, image_size: int | None) -> tuple[Labeled, Labeled]:
    """Training and test images of a named or given source."""
    path = Path(data).expanduser()
    if data == "digits":
        return _halves(_resized(_digits(), image_size))
    if data in TORCHVISION:
        train, test = _torchvision(data, root)
        return _resized(train, image_size), _resized(test, image_size)
    if path.suffix == ".npz" and path.is_file():
        from dsdistill.harness import npz

        return _halves(_resized(npz.read(path), image_size))
    if path.is_dir():
        from dsdistill.harness import folders

        return folders.read(path, root / "folders", image_size)
    if path.exists():
        raise DataError(f"{data} is neither a folder of class folders nor an .npz file")
    if path.suffix or data != path.name:
        raise DataError(f"no such file or folder: {data}")
    raise unknown("data set", data, NAMES)


def _digits() -> Labeled:
    """scikit-learn's 1797 real 8x8 images, values 0 to 16."""
    from sklearn.datasets import load_digits

    flat, labels = load_digits(return_X_y=True)
    images = np.asarray(flat, np.float32).reshape(-1, 8, 8, 1) / 16
    return Labeled(images, np.asarray(labels, np.int64), tuple(str(i) for i in range(10)))


def _torchvision(name: str, root: Path) -> tuple[Labeled, Labeled]:
    cls, argument, parts = TORCHVISION[name]
    kind = getattr(importlib.import_module("torchvision.datasets"), cls)
    train, test = (_torchvision_part(kind, name, root, {argument: part}) for part in parts)
    return train, test


def _torchvision_part(kind: Callable[..., Any], name: str, root: Path, part: dict) -> Labeled:
    try:
        try:
            source = kind(root, **part, download=False)
        except RuntimeError:  # not found
            source = kind(root, **part, download=True)
    except Exception as error:  # a damaged file fails in many ways, as does a download
        raise DataError(
            f"{name} is not whole under {root} and could not be downloaded "
            f"({' '.join(str(error).split())}): give its folder with --data-root or DSDISTILL_DATA"
        ) from error
    images = np.asarray(source.data)
    if name == "svhn":
        images = images.transpose(0, 2, 3, 1)  # torchvision keeps this one as NCHW
    labels = np.asarray(getattr(source, "targets", getattr(source, "labels", None)), np.int64)
    classes = getattr(source, "classes", [str(i) for i in range(10)])
    return Labeled(images if images.ndim == 4 else images[..., None], labels, tuple(classes))


def _halves(data: Labeled) -> tuple[Labeled, Labeled]:
    """Training and test part of a source that has no parts of its own."""
    train, test = stratified(data.labels, TEST_FRACTION)
    return data.select(train), data.select(test)


def _resized(data: Labeled, size: int | None) -> Labeled:
    if size is None or data.shape[:2] == (size, size):
        return data
    from PIL import Image

    def one(image: np.ndarray) -> np.ndarray:
        # PIL resizes float images one channel at a time.
        planes = [Image.fromarray(image[..., c]) for c in range(image.shape[-1])]
        small = [plane.resize((size, size), Image.Resampling.BILINEAR) for plane in planes]
        return np.stack([np.asarray(plane) for plane in small], -1)

    return replace(data, store=np.stack([one(image) for image in data.images()]), rows=None)


def digest(data: Labeled) -> str:
    """SHA-256 of images, labels and class names."""
    sha = hashlib.sha256(repr((data.shape, data.classes)).encode())
    sha.update(np.ascontiguousarray(data.labels, "<i8").data)
    for images in data.chunks(1024):
        sha.update(np.ascontiguousarray(images).data)
    return sha.hexdigest()


def _require_every_class(train: Labeled, data: str) -> None:
    counts = np.bincount(train.labels, minlength=len(train.classes))
    if len(train.classes) < 2:
        raise DataError(f"{data} must have at least two classes, has {len(train.classes)}")
    if (counts == 0).any():
        empty = train.classes[int(counts.argmin())]
        raise DataError(f"{data}: class {empty!r} has no training image left")


def _short_name(data: str) -> str:
    return data if data in NAMES else Path(data).expanduser().resolve().stem
