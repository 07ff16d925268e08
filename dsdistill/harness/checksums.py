"""Named arrays with a description in one `.safetensors` file, under one checksum.

The SHA-256 covers the description and every array's name, dtype, shape and values: a flipped bit
anywhere is a one-line error, never different data. Distilled sets, checkpoints and students use
this format.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from dsdistill.harness.errors import UserError, one_line

CHECKSUM_KEY = "sha256"  # key of the checksum in a file's metadata


class Content(NamedTuple):
    """Content of a file.

    Attributes:
        description: JSON value.
        arrays: Arrays by name.
        checked: Whether the file had a checksum; if it had one, it matched.
    """

    description: Any
    arrays: dict[str, np.ndarray]
    checked: bool


def digest(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of a text and of named arrays: their names, dtypes, shapes and values.

    Args:
        text: Usually the description as JSON.
        arrays: C-contiguous arrays. A dtype that NumPy lacks (bfloat16) is passed as integers of
            the same size.
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
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def metadata(key: str, text: str, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Metadata in the header of a `.safetensors` file.

    Args:
        key: Key of the description; names the kind of file.
        text: The description as JSON.
        arrays: As for `digest`.

    Returns:
        The description under `key`, and the checksum of both under `CHECKSUM_KEY`.
    """
    return {key: text, CHECKSUM_KEY: digest(text, arrays)}


def pack(key: str, text: str, arrays: Mapping[str, np.ndarray]) -> bytes:
    """Bytes of a file, to be written with `files.write_bytes`.

    Args:
        key, text: As for `metadata`.
        arrays: Arrays in any memory order.
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
        path: Path of the file.
        key: The key that was passed to `pack`.
        kind: What the file should be, for messages, such as "a checkpoint".
        remedy: End of every message, such as ": start anew in another folder".
        error: Class of the error that is raised.
        required: Refuse a file without a checksum.

    Raises:
        UserError: An `error` with a one-line message, if the file is missing, truncated, damaged
            or of another kind.
    """
    if not path.is_file():
        raise error(f"no {kind.partition(' ')[2]} at {path}{remedy}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as reason:  # safetensors' own error, OSError, and others for odd dtypes
        message = f"{path} is damaged: it is not a whole .safetensors file ({one_line(reason)})"
        raise error(message + remedy) from reason
    if key not in header:
        raise error(f"{path} is a .safetensors file, but not {kind}{remedy}")
    # A flipped bit in the key "sha256" must not turn the file into one without a checksum.
    required = required or header.keys() != {key}
    return unpack(path, key, header, arrays, remedy=remedy, error=error, required=required)


def unpack(
    path: Path,
    key: str,
    header: Mapping[str, str],
    arrays: dict[str, np.ndarray],
    *,
    remedy: str = "",
    error: type[UserError] = UserError,
    required: bool = True,
) -> Content:
    """Verify the checksum of a file's content, and read its description.

    Args:
        path: Path of the file, for messages.
        key, remedy, error, required: As for `load`.
        header: Metadata from `metadata`.
        arrays: As for `digest`.

    Raises:
        UserError: An `error`, if the checksum differs or is missing and required, or if the
            description is not JSON.
    """
    expected = header.get(CHECKSUM_KEY)
    if (expected is not None or required) and expected != digest(header[key], arrays):
        raise error(f"{path} is damaged: its contents do not match its checksum{remedy}")
    try:
        description = json.loads(header[key])
    except (ValueError, RecursionError) as reason:
        line = one_line(reason)
        raise error(f"{path} is damaged: its header is not JSON ({line}){remedy}") from reason
    return Content(description, arrays, expected is not None)
