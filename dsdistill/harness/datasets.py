"""Image data sets by name or path, split once into training, validation and test images.

The validation images are held out of the training set by a fixed seed, so every method,
learner and seed sees the same split and nothing is ever chosen on the test images.
"""

import hashlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num

from dsdistill.harness.errors import UserError, unknown
from dsdistill.harness.preprocess import Preprocess

# Our name -> (class in torchvision.datasets, argument that chooses the part, its two values).
TORCHVISION = {
    "mnist": ("MNIST", "train", (True, False)),
    "fashion-mnist": ("FashionMNIST", "train", (True, False)),
    "cifar10": ("CIFAR10", "train", (True, False)),
    "cifar100": ("CIFAR100", "train", (True, False)),
    "svhn": ("SVHN", "split", ("train", "test")),
}
NAMES = ("digits", *TORCHVISION)
SPLIT_SEED = 0  # fixed: a split that followed --seed would leak validation images between runs
TEST_FRACTION = 0.2  # of a source that has no test part of its own; of digits too


class DataError(UserError):
    """A data set that is missing, unreadable or unfit for what was asked."""


@dataclass(frozen=True, eq=False)
class Labeled:
    """Images with integer labels, possibly a view of rows of a larger array or memory map.

    Attributes:
        store: (N, h, w, c) uint8, or float32 in [0, 1]; N >= n.
        labels: One class index an image.
        classes: Names, in the order of the indices.
        rows: Position of each image in `store`; None when the two are aligned.
    """

    store: Num[np.ndarray, "N h w c"]
    labels: Int[np.ndarray, " n"]
    classes: tuple[str, ...]
    rows: Int[np.ndarray, " n"] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        h, w, c = self.store.shape[1:]
        return h, w, c

    def images(self, indices: Int[np.ndarray, " m"] | slice = slice(None)) -> np.ndarray:
        """The images at `indices`, read from disk now if the store is a memory map."""
        rows = indices if self.rows is None else self.rows[indices]
        return np.asarray(self.store[rows])

    def select(self, indices: Int[np.ndarray, " m"]) -> "Labeled":
        """A view of some of the images, in the order given; no pixel is copied."""
        rows = indices if self.rows is None else self.rows[indices]
        return replace(self, labels=self.labels[indices], rows=rows)

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """All images in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.images(slice(start, start + size))


@dataclass(frozen=True, eq=False)
class Examples:
    """What a learner trains on: images as its model sees them, with real-valued labels.

    Attributes:
        data: The images; for a distilled set, already preprocessed, with arg-max labels.
        targets: (n, k) float32, or None for one-hot labels minus 1/k.
        preprocess: The space in which a model sees the images.
        ready: True if `data` is already in that space (a distilled set).
    """

    data: Labeled
    preprocess: Preprocess
    targets: Float[np.ndarray, "n k"] | None = None
    ready: bool = False

    def __len__(self) -> int:
        return len(self.data)

    def images(self, indices: Int[np.ndarray, " m"] | slice = slice(None)) -> np.ndarray:
        """Preprocessed float32 images at `indices`."""
        raw = self.data.images(indices)
        return raw if self.ready else self.preprocess.apply(raw)

    def labels(self, indices: Int[np.ndarray, " m"] | slice = slice(None)) -> np.ndarray:
        """(m, k) float32 labels at `indices`: the stored ones, or one-hot minus 1/k."""
        if self.targets is not None:
            return self.targets[indices]
        return centred_one_hot(self.data.labels[indices], len(self.data.classes))


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
    digest = _digest(train)
    rest, held = stratified(train.labels, validation_fraction)
    _require_every_class(train.select(rest), data)
    return Splits(_short_name(data), train.select(rest), train.select(held), test, digest)


def stratified(labels: Int[np.ndarray, " n"], fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of the images kept and of those held out, the same share of every class."""
    rng = np.random.default_rng(SPLIT_SEED)
    held = [np.empty(0, np.int64)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held.append(members[: round(fraction * len(members))])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), out), out


def balanced(labels: Int[np.ndarray, " n"], count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of up to `count` random images, as many of each class as there are, in class order.

    Args:
        count: Images wanted in all; divided evenly, the remainder dropped. A class that has
            fewer gives all it has.
        rng: Draws without replacement.
    """
    classes = np.unique(labels)
    share = max(count // len(classes), 1)
    members = (np.flatnonzero(labels == label) for label in classes)
    return np.concatenate([rng.permutation(m)[:share] for m in members])


def per_class(data: Labeled, images_per_class: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of exactly `images_per_class` random images of every class, in class order.

    Raises:
        DataError: If a class has fewer.
    """
    check_per_class(data, images_per_class)
    return balanced(data.labels, images_per_class * len(data.classes), rng)


def check_per_class(data: Labeled, images_per_class: int) -> None:
    """Refuse a number of images a class that is not there."""
    if images_per_class < 1:
        raise UserError(f"images per class must be at least 1, got {images_per_class}")
    counts = np.bincount(data.labels, minlength=len(data.classes))
    scarce = int(counts.argmin())
    if counts[scarce] < images_per_class:
        raise DataError(
            f"class {data.classes[scarce]!r} has {counts[scarce]} training images, fewer than "
            f"the {images_per_class} asked for: lower --images-per-class"
        )


def centred_one_hot(labels: Int[np.ndarray, " n"], k: int) -> Float[np.ndarray, "n k"]:
    """One-hot labels minus 1/k: every row sums to 0. The encoding of KIP and Label Solve."""
    return (np.eye(k, dtype=np.float32) - np.float32(1 / k))[labels]


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
    images = (flat.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    return Labeled(images, labels.astype(np.int64), tuple(str(i) for i in range(10)))


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


def _digest(data: Labeled) -> str:
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
