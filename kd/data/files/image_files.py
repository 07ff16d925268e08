"""List image files and their classes, and read their pixels by row on demand.

A folder has the classes, the order, the split and the pixels of `dsdistill.harness.data.datasets`:
the same images validate a training whether its data are streamed or decoded once into a cache.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from jaxtyping import Int
from PIL import Image

from dsdistill.harness.data import image_files
from dsdistill.harness.data.labeled_images import TEST_FRACTION, DataError, split_by_class
from dsdistill.harness.data.layout import FolderLayout, list_folder
from dsdistill.harness.text import quote

MAX_PROBED_HEADERS = 2000  # files of a folder whose headers are read to learn of grayscale ones


class UnreadableImage(DataError):
    """An image that cannot be read; its cause says why."""


class ImageReader(Protocol):
    """timm's protocol of a reader of images in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[BinaryIO, int]:
        """An open image file, and its label."""
        ...

    def filename(self, index: int, /, *, absolute: bool) -> str:
        """Path of the file, for messages."""
        ...


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Some of the images of a reader.

    Attributes:
        reader: Reader of all images.
        classes: Class names, in label order.
        stamp: Function that returns a text which changes with the images of the reader.
        rows: Positions in the reader.
        labels: One class index per row, if they are known without reading the images: those of the
            reader, or of groups of its classes.
        draw_order: As in `labeled_images.split_by_class`.
    """

    reader: ImageReader
    classes: tuple[str, ...]
    stamp: Callable[[], str]
    rows: Int[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"] | None
    draw_order: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def digest(self) -> str:
        """SHA-256 of the names, sizes and times of the image files, not of their contents."""
        sha = hashlib.sha256(repr((self.stamp(), self.classes)).encode())
        sha.update(np.ascontiguousarray(self.rows, "<i8").data)
        return sha.hexdigest()

    def select(self, indices: Int[np.ndarray, " m"]) -> "ImageFiles":
        """Select images, in the order of the indices."""
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, rows=self.rows[indices], labels=labels)

    def hold_out(self, fraction: float) -> tuple["ImageFiles", "ImageFiles"]:
        """Split into images kept and images held out, with the same share of every class.

        Raises:
            DataError: If the labels are not known, or a class would have no image left.
        """
        if self.labels is None:
            raise DataError("images whose labels are not known beforehand cannot be held out")
        kept, held = split_by_class(self.labels, fraction, self.draw_order)
        left = np.bincount(self.labels[kept], minlength=len(self.classes))
        if (left == 0).any():
            empty = self.classes[int(left.argmin())]
            raise DataError(f"class {quote(empty)} has no training image left")
        return self.select(kept), self.select(held)

    def read(self, row: int, channels: int) -> tuple[Image.Image, int]:
        """Read one image, upright and with transparent pixels on white, and its label.

        Args:
            row: Row of the image, in `rows`.
            channels: 3 for colour, 1 for grayscale.

        Raises:
            UnreadableImage: If it cannot be read.
        """
        position = int(self.rows[row])
        try:
            file, label = self.reader[position]
            with file:
                image = image_files.read(file, channels)
            return image, int(label if self.labels is None else self.labels[row])
        except Exception as error:  # a damaged file has many ways to fail
            name = self.reader.filename(position, absolute=True) or f"number {position}"
            raise UnreadableImage(
                f"image {name} cannot be read ({image_files.describe_error(error)}): repair it, "
                "or remove it"
            ) from error

    def name(self, row: int) -> str:
        """Path of an image below the folder, or its number where it has none."""
        position = int(self.rows[row])
        return self.reader.filename(position, absolute=False) or f"number {position}"


@dataclass(frozen=True, eq=False)
class FileSplits:
    """The images of a folder.

    Attributes:
        train: Images to train on.
        validation: The folder's own validation images, or images held out of the training images;
            may be empty.
        test: Images to be evaluated once, at the end.
        brings_validation: Whether `validation` is the folder's own.
    """

    train: ImageFiles
    validation: ImageFiles
    test: ImageFiles
    brings_validation: bool = False


def open_folder(
    path: Path,
    validation_fraction: float,
    classes: Sequence[str] | None = None,
    *,
    announce: bool = True,
) -> FileSplits:
    """List the images of a folder, without reading them.

    Args:
        path: Folder as in `dsdistill.harness.data.folders.read`, which splits it in the same way.
        validation_fraction: Share of every class of the training images, in [0, 1); ignored where
            the folder has validation images beside test images.
        classes: Order of the classes, as in `dsdistill.harness.data.layout.list_folder`.
        announce: Whether to say which folders were taken for which part.

    Raises:
        DataError: If the folders do not make a data set.
    """
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation fraction must be in [0, 1), got {validation_fraction}")
    layout = list_folder(path, classes)
    if layout.holds_recordings:
        raise DataError(
            f"{path} holds recordings, of which no crops are cut and no features written: train on "
            "them with kd train, without --augment imagenet"
        )
    images, rows = _list_images(layout), np.arange(len(layout.files))
    first, second = layout.ends
    if layout.test:
        train, test = images.select(rows[:first]), images.select(rows[second:])
    else:
        train, test = images.hold_out(TEST_FRACTION)
    if layout.validation:
        validation = images.select(rows[first:second])
    else:
        train, validation = train.hold_out(validation_fraction)
    if announce:
        layout.announce(len(train), len(validation), len(test))
    return FileSplits(train, validation, test, layout.validation is not None)


def describe_gray(path: Path, images: ImageFiles) -> str | None:
    """A line on the files of one channel, which are read as colour; None where none is seen.

    Headers alone are read, and of a large folder those of `MAX_PROBED_HEADERS` files.

    Args:
        path: The folder, as the user wrote it.
        images: Some of its images; all that their reader has are looked at.
    """
    count = len(images.reader)
    rows = range(0, count, -(-count // MAX_PROBED_HEADERS) or 1)
    files = (Path(images.reader.filename(row, absolute=True)) for row in rows)
    gray = sum(image_files.is_gray(file) is True for file in files)
    if not gray:
        return None
    which = f"{gray:,} of {len(rows):,} images"
    return (
        f"{path}: {which}{' looked at' if len(rows) < count else ''} are grayscale and are read as "
        "colour; --channels 1 makes all grayscale"
    )


@dataclass(frozen=True, eq=False)
class FileList:
    """Image files below a folder, in a form that processes share: a million paths in one array.

    A list of strings would be copied into every process, since reading them changes their reference
    counts.

    Attributes:
        root: The folder.
        names: Paths below it.
        labels: Class indices.
    """

    root: Path
    names: np.ndarray
    labels: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return self._path(index).open("rb"), int(self.labels[index])

    def filename(self, index: int, *, absolute: bool) -> str:
        path = self._path(index)
        return str(path if absolute else path.relative_to(self.root))

    def stamp(self) -> str:
        """SHA-256 of the labels and of the names, sizes and times of all files."""
        sha = hashlib.sha256(np.ascontiguousarray(self.labels, "<i8").data)
        root = os.fsencode(self.root)
        for name in self.names:
            status = os.stat(os.path.join(root, name))  # a third of the time of a `Path`
            sha.update(repr((name, status.st_size, status.st_mtime_ns)).encode())
        return sha.hexdigest()

    def _path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.names[index])


def _list_images(layout: FolderLayout) -> ImageFiles:
    names = np.array([os.fsencode(path.relative_to(layout.root)) for path in layout.files])
    files = FileList(layout.root, names, np.array(layout.labels, np.int64))
    return ImageFiles(
        files,
        layout.train.classes,
        files.stamp,
        np.arange(len(files)),
        files.labels,
        layout.draw_order,
    )
