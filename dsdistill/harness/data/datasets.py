"""Image data sets by name or path, split once into training, validation and test images.

Validation images are held out of the training set with a fixed seed, so every method, learner and
seed sees the same split and nothing is ever chosen on the test images.
"""

import hashlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dsdistill.harness import memory, paths
from dsdistill.harness.data import class_names, feature_file
from dsdistill.harness.data.labeled_images import (
    TEST_FRACTION,
    DataError,
    LabeledImages,
    split_by_class,
    strata,
)
from dsdistill.harness.data.layout import FolderLayout
from dsdistill.harness.data.mel_images import MelFormat, MelOptions
from dsdistill.harness.errors import UserError, one_line, unknown_name
from dsdistill.harness.runs import progress
from dsdistill.harness.text import quote

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
    """One data set in three parts.

    Attributes:
        name: Short name of the data set.
        train, validation, test: Images and labels of each part.
        digest: SHA-256 of the training images and labels before any are held out.
        brings_validation: Whether the validation images are a part of the data set's own, and none
            are held out of the training images.
        mel: Format of the images of recordings; None for other data.
        layout: Files of a folder by part; None for other data.
    """

    name: str
    train: LabeledImages
    validation: LabeledImages
    test: LabeledImages
    digest: str
    brings_validation: bool = False
    mel: MelFormat | None = None
    layout: FolderLayout | None = None

    def digests(self) -> dict[str, str]:
        """SHA-256 of the images, labels and class names of each part, for `Run.require_same`."""
        return {
            "training images and labels": self.digest,
            "validation images and labels": digest(self.validation),
            "test images and labels": digest(self.test),
        }


def absolute_name(data: str) -> str:
    """The name of a data set as it is, and the path of a folder or file as an absolute one.

    Args:
        data: As in `load`.
    """
    return data if data in NAMES else paths.absolute(data)


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
    sound: MelOptions | None = None,
    several_labels: bool = False,
) -> Splits:
    """Load a data set and split it.

    Args:
        data: `digits`; a torchvision name of `TORCHVISION`; a folder of class folders of images or
            of recordings, with or without `train/`, `val/` and `test/` inside; an `.npz` file with
            `images` and `labels`; or one of features that `kd features` wrote.
        root: Folder of torchvision's data sets, which are downloaded there if missing.
        image_size: Height and width that images are resized to, in pixels. None keeps the size of
            arrays, and is refused for folders whose images differ in size.
        validation_fraction: Share of the training images held out for validation, in [0, 1);
            ignored for data that have three parts.
        channels: 1 converts all images to grayscale, 3 to colour; None keeps them, but gives a
            folder that has both three channels.
        classes: Order of the class names, as in a distilled set or a network; ignored if the data
            have other classes.
        cache: Folder for the decoded images of folders; by default `paths.decoded_images`.
        announce: Whether to print which folder serves as which part.
        sound: What is asked of the images of recordings; None where nothing is.
        several_labels: Whether a folder may have a table that gives an image any number of labels.

    Raises:
        DataError: If the data are missing, unreadable or unfit; one line with expected and got.
        UserError: If an option is out of range.
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
        of_folder = path, cache or paths.decoded_images(), image_size, validation_fraction
        if several_labels and sound is None:
            found = _load_several_labels(*of_folder, channels, classes, announce)
            if found is not None:
                return found
        return _load_folder(*of_folder, channels, classes, announce, sound)
    if sound is not None:
        raise UserError(
            f"--seconds, --mel-bands and --sample-rate are for a folder of recordings, and {data} "
            "is none: leave them out"
        )
    if path.suffix == ".npz" and path.is_file() and feature_file.is_feature_file(path):
        return _load_features(data, path, image_size, validation_fraction, channels, classes)
    parts = _load_train_and_test(data, path, root, image_size)
    order = class_names.match(parts[0].classes, classes) if classes else None
    train, test = (
        _convert_channels(_reorder_classes(part, order, classes), channels) for part in parts
    )
    return split(data, train, None, test, validation_fraction, order)


def load_unlabelled(
    data: str, *, root: Path, image_size: int | None = None, channels: int | None = None
) -> LabeledImages:
    """Load the images of a named data set or a file that serve without their labels.

    All images of data without parts of their own, which `load` would split, and the training images
    of others.

    Args:
        data: A name or a file, as in `load`; an `.npz` file may have no `labels`.
        root, image_size, channels: As in `load`.

    Returns:
        The images; what labels they have means nothing.

    Raises:
        DataError, UserError: As `load`.
    """
    path = Path(data).expanduser()
    if feature_file.is_feature_file(path) or not _has_no_parts(data, path):
        options = {"image_size": image_size, "validation_fraction": 0.0, "channels": channels}
        return load(data, root=root, **options).train
    whole = _resize(_load_undivided(data, path, labelled=False), image_size)
    return _convert_channels(whole, channels)


def _load_several_labels(
    path: Path,
    cache: Path,
    image_size: int | None,
    validation_fraction: float,
    channels: int | None,
    classes: Sequence[str] | None,
    announce: bool,
) -> Splits | None:
    """Load a folder whose table gives an image any number of labels; None for any other one."""
    from dsdistill.harness.data import multi_label

    parts = multi_label.list_folder(path, classes)
    if parts is None:
        return None
    train, validation, test = multi_label.read(parts, cache, image_size, channels)
    splits = split(str(path), train, validation, test, validation_fraction)
    if announce:
        counts = (len(part) for part in (splits.train, splits.validation, splits.test))
        progress.note(parts.summary(*counts))
    return splits


def _load_folder(
    path: Path,
    cache: Path,
    image_size: int | None,
    validation_fraction: float,
    channels: int | None,
    classes: Sequence[str] | None,
    announce: bool,
    sound: MelOptions | None,
) -> Splits:
    from dsdistill.harness.data import folders

    parts = folders.read(path, cache, image_size, channels=channels, classes=classes, sound=sound)
    splits = split(
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
        if parts.conversion:
            progress.note(f"{path}: {parts.conversion}")
    return replace(splits, mel=parts.mel, layout=parts.layout)


def _load_features(
    data: str,
    path: Path,
    image_size: int | None,
    validation_fraction: float,
    channels: int | None,
    classes: Sequence[str] | None,
) -> Splits:
    """Load the parts of a file of features; further views join the images to train on."""
    if image_size is not None or channels is not None:
        raise UserError(
            f"{path} holds features, which have no size and no colour: leave --image-size and "
            "--channels out"
        )
    features = feature_file.read(path)
    order = class_names.match(features.images.classes, classes) if classes else None
    features = replace(features, images=_reorder_classes(features.images, order, classes))
    train, test = features.part("train"), features.part("test")
    if train is None or test is None:
        raise DataError(f"{path} must hold features of training and of test images")
    drawn = [order[label] if order else label for label in features.draw_order]
    splits = split(data, train, features.part("validation"), test, validation_fraction, drawn)
    sha256 = digest(features.with_views(train))
    return replace(splits, train=features.with_views(splits.train), digest=sha256)


def split(
    data: str,
    train: LabeledImages,
    validation: LabeledImages | None,
    test: LabeledImages,
    fraction: float,
    order: Sequence[int] | None = None,
) -> Splits:
    """Assemble the parts, holding validation images out of the training part if there are none.

    Args:
        data: Name or path of the data.
        train, test: Images of these parts; those of the test may be none.
        validation: The data's own validation images, if any.
        fraction: Share of the training images to hold out otherwise.
        order: Class indices in the data's own order, in which images are drawn, whatever order of
            classes the caller asked for.

    Raises:
        DataError: If fewer than two classes have training images, or one has none left.
    """
    sha256, brings_validation = digest(train), validation is not None
    if validation is None:
        rest, held_out = split_by_class(strata(train.labels), fraction, order)
        train, validation = train.select(rest), train.select(held_out)
    _require_every_class(train, data)
    return Splits(_short_name(data), train, validation, test, sha256, brings_validation)


def _load_train_and_test(
    data: str, path: Path, root: Path, image_size: int | None
) -> tuple[LabeledImages, LabeledImages]:
    """Load the training and test images of a named data set or a file."""
    if _has_no_parts(data, path):
        return _split_off_test(_resize(_load_undivided(data, path), image_size))
    if data in TORCHVISION:
        train, test = _load_torchvision(data, root)
        return _resize(train, image_size), _resize(test, image_size)
    if path.exists():
        raise DataError(f"{data} is neither a folder of class folders nor an .npz file")
    if path.suffix or data != path.name:
        raise DataError(f"no such file or folder: {data}")
    raise unknown_name("data set", data, NAMES)


def _has_no_parts(data: str, path: Path) -> bool:
    """Whether a data set is neither divided into parts nor missing."""
    return data == "digits" or (path.suffix == ".npz" and path.is_file())


def _load_undivided(data: str, path: Path, *, labelled: bool = True) -> LabeledImages:
    """Load all images of a data set for which `_has_no_parts` holds."""
    if data == "digits":
        return _load_digits()
    from dsdistill.harness.data import npz

    return npz.read(path, labelled=labelled)


def _load_digits() -> LabeledImages:
    """Load scikit-learn's 1797 real 8x8 images, with values 0 to 16 scaled to [0, 1].

    The file is read as scikit-learn reads it, but without importing `sklearn.datasets`, which takes
    four seconds of computing with SciPy and pandas: a third of a short run.
    """
    file = metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = np.loadtxt(str(file), delimiter=",")  # 64 pixels and the label
    images = rows[:, :-1].astype(np.float32).reshape(-1, 8, 8, 1) / 16
    return LabeledImages(images, rows[:, -1].astype(np.int64), tuple(str(i) for i in range(10)))


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
            f"{name} is missing or incomplete under {root} and could not be downloaded "
            f"({one_line(error)}): give its folder with --data-root or DSDISTILL_DATA"
        ) from error
    images = np.asarray(source.data)
    if name == "svhn":
        images = images.transpose(0, 2, 3, 1)  # torchvision stores SVHN as NCHW
    labels = np.asarray(getattr(source, "targets", getattr(source, "labels", None)), np.int64)
    classes = getattr(source, "classes", [str(i) for i in range(10)])
    return LabeledImages(images if images.ndim == 4 else images[..., None], labels, tuple(classes))


def _split_off_test(data: LabeledImages) -> tuple[LabeledImages, LabeledImages]:
    """Split a data set without parts of its own into training and test images."""
    train, test = split_by_class(data.labels, TEST_FRACTION)
    return data.select(train), data.select(test)


def _resize(data: LabeledImages, size: int | None) -> LabeledImages:
    if size is None or data.shape[:2] == (size, size):
        return data
    _require_memory(len(data), data.shape[2], data.store.itemsize, size)
    from PIL import Image

    def resize(image: np.ndarray) -> np.ndarray:
        # PIL resizes float images one channel at a time.
        planes = [Image.fromarray(image[..., c]) for c in range(image.shape[-1])]
        resized = [plane.resize((size, size), Image.Resampling.BILINEAR) for plane in planes]
        return np.stack([np.asarray(plane) for plane in resized], -1)

    return replace(data, store=np.stack([resize(image) for image in data.images()]), rows=None)


def _require_memory(count: int, channels: int, itemsize: int, size: int) -> None:
    # During stacking each image is in memory twice.
    needed = 2 * count * channels * itemsize * size**2
    images = f"{count} images" if count > 1 else "an image"
    memory.require(needed, f"{images} of {size}x{size} pixels", "use a smaller --image-size")


def _convert_channels(data: LabeledImages, channels: int | None) -> LabeledImages:
    """Repeat grayscale images in three channels, or convert colour to gray as Pillow does."""
    if channels in (None, data.shape[-1]):
        return data
    images = data.images()
    if channels == 3:
        return replace(data, store=np.repeat(images, 3, axis=-1), rows=None)
    luma = np.array([19595, 38470, 7471])  # ITU-R 601-2, in units of 1 / 65536
    if images.dtype == np.uint8:
        gray = ((images @ luma + 32768) >> 16).astype(np.uint8)
    else:
        gray = (images @ (luma / 65536)).astype(np.float32)
    return replace(data, store=gray[..., None], rows=None)


def _reorder_classes(
    data: LabeledImages, order: Sequence[int] | None, classes: Sequence[str] | None
) -> LabeledImages:
    """Renumber the classes of labelled images, if they have exactly these classes.

    Args:
        data: The images.
        order: Position of each of their classes in `classes`; None if the classes differ.
        classes: All class names, in the new order.
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
    if len(train.classes) < 2:
        raise DataError(f"{data} must have at least two classes, has {len(train.classes)}")
    if train.has_several_labels:
        return  # what a model knows and no image here has is never answered, which is right
    counts = np.bincount(train.labels, minlength=len(train.classes))
    if (counts == 0).any():
        empty = train.classes[int(counts.argmin())]
        raise DataError(f"{data}: class {quote(empty)} has no training image left")


def _short_name(data: str) -> str:
    return data if data in NAMES else Path(data).expanduser().resolve().stem
