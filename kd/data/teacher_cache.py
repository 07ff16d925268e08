"""Teachers' answers on disk, so that a view of an image is shown to a teacher once.

    DIR/<SHA-256 of the key>/key.json              what the answers depend on, in clear
                             static.json           index of a table: one row an image
                             epoch-00012.json      index of an epoch's views, in order of its steps
                             chunks/<SHA-256>.safetensors

Every view of a training is a function of the key, so an entry is named by its epoch alone. An
index is written last and atomically, and names its chunks by their contents: a killed epoch leaves
chunks that nothing names, and processes that write one entry at once cannot mix their rows.
Whatever does not match its checksum, its key or its form is said in one line and not used.

Source of the idea that teacher and student must see one view: Beyer et al. (2022),
arXiv:2106.05237.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsdistill.harness.checksums import file_digest
from dsdistill.harness.errors import UserError, one_line
from dsdistill.harness.runs import locks, progress
from dsdistill.harness.runs.run_folder import write_bytes
from kd.data import top_k
from kd.data.top_k import StoredLogits

FORMAT_VERSION = 1  # part of the key: raise it when the same answers would be stored differently
CHUNK_BYTES = 1 << 24  # of one file, and so of the memory that writing takes
MAX_INDEX_BYTES = 1 << 24  # no whole index is larger
ABANDONED_SECONDS = 7 * 24 * 3600  # seconds after which a chunk that no index names is swept away


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of names, types, shapes and bytes of a module's `state_dict`, in order of names."""
    sha = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()


@dataclass(frozen=True, eq=False)
class CachedLogits:
    """A checked entry, read where it is asked for: its chunks are mapped, not loaded.

    Attributes:
        chunks: Mapped tensors of each chunk.
        starts: First row of each chunk.
        classes: k.
        rows: n.
    """

    chunks: list[StoredLogits]
    starts: Int[np.ndarray, " chunks"]
    classes: int
    rows: int

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, rows: slice | Int[np.ndarray, " m"]) -> Float[Tensor, "m k"]:
        """Logits, or log-probabilities of an entry that keeps the largest alone, of these rows."""
        wanted = np.arange(*rows.indices(self.rows)) if isinstance(rows, slice) else rows
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < self.rows:
            raise IndexError(f"rows must be in 0 to {self.rows - 1}, got {wanted}")
        answers = torch.empty(len(wanted), self.classes)
        chunk = np.searchsorted(self.starts, wanted, "right") - 1
        for number in np.unique(chunk):
            here = np.flatnonzero(chunk == number)
            local = torch.from_numpy(wanted[here] - self.starts[number])
            found = top_k.select_rows(self.chunks[number], local)
            answers[torch.from_numpy(here)] = top_k.decode(found, self.classes)
        return answers


@dataclass(frozen=True)
class TeacherCache:
    """The answers that one key leads to; made by `open_cache`.

    Attributes:
        folder: Named by the key's SHA-256.
        top: Log-probabilities kept of each row; None for all logits in float32.
        lock: Held while this is used, so that nobody clears the folder; None where another process
            that uses the same answers holds it.
    """

    folder: Path
    top: int | None
    lock: locks.Lock | None = field(default=None, repr=False, compare=False)

    def open(self, name: str, rows: int, classes: int) -> CachedLogits | None:
        """An entry, checked as a whole now and mapped into memory; None if it cannot be used.

        Args:
            name: Such as `static` or `epoch-00012`.
            rows, classes: What it must have.
        """
        path = self._index(name)
        try:
            return (
                _open_entry(path, self.folder.name, rows, classes, self.top)
                if path.exists()
                else None
            )
        except Exception as error:  # damage shows in many ways, and each is mended by new answers
            why = one_line(error)
            progress.say(f"teacher cache: {path} is not used ({why}): computed anew")
            return None

    def load(self, name: str, rows: int, classes: int) -> Float[Tensor, "n k"] | None:
        """All rows of an entry at once, as `open` finds them."""
        entry = self.open(name, rows, classes)
        return None if entry is None else entry[:]

    def save(self, name: str, logits: Float[Tensor, "n k"]) -> None:
        """Write an entry that is in memory."""
        with self.writing(name) as write:
            write(logits)

    @contextmanager
    def writing(self, name: str) -> Iterator[Callable[[Float[Tensor, "m k"]], None]]:
        """Write an entry row by row; it exists once the block has ended without an error.

        Args:
            name: Such as `static` or `epoch-00012`; an older entry of that name is replaced.

        Yields:
            `write(logits)`: adds rows; at most one chunk is held in memory.

        Raises:
            ValueError: If logits are not finite, or rows differ in length.
            OSError: If the disk is full or cannot be written.
        """
        path, writer = self._index(name), _Writer(self.folder / "chunks", self.top)
        yield writer.add
        writer.flush()
        index = {"key": self.folder.name, "classes": writer.classes, "chunks": writer.written}
        write_bytes(path, _json_bytes({"index": index, "sha256": _strict_json_digest(index)}))

    def _index(self, name: str) -> Path:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name) or name == "key":
            raise ValueError(f"an entry's name is of small letters, digits and -, got {name!r}")
        return self.folder / f"{name}.json"


def open_cache(folder: Path, key: Mapping[str, Any], *, top: int | None) -> TeacherCache:
    """The answers under `folder` that belong to a key.

    Args:
        folder: Created with its parents; any number of keys share it.
        key: JSON-compatible; everything that the answers depend on: data, teacher, the recipe's
            changes of images, seed, batch size, share of a process.
        top: Keep so many of the largest log-probabilities in half precision; None keeps all
            logits, exactly.

    Raises:
        UserError: If `top` is not positive, or the folder cannot be made.
        ValueError: If the key is not JSON-compatible.
    """
    if top is not None and top < 1:
        raise UserError(f"--cache-top must be at least 1, got {top}")
    whole = {"format": FORMAT_VERSION, "top": top, "key": dict(key)}
    inner = folder / _strict_json_digest(whole)
    try:
        (inner / "chunks").mkdir(parents=True, exist_ok=True)
        lock = _lock(inner)
        write_bytes(inner / "key.json", _json_bytes(whole))
        _remove_abandoned(inner)
    except OSError as error:
        raise UserError(f"--cache {folder} cannot be used ({error}): choose another") from error
    return TeacherCache(inner, top, lock)


def _lock(folder: Path) -> locks.Lock | None:
    try:
        return locks.acquire(folder, needed=False)
    except locks.LockHeld:
        return None


class _Writer:
    """Rows on their way into chunks of equal length."""

    def __init__(self, folder: Path, top: int | None) -> None:
        self.folder, self.top = folder, top
        self.classes = self.held = 0
        self.parts: list[StoredLogits] = []
        self.written: list[dict[str, Any]] = []

    def add(self, logits: Float[Tensor, "m k"]) -> None:
        if logits.ndim != 2 or self.classes not in (0, logits.shape[1]):
            raise ValueError(f"expected rows of {self.classes} logits, got {tuple(logits.shape)}")
        if not torch.isfinite(logits).all():
            raise ValueError("a teacher's logits must be finite: NaN or infinity among them")
        self.classes = logits.shape[1]
        row = top_k.expected_forms(1, self.classes, self.top).values()
        length = max(1, CHUNK_BYTES // sum(t.itemsize * math.prod(shape) for t, shape in row))
        for part in logits.split(length):
            self.parts.append(top_k.encode(part, self.top))
            self.held += len(part)
            if self.held >= length:
                self._write(length)

    def flush(self) -> None:
        if self.held:
            self._write(self.held)

    def _write(self, count: int) -> None:
        """The first `count` rows that are held, as a file named by its contents."""
        joined, rows = top_k.join_rows(self.parts), torch.arange(self.held)
        content = safetensors.torch.save(top_k.select_rows(joined, rows[:count]))
        sha256 = hashlib.sha256(content).hexdigest()
        write_bytes(self.folder / f"{sha256}.safetensors", content)
        self.written.append({"sha256": sha256, "rows": count})
        self.parts, self.held = [top_k.select_rows(joined, rows[count:])], self.held - count


def _open_entry(path: Path, key: str, rows: int, classes: int, top: int | None) -> CachedLogits:
    """Raises, with what is wrong, unless every byte is as it was written."""
    index = _read_index(path)
    _require(index["key"] == key, "it belongs to another key")
    lengths = [chunk["rows"] for chunk in index["chunks"]]
    _require(all(type(n) is int and n > 0 for n in lengths), "a chunk has no rows")
    _require(index["classes"] == classes, f"it has {index['classes']} classes, not {classes}")
    _require(sum(lengths) == rows, f"it has {sum(lengths)} rows, not {rows}")
    ends = np.cumsum([0, *lengths])
    folder = path.parent / "chunks"
    chunks = [_open_chunk(folder, c["sha256"], c["rows"], classes, top) for c in index["chunks"]]
    return CachedLogits(chunks, ends[:-1], classes, rows)


def _read_index(path: Path) -> dict[str, Any]:
    _require(path.is_file() and path.stat().st_size <= MAX_INDEX_BYTES, "the index is no such file")
    stored = json.loads(path.read_text())
    _require(
        _strict_json_digest(stored["index"]) == stored["sha256"],
        "the index does not match its checksum",
    )
    return stored["index"]


def _open_chunk(
    folder: Path, sha256: str, rows: int, classes: int, top: int | None
) -> StoredLogits:
    """A chunk's tensors, mapped; a checksum keeps damage out, the rest keeps strangers out."""
    _require(bool(re.fullmatch("[0-9a-f]{64}", sha256)), "a chunk's name is no checksum")
    path = folder / f"{sha256}.safetensors"
    _require(path.is_file(), f"chunk {sha256[:12]} is missing")
    _require(file_digest(path) == sha256, f"chunk {sha256[:12]} does not match its checksum")
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    form = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    _require(
        form == top_k.expected_forms(rows, classes, top), f"chunk {sha256[:12]} has another form"
    )
    _require(
        top_k.are_valid(tensors, classes), f"chunk {sha256[:12]} holds what no teacher answers"
    )
    return tensors


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left; a living one writes each chunk anew."""
    named: set[str] = set()
    for path in folder.glob("[!.]*.json"):
        with suppress(Exception):  # a damaged index names nothing
            named |= {chunk["sha256"] for chunk in _read_index(path)["chunks"]}
    for path in (*folder.glob(".*"), *(folder / "chunks").iterdir()):
        with suppress(FileNotFoundError):  # another process was faster
            if path.stem not in named and time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise ValueError(why)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _strict_json_digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its names and its white space.

    Raises:
        ValueError: If it is none.
    """
    try:
        text = json.dumps(value, sort_keys=True, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"the key of a teacher cache must be JSON-compatible: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()
