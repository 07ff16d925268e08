"""Files that are replaced as a whole: a reader finds the old content or the new, never a part.

A process that is killed during a write leaves a hidden file, and the old content in place.
"""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsdistill.harness.errors import UserError, one_line

# Temporary files of `write_bytes`: hidden, the name of the file, eight random letters.
_TEMPORARY = re.compile(r"\.[^.].*\.[A-Za-z]+\.[a-z0-9_]{8}")

# Of indented JSON, in which no text holds a line break.
_LIST_OF_NUMBERS = re.compile(r"\[\n((?:\s*(?:null|[-+.\deE]+),?\n)+)\s*\]")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically: written beside it, flushed to disk, then renamed."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp creates it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, *, compact_numbers: bool = False) -> None:
    """Replace a JSON file atomically. NaN becomes null, since JSON has none.

    Args:
        path: The file.
        value: The content.
        compact_numbers: Whether a list of numbers stands on one line; a matrix of 200 classes then
            takes a sixth of the bytes.
    """
    text = json.dumps(replace_not_finite(value), indent=2)
    if compact_numbers:
        text = _LIST_OF_NUMBERS.sub(lambda found: "[" + "".join(found[1].split()) + "]", text)
    write_bytes(path, (text + "\n").encode())


def read_json(path: Path, error: type[UserError] = UserError) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        error: Kind of error to raise.

    Raises:
        UserError: If the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"cannot read {path}: {one_line(reason)}") from reason


def remove_temporaries(folder: Path) -> None:
    """Remove what interrupted writes have left in a folder that no process writes to."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def replace_not_finite(value: Any) -> Any:
    """Copy a value with NaN and infinities replaced by None, at any depth."""
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: replace_not_finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [replace_not_finite(v) for v in value]
    return value
