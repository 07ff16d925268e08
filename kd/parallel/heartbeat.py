"""Say in one line that another process of a training has died, and which.

torchrun's agent, which `accelerate launch` uses too, names a dead process and ends the others;
there only the error of the broken connection becomes one line. Without an agent, as with srun, with
mpirun and by hand, a process sees nothing but that connection: each writes a heartbeat to the store
of the process group, and the heartbeat that stopped shows whose it was.

Measured on loopback with gloo, two and three processes on two busy cores, one killed by SIGKILL in
the middle of a step; the checkpoint was readable in all cases, all exit codes were 1:

                      others ended after   last lines
torchrun alone        0.2 to 0.7 s         a traceback of each process, then the agent's table
torchrun, heartbeat   5 to 17 s            in one run of four the name of a living process too
by hand alone         6 to 38 s            a traceback of each process, no name
by hand, heartbeat    10 to 21 s           one line: process 1 of 2 has died
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsdistill.harness.errors import UserError
from kd.parallel.engine import Engine

SECONDS_BETWEEN_BEATS = 1.0
SECONDS_UNTIL_DEAD = 3.5  # without a heartbeat
ENDED = b"ended"  # last beat of a process that ends by itself


@contextmanager
def watch(on: Engine, out: Path) -> Iterator[None]:
    """Turn the error after the death of another process into one line.

    Args:
        on: Engine of the training.
        out: Folder of the run, for the message.

    Raises:
        UserError: If another process has died; it names the process unless torchrun does.
    """
    if on.num_processes == 1:
        yield
        return
    store = None if dist.is_torchelastic_launched() else dist.distributed_c10d._get_default_store()
    with nullcontext() if store is None else _heartbeat(store, on.process_index):
        try:
            yield
        except (RuntimeError, dist.DistBackendError) as error:
            if isinstance(error, UserError) or not _is_connection_loss(error):
                raise
            if store is None:
                dead = f"another process of {on.num_processes} has died, which torchrun names"
            else:
                dead = f"{_find_dead(on, store)} of {on.num_processes} has died"
            raise UserError(
                f"{dead}: go on with as many processes and `kd train --resume --out {out}`"
            ) from error


@contextmanager
def _heartbeat(store: Any, rank: int) -> Iterator[None]:
    """Write a beat to the store every second inside the block, and at its end that it is over."""
    over = threading.Event()

    def beat() -> None:
        count = 0
        with suppress(RuntimeError):  # the process that holds the store has died
            while not over.wait(SECONDS_BETWEEN_BEATS):
                count += 1
                store.set(f"beat-{rank}", str(count))
            store.set(f"beat-{rank}", ENDED)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _is_connection_loss(error: Exception) -> bool:
    words = ("closed", "connection", "reset by peer", "broken pipe", "timed out", "timeout")
    return any(word in str(error).lower() for word in words)


def _find_dead(on: Engine, store: Any) -> str:
    """Name the processes without a heartbeat that have not said that they end."""
    others = [rank for rank in range(on.num_processes) if rank != on.process_index]

    def beats() -> dict[int, bytes]:
        return {r: store.get(f"beat-{r}") for r in others if store.check([f"beat-{r}"])}

    try:
        before = beats()
        time.sleep(SECONDS_UNTIL_DEAD)
        after = beats()
    except RuntimeError:
        return "process 0"  # the store was in it
    dead = [str(rank) for rank in others if after.get(rank) == before.get(rank) != ENDED]
    return f"process {', '.join(dead)}" if dead else "another process"
