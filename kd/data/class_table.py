"""Files that give each class of the data one value: the weights of classes, and their groups."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsdistill.harness.data import tables
from dsdistill.harness.errors import UserError, first_line, unknown_name
from dsdistill.harness.text import quote
from kd.models.zoo import class_names


def read(path: Path, option: str, value: str) -> dict[str, Any]:
    """Read a JSON object of class names and values, or a table with a column for each of the two.

    Args:
        path: A `.json` file; or a table of `tables.SUFFIXES` with the columns `class` and `value`.
        option: The option that names the file, for messages.
        value: What a class is given, as a table's column is called: `weight` or `group`.

    Raises:
        UserError: If the file cannot be read, is of another form, or has a class twice.
    """
    pairs = _read_table(path, option, value) if tables.table_suffix(path) else _read_json(path)
    if pairs is None:
        example = {"cat": "pet", "dog": "pet"} if value == "group" else {"cat": 1, "dog": 2.5}
        raise UserError(
            f"{option} {path} must be one JSON object of class names and each one's {value}, such "
            f"as {json.dumps(example)}, or a table with the columns class and {value}"
        )
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{option} {path} has class {quote(twice)} twice")
    return values


def align(
    values: Mapping[str, Any], classes: Sequence[str], option: str, path: Path
) -> tuple[Any, ...]:
    """The value of each class, whose names are compared as those of teachers are.

    Args:
        values: Class name -> value, from `read`.
        classes: Class names of the data, in label order.
        option, path: As in `read`.

    Raises:
        UserError: If a class has no value, or a value is of no class.
    """
    names = list(values)
    matched = class_names.match_by_name(names, classes)
    if matched is not None and len(names) == len(classes):
        return tuple(values[names[i]] for i in matched)
    for name in names:
        if class_names.match_by_name(classes, [name]) is None:
            raise unknown_name(f"class of the data in {option} {path}", name, classes)
    left = [name for name in classes if class_names.match_by_name(names, [name]) is None]
    if left:
        raise UserError(
            f"{option} {path} leaves out {len(left)} of the data's classes: "
            f"{class_names.abbreviate(left)}"
        )
    raise UserError(f"{option} {path} has several names that could be one class of the data")


def _read_json(path: Path) -> list[tuple[str, Any]] | None:
    """The entries of a JSON object in the order of the file; None if it is no object."""
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_Pairs)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {first_line(error)}") from error
    return list(pairs) if isinstance(pairs, _Pairs) else None


class _Pairs(list[tuple[str, Any]]):
    """The entries of a JSON object, also where a name occurs twice."""


def _read_table(path: Path, option: str, value: str) -> list[tuple[str, Any]] | None:
    """The rows of a table; None if it lacks one of the two columns."""
    columns = tables.read(path).columns
    if not {"class", value} <= columns.keys():
        return None
    if foreign := sorted(columns.keys() - {"class", value}):
        raise UserError(
            f"{option} {path} has a column {foreign[0]!r} beside class and {value}: leave it out"
        )
    return list(zip(map(str, columns["class"]), columns[value], strict=True))
