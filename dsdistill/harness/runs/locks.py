"""A lock on a folder: only one process works in it, and a dead process holds no lock.

It is the operating system's lock on the open file `.lock` (`flock`), which ends with the process,
however that ends; the file itself means nothing, and is removed with the lock. On a network file
system it works between machines if the server supports `flock`: NFS with Linux clients, Lustre
mounted with `flock` and GPFS do. On any other, or on a system without `flock` (Windows), a folder
is used without a lock.
"""

import contextlib
import errno
import os
import socket
import weakref
from pathlib import Path

from dsdistill.harness.runs import progress

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".lock"
MAX_ATTEMPTS = 100  # to open a lock file that its holder removes at the same moment
# Error codes of a file system without locks.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class LockHeld(Exception):
    """Another process holds the lock. The message names it, such as "process 123"."""


class Lock:
    """A lock that is held until `release`, or until the process ends.

    Args:
        path: Path of the lock file.
        handle: Open file descriptor of it; None for a lock that holds nothing.
    """

    def __init__(self, path: Path, handle: int | None) -> None:
        self._handle = handle
        self._release = weakref.finalize(self, _release, path, handle, os.getpid())
        # A process that exits without a release must not remove a file during shutdown.
        self._release.atexit = False
        _LOCKS.add(self)

    def release(self) -> None:
        """Release the folder and remove the lock file; a second call does nothing."""
        self._release()

    def forget(self) -> None:
        """Close the copy that a forked process has inherited; the parent keeps the lock."""
        if self._release.detach() and self._handle is not None:
            os.close(self._handle)

    def __reduce__(self) -> tuple[object, ...]:
        return Lock, (Path(), None)  # a pickled lock holds nothing


def acquire(folder: Path, *, needed: bool = True) -> Lock:
    """Lock an existing folder.

    Args:
        folder: The folder.
        needed: Whether to print a note if the file system has no locks. False for a lock that
            only `dsdistill cache --clear` looks for.

    Raises:
        LockHeld: If another process, or another run of this one, holds it.
        OSError: If the lock file cannot be created.
    """
    path = folder / LOCK_FILE
    if fcntl is None:
        return Lock(path, None)
    for _ in range(MAX_ATTEMPTS):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(handle)
            os.close(handle)
            if error.errno in _UNSUPPORTED:
                if needed:
                    progress.say(
                        f"note: no lock on {folder}: its file system has no locks; do not start a "
                        "second run in it while this one is running"
                    )
                path.unlink(missing_ok=True)
                return Lock(path, None)
            if isinstance(error, BlockingIOError):
                raise LockHeld(holder) from error
            raise
        # The previous holder may have removed the file that we opened: then it locks nothing.
        if _is_at(handle, path):
            os.truncate(handle, 0)
            os.write(handle, f"{os.getpid()} {socket.gethostname()}\n".encode())
            return Lock(path, handle)
        os.close(handle)
    raise LockHeld("another process")


def _holder(handle: int) -> str:
    words = os.read(handle, 300).decode(errors="replace").split()
    if not words or not words[0].isdigit():
        return "another process"
    if words[0] == str(os.getpid()):
        return "another run of this process"
    is_remote = words[1:] and words[1] != socket.gethostname()
    return f"process {words[0]}" + (f" on {words[1]}" if is_remote else "")


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one at that path."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _release(path: Path, handle: int | None, owner: int) -> None:
    if handle is None:
        return
    if os.getpid() == owner:
        with contextlib.suppress(OSError):  # the folder is gone, or no longer writable
            if _is_at(handle, path):
                path.unlink()
    os.close(handle)


# A `flock` belongs to the open file, which a forked child (a worker that loads images) shares: the
# child would hold the folder after its parent was killed.
_LOCKS: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_LOCKS):
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
