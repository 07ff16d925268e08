"""Signs of life: a host that goes silent ends the others with a line, before JAX aborts them.

Mostly a lost host breaks a connection, and JAX raises an error. One that hangs, or whose machine
loses its power, breaks none; and of two devices of a host, one may see the error and the other wait
for it. Then the only sign is that there is none. JAX watches that too, but ends the process from
within, with the stack of its own code: its limit (`hosts.JAX_HEARTBEAT_SECONDS`) must be longer than this one.
"""

import itertools
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

run_path: Path | None = None  # the folder of this process's run, once it is known

SECONDS_BETWEEN_SIGNS = 2.0  # seconds between signs
# Seconds without one that make a host count as lost; it gives them while it compiles.
MAX_SILENT_SECONDS = 30.0
_KEY_PREFIX = "dsdistill/alive/"


def start(client: Any, host: int) -> None:
    """From now on give signs of life, and end this process when another host stops giving them.

    Args:
        client: JAX's, of the key-value store on host 0.
        host: This one.
    """
    threading.Thread(target=_send_and_watch, args=(client, host), daemon=True).start()


def resume_advice() -> str:
    """How a run goes on that has lost a host."""
    where = f"--resume --out {run_path}" if run_path else "--resume"
    return f"the run continues from its last checkpoint with {where}, on any number of hosts"


def _send_and_watch(client: Any, host: int) -> None:
    heard: dict[str, tuple[str, float]] = {}
    for count in itertools.count():
        try:
            client.key_value_set(f"{_KEY_PREFIX}{host}", str(count), allow_overwrite=True)
            signs = dict(client.key_value_dir_get(_KEY_PREFIX))
        except RuntimeError:
            return  # host 0 is gone, and JAX says so
        now = time.monotonic()
        for name, sign in signs.items():
            if heard.get(name, ("", now))[0] != sign:
                heard[name] = sign, now
            elif now - heard[name][1] > MAX_SILENT_SECONDS:
                _abort(name.removeprefix(_KEY_PREFIX))
        time.sleep(SECONDS_BETWEEN_SIGNS)


def _abort(host: str) -> NoReturn:
    print(
        f"\ndsdistill: host {host} has given no sign of life for {MAX_SILENT_SECONDS:.0f} s: {resume_advice()}",
        file=sys.__stderr__,
        flush=True,
    )
    os._exit(1)
