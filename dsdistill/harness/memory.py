"""Free memory, and the check that planned work fits into it."""

import sys
from pathlib import Path

import psutil

from dsdistill.harness.errors import UserError

_CGROUP = Path("/sys/fs/cgroup")


def available() -> int:
    """Bytes that this process can still allocate: free memory, or what a container leaves."""
    free = psutil.virtual_memory().available
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # The file cache counts as used, but the system frees it on demand.
        used -= int(stat["active_file"]) + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return free
    return free if limit == "max" else min(free, max(int(limit) - used, 0))


def peak() -> int:
    """Peak resident size of this process so far, in bytes."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Unix only

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # KiB except on macOS


def require(needed: int, purpose: str, remedy: str) -> None:
    """Refuse work that would not fit into memory, with both figures in the message.

    Args:
        needed: Bytes that the work takes.
        purpose: Subject of the message, such as "ZCA whitening".
        remedy: End of the message, such as "use a smaller --image-size".

    Raises:
        UserError: If more bytes are needed than available.
    """
    free = available()
    if needed > free:
        raise UserError(
            f"{purpose} needs {format_bytes(needed)}, {format_bytes(free)} is free: {remedy}"
        )


def format_bytes(size: float) -> str:
    """Format a byte count, such as 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
