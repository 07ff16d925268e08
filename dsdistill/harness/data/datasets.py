"""Image data sets by name or path, split once into training, validation and test images.

The validation images are held out of the training set by a fixed seed, so every method,
learner and seed sees the same split and nothing is ever chosen on the test images.
"""

import hashlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dsdistill.harness import memory, paths
from dsdistill.harness.data import class_names
from dsdistill.harness.data.labeled_images import (
    TEST_FRACTION,
    DataError,
    LabeledImages,
    split_by_class,
)
from dsdistill.harness.errors import UserError, one_line, unknown_name

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
    train: LabeledImages
    validation: LabeledImages
    test: LabeledImages
    digest: str

    def digests(self) -> dict[str, str]:
        """SHA-256 of the images, labels and class names of each part, for `Run.require_same`."""
        return {
            "training images and labels": self.digest,
            "validation images and labels": digest(self.validation),
            "test images and labels": digest(self.test),
        }


def load(
    data: str,
    *,
    root: Path,
    image_size: int | None = None,
    validation_fraction: float = 0.1,
    channels: int | None = None,
    classes: Sequence[str] | None = None,
    cache: Path | None = None,
    announce: bool = True,
) -> Splits:
    """Load a data set and split it.

    Args:
        data: `digits`; a torchvision name of `TORCHVISION`; a folder of class folders, with or
            without `train/`, `val/` and `test/` inside; or an `.npz` file with `images` and
            `labels`.
        root: Where torchvision's data sets lie or are downloaded to.
        image_size: Images are resized to this height and width. None keeps an array's size and
            is refused for folders whose images differ in size.
        validation_fraction: Share of the training images held out for validation, in [0, 1); of
            no account for a folder that has `train/`, `val/` and `test/`.
        channels: 1 makes all images grayscale, 3 colour; None keeps what they are, and gives a
            folder with both colour.
        classes: The order of the class names, as a distilled set or a network has them. The data's
            own is kept where it has other classes.
        cache: Where the decoded images of folders are kept; by default `places.decoded_images`.
        announce: Whether to say which part of a folder was taken for what.

    Raises:
        DataError: With one line that says what was looked for and what was found.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation fraction must be in [0, 1), got {validation_fraction}")
    if image_size is not None and image_size < 1:
        raise UserError(f"image size must be at least 1 pixel, got {image_size}")
    if channels not in (None, 1, 3):
        raise UserError(f"channels must be 1 (grayscale) or 3 (colour), got {channels}")
    if image_size is not None:
        _require_memory(1, 3, 4, image_size)  # before the first image is resized
    path = Path(data).expanduser()
    if data not in NAMES and path.is_dir():
        return _load_folder(
            path, cache, image_size, validation_fraction, channels, classes, announce
        )
    parts = _load_train_and_test(data, path, root, image_size)
    order = class_names.match(parts[0].classes, classes) if classes else None
    train, test = (
        _convert_channels(_reorder_classes(part, order, classes), channels) for part in parts
    )
    return _split(data, train, None, test, validation_fraction, order)


def _load_folder(
    path: Path,
    cache: Path | None,
    image_size: int | None,
    validation_fraction: float,
    channels: int | None,
    classes: Sequence[str] | None,
    announce: bool,
) -> Splits:
    from dsdistill.harness.data import folders

    cache = cache or paths.decoded_images()
    parts = folders.read(path, cache, image_size, channels=channels, classes=classes)
    splits = _split(
        str(path),
        parts.train,
        parts.validation,
        parts.test,
        validation_fraction,
        parts.layout.draw_order,
    )
    counts = (len(part) for part in (splits.train, splits.validation, splits.test))
    if announce:
        parts.layout.announce(*counts)
    return splits


def _split(
    data: str,
    train: LabeledImages,
    validation: LabeledImages | None,
    test: LabeledImages,
    fraction: float,
    order: Sequence[int] | None,
) -> Splits:
    """The parts, with validation images held out where there are none of their own.

    The images are drawn in the data's own order of the classes, not in that of whoever reads them.
    """
    sha256 = digest(train)
    if validation is None:
        kept, held = split_by_class(train.labels, fraction, order)
        train, validation = train.select(kept), train.select(held)
    _require_every_class(train, data)
    return Splits(_short_name(data), train, validation, test, sha256)


def _load_train_and_test(
    data: str, path: Path, root: Path, image_size: int | None
) -> tuple[LabeledImages, LabeledImages]:
    """Training and test images of a named source, or of a file."""
    if data == "digits":
        return _split_off_test(_resize(_load_digits(), image_size))
    if data in TORCHVISION:
        train, test = _load_torchvision(data, root)
        return _resize(train, image_size), _resize(test, image_size)
    if path.suffix == ".npz" and path.is_file():
        from dsdistill.harness.data import npz

        return _split_off_test(_resize(npz.read(path), image_size))
    if path.exists():
        raise DataError(f"{data} is neither a folder of class folders nor an .npz file")
    if path.suffix or data != path.name:
        raise DataError(f"no such file or folder: {data}")
    raise unknown_name("data set", data, NAMES)


def _load_digits() -> LabeledImages:
    """scikit-learn's 1797 real 8x8 images, values 0 to 16."""
    from sklearn.datasets import load_digits

    flat, labels = load_digits(return_X_y=True)
    images = np.asarray(flat, np.float32).reshape(-1, 8, 8, 1) / 16
    return LabeledImages(images, np.asarray(labels, np.int64), tuple(str(i) for i in range(10)))


def _load_torchvision(name: str, root: Path) -> tuple[LabeledImages, LabeledImages]:
    cls, argument, parts = TORCHVISION[name]
    kind = getattr(importlib.import_module("torchvision.datasets"), cls)
    train, test = (_load_torchvision_part(kind, name, root, {argument: part}) for part in parts)
    return train, test


def _load_torchvision_part(
    kind: Callable[..., Any], name: str, root: Path, part: dict
) -> LabeledImages:
    try:
        try:
            source = kind(root, **part, download=False)
        except RuntimeError:  # not found
            source = kind(root, **part, download=True)
    except Exception as error:  # a damaged file fails in many ways, as does a download
        raise DataError(
            f"{name} is not whole under {root} and could not be downloaded "
            f"({one_line(error)}): give its folder with --data-root or DSDISTILL_DATA"
        ) from error
    images = np.asarray(source.data)
    if name == "svhn":
        images = images.transpose(0, 2, 3, 1)  # torchvision keeps this one as NCHW
    labels = np.asarray(getattr(source, "targets", getattr(source, "labels", None)), np.int64)
    classes = getattr(source, "classes", [str(i) for i in range(10)])
    return LabeledImages(images if images.ndim == 4 else images[..., None], labels, tuple(classes))


def _split_off_test(data: LabeledImages) -> tuple[LabeledImages, LabeledImages]:
    """Training and test part of a source that has no parts of its own."""
    train, test = split_by_class(data.labels, TEST_FRACTION)
    return data.select(train), data.select(test)


def _resize(data: LabeledImages, size: int | None) -> LabeledImages:
    if size is None or data.shape[:2] == (size, size):
        return data
    _require_memory(len(data), data.shape[2], data.store.itemsize, size)
    from PIL import Image

    def one(image: np.ndarray) -> np.ndarray:
        # PIL resizes float images one channel at a time.
        planes = [Image.fromarray(image[..., c]) for c in range(image.shape[-1])]
        small = [plane.resize((size, size), Image.Resampling.BILINEAR) for plane in planes]
        return np.stack([np.asarray(plane) for plane in small], -1)

    return replace(data, store=np.stack([one(image) for image in data.images()]), rows=None)


def _require_memory(count: int, channels: int, itemsize: int, size: int) -> None:
    # While the images are stacked they are there twice.
    needed = 2 * count * channels * itemsize * size**2
    what = f"{count} images" if count > 1 else "an image"
    memory.require(needed, f"{what} of {size}x{size} pixels", "use a smaller --image-size")


def _convert_channels(data: LabeledImages, channels: int | None) -> LabeledImages:
    """Grayscale images in three equal channels, or colour ones as Pillow makes them gray."""
    if channels in (None, data.shape[-1]):
        return data
    images = data.images()
    if channels == 3:
        return replace(data, store=np.repeat(images, 3, axis=-1), rows=None)
    luma = np.array([19595, 38470, 7471])  # of ITU-R 601-2, in parts of 65536
    if images.dtype == np.uint8:
        gray = ((images @ luma + 32768) >> 16).astype(np.uint8)
    else:
        gray = (images @ (luma / 65536)).astype(np.float32)
    return replace(data, store=gray[..., None], rows=None)


def _reorder_classes(
    data: LabeledImages, order: Sequence[int] | None, classes: Sequence[str] | None
) -> LabeledImages:
    """The same images with their classes in another order, if they are of just these classes.

    Args:
        data: The images.
        order: The place of each of its classes among `classes`; None if these are others.
        classes: All class names.
    """
    if order is None or classes is None:
        return data
    return replace(data, labels=np.array(order, np.int64)[data.labels], classes=tuple(classes))


def digest(data: LabeledImages) -> str:
    """SHA-256 of images, labels and class names."""
    sha = hashlib.sha256(repr((data.shape, data.classes)).encode())
    sha.update(np.ascontiguousarray(data.labels, "<i8").data)
    for images in data.chunks(1024):
        sha.update(np.ascontiguousarray(images).data)
    return sha.hexdigest()


def _require_every_class(train: LabeledImages, data: str) -> None:
    counts = np.bincount(train.labels, minlength=len(train.classes))
    if len(train.classes) < 2:
        raise DataError(f"{data} must have at least two classes, has {len(train.classes)}")
    if (counts == 0).any():
        empty = train.classes[int(counts.argmin())]
        raise DataError(f"{data}: class {empty!r} has no training image left")


def _short_name(data: str) -> str:
    return data if data in NAMES else Path(data).expanduser().resolve().stem
