"""Named arrays with a description in one `.safetensors` file, under one checksum.

The SHA-256 covers the description and every array's name, dtype, shape and values: a bit that
flips anywhere is an error with one line, and never other data. Distilled sets, checkpoints and
students share it.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from dsdistill.harness.errors import UserError

SHA256 = "sha256"  # key of the checksum in a file's metadata


class Content(NamedTuple):
    """What a file holds.

    Attributes:
        description: JSON value.
        arrays: By name.
        checked: Whether the file had a checksum; if it had, it matched.
    """

    description: Any
    arrays: dict[str, np.ndarray]
    checked: bool


def digest(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of a text and of named arrays: their names, dtypes, shapes and values.

    Args:
        text: Usually the description as JSON.
        arrays: C-contiguous. A dtype that NumPy lacks (bfloat16) goes in as integers of its size.
    """
    sha = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        sha.update(f"{name} {array.dtype.str} {array.shape}".encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its names."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def metadata(key: str, text: str, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """What the header of a `.safetensors` file holds beside the arrays.

    Args:
        key: Under which the description stands: the kind of the file.
        text: The description as JSON.
        arrays: As for `digest`.
    """
    return {key: text, SHA256: digest(text, arrays)}


def pack(key: str, text: str, arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a file, to be written with `runs.write_bytes`.

    Args:
        key, text: As for `metadata`.
        arrays: In any memory order.
    """
    # Not ascontiguousarray, which gives a scalar (a step count) an axis.
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    return safetensors.numpy.save(whole, metadata(key, text, whole))


def load(
    path: Path,
    key: str,
    *,
    kind: str,
    remedy: str = "",
    error: type[UserError] = UserError,
    required: bool = True,
) -> Content:
    """Read a file and verify its checksum.

    Args:
        path: Of the file.
        key: As it was given to `pack`.
        kind: What the file should be, for messages, such as "a checkpoint".
        remedy: Ends every message, such as ": start anew in another folder".
        error: Class of the error that is raised.
        required: Refuse a file without a checksum.

    Raises:
        UserError: Of class `error`, with one line: if the file is missing, truncated, damaged or of
            another kind.
    """
    if not path.is_file():
        raise error(f"no {kind.partition(' ')[2]} at {path}{remedy}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            found = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as reason:  # safetensors' own error, OSError, and others for odd dtypes
        line = " ".join(str(reason).split())
        message = f"{path} is damaged: it is not a whole .safetensors file ({line}){remedy}"
        raise error(message) from reason
    if key not in found:
        raise error(f"{path} is a .safetensors file, but not {kind}{remedy}")
    seal = found.get(SHA256)
    # A bit that flips in the word "sha256" must not make a file one of those without a checksum.
    required = required or found.keys() != {key}
    verify(path, found[key], arrays, seal, required=required, remedy=remedy, error=error)
    try:
        description = json.loads(found[key])
    except (ValueError, RecursionError) as reason:
        line = " ".join(str(reason).split())
        raise error(f"{path} is damaged: its header is not JSON ({line}){remedy}") from reason
    return Content(description, arrays, seal is not None)


def verify(
    path: Path,
    text: str,
    arrays: Mapping[str, np.ndarray],
    expected: str | None,
    *,
    required: bool = True,
    remedy: str = "",
    error: type[UserError] = UserError,
) -> None:
    """Compare the content of a file with the checksum that stands in it.

    Args:
        path: For the message.
        text, arrays: As for `digest`.
        expected: The checksum; None where there is none.
        required, remedy, error: As for `load`.

    Raises:
        UserError: Of class `error`, if they differ, or if there is none and one is required.
    """
    if expected is None and not required:
        return
    if expected != digest(text, arrays):
        raise error(f"{path} is damaged: its contents do not match its checksum{remedy}")
