"""Name the process of a training that has died.

Each process writes a heartbeat to the store of the process group. A process whose partner has died
sees only a broken connection; the heartbeat that stopped shows whose it was.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsdistill.harness.errors import UserError
from kd.parallel.engine import Engine

SECONDS_BETWEEN_BEATS = 1.0
SECONDS_UNTIL_DEAD = 3.5  # without a heartbeat


@contextmanager
def watch(on: Engine, out: Path) -> Iterator[None]:
    """Turn the error after the death of another process into one line that names it.

    Args:
        on: Engine of the training.
        out: Folder of the run, for the message.

    Raises:
        UserError: If another process has died.
    """
    if on.num_processes == 1:
        yield
        return
    store = dist.distributed_c10d._get_default_store()
    over = threading.Event()

    def beat() -> None:
        count = 0
        while not over.wait(SECONDS_BETWEEN_BEATS):
            count += 1
            try:
                store.set(f"beat-{on.process_index}", str(count))
            except RuntimeError:  # the process that holds the store has died
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    except (RuntimeError, dist.DistBackendError) as error:
        if isinstance(error, UserError) or not _is_connection_loss(error):
            raise
        raise UserError(_dead_process_message(on, store, out)) from error
    finally:
        over.set()
        thread.join()


def _is_connection_loss(error: Exception) -> bool:
    words = ("closed", "connection", "reset by peer", "broken pipe", "timed out", "timeout")
    return any(word in str(error).lower() for word in words)


def _dead_process_message(on: Engine, store: Any, out: Path) -> str:
    others = [rank for rank in range(on.num_processes) if rank != on.process_index]

    def beats() -> dict[int, bytes]:
        return {r: store.get(f"beat-{r}") for r in others if store.check([f"beat-{r}"])}

    try:
        before = beats()
        time.sleep(SECONDS_UNTIL_DEAD)
        after = beats()
        dead = [rank for rank in others if after.get(rank) == before.get(rank)]
    except RuntimeError:
        dead = [0]  # the store was in this process
    names = ", ".join(map(str, dead)) or "another"
    return (
        f"process {names} of {on.num_processes} has died: go on with as many processes and "
        f"`kd train --resume --out {out}`"
    )
