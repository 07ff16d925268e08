"""Read the archive of `torch.export.save` without torch's loader: tensors, a graph, a card.

`torch.export.load` unpickles, evaluates expressions and writes Python code from the names in a
file. Nothing of the kind happens here: the entries of the archive are read by one reader, each is
recognised by its exact name, JSON is parsed and raw bytes become tensors. Anything else in an
archive is refused by name.
"""

import json
import math
import re
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsdistill.harness.errors import UserError, first_line

SCHEMA_VERSION = 8  # major version of the graph's JSON
MAX_EXPANDED_BYTES = 2**28  # bytes of a tensor that repeats its stored bytes
DTYPES = {  # dtype by its number in the file
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
STRIDED_LAYOUT = 7  # the only layout of a tensor that is read

_MODEL = "models/model.json"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_ENTRY_PATTERNS = (
    re.escape(_MODEL),
    *map(re.escape, _CONFIGS),
    r"archive_format",
    r"archive_version",
    r"byteorder",
    r"version",
    r"\.data/version",
    r"\.data/serialization_id",
    r"data/sample_inputs/model\.pt",  # never read
    r"data/weights/weight_[0-9]{1,9}",
    r"data/constants/tensor_[0-9]{1,9}",
    r"extra/[A-Za-z0-9_. -]{1,200}",
)
_ENTRY_PATTERN = re.compile("|".join(_ENTRY_PATTERNS))


class NotAllowed(UserError):
    """Content that no network's program needs; the message names it."""


@dataclass(frozen=True, eq=False)
class ProgramArchive:
    """The content of an exported program's file.

    Attributes:
        program: The JSON of graph and signature, not yet checked.
        text: The bytes of this JSON.
        tensors: Parameters, buffers and constants by their names.
        parameters: Names of the tensors that are parameters.
        extra: Text beside the program, by the name of its entry.
    """

    program: Mapping[str, Any]
    text: bytes
    tensors: Mapping[str, Tensor]
    parameters: frozenset[str]
    extra: Mapping[str, bytes]


def read(path: Path) -> ProgramArchive:
    """Read an archive.

    Raises:
        UserError: If the file is missing, damaged, or of another layout or version.
        NotAllowed: If it holds anything but a program, tensors and text.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive)
    except NotAllowed as error:
        raise NotAllowed(f"{path} holds more than a program and tensors: {error}") from error
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"{path} is not a whole .pt2 file: {first_line(error)}") from error
    except UserError as error:
        raise UserError(f"{path} is not a program that can be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        raise UserError(f"{path} is not a program that can be read: {first_line(error)}") from error


def printable(value: object) -> str:
    """Format a value from a file for one line of a message: short, without control characters."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _read_archive(archive: zipfile.ZipFile) -> ProgramArchive:
    entries = _check_entries(archive)

    def content(name: str, default: bytes | None = None) -> bytes:
        if name not in entries and default is not None:
            return default
        if name not in entries:
            raise UserError(f"it lacks {name}")
        return archive.read(entries[name])

    expected = (("archive_format", b"pt2"), ("archive_version", b"0"))
    for name, value in (*expected, ("byteorder", sys.byteorder.encode())):
        if content(name, value if name == "byteorder" else None).strip() != value:
            raise UserError(f"its {name} is not {value.decode()}")
    text = content(_MODEL)
    program = json.loads(text)
    major = program["schema_version"]["major"]
    if major != SCHEMA_VERSION:
        raise UserError(
            f"its program is of version {printable(major)}, and {SCHEMA_VERSION} is read: "
            "export it with a torch of today"
        )
    storages: dict[str, Tensor] = {}
    tensors, parameters = {}, set()
    for config in _CONFIGS:
        folder = config.rpartition("/")[0]
        for name, payload in json.loads(content(config))["config"].items():
            if payload["use_pickle"] is not False:
                raise NotAllowed(f"{printable(name)} is pickled")
            entry = f"{folder}/{payload['path_name']}"
            dtype = payload["tensor_meta"]["dtype"]
            if entry not in storages:
                storages[entry] = _read_storage(name, content(entry), dtype)
            if DTYPES.get(dtype) is not storages[entry].dtype:
                raise NotAllowed(f"{printable(name)} reads the bytes of another dtype")
            if name in tensors:
                raise UserError(f"{printable(name)} is both a weight and a constant")
            tensors[name] = _view_tensor(name, storages[entry], payload["tensor_meta"])
            if payload["is_param"] is True:
                parameters.add(name)
    extra = {
        name.removeprefix("extra/"): content(name) for name in entries if name.startswith("extra/")
    }
    return ProgramArchive(program, text, tensors, frozenset(parameters), extra)


def _check_entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The archive's entries by name, without their common folder.

    All are stored uncompressed, and together they are no larger than the file.
    """
    entries: dict[str, zipfile.ZipInfo] = {}
    roots = set()
    for info in archive.infolist():
        # zipfile cuts a name at a NUL; another reader may not.
        root, _, name = info.orig_filename.partition("/")
        roots.add(root)
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", root) or not _ENTRY_PATTERN.fullmatch(name):
            raise NotAllowed(f"the entry {printable(info.orig_filename)} is not allowed")
        if name in entries:
            raise NotAllowed(f"the entry {printable(info.orig_filename)} is there twice")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise NotAllowed(
                f"the entry {printable(info.orig_filename)} is compressed or encrypted"
            )
        entries[name] = info
    # Overlapping entries can add up to more than the file.
    size = sum(info.file_size for info in entries.values())
    if size > Path(archive.filename or "").stat().st_size:
        raise NotAllowed(f"its entries are {size} bytes, more than the file")
    if len(roots) > 1:
        raise NotAllowed(f"its entries lie in {len(roots)} folders")
    return entries


def _read_storage(name: str, content: bytes, dtype: object) -> Tensor:
    if not isinstance(dtype, int) or dtype not in DTYPES:
        raise NotAllowed(f"{printable(name)} is of the dtype {printable(dtype)}")
    kind = DTYPES[dtype]
    if not content:
        return torch.empty(0, dtype=kind)
    if len(content) % kind.itemsize:
        raise UserError(f"the bytes of {printable(name)} are no whole numbers")
    if kind == torch.bool:  # kernels rely on 0 or 1
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).bool()
    return torch.frombuffer(bytearray(content), dtype=kind)


def _view_tensor(name: str, storage: Tensor, meta: Mapping[str, Any]) -> Tensor:
    """View the bytes as a tensor; torch refuses a view beyond them."""
    if meta["layout"] != STRIDED_LAYOUT:
        raise NotAllowed(f"{printable(name)} has the layout {printable(meta['layout'])}")
    sizes, strides = ([parse_integer(v) for v in meta[key]] for key in ("sizes", "strides"))
    offset = parse_integer(meta["storage_offset"])
    size = math.prod(sizes)
    if size > len(storage) and size * storage.itemsize > MAX_EXPANDED_BYTES:
        raise UserError(f"{printable(name)} is {size} numbers where the file has {len(storage)}")
    return storage.as_strided(sizes, strides, offset)


def parse_integer(value: Mapping[str, Any]) -> int:
    """Parse a size, which the file writes as `{"as_int": 3}`.

    Raises:
        NotAllowed: If it is not a plain integer.
    """
    number = value.get("as_int")
    if len(value) != 1 or type(number) is not int or not 0 <= number < 2**63:
        raise NotAllowed(f"a tensor has the size {printable(value)}")
    return number


def parse_string(value: object) -> str:
    """Return a name from the file.

    Raises:
        NotAllowed: If it is not a string.
    """
    if not isinstance(value, str):
        raise NotAllowed(f"the name {printable(value)} is not allowed")
    return value
