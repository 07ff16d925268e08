"""Detect hosts that went silent, and end the other hosts with one line before JAX aborts them.

Usually a lost host breaks a connection, and JAX raises an error. A host that hangs, or whose
machine loses power, breaks none; and of two devices of a host, one may see the error while the
other waits for it. Such a loss shows only by silence. JAX watches for that too, but then aborts
with a stack trace of its own code, so its limit (`hosts.JAX_HEARTBEAT_SECONDS`) must be longer than
the one here.
"""

import itertools
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

run_path: Path | None = None  # the folder of this process's run, once it is known

SECONDS_BETWEEN_SIGNS = 2.0
MAX_SILENT_SECONDS = 30.0  # then a host counts as lost; a host that compiles still sends signs
_KEY_PREFIX = "dsdistill/alive/"


def start(client: Any, host: int) -> None:
    """Start to send signs of life, and end this process when another host stops sending them.

    Args:
        client: JAX's client of the key-value store on host 0.
        host: Index of this host.
    """
    threading.Thread(target=_send_and_watch, args=(client, host), daemon=True).start()


def resume_advice() -> str:
    """How to continue a run that has lost a host, for messages."""
    options = f"--resume --out {run_path}" if run_path else "--resume"
    return f"the run continues from its last checkpoint with {options}, on any number of hosts"


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
        f"\ndsdistill: host {host} has given no sign of life for {MAX_SILENT_SECONDS:.0f} s: "
        f"{resume_advice()}",
        file=sys.__stderr__,
        flush=True,
    )
    os._exit(1)
