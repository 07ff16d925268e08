"""Folders of images that have any number of labels each, by a table beside them.

    photos/train/metadata.jsonl    {"file_name": "0001.png", "labels": ["cat", "dog"]}
    photos/metadata.csv            file_name,labels      train/0001.png,cat|dog
    photos/metadata.csv            file_name,cat,dog     0001.png,1,1

`metadata_files.read_several` recognises the labels; parts are folders, as in `layout`. An image may
have no label. Images are held out by their rarest label, so that rare ones are in every part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from dsdistill.harness.data import class_names, folders, metadata_files, wav_files
from dsdistill.harness.data.folder_part import descend
from dsdistill.harness.data.labeled_images import (
    TEST_FRACTION,
    DataError,
    LabeledImages,
    split_by_class,
    strata,
)
from dsdistill.harness.data.layout import find_parts
from dsdistill.harness.data.metadata_files import SeveralLabels
from dsdistill.harness.data.walk import SkippedFiles, find_images
from dsdistill.harness.text import abbreviate_names, quote

Part = Mapping[Path, tuple[str, ...]]  # labels of each image, in the order of the paths


@dataclass(frozen=True, eq=False)
class LabelledFolder:
    """The images of a folder by part, with any number of labels each.

    Attributes:
        path: The folder.
        classes: Names of the labels, in the order of the columns of a matrix of labels.
        train: Training images; all where the folder has no parts.
        validation, test: Images of these parts; None if the folder has none.
        how: How the labels were recognised, in words.
        left_out: Number of images that no table names.
    """

    path: Path
    classes: tuple[str, ...]
    train: Part
    validation: Part | None
    test: Part | None
    how: str
    left_out: int

    @property
    def parts(self) -> list[Part]:
        """The parts that there are: training, validation and test."""
        return [part for part in (self.train, self.validation, self.test) if part is not None]

    def summary(self, train: int, validation: int, test: int) -> str:
        """One line on the labels and the numbers of images used."""
        every = [names for part in self.parts for names in part.values()]
        mean, none = np.mean([len(names) for names in every]), sum(not names for names in every)
        line = (
            f"{self.path}: {train:,} training images with {len(self.classes)} labels ({self.how}), "
            f"{mean:.2g} an image, {none:,} images without any; {validation:,} for validation, "
            f"{test:,} for the test"
        )
        if not self.left_out:
            return line
        return f"{line}; left out: {self.left_out:,} images that no table names"


def list_folder(path: Path, classes: Sequence[str] | None = None) -> LabelledFolder | None:
    """Find the images of a folder, their parts and labels; None if an image has one class here.

    Args:
        path: The folder.
        classes: Labels that a model knows, in its order; used if the folder has no others, though
            it may have only some.

    Raises:
        DataError: If a table cannot be read, or a part has a label that the training images have
            not.
    """
    root = descend(path)
    if metadata_files.find(root) is None and not _has_table_below(root):
        return None
    roles = find_parts(root, SkippedFiles())
    train = _read_part(roles.get("train", root), root, None)
    if train is None:
        return None
    read = {name: _read_part(roles[name], root, train) for name in roles}
    read["train"] = train
    known = {name for names in train.labels.values() for name in names}
    order = class_names.sort(sorted(known))
    if classes is not None and known <= {*classes}:
        order = tuple(classes)
        known = {*classes}
    found = {name: part for name, part in read.items() if part is not None}
    parts = {name: dict(sorted(part.labels.items())) for name, part in found.items()}
    for name, part in parts.items():
        foreign = sorted({label for names in part.values() for label in names} - known)
        if foreign:
            raise DataError(
                f"{roles[name]} has the label {quote(foreign[0])}, which no training image has: "
                "add some, or remove it"
            )
    validation, test = parts.get("validation"), parts.get("test")
    if test is None:
        validation, test = None, validation
    named = {file for part in parts.values() for file in part}
    every = find_images(root, set(), SkippedFiles())
    left_out = sum(file not in named for file in every)
    return LabelledFolder(root, order, parts["train"], validation, test, train.how, left_out)


def read(
    folder: LabelledFolder, cache: Path, image_size: int | None, channels: int | None
) -> tuple[LabeledImages, LabeledImages | None, LabeledImages]:
    """Load the training, validation and test images; a fixed share where there is no test part.

    Args:
        folder: The folder.
        cache, image_size, channels: As in `folders.read`.

    Raises:
        DataError, OSError: As `folders.read`.
    """
    files = [file for part in folder.parts for file in part]
    if recordings := [file.name for file in files if wav_files.is_wav(file)]:
        raise DataError(
            f"{folder.path} has recordings with several labels ({abbreviate_names(recordings)}), "
            "which are not read: give each one class"
        )
    images, readable = folders.read_files(folder.path, cache, files, image_size, channels)
    matrix = _matrix([names for part in folder.parts for names in part.values()], folder.classes)
    everything = LabeledImages(images, matrix[readable], folder.classes, rows=readable)
    ends = np.cumsum([len(part) for part in folder.parts])
    pieces = np.split(np.arange(len(readable)), np.searchsorted(readable, ends)[:-1])
    if folder.test is None:
        train, test = split_by_class(strata(everything.labels), TEST_FRACTION)
        return everything.select(train), None, everything.select(test)
    validation = everything.select(pieces[1]) if folder.validation is not None else None
    return everything.select(pieces[0]), validation, everything.select(pieces[-1])


def _has_table_below(root: Path) -> bool:
    """Whether a folder directly inside has a table."""
    return any(metadata_files.find(child) for child in sorted(root.iterdir()) if child.is_dir())


def _read_part(folder: Path, root: Path, train: SeveralLabels | None) -> SeveralLabels | None:
    """The labels of a part, by the table in its folder or in the one above; None without any.

    Args:
        folder: Folder of the part.
        root: The folder of all parts.
        train: Labels of the training part; None where these are read.

    Raises:
        DataError: If the table of another part than that has no labels of its kind.
    """
    inside = descend(folder, part=True)
    for directory in dict.fromkeys((inside, folder, root)):
        if (path := metadata_files.find(directory)) is None:
            continue
        several = metadata_files.read_several(path, train)
        if several is None and train is not None:
            raise DataError(
                f"{path} must give labels as the table of the training images does ({train.how})"
            )
        if several is None:
            continue
        own = {f: names for f, names in several.labels.items() if f.is_relative_to(folder)}
        if own:
            return replace(several, labels=own, how=f"{several.how} of {path.name}")
    return None


def _matrix(labels: Sequence[Sequence[str]], classes: Sequence[str]) -> Int[np.ndarray, "n k"]:
    """For each image and class, whether the image has it, 0 or 1."""
    column = {name: i for i, name in enumerate(classes)}
    matrix = np.zeros((len(labels), len(classes)), np.int64)
    for row, names in enumerate(labels):
        matrix[row, [column[name] for name in names]] = 1
    return matrix
