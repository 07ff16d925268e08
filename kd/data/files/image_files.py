"""Image files by row: which there are, of which class, and their pixels when they are asked for.

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


class ImageReader(Protocol):
    """timm's protocol of data that are read in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[BinaryIO, int]:
        """An open image file, and its label."""
        ...

    def filename(self, index: int, /, *, absolute: bool) -> str:
        """For people."""
        ...


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Some of the images of a reader.

    Attributes:
        reader: Of all of them.
        classes: Names, in label order.
        stamp: Called for a text that changes with the images of the reader.
        rows: Positions in the reader.
        labels: One class index a row, if they are known without reading the images.
        draw_order: As `stratified` takes it.
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
        """SHA-256 over which images these are, with their sizes and times, not their contents."""
        sha = hashlib.sha256(repr((self.stamp(), self.classes)).encode())
        sha.update(np.ascontiguousarray(self.rows, "<i8").data)
        return sha.hexdigest()

    def select(self, indices: Int[np.ndarray, " m"]) -> "ImageFiles":
        """Some of these, in the order given."""
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, rows=self.rows[indices], labels=labels)

    def held_out(self, fraction: float) -> tuple["ImageFiles", "ImageFiles"]:
        """The images kept and those held out, the same share of every class.

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
        """One image, upright and with its transparent pixels on white, and its label.

        Args:
            row: Of these.
            channels: 3 for colour, 1 for grayscale.

        Raises:
            DataError: If it cannot be read.
        """
        at = int(self.rows[row])
        try:
            file, label = self.reader[at]
            with file:
                return image_files.read(file, channels), int(label)
        except Exception as error:  # a damaged file has many ways to fail
            name = self.reader.filename(at, absolute=True) or f"number {at}"
            raise DataError(
                f"image {name} cannot be read ({image_files.describe_error(error)}): mend it, "
                "or take it away"
            ) from error


@dataclass(frozen=True, eq=False)
class FileSplits:
    """The images of a folder.

    Attributes:
        train: To train on.
        validation: The folder's own, or held out of the training images; may be none.
        test: To be looked at once.
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
    """List a folder; nothing is read.

    Args:
        path: As in `dsdistill.harness.data.folders.read`, which splits it in the same way.
        validation_fraction: Share of every class of the training images, in [0, 1); of no account
            where the folder has validation images beside test images.
        classes: Their order, as in `dsdistill.harness.data.layout.list_folder`.
        announce: Whether to say what was taken for what.

    Raises:
        DataError: If the folders do not make a data set.
    """
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation fraction must be in [0, 1), got {validation_fraction}")
    layout = list_folder(path, classes)
    images, rows = _list_images(layout), np.arange(len(layout.files))
    first, second = layout.ends
    if layout.test:
        train, test = images.select(rows[:first]), images.select(rows[second:])
    else:
        train, test = images.held_out(TEST_FRACTION)
    if layout.validation:
        validation = images.select(rows[first:second])
    else:
        train, validation = train.held_out(validation_fraction)
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

    A list of as many strings would be copied into every process, as each counts who uses it.

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
        """Changes with the name, size or time of any file, and with any label."""
        sha = hashlib.sha256(np.ascontiguousarray(self.labels, "<i8").data)
        for index, name in enumerate(self.names):
            found = self._path(index).stat()
            sha.update(repr((name, found.st_size, found.st_mtime_ns)).encode())
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
