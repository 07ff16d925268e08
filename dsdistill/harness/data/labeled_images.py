"""Labelled images, possibly on disk; random draws from them; and training examples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int, Num

from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError
from dsdistill.harness.text import abbreviate_names, quote

IMAGES_PER_BATCH = 2000  # images that are preprocessed and predicted at a time
SPLIT_SEED = 0  # fixed: a split that depended on --seed would leak validation images between runs
TEST_FRACTION = 0.2  # of a data set without a test part, including digits


class DataError(UserError):
    """A data set that is missing, unreadable or unfit for what was asked."""


@dataclass(frozen=True, eq=False)
class LabeledImages:
    """Images with integer labels, possibly a view of rows of a larger array or memory map.

    Attributes:
        store: Pixels, uint8, or float32 in [0, 1]; N >= n.
        labels: Class index of each image; of data with several labels an image, for each class
            whether the image has it (n, k), 0 or 1.
        classes: Class names, in the order of the indices.
        rows: Position of each image in `store`; None if the two are aligned.
    """

    store: Num[np.ndarray, "N h w c"]
    labels: Int[np.ndarray, " n"] | Int[np.ndarray, "n k"]
    classes: tuple[str, ...]
    rows: Int[np.ndarray, " n"] | None = None

    @property
    def has_several_labels(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.labels.ndim == 2

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        h, w, c = self.store.shape[1:]
        return h, w, c

    def images(self, indices: Int[np.ndarray, " m"] | slice = slice(None)) -> np.ndarray:
        """The images at `indices`, read from disk if the store is a memory map."""
        rows = indices if self.rows is None else self.rows[indices]
        return np.asarray(self.store[rows])

    def select(self, indices: Int[np.ndarray, " m"]) -> "LabeledImages":
        """View of some of the images, in the given order; no pixel is copied."""
        rows = indices if self.rows is None else self.rows[indices]
        return replace(self, labels=self.labels[indices], rows=rows)

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """All images in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.images(slice(start, start + size))


def iterate_chunks(parts: Sequence[LabeledImages], size: int) -> Iterator[np.ndarray]:
    """All images of several parts in order, in chunks of `size` that may span two parts."""
    rest = parts[0].images(slice(0, 0))
    for part in parts:
        for images in part.chunks(size):
            rest = np.concatenate([rest, images]) if len(rest) else images
            while len(rest) >= size:
                yield rest[:size]
                rest = rest[size:]
    if len(rest):
        yield rest


@dataclass(frozen=True, eq=False)
class Examples:
    """Training examples of a learner: images as its model sees them, with real-valued labels.

    Attributes:
        data: The images; for a distilled set, already preprocessed, with arg-max labels.
        preprocess: Map from images in [0, 1] to the space in which a model sees them.
        targets: float32 labels, or None for one-hot labels minus 1/k.
        is_preprocessed: Whether `data` is already in that space (a distilled set).
    """

    data: LabeledImages
    preprocess: Preprocess
    targets: Float[np.ndarray, "n k"] | None = None
    is_preprocessed: bool = False

    def __len__(self) -> int:
        return len(self.data)

    def images(self, indices: Int[np.ndarray, " m"] | slice = slice(None)) -> np.ndarray:
        """Preprocessed float32 images at `indices`."""
        raw = self.data.images(indices)
        return raw if self.is_preprocessed else self.preprocess.apply(raw)

    def labels(self, indices: Int[np.ndarray, " m"] | slice = slice(None)) -> np.ndarray:
        """(m, k) float32 labels at `indices`: the stored ones, or one-hot minus 1/k."""
        if self.targets is not None:
            return self.targets[indices]
        return centred_one_hot(self.data.labels[indices], len(self.data.classes))

    def batches(self) -> list[slice]:
        """Slices that cover all images, `IMAGES_PER_BATCH` each, to preprocess and predict."""
        starts = range(0, len(self), IMAGES_PER_BATCH)
        return [slice(start, min(start + IMAGES_PER_BATCH, len(self))) for start in starts]


def split_by_class(
    labels: Int[np.ndarray, " n"], fraction: float, order: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out the same share of every class.

    Args:
        labels: Class index of each image.
        fraction: Share of every class that is held out.
        order: Class indices in the order in which images are drawn, which decides which images
            are held out; by default ascending.

    Returns:
        Sorted indices of the remaining images, and of those held out.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    parts = [np.empty(0, np.int64)]
    present = np.unique(labels).tolist()
    for label in present if order is None else [label for label in order if label in present]:
        members = rng.permutation(np.flatnonzero(labels == label))
        parts.append(members[: round(fraction * len(members))])
    held_out = np.sort(np.concatenate(parts))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def strata(labels: Int[np.ndarray, " n"] | Int[np.ndarray, "n k"]) -> Int[np.ndarray, " n"]:
    """The class by which an image is held out or drawn evenly with others.

    Of several labels it is the rarest, so that rare ones are in every part; images without any
    label are a class of their own, the last one.
    """
    if labels.ndim == 1:
        return labels
    counts = labels.sum(0)
    order = np.argsort(counts, kind="stable")
    rarest = order[labels[:, order].argmax(1)]
    return np.where(labels.any(1), rarest, labels.shape[1])


def draw_balanced(
    labels: Int[np.ndarray, " n"], count: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw up to `count` random images, equally many per class; their indices in class order.

    Args:
        labels: Class index of each image.
        count: Total number of images; divided evenly among the classes, the remainder dropped. A
            class with fewer images contributes all of them.
        rng: Generator of the draws, which are without replacement.
    """
    classes = np.unique(labels)
    per_class = max(count // len(classes), 1)
    members = (np.flatnonzero(labels == label) for label in classes)
    return np.concatenate([rng.permutation(m)[:per_class] for m in members])


def spread(
    labels: Int[np.ndarray, " n"] | Int[np.ndarray, "n k"], count: int
) -> Int[np.ndarray, " m"]:
    """Sorted indices of up to `count` images of as many classes as possible, always the same."""
    labels = strata(labels)
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(len(labels))
    # Rank each image within its class: first one image of every class, then a second.
    ordered = labels[shuffled]
    by_class = np.argsort(ordered, kind="stable")
    starts = np.searchsorted(ordered[by_class], ordered[by_class])
    rank = np.empty(len(labels), np.int64)
    rank[by_class] = np.arange(len(labels)) - starts
    return np.sort(shuffled[np.argsort(rank, kind="stable")[:count]])


def draw_per_class(
    data: LabeledImages, images_per_class: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw exactly `images_per_class` random images of every class; their indices in class order.

    Raises:
        DataError: If a class has fewer images.
    """
    check_images_per_class(data, images_per_class)
    return draw_balanced(data.labels, images_per_class * len(data.classes), rng)


def check_images_per_class(data: LabeledImages, images_per_class: int) -> None:
    """Refuse more images per class than the data have.

    Raises:
        UserError: If fewer than one image per class is asked for.
        DataError: If a class has fewer images than asked for.
    """
    if images_per_class < 1:
        raise UserError(f"images per class must be at least 1, got {images_per_class}")
    counts = np.bincount(data.labels, minlength=len(data.classes))
    scarce = int(counts.argmin())
    if counts[scarce] < images_per_class:
        raise DataError(
            f"class {quote(data.classes[scarce])} has {counts[scarce]} training images, fewer than "
            f"the {images_per_class} asked for: lower --images-per-class"
        )


def describe_missing_classes(
    part: str, labels: Int[np.ndarray, " n"] | Int[np.ndarray, "n k"], classes: Sequence[str]
) -> str | None:
    """A line that names classes without images in a part; None where there are none, or no images.

    Args:
        part: `test` or `validation`.
        labels: Labels of the images of the part, as in `LabeledImages`.
        classes: Names, in the order of the indices.
    """
    present = labels if labels.ndim == 1 else np.flatnonzero(labels.any(0))
    missing = sorted(set(range(len(classes))) - set(present.tolist()))
    if not len(labels) or not missing:
        return None
    names = abbreviate_names([classes[label] for label in missing])
    return (
        f"{len(missing)} of {len(classes)} classes have no {part} images ({names}): "
        f"the {part} accuracy says nothing of them"
    )


def centred_one_hot(labels: Int[np.ndarray, " n"], k: int) -> Float[np.ndarray, "n k"]:
    """One-hot labels minus 1/k, the encoding of KIP and Label Solve; every row sums to 0."""
    return (np.eye(k, dtype=np.float32) - np.float32(1 / k))[labels]
