"""Commands and scripts in several processes, as torchrun starts them."""

import socket
import subprocess
import sys
from pathlib import Path

import kd_support as support

SPREAD = Path(__file__).parent / "fsdp_on_cpu.py"


def start(
    cwd: Path, *arguments: object, world: int = 2, spread: bool = False, script: Path | None = None
) -> list[subprocess.Popen]:
    """The command, or a script, in several processes, as torchrun would; `spread` with FSDP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**support.environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    common |= {"ACCELERATE_USE_FSDP": str(spread)}
    program = [str(script)] if script else [str(SPREAD)] if spread else ["-m", "kd"]
    command = [sys.executable, *program, *map(str, arguments), "--device", "cpu"]
    return [
        subprocess.Popen(
            command,
            cwd=cwd,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[str, str]]:
    """What they print, when all have ended well."""
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs
