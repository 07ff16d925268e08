"""Data whose classes are joined to groups, by a file or as an earlier student has learned them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from dsdistill.harness.errors import UserError
from kd.data import class_table
from kd.data.data_source import DataSource
from kd.data.files.archives import ArchiveSplit
from kd.data.files.file_source import FileSource
from kd.data.files.image_files import ImageFiles
from kd.models.zoo import class_groups
from kd.models.zoo.class_groups import ClassGroups

OPTION = "--class-groups"


def read(path: Path, classes: Sequence[str]) -> ClassGroups:
    """Read the group of each class, as `class_table.read`.

    Args:
        path: The file.
        classes: Class names of the data, in label order.

    Raises:
        UserError: If the file cannot be used.
    """
    path = path.expanduser()
    stored = class_table.read(path, OPTION, "group")
    for name, group in stored.items():
        if not isinstance(group, str | int) or isinstance(group, bool) or not str(group).strip():
            raise UserError(
                f"{OPTION} {path} gives class {name!r} the group {group!r}: it must be a name"
            )
    groups = [str(group).strip() for group in class_table.align(stored, classes, OPTION, path)]
    return class_groups.make(groups, classes, f"{OPTION} {path}")


def restore(
    source: DataSource | FileSource, stored: Mapping[str, str], classes: Sequence[str], who: str
) -> DataSource | FileSource:
    """Join the classes of data as a student has learned them, unless they are its groups already.

    Args:
        source: The data, with all of the classes or some.
        stored: Class -> group, as in the training; empty where the student learned no groups.
        classes: Groups in the order of the student's outputs.
        who: The student, for messages.

    Raises:
        UserError: If the data have a class of no group.
    """
    if not stored:
        return source
    groups = class_groups.restore(stored, classes)
    group_of = groups.of(source.classes, who)
    return replace(source, groups=groups) if group_of is None else _join(source, groups, group_of)


def join(source: DataSource | FileSource, groups: ClassGroups) -> DataSource | FileSource:
    """Replace the classes of data by their groups; the parts keep their images.

    Args:
        source: The data.
        groups: Groups of exactly its classes, in label order.

    Raises:
        UserError: If the data are a distilled set, or do not tell their labels beforehand.
    """
    return _join(source, groups, groups.group_of)


def _join(
    source: DataSource | FileSource, groups: ClassGroups, group_of: Sequence[int]
) -> DataSource | FileSource:
    """Replace the classes of data by the groups of this index."""
    table = np.asarray(group_of, np.int64)
    if isinstance(source, FileSource):
        train, validation, test = (_files(part, groups, table) for part in source.parts)
        assert train is not None
        return replace(source, parts=(train, validation, test), groups=groups)
    if source.has_several_labels:
        raise UserError(
            f"{OPTION} joins classes of which an image has one, and an image of {source.name} has "
            "any number of labels: leave it out"
        )
    splits = source.splits
    if source.distilled is not None or splits is None:
        raise UserError(
            f"{OPTION} joins the classes of images, and {source.name} is a distilled set, whose "
            "labels are learned: distil the groups, or leave it out"
        )
    train, validation, test = (
        replace(part, labels=table[part.labels], classes=groups.classes)
        for part in (splits.train, splits.validation, splits.test)
    )
    joined = replace(splits, train=train, validation=validation, test=test)
    return replace(source, splits=joined, groups=groups)


def _files(
    part: ImageFiles | ArchiveSplit | None, groups: ClassGroups, table: Int[np.ndarray, " k"]
) -> ImageFiles | None:
    if part is None:
        return None
    if isinstance(part, ArchiveSplit) or part.labels is None:
        raise UserError(
            f"{OPTION} needs the labels of all images before the training, and these archives give "
            "them only while they are read: use a folder of class folders"
        )
    return replace(part, labels=table[part.labels], classes=groups.classes)
