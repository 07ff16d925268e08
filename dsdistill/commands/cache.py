"""What is kept in the cache folder, for `dsdistill cache`: list it, clear it.

Nothing is touched that does not look as if it was written here: the folder may be that of the data
sets too, which torchvision downloads.
"""

import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dsdistill.harness import paths
from dsdistill.harness.data import folders
from dsdistill.harness.errors import UserError
from dsdistill.harness.memory import format_bytes
from dsdistill.harness.runs import locks, progress
from dsdistill.harness.text import printable

SECONDS_PER_DAY = 24 * 3600
_KEY = re.compile(r"[0-9a-f]{32}")
_ENTRY_FILES = {"images.npy", folders.INDEX_FILE, locks.LOCK_FILE}


@dataclass(frozen=True)
class CacheEntry:
    """Something in the cache.

    Attributes:
        path: File or folder.
        what: For people: the folder whose images these are, or the kind of result.
        size: Bytes.
        used: When it was last read or written, in seconds since 1970.
    """

    path: Path
    what: str
    size: int
    used: float


def entries() -> list[CacheEntry]:
    """All that is kept, the largest first."""
    everything = [
        *_decoded_images(paths.decoded_images()),
        # Where earlier versions kept them.
        *_decoded_images(paths.data_root() / "folders", " (of an earlier version, no longer read)"),
        *_evaluations(paths.evaluations()),
        *_teacher_answers(paths.cache()),
    ]
    return sorted(everything, key=lambda entry: -entry.size)


def run(*, clear: bool, older_than: float | None) -> None:
    """List or remove what is kept.

    Args:
        clear: Remove it.
        older_than: Only what was not used for this number of days.

    Raises:
        UserError: If the number of days is below 0.
    """
    if older_than is not None and older_than < 0:
        raise UserError(f"--older-than must be 0 days or more, got {older_than:g}")
    limit = time.time() - (older_than or 0) * SECONDS_PER_DAY
    chosen = [entry for entry in entries() if older_than is None or entry.used < limit]
    if clear:
        chosen = [entry for entry in chosen if _remove(entry.path)]
    for entry in _rows(chosen):
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        print(printable(f"{format_bytes(entry.size):>10}  {used}  {entry.what}  {entry.path}"))
    total = format_bytes(sum(entry.size for entry in chosen))
    print(f"{total:>10}  {'removed' if clear else 'kept'} in {paths.cache()} (DSDISTILL_CACHE)")


def _rows(chosen: Sequence[CacheEntry]) -> list[CacheEntry]:
    """One row a folder, and one for all small files of a folder."""
    rows, small = [], {}
    for entry in chosen:
        if entry.path.suffix == ".json":
            small.setdefault(entry.path.parent, []).append(entry)
        else:
            rows.append(entry)
    for folder, files in small.items():
        size, used = sum(f.size for f in files), max(f.used for f in files)
        rows.append(CacheEntry(folder, f"{len(files)} results of evaluations", size, used))
    return rows


def _decoded_images(folder: Path, note: str = "") -> Iterator[CacheEntry]:
    """Decoded images of folders, the halves that killed processes left among them."""
    for path in folder.glob("*"):
        if not path.is_dir() or path.is_symlink():
            continue
        if path.name.startswith(".half-"):
            yield _entry(path, "unfinished decoding")
        elif _KEY.fullmatch(path.name) and {p.name for p in path.iterdir()} <= _ENTRY_FILES:
            index = folders.read_index(path) or {}
            size = f" at {index['image_size']} pixels" if index.get("image_size") else ""
            yield _entry(path, f"{index.get('source', 'decoded images')}{size}{note}")


def _evaluations(folder: Path) -> Iterator[CacheEntry]:
    for path in folder.glob("*.json"):
        if _KEY.fullmatch(path.stem):
            yield _entry(path, "result of an evaluation")


def _teacher_answers(cache: Path) -> Iterator[CacheEntry]:
    """The answers that `kd train --cache` keeps in a folder here."""
    for key in (*cache.glob("*/key.json"), *cache.glob("*/*/key.json")):
        if re.fullmatch(r"[0-9a-f]{64}", key.parent.name):
            yield _entry(key.parent, "answers of a teacher")


def _entry(path: Path, what: str) -> CacheEntry:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    found = [file.stat() for file in files] or [path.stat()]
    size = sum(s.st_size for s in found) if files else 0
    return CacheEntry(path, what, size, max(s.st_mtime for s in found))


def _remove(path: Path) -> bool:
    """Remove a file, or a folder unless a living process writes it; whether it was removed."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return True
    try:
        lock = locks.acquire(path, needed=False)
    except locks.LockHeld as holder:
        progress.say(f"{path} is left: {holder} is writing it")
        return False
    except FileNotFoundError:  # its process has finished it, or given up
        return False
    try:
        # Renamed at once: a process that opens it now finds a whole entry or none.
        doomed = path.with_name(f".half-{path.name.removeprefix('.half-')}")
        with suppress(OSError):
            path = path.rename(doomed)
        shutil.rmtree(path)
    finally:
        lock.release()
    return True
