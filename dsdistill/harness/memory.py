"""How much memory there is, asked before it is needed."""

import sys
from pathlib import Path

import psutil

from dsdistill.harness.errors import UserError

_CGROUP = Path("/sys/fs/cgroup")


def available() -> int:
    """Bytes that this process can still take: free memory, or what a container's limit leaves."""
    free = psutil.virtual_memory().available
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # The file cache counts as used, but is given up as soon as memory is asked for.
        used -= int(stat["active_file"]) + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return free
    return free if limit == "max" else min(free, max(int(limit) - used, 0))


def peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Unix only

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # KiB but on macOS


def require(needed: int, purpose: str, remedy: str) -> None:
    """Refuse, with the figures, work that would not fit into memory.

    Raises:
        UserError: If `needed` bytes are more than is available.
    """
    free = available()
    if needed > free:
        raise UserError(
            f"{purpose} needs {format_bytes(needed)}, {format_bytes(free)} is free: {remedy}"
        )


def format_bytes(size: float) -> str:
    """A byte count for people, such as 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
