"""Teachers' answers on disk, so that a teacher evaluates each view of an image or text once.

    DIR/<SHA-256 of the key>/key.json              the key, which the answers depend on, as text
                             static.json           index of a table: one row per image
                             part-00003.json       index of a part of the texts or their tokens
                             epoch-00012.json      index of an epoch's views, in order of its steps
                             chunks/<SHA-256>.safetensors

A row is the logits of an image, a text or a token, or a vector of a layer, for which all values are
kept.

Every view of a training is a function of the key, so an entry is named only by its epoch. An
index is written last and atomically, and names its chunks by their contents: a killed epoch leaves
chunks that no index names, and processes that write one entry at once cannot mix their rows. An
entry that does not match its checksum, its key or its form is reported in one line and not used.

Source of the idea that teacher and student must see one view: Beyer et al. (2022),
arXiv:2106.05237.
"""

import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsdistill.harness.checksums import file_digest
from dsdistill.harness.errors import UserError, one_line
from dsdistill.harness.files import write_bytes
from dsdistill.harness.runs import locks, progress
from kd.data import top_k
from kd.data.top_k import StoredLogits

FORMAT_VERSION = 1  # part of the key: raise it when the same logits would be stored differently
CHUNK_BYTES = 1 << 24  # of one file, and so of the memory that writing takes
MAX_INDEX_BYTES = 1 << 24  # a larger index is damaged
_NUMBERS = (bool, int, float, complex)  # attributes of a layer that `architecture` reads
ABANDONED_SECONDS = 7 * 24 * 3600  # age at which a chunk that no index names is removed


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of names, types, shapes and bytes of a module's `state_dict`, in order of names."""
    return hash_tensors(module.state_dict())


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors, in order of names."""
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()


def architecture(module: nn.Module) -> str:
    """SHA-256 of what beside its weights decides what a module computes, as far as it can be seen.

    Equal weights may be those of another function: a model of transformers with another number of
    heads, a layer with another stride or activation. Read are the printed form of the module with
    all of its layers, the configurations of models of transformers without the names of their files
    and versions, and the numbers and flags among each layer's public attributes but `training`.
    """
    described = [repr(module)]
    for name, layer in module.named_modules():
        numbers = {k: v for k, v in vars(layer).items() if not k.startswith("_")}
        numbers.pop("training", None)
        described += [f"{name}.{k}={v!r}" for k, v in numbers.items() if type(v) in _NUMBERS]
        if hasattr(config := getattr(layer, "config", None), "to_dict"):
            values = cast(Any, config).to_dict()
            described += [f"{name}.{k}={v!r}" for k, v in values.items() if _computes(k)]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()


def packages(module: nn.Module) -> str:
    """The packages that the layers of a module are of, with their versions: `torch 2.14.0`.

    Another version may print the same layers otherwise, so architectures are compared only where
    these are equal.
    """
    names = {type(layer).__module__.partition(".")[0] for layer in module.modules()}
    versions = []
    for name in sorted(names):
        with suppress(PackageNotFoundError):  # code of the user's own, or of this project
            versions.append(f"{name} {version(name)}")
    return ", ".join(versions)


def input_hashes(name: str, module: nn.Module) -> dict[str, str]:
    """SHA-256 of a network's weights and, apart, of its layers, by names for messages.

    The name of the second holds the versions of the packages: after an update it is another name,
    so that `Run.require_same` says that nothing can be compared.

    Args:
        name: Name of the network, such as `the teacher`.
        module: The network.
    """
    return {name: fingerprint(module)} | layer_hash(name, module)


def layer_hash(name: str, module: nn.Module) -> dict[str, str]:
    """The second part of `input_hashes`."""
    known = packages(module)
    return {f"layers of {name}" + (f" ({known})" if known else ""): architecture(module)}


def _computes(setting: str) -> bool:
    """Whether a setting of a configuration of transformers may change what the model computes."""
    return not setting.startswith("_") and setting != "transformers_version"


@dataclass(frozen=True, eq=False)
class CachedLogits:
    """A checked entry whose rows are read on access: its chunks are mapped, not loaded.

    Attributes:
        chunks: Mapped tensors of each chunk.
        starts: First row of each chunk.
        classes: Number of classes k.
        rows: Number of rows n.
        temperature: Temperature of the stored probabilities.
    """

    chunks: list[StoredLogits]
    starts: Int[np.ndarray, " chunks"]
    classes: int
    rows: int
    temperature: float = 1.0

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, rows: slice | Int[np.ndarray, " m"]) -> Float[Tensor, "m k"]:
        """Read the logits of rows; log-probabilities if the entry keeps only the largest."""
        return self.read(rows, torch.device("cpu"))

    def read(
        self, rows: slice | Int[np.ndarray, " m"], device: torch.device
    ) -> Float[Tensor, "m k"]:
        """Read rows to a device, on which those that keep only the largest are expanded.

        Args:
            rows: Numbers of the rows, in any order.
            device: Device of the result.
        """
        index = np.arange(*rows.indices(self.rows)) if isinstance(rows, slice) else rows
        if not len(index):
            return torch.empty(0, self.classes, device=device)
        if not 0 <= index.min() <= index.max() < self.rows:
            raise IndexError(f"rows must be in 0 to {self.rows - 1}, got {index}")
        chunk = np.searchsorted(self.starts, index, "right") - 1
        order = np.argsort(chunk, kind="stable")
        parts = []
        for number in np.unique(chunk):
            local = torch.from_numpy(index[chunk == number] - self.starts[number])
            parts.append(top_k.select_rows(self.chunks[number], local))
        stored = top_k.select_rows(top_k.join_rows(parts), torch.from_numpy(np.argsort(order)))
        moved = {name: value.to(device) for name, value in stored.items()}
        return top_k.decode(moved, self.classes) * self.temperature


def join(entries: Sequence[CachedLogits]) -> CachedLogits:
    """The rows of several entries of one cache as those of one.

    Args:
        entries: The entries, in the order of their rows; at least one.
    """
    first, *_ = entries
    ends = np.cumsum([0, *(entry.rows for entry in entries)])
    starts = [entry.starts + end for entry, end in zip(entries, ends[:-1], strict=True)]
    chunks = [chunk for entry in entries for chunk in entry.chunks]
    return replace(first, chunks=chunks, starts=np.concatenate(starts), rows=int(ends[-1]))


@dataclass(frozen=True)
class TeacherCache:
    """The logits of one key; created by `open_cache`.

    Attributes:
        folder: Folder named by the key's SHA-256.
        top: Number of log-probabilities kept of each row; None for all logits in float32.
        temperature: Temperature of these probabilities.
        lock: Lock held while the cache is in use, so that nobody clears the folder; None where
            another process that uses the same logits holds it.
    """

    folder: Path
    top: int | None
    temperature: float = 1.0
    lock: locks.Lock | None = field(default=None, repr=False, compare=False)

    def open(self, name: str, rows: int, classes: int) -> CachedLogits | None:
        """Open an entry, checked as a whole and mapped into memory; None if it cannot be used.

        Args:
            name: Name of the entry, such as `static` or `epoch-00012`.
            rows, classes: Numbers that the entry must have.
        """
        path = self._index(name)
        if not path.exists():
            return None
        try:
            entry = _open_entry(path, self.folder.name, rows, classes, self.top)
            return replace(entry, temperature=self.temperature)
        except Exception as error:  # any damage is mended by computing the logits again
            why = one_line(error)
            progress.say(f"teacher cache: {path} is not used ({why}): computed anew")
            return None

    def load(self, name: str, rows: int, classes: int) -> Float[Tensor, "n k"] | None:
        """Load all rows of an entry at once; None if it cannot be used."""
        entry = self.open(name, rows, classes)
        return None if entry is None else entry[:]

    def has(self, name: str) -> bool:
        """Whether there is an entry of this name, which nobody has checked."""
        return self._index(name).exists()

    def save(self, name: str, logits: Float[Tensor, "n k"]) -> None:
        """Write an entry from memory."""
        with self.write(name) as add:
            add(logits)

    def as_kept(self, logits: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """The logits as the cache gives them back, on their device.

        A training that computes them takes these, so that it learns from the same values as one
        that reads them, such as itself after a stop.
        """
        if self.top is None:
            return logits.detach().float()
        stored = top_k.encode(logits / self.temperature, self.top)
        moved = {name: value.to(logits.device) for name, value in stored.items()}
        return top_k.decode(moved, logits.shape[1]) * self.temperature

    def row_bytes(self, classes: int) -> int:
        """Bytes of a row on disk.

        Args:
            classes: Number of classes.
        """
        return _row_bytes(classes, self.top)

    @contextmanager
    def write(self, name: str) -> Iterator[Callable[[Float[Tensor, "m k"]], None]]:
        """Write an entry part by part; it exists once the block has ended without an error.

        Args:
            name: Name of the entry, such as `static` or `epoch-00012`; an older one is replaced.

        Yields:
            `add(logits)`: adds rows; at most one chunk is held in memory.

        Raises:
            ValueError: If logits are not finite, or rows differ in length.
            OSError: If the disk is full or cannot be written.
        """
        path = self._index(name)
        writer = _Writer(self.folder / "chunks", self.top, self.temperature)
        yield writer.add
        writer.flush()
        index = {"key": self.folder.name, "classes": writer.classes, "chunks": writer.written}
        write_bytes(path, _json_bytes({"index": index, "sha256": _strict_json_digest(index)}))

    def _index(self, name: str) -> Path:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name) or name == "key":
            raise ValueError(f"an entry's name has only small letters, digits and -, got {name!r}")
        return self.folder / f"{name}.json"


def open_cache(
    folder: Path, key: Mapping[str, Any], *, top: int | None, temperature: float = 1.0
) -> TeacherCache:
    """Open the cache of a key under `folder`, or create it.

    Args:
        folder: Folder of the caches of any number of keys; created with its parents.
        key: JSON-compatible values of everything that the logits depend on: data, teacher,
            augmentation, seed, batch size, share of a process.
        top: Number of largest log-probabilities to keep in half precision; None keeps all logits
            exactly.
        temperature: Temperature of the probabilities that are kept. At a higher one than theirs the
            classes that are left out would share far more of the probability than they have.

    Raises:
        UserError: If `top` is not positive, or the folder cannot be created.
        ValueError: If the key is not JSON-compatible.
    """
    if top is not None and top < 1:
        raise UserError(f"--cache-top must be at least 1, got {top}")
    temperature = 1.0 if top is None else temperature
    versioned_key = {"format": FORMAT_VERSION, "top": top, "key": dict(key)}
    if temperature != 1:
        versioned_key["temperature"] = temperature
    inner = folder / _strict_json_digest(versioned_key)
    try:
        (inner / "chunks").mkdir(parents=True, exist_ok=True)
        lock = _lock(inner)
        write_bytes(inner / "key.json", _json_bytes(versioned_key))
        _remove_abandoned(inner)
    except OSError as error:
        raise UserError(f"--cache {folder} cannot be used ({error}): choose another") from error
    return TeacherCache(inner, top, temperature, lock)


def remove_empty(folder: Path) -> None:
    """Remove caches that keep nothing yet, and their folder if nothing else is in it.

    Args:
        folder: Folder of the caches, as for `open_cache`.
    """
    for key in folder.glob("*/key.json"):
        if not any(path.is_file() for path in key.parent.rglob("*.safetensors")):
            shutil.rmtree(key.parent, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()


def _lock(folder: Path) -> locks.Lock | None:
    try:
        return locks.acquire(folder, needed=False)
    except locks.LockHeld:
        return None


class _Writer:
    """Collects rows and writes them as chunks of equal length."""

    def __init__(self, folder: Path, top: int | None, temperature: float) -> None:
        self.folder, self.top, self.temperature = folder, top, temperature
        self.classes = self.held = 0
        self.parts: list[StoredLogits] = []
        self.written: list[dict[str, Any]] = []

    def add(self, logits: Float[Tensor, "m k"]) -> None:
        if logits.ndim != 2 or self.classes not in (0, logits.shape[1]):
            raise ValueError(f"expected rows of {self.classes} logits, got {tuple(logits.shape)}")
        if not torch.isfinite(logits).all():
            raise ValueError("a teacher's logits must be finite: NaN or infinity among them")
        self.classes = logits.shape[1]
        length = max(1, CHUNK_BYTES // _row_bytes(self.classes, self.top))
        for part in (logits if self.temperature == 1 else logits / self.temperature).split(length):
            self.parts.append(top_k.encode(part, self.top))
            self.held += len(part)
            if self.held >= length:
                self._write(length)

    def flush(self) -> None:
        if self.held:
            self._write(self.held)

    def _write(self, count: int) -> None:
        """Write the first `count` of the collected rows, as a file named by its contents."""
        joined, rows = top_k.join_rows(self.parts), torch.arange(self.held)
        content = safetensors.torch.save(top_k.select_rows(joined, rows[:count]))
        sha256 = hashlib.sha256(content).hexdigest()
        write_bytes(self.folder / f"{sha256}.safetensors", content)
        self.written.append({"sha256": sha256, "rows": count})
        self.parts, self.held = [top_k.select_rows(joined, rows[count:])], self.held - count


def _row_bytes(classes: int, top: int | None) -> int:
    row = top_k.expected_forms(1, classes, top).values()
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in row)


def _open_entry(path: Path, key: str, rows: int, classes: int, top: int | None) -> CachedLogits:
    """Open an entry; raise an error with the reason unless every byte is as it was written."""
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
    _require(
        path.is_file() and path.stat().st_size <= MAX_INDEX_BYTES,
        "the index is missing or too large",
    )
    stored = json.loads(path.read_text())
    _require(
        _strict_json_digest(stored["index"]) == stored["sha256"],
        "the index does not match its checksum",
    )
    return stored["index"]


def _open_chunk(
    folder: Path, sha256: str, rows: int, classes: int, top: int | None
) -> StoredLogits:
    """Map a chunk's tensors; the checksum detects damage, the other checks foreign files."""
    _require(bool(re.fullmatch("[0-9a-f]{64}", sha256)), "a chunk's name is not a checksum")
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
        top_k.are_valid(tensors, classes), f"chunk {sha256[:12]} holds values that are not logits"
    )
    return tensors


def _remove_abandoned(folder: Path) -> None:
    """Remove old files of killed processes; a running process writes its chunks again."""
    named: set[str] = set()
    for path in folder.glob("[!.]*.json"):
        with suppress(Exception):  # a damaged index names no chunk
            named |= {chunk["sha256"] for chunk in _read_index(path)["chunks"]}
    for path in (*folder.glob(".*"), *(folder / "chunks").iterdir()):
        with suppress(FileNotFoundError):  # another process has removed it
            if path.stem not in named and time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise ValueError(why)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _strict_json_digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its names and its white space.

    Raises:
        ValueError: If it is not JSON-compatible.
    """
    try:
        text = json.dumps(value, sort_keys=True, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"the key of a teacher cache must be JSON-compatible: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()
