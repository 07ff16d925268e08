"""The transfer set of a corpus: its training texts and copies of them, for a teacher to answer.

The copies lie on disk, named by all that they depend on:

    DIR/<SHA-256 of the key>/key.json             the key as text
                             copies-00012.safetensors   the copies of `SHARD_ROWS` rows

A shard is written atomically and has a checksum, and a copy is a function of its row, its number
and the seed: what a kill interrupts is continued, to the same bits. A shard that does not match its
checksum is reported in one line and made anew.

A transfer set has no labels. A copy says something else than its original, and often its opposite:
it is the teacher that answers it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from dsdistill.harness import checksums
from dsdistill.harness.errors import UserError
from dsdistill.harness.files import remove_temporaries, write_bytes, write_json
from dsdistill.harness.runs import locks, progress
from kd.data.text.corpus import TextPart

FORMAT_VERSION = 1  # part of the key: raise it when the same options would give other copies
SHARD_ROWS = 256  # whose copies a kill loses at most
COPIES, COPIES_OF_PAIRS = 20, 10  # of a row, as in the papers
_KEY = "transfer_set"  # of the description in a shard


class Augmentation(Protocol):
    """A method that makes copies of texts."""

    def copies_of(
        self, row: int, texts: tuple[str, ...], language: str | None = None
    ) -> list[tuple[str, ...]]:
        """The copies of a row: a function of the arguments and of what `record` says."""
        ...

    def record(self) -> dict[str, Any]:
        """All that the copies of given texts depend on, JSON-compatible."""
        ...


@dataclass(frozen=True, eq=False)
class _Shard:
    """Copies of consecutive rows: texts of each column, and their number for each row."""

    texts: list[list[str]]
    counts: list[int]


@dataclass(frozen=True, eq=False)
class TransferSet:
    """Training texts and their copies.

    Attributes:
        part: The n training texts, then the copies in the order of their originals; without labels.
        rows: Number of the training row that each is, or is a copy of.
        originals: Number n of the training texts.
    """

    part: TextPart
    rows: Int[np.ndarray, " m"]
    originals: int

    def __len__(self) -> int:
        return len(self.part)


def default_copies(part: TextPart) -> int:
    """Number of copies of a row where none is asked for: fewer of pairs."""
    return COPIES if len(part.texts) == 1 else COPIES_OF_PAIRS


def build(part: TextPart, augmentation: Augmentation, folder: Path) -> TransferSet:
    """Make the transfer set of training texts, or read what there is of it.

    Args:
        part: Training texts, or pairs.
        augmentation: Makes the copies. Those that are alike, or like their original, count once.
        folder: Folder of any number of transfer sets; created with its parents.

    Raises:
        UserError: If there are no texts, or texts are lists of tokens or messages.
        OSError: If the folder cannot be written.
    """
    _require_texts(part)
    columns = [list(column) for column in part.texts]
    key = {
        "format": FORMAT_VERSION,
        "texts": checksums.json_digest([columns, part.languages]),
        "augmentation": augmentation.record(),
    }
    inner = folder / checksums.json_digest(key)
    inner.mkdir(parents=True, exist_ok=True)
    try:
        lock = locks.acquire(inner, needed=False)
        remove_temporaries(inner)
    except locks.LockHeld:  # another process writes the same
        lock = None
    try:
        write_json(inner / "key.json", key)
        copies, counts = _copies(part, augmentation, inner)
    finally:
        if lock is not None:
            lock.release()
    n = len(part)
    rows = np.concatenate([np.arange(n), np.repeat(np.arange(n), counts)])
    texts = tuple([*column, *more] for column, more in zip(columns, copies, strict=True))
    languages = part.languages and tuple(part.languages[i] for i in rows)
    return TransferSet(TextPart(texts, None, languages), rows, n)


def distinct_copies(augmentation: Augmentation, part: TextPart, row: int) -> list[tuple[str, ...]]:
    """The copies of a row without those that are like another or like the original.

    Args:
        augmentation: Makes the copies.
        part: Training texts, or pairs.
        row: Number of the row.
    """
    texts = tuple(column[row] for column in part.texts)
    language = part.languages[row] if part.languages else None
    copies = augmentation.copies_of(row, texts, language)
    return [copy for copy in dict.fromkeys(copies) if copy != texts]


def _require_texts(part: TextPart) -> None:
    if not len(part):
        raise UserError("there are no training texts of which copies could be made")
    if not all(isinstance(column[0], str) for column in part.texts):
        raise UserError(
            "copies are made of texts, and not of tagged tokens or conversations, whose tags and "
            "answers they would not fit"
        )


def _copies(
    part: TextPart, augmentation: Augmentation, folder: Path
) -> tuple[list[list[str]], list[int]]:
    """The copies of all rows, a list for each column of texts, and their number for each row."""
    total = len(part)
    ranges = [range(i, min(i + SHARD_ROWS, total)) for i in range(0, total, SHARD_ROWS)]
    files = [folder / f"copies-{number:05}.safetensors" for number in range(len(ranges))]
    shards = [_read(path, len(part.texts)) for path in files]
    done = sum(len(rows) for rows, shard in zip(ranges, shards, strict=True) if shard is not None)
    if done < total:
        with progress.bar(total, "texts", start=done) as show:
            for number, rows in enumerate(ranges):
                if shards[number] is None:
                    shards[number] = shard = _make(part, augmentation, rows)
                    _write(files[number], shard)
                    done += len(rows)
                    show(done)
    whole = [shard for shard in shards if shard is not None]
    columns = range(len(part.texts))
    texts = [[text for shard in whole for text in shard.texts[i]] for i in columns]
    return texts, [count for shard in whole for count in shard.counts]


def _make(part: TextPart, augmentation: Augmentation, rows: range) -> _Shard:
    copies = [distinct_copies(augmentation, part, row) for row in rows]
    columns = range(len(part.texts))
    texts = [[copy[i] for of_row in copies for copy in of_row] for i in columns]
    return _Shard(texts, [len(of_row) for of_row in copies])


def _write(path: Path, shard: _Shard) -> None:
    arrays: dict[str, np.ndarray] = {"counts": np.array(shard.counts, np.int32)}
    for i, column in enumerate(shard.texts):
        encoded = [text.encode("utf-8", "surrogatepass") for text in column]
        arrays[f"bytes{i}"] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays[f"lengths{i}"] = np.array([len(text) for text in encoded], np.int32)
    write_bytes(path, checksums.pack(_KEY, json.dumps(_place(path)), arrays))


def _read(path: Path, columns: int) -> _Shard | None:
    """The copies in a shard; None if it is not there or cannot be used."""
    if not path.exists():
        return None
    try:
        content = checksums.load(path, _KEY, kind="a shard of a transfer set")
    except UserError as error:
        progress.say(f"{error}: made anew")
        return None
    if content.description != _place(path):
        progress.say(f"{path} is of another transfer set: made anew")
        return None
    counts = content.arrays["counts"].tolist()
    return _Shard([_texts(content.arrays, i) for i in range(columns)], counts)


def _place(path: Path) -> str:
    """Folder, and so key, and name of a shard."""
    return f"{path.parent.name}/{path.name}"


def _texts(arrays: Mapping[str, np.ndarray], column: int) -> list[str]:
    content = arrays[f"bytes{column}"].tobytes()
    ends = np.cumsum(arrays[f"lengths{column}"]).tolist()
    starts = [0, *ends[:-1]]
    return [
        content[start:end].decode("utf-8", "surrogatepass")
        for start, end in zip(starts, ends, strict=True)
    ]
