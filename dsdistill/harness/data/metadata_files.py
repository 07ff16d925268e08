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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dsdistill.harness.data import class_names
from dsdistill.harness.data.labeled_images import DataError
from dsdistill.harness.errors import one_line
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
    rows = _READERS[path.suffix](path)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    label = _label_column(path, columns)
    if label is None or all(_is_missing(row.get(label)) for row in rows):
        return None
    for column in columns:
        if column.casefold() in LIKE_PART:
            progress.note(
                f"{path}: the column {column!r} is ignored: parts are folders, such as train/ "
                "and test/"
            )
    classes: dict[Path, str] = {}
    for number, row in enumerate(rows, start=1):
        file, name = _file(path, number, row.get(FILE)), _name(path, number, row.get(label))
        if classes.setdefault(file, name) != name:
            raise DataError(
                f"{path}: row {number} gives {row[FILE]!r} the class {quote(name)}, an earlier row "
                f"{quote(classes[file])}: keep one of them"
            )
    return classes


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


def _label_column(path: Path, columns: Iterable[str]) -> str | None:
    """Find the column of classes, with a note if the choice is not obvious; None without any."""
    candidates = [column for column in columns if column.casefold() in ("label", *LIKE_LABEL)]
    names = abbreviate_names(candidates)
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


def _file(path: Path, number: int, name: Any) -> Path:
    """Path of the image of a row, which must lie in the table's folder."""
    if not isinstance(name, str) or not name:
        raise DataError(f"{path}: row {number} must have a {FILE}, got {name!r}")
    inside = os.path.normpath(name.replace("\\", "/"))
    if "\0" in name or "://" in name or os.path.isabs(inside) or inside.split("/")[0] == "..":
        raise DataError(
            f"{path}: row {number} names {name[:60]!r}, but a {FILE} must be a path inside "
            f"{path.parent}"
        )
    file = path.parent / inside
    if not file.is_file():
        raise DataError(
            f"{path}: row {number} names {name[:60]!r}, which is not a file in {path.parent}: add "
            "it, or remove the row"
        )
    return file


def _name(path: Path, number: int, value: Any) -> str:
    """Class name of a row: text, or a number as text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if _is_missing(value) or not isinstance(value, str | int):
        raise DataError(
            f"{path}: row {number} must have one class, text or a whole number, got "
            f"{str(value)[:60]!r}"
        )
    return class_names.from_folder(str(value).strip())


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _read_csv(path: Path) -> list[Mapping[str, Any]]:
    try:
        # A byte order mark, as spreadsheets write it, is not part of the first column's name.
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file, strict=True))
    except (csv.Error, ValueError) as error:
        raise DataError(f"{path} is not CSV in UTF-8: {one_line(error)}") from error
    if not rows:
        raise DataError(f"{path} is empty")
    columns, *rows = rows
    if len(set(columns)) < len(columns):
        raise DataError(
            f"{path} has two columns of the same name among {abbreviate_names(columns)}"
        )
    for number, row in enumerate(rows, start=1):
        if row and len(row) != len(columns):
            raise DataError(
                f"{path}: row {number} has {len(row)} values, the first line {len(columns)} columns"
            )
    return [dict(zip(columns, row, strict=True)) for row in rows if row]


def _read_json_lines(path: Path) -> list[Mapping[str, Any]]:
    rows = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(
                        f"{path}: line {number} must be an object such as "
                        f'{{"{FILE}": "1.png", "label": "cat"}}, got {line.strip()[:60]!r}'
                    )
                rows.append(row)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not one JSON object per line: {one_line(error)}") from error
    return rows


def _read_parquet(path: Path) -> list[Mapping[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path} needs pyarrow: `pip install pyarrow`, write the table as metadata.csv, or "
            "give it another name"
        ) from error
    try:
        file = parquet.ParquetFile(path)
        known = {"label", *LIKE_LABEL, *LIKE_PART, FILE}
        columns = [name for name in file.schema_arrow.names if name.casefold() in known]
        table = file.read(columns=columns)
    except Exception as error:  # pyarrow raises many kinds for damaged files
        raise DataError(f"{path} is not a complete Parquet file: {one_line(error)}") from error
    if FILE not in columns:
        raise DataError(f"{path} must have a column {FILE}: add it, or rename the table")
    return table.to_pylist()


_READERS = {".csv": _read_csv, ".jsonl": _read_json_lines, ".parquet": _read_parquet}
