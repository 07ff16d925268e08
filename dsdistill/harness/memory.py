"""How much memory there is, asked before it is needed."""

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
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, max(int(limit) - used, 0))


def peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def require(needed: int, purpose: str, remedy: str) -> None:
    """Refuse, with the figures, work that would not fit into memory.

    Raises:
        UserError: If `needed` bytes are more than is available.
    """
    free = available()
    if needed > free:
        raise UserError(f"{purpose} needs {readable(needed)}, {readable(free)} is free: {remedy}")


def readable(size: float) -> str:
    """A byte count for people, such as 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
