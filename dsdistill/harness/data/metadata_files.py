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
from pathlib import Path
from typing import Any

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


def _table(path: Path) -> Table:
    """The columns of a table; of Parquet, which may hold the images too, those that are read."""
    known = {"label", *LIKE_LABEL, *LIKE_PART, FILE}
    try:
        table = tables.read(path, partial=True, wanted=lambda name: name.casefold() in known)
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
