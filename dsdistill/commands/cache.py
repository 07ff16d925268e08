"""List and clear the cache folder, for `dsdistill cache`.

Only entries that look like this package's own are listed or removed: the same folder may hold the
data sets that torchvision downloads.
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
    """One file or folder in the cache.

    Attributes:
        path: File or folder.
        description: For people: the folder that the images come from, or the kind of result.
        size: Bytes.
        last_used: When it was last read or written, in seconds since 1970.
    """

    path: Path
    description: str
    size: int
    last_used: float


def entries() -> list[CacheEntry]:
    """Every entry of the cache, the largest first."""
    all_entries = [
        *_decoded_images(paths.decoded_images()),
        # The place that earlier versions wrote to.
        *_decoded_images(paths.data_root() / "folders", " (of an earlier version, no longer read)"),
        *_evaluations(paths.evaluations()),
        *_of_kd(paths.cache()),
    ]
    return sorted(all_entries, key=lambda entry: -entry.size)


def run(*, clear: bool, older_than: float | None) -> None:
    """List or remove the entries of the cache.

    Args:
        clear: Remove the entries, and list those that were removed.
        older_than: Restrict to entries that were not used for this number of days.

    Raises:
        UserError: If `older_than` is negative.
    """
    if older_than is not None and older_than < 0:
        raise UserError(f"--older-than must be 0 days or more, got {older_than:g}")
    limit = time.time() - (older_than or 0) * SECONDS_PER_DAY
    chosen = [entry for entry in entries() if older_than is None or entry.last_used < limit]
    if clear:
        chosen = [entry for entry in chosen if _remove(entry.path)]
    for entry in _rows(chosen):
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
        print(
            printable(f"{format_bytes(entry.size):>10}  {date}  {entry.description}  {entry.path}")
        )
    total = format_bytes(sum(entry.size for entry in chosen))
    print(f"{total:>10}  {'removed' if clear else 'kept'} in {paths.cache()} (DSDISTILL_CACHE)")


def _rows(chosen: Sequence[CacheEntry]) -> list[CacheEntry]:
    """One row per entry; the small files of one folder share a row."""
    rows, small = [], {}
    for entry in chosen:
        if entry.path.suffix == ".json":
            small.setdefault(entry.path.parent, []).append(entry)
        else:
            rows.append(entry)
    for folder, files in small.items():
        size, last_used = sum(f.size for f in files), max(f.last_used for f in files)
        rows.append(CacheEntry(folder, f"{len(files)} results of evaluations", size, last_used))
    return rows


def _decoded_images(folder: Path, note: str = "") -> Iterator[CacheEntry]:
    """Decoded image folders, unfinished ones of killed processes included."""
    for path in folder.glob("*"):
        if not path.is_dir() or path.is_symlink():
            continue
        if path.name.startswith(".half-"):
            yield _entry(path, "unfinished decoding")
        elif _KEY.fullmatch(path.name) and {p.name for p in path.iterdir()} <= _ENTRY_FILES:
            index = folders.read_index(path) or {}
            size = f" at {index['image_size']} pixels" if index.get("image_size") else ""
            size = f" as {index['recordings']}" if index.get("recordings") else size
            yield _entry(path, f"{index.get('source', 'decoded images')}{size}{note}")


def _evaluations(folder: Path) -> Iterator[CacheEntry]:
    for path in folder.glob("*.json"):
        if _KEY.fullmatch(path.stem):
            yield _entry(path, "result of an evaluation")


def _of_kd(cache: Path) -> Iterator[CacheEntry]:
    """Teacher outputs of `kd train --cache` and copies of texts that are inside this folder."""
    for key in (*cache.glob("*/key.json"), *cache.glob("*/*/key.json")):
        if re.fullmatch(r"[0-9a-f]{64}", key.parent.name):
            copies = key.parent.parent == paths.transfer_sets()
            yield _entry(key.parent, "copies of texts" if copies else "answers of a teacher")


def _entry(path: Path, description: str) -> CacheEntry:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    stats = [file.stat() for file in files] or [path.stat()]
    size = sum(s.st_size for s in stats) if files else 0
    return CacheEntry(path, description, size, max(s.st_mtime for s in stats))


def _remove(path: Path) -> bool:
    """Remove a file, or a folder that no living process is writing; return whether it is gone."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return True
    try:
        lock = locks.acquire(path, needed=False)
    except locks.LockHeld as holder:
        progress.say(f"{path} is kept, since {holder} is writing it")
        return False
    except FileNotFoundError:  # the process that wrote it has renamed or removed it
        return False
    try:
        # Rename first, so that a process that opens the entry now sees all of it or nothing.
        doomed = path.with_name(f".half-{path.name.removeprefix('.half-')}")
        with suppress(OSError):
            path = path.rename(doomed)
        shutil.rmtree(path)
    finally:
        lock.release()
    return True
