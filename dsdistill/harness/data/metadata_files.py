"""Class labels from a table beside the images, as Hugging Face's `imagefolder` reads them.

    photos/train/metadata.csv      file_name,label          photos/metadata.jsonl
    photos/train/0001.png          0001.png,cat             {"file_name": "train/0001.png", ...}

A file name is relative to the table, and must not lead out of its folder. Parquet needs pyarrow,
which comes with `datasets`.

Source: huggingface/datasets, `packaged_modules/folder_based_builder`, and its documentation "Create
an image dataset", which name files and columns.
"""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dsdistill.harness.data import class_names, tables
from dsdistill.harness.data.labeled_images import DataError
from dsdistill.harness.data.tables import Table
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from dsdistill.harness.text import abbreviate_names, quote

NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE = "file_name"
MAX_FIRST_LINE = 1 << 20  # characters that are read of a first line
# Columns that are read as classes if none is called `label`.
LIKE_LABEL = ("labels", "class", "class_name", "category", "target", "label_name")
LIKE_PART = ("split", "subset", "partition", "fold")
# Last words of the names of columns whose texts may hold several labels, and what parts these.
SEVERAL_LABELS = ("labels", "tags", "classes", "categories")
SEPARATORS = ("|", ";")
ROW_NUMBERS = ("id", "index")  # columns that say nothing of an image


def find(folder: Path) -> Path | None:
    """Find the table of a folder, if there is one with a column of file names.

    Raises:
        DataError: If there are several.
    """
    tables = [table for name in NAMES if (table := folder / name).is_file() and _has_files(table)]
    if len(tables) > 1:
        names = abbreviate_names([table.name for table in tables])
        raise DataError(f"{folder} has {names}: keep one of them")
    return tables[0] if tables else None


def read(path: Path) -> dict[Path, str] | None:
    """Read the class of each image in a table; None if it has no column of classes.

    Classes are in the column `label`, or else in the only column with a similar name.

    Raises:
        DataError: If the table cannot be read, if several columns could be the class, or if a row
            has no class or names no file in the folder.
    """
    if (several := read_several(path)) is not None:
        raise DataError(
            f"{path} gives an image several labels ({several.how}), and one class each is needed "
            "here: kd train learns several, without --augment imagenet"
        )
    table = _table(path)
    label = _label_column(table)
    if label is None or all(map(_is_missing, table.columns[label])):
        return None
    for column in table.columns:
        if column.casefold() in LIKE_PART:
            progress.note(
                f"{path}: the column {column!r} is ignored: parts are folders, such as train/ "
                "and test/"
            )
    classes: dict[Path, str] = {}
    values = zip(table.columns[FILE], table.columns[label], strict=True)
    for row, (file_name, class_name) in enumerate(values):
        file, name = _file(table, row, file_name), _name(table, row, class_name)
        if classes.setdefault(file, name) != name:
            raise DataError(
                f"{table.place(row)} gives {file_name!r} the class {quote(name)}, an earlier one "
                f"{quote(classes[file])}: keep one of them"
            )
    return classes


@dataclass(frozen=True, eq=False)
class SeveralLabels:
    """Any number of labels for each image of a table.

    Attributes:
        labels: Labels of each image, none among them twice; empty for an image without any.
        how: How they were recognised, in words.
        column: Column whose texts a separator parts; None of lists and of 0 and 1.
        separator: What parts them; None for spaces.
    """

    labels: Mapping[Path, tuple[str, ...]]
    how: str
    column: str | None = None
    separator: str | None = None


def read_several(path: Path, like: SeveralLabels | None = None) -> SeveralLabels | None:
    """Read the labels of each image, where a table gives an image any number; else None.

    Labels are lists in a column of classes; texts that `|` or `;` parts, in a column `labels`,
    `tags`, `classes` or `categories`, or spaces in a column `tags`; or a column of 0 and 1 for each
    label, in a table without other columns. Of images in class folders the folders count, unless
    the column is one that names classes (`LIKE_LABEL`).

    Args:
        path: The table.
        like: Labels of the training part, whose column and separator the table has too, even if
            none of its images has several.

    Raises:
        DataError: If the table cannot be read, or a row has no file or labels that are none.
    """
    table = _table(path, every=True)
    found = _listed_labels(table) or _joined_labels(table, like) or _marked_labels(table)
    if found is None:
        return None
    labels: dict[Path, tuple[str, ...]] = {}
    for row, (file_name, names) in enumerate(zip(table.columns[FILE], found.rows, strict=True)):
        file = _file(table, row, file_name)
        known = tuple(dict.fromkeys(_name(table, row, name) for name in names))
        if {*labels.setdefault(file, known)} != {*known}:
            raise DataError(
                f"{table.place(row)} gives {file_name!r} other labels than an earlier one: keep "
                "one of them"
            )
    return SeveralLabels(labels, found.how, found.column, found.separator)


class _Found(NamedTuple):
    """Labels of each row, and what `SeveralLabels` says of them."""

    rows: list[Sequence[Any]]
    how: str
    column: str | None = None
    separator: str | None = None


def _listed_labels(table: Table) -> _Found | None:
    """Labels that are lists, as in JSON lines."""
    named = [name for name in table.columns if _means_labels(name, table)]
    lists = [name for name in named if any(isinstance(x, list) for x in table.columns[name])]
    if not lists:
        return None
    if len(lists) > 1:
        names = abbreviate_names(lists)
        raise DataError(f"{table.path} has lists of labels in the columns {names}: keep one")
    values = table.columns[lists[0]]
    for row, value in enumerate(values):
        if not isinstance(value, list) and not _is_missing(value):
            raise DataError(
                f"{table.place(row)} must have a list of labels in {lists[0]!r}, as other rows "
                f"do, got {str(value)[:60]!r}"
            )
    rows: list[Sequence[Any]] = [value if isinstance(value, list) else [] for value in values]
    return _Found(rows, f"lists in the column {lists[0]!r}")


def _joined_labels(table: Table, like: SeveralLabels | None) -> _Found | None:
    """Labels that a separator parts in one text."""
    if like is not None and like.column is not None and like.column in table.columns:
        return _part(table, like.column, like.separator)
    for name, values in table.columns.items():
        texts = [value for value in values if isinstance(value, str)]
        others = any(not isinstance(value, str) and not _is_missing(value) for value in values)
        if _last_word(name) not in SEVERAL_LABELS or not _means_labels(name, table) or others:
            continue
        known = [mark for mark in SEPARATORS if any(mark in text for text in texts)]
        if len(known) > 1:
            raise DataError(
                f"{table.path} parts labels of the column {name!r} by both {known[0]!r} and "
                f"{known[1]!r}: use one of them"
            )
        if known or (_last_word(name) == "tags" and any(" " in text.strip() for text in texts)):
            return _part(table, name, known[0] if known else None)
    return None


def _part(table: Table, column: str, separator: str | None) -> _Found:
    """Part the texts of a column, by spaces if the separator is None."""
    values = (("" if _is_missing(value) else str(value)) for value in table.columns[column])
    rows: list[Sequence[Any]] = [list(filter(str.strip, x.split(separator))) for x in values]
    by = repr(separator) if separator else "spaces"
    return _Found(rows, f"parted by {by} in the column {column!r}", column, separator)


def _marked_labels(table: Table) -> _Found | None:
    """Labels that have a column of 0 and 1 each."""
    rest = {FILE, *LIKE_PART, *ROW_NUMBERS}
    names = [name for name in table.columns if name.casefold() not in rest]
    marks = [{str(x).strip().removesuffix(".0") for x in table.columns[name]} for name in names]
    if len(names) < 2 or not all(values <= {"0", "1"} for values in marks):
        return None
    if {"0", "1"} not in marks or _in_class_folders(table):
        return None
    rows: list[Sequence[Any]] = [
        [name for name in names if float(table.columns[name][row]) == 1]
        for row in range(len(table))
    ]
    return _Found(rows, f"{len(names)} columns of 0 and 1")


_PARTS = ("train", "val", "dev", "test", "eval")  # in names of folders that are no classes


def _in_class_folders(table: Table) -> bool:
    """Whether the images lie in several folders that are neither parts nor `images`."""
    folders = {Path(str(name)).parent.name.casefold() for name in table.columns[FILE]} - {"images"}
    return len({name for name in folders if not any(word in name for word in _PARTS)}) > 1


def _means_labels(name: str, table: Table) -> bool:
    """Whether a column has labels: by its name, or its last word where no folders are classes."""
    if name.casefold() in ("label", *LIKE_LABEL):
        return True
    return _last_word(name) in SEVERAL_LABELS and not _in_class_folders(table)


def _last_word(name: str) -> str:
    return (name.casefold().replace("_", " ").split() or [""])[-1]


def _table(path: Path, *, every: bool = False) -> Table:
    """The columns of a table; of Parquet, which may hold the images too, those that are read.

    Args:
        path: The table.
        every: Whether all columns but those of images are read.
    """
    known = {"label", *LIKE_LABEL, *LIKE_PART, FILE}
    try:
        table = tables.read(
            path,
            partial=True,
            wanted=lambda name: name != "image" if every else name.casefold() in known,
        )
    except UserError as error:
        raise DataError(str(error)) from error
    if FILE not in table.columns:
        raise DataError(f"{path} must have a column {FILE}: add it, or rename the table")
    return table


def _has_files(path: Path) -> bool:
    """Whether a table has the column of file names, by its first line; unreadable counts as yes."""
    if path.suffix == ".parquet":
        return True
    try:
        with path.open(encoding="utf-8-sig") as file:
            line = file.readline(MAX_FIRST_LINE)
        first = json.loads(line) if path.suffix == ".jsonl" else next(csv.reader([line]), [])
        return FILE in first
    except (csv.Error, ValueError, RecursionError, TypeError):
        return True


def _label_column(table: Table) -> str | None:
    """Find the column of classes, with a note if the choice is not obvious; None without any."""
    candidates = [name for name in table.columns if name.casefold() in ("label", *LIKE_LABEL)]
    path, names = table.path, abbreviate_names(candidates)
    if "label" in candidates:
        if len(candidates) > 1:
            progress.note(f"{path}: of the columns {names} the classes are those of 'label'")
        return "label"
    if len(candidates) > 1:
        raise DataError(
            f"{path} has the columns {names}, each of which could be the class: rename one of "
            "them to label"
        )
    if candidates:
        progress.note(f"{path}: the classes are those of the column {candidates[0]!r}")
    return candidates[0] if candidates else None


def _file(table: Table, row: int, name: Any) -> Path:
    """Path of the image of a row, which must lie in the table's folder."""
    folder = table.path.parent
    if not isinstance(name, str) or not name:
        raise DataError(f"{table.place(row)} must have a {FILE}, got {name!r}")
    inside = os.path.normpath(name.replace("\\", "/"))
    if "\0" in name or "://" in name or os.path.isabs(inside) or inside.split("/")[0] == "..":
        raise DataError(
            f"{table.place(row)} names {name[:60]!r}, but a {FILE} must be a path inside {folder}"
        )
    file = folder / inside
    if not file.is_file():
        raise DataError(
            f"{table.place(row)} names {name[:60]!r}, which is not a file in {folder}: add it, or "
            "remove the row"
        )
    return file


def _name(table: Table, row: int, value: Any) -> str:
    """Class name of a row: text, or a number as text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if _is_missing(value) or not isinstance(value, str | int):
        raise DataError(
            f"{table.place(row)} must have one class, text or a whole number, got "
            f"{str(value)[:60]!r}"
        )
    return class_names.from_folder(str(value).strip())


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())
