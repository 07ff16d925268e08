"""Description of the machine, for comparing times."""

import platform
from collections.abc import Iterable
from pathlib import Path

import psutil

from dsdistill.harness import memory

_CPUS = Path("/proc/cpuinfo")


def describe(accelerators: Iterable[str] = ()) -> str:
    """Processor, cores, memory and system, such as `AMD EPYC, 2 cores, 23.5 GiB, Linux x86_64`.

    Args:
        accelerators: Names of the accelerators used; they come last.
    """
    cores = psutil.cpu_count() or 1
    size = memory.format_bytes(psutil.virtual_memory().total)
    system = f"{platform.system()} {platform.machine()}"
    parts = (_processor(), f"{cores} core{'s' * (cores > 1)}", size, system, *accelerators)
    return ", ".join(parts)


def _processor() -> str:
    """Name of the processor; on Linux Python itself does not know it."""
    try:
        lines = _CPUS.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or "unknown processor"
