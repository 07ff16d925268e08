"""Run one command on several hosts, joined by `jax.distributed`.

Every host runs the same command on the same data, holds the same support and takes the same steps;
targets are divided among the devices of all hosts (`devices`). Only host 0 writes files and shows
progress. Decisions that depend on a clock or a file are made on host 0 and broadcast; hosts that
diverge would deadlock. After a stop by hand all hosts end after the same step. A host that dies
ends the run.
"""

import atexit
import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the key-value store, which has no public name
from jax.experimental import multihost_utils

from dsdistill.harness import agreement, stopping
from dsdistill.harness.errors import UserError, first_line
from dsdistill.harness.runs import progress, run_folder
from dsdistill.parallel import devices, heartbeat, launchers

JAX_HEARTBEAT_SECONDS = 60  # silence after which JAX aborts; `heartbeat` acts before that
END_BARRIER_SECONDS = 5.0  # time after an error for the other hosts to end as well
HOST_0_LINGER_SECONDS = 2.0  # extra time of host 0, through which all hosts are connected
LOST_HOST_ERRORS = (RuntimeError, ValueError)  # raised by JAX, or through NumPy, for a lost host
Checkpoint = tuple[dict[str, np.ndarray], dict[str, Any]]  # arrays, and JSON-compatible values
# How the message of such an error begins.
_JAX_ERROR_PATTERN = "(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): "


@contextlib.contextmanager
def join(hosts: str | None) -> Iterator[None]:
    """Work as one of several hosts, if there are several; to be entered before JAX computes.

    Args:
        hosts: Value of `--hosts`, see `launchers.parse`.

    Raises:
        UserError: If the hosts cannot be joined, or one of them is lost.
    """
    arguments = launchers.parse(hosts)
    if arguments is None:
        yield
        return
    _initialize(arguments)
    try:
        with _silence_output(), explain_lost_host():
            yield
    except BaseException:
        # Otherwise JAX would wait for the other hosts to end as well, and then abort.
        atexit.register(_exit_after_error)
        raise


def is_first() -> bool:
    """Whether this is host 0, which writes and decides; True without other hosts."""
    return jax.process_index() == 0


def decide(choose: Callable[[], Any]) -> Any:
    """Return on every host what host 0 chooses.

    Args:
        choose: Function that only host 0 calls; its result is JSON-compatible.

    Raises:
        UserError: On every host, if `choose` raises it or an OSError on host 0.
    """
    if jax.process_count() == 1:
        return choose()
    return agreement.decide(choose, decides=is_first(), broadcast=_broadcast)


def check_same(values: Mapping[str, Any]) -> None:
    """Require that values which all hosts must share equal those of host 0.

    Args:
        values: JSON-compatible values by name.

    Raises:
        UserError: On every host, if a value differs on any.
    """
    if jax.process_count() == 1:
        return
    expected, *others = _gather(values)
    for index, theirs in enumerate(others, start=1):
        for name, value in expected.items():
            if json.dumps(theirs.get(name)) != json.dumps(value):  # NaN equals NaN
                raise UserError(
                    f"all hosts need the same {name}: host 0 has {value}, "
                    f"host {index} has {theirs.get(name)}"
                )


def open_run(start: Callable[[], run_folder.Run]) -> run_folder.Run:
    """Open the run that host 0 starts or resumes; other hosts get its configuration, write nothing.

    Args:
        start: Function that starts or resumes the run; only host 0 calls it.

    Raises:
        UserError: On every host, if host 0 cannot open its folder.
    """

    host_0_runs: list[run_folder.Run] = []  # on host 0 the run, with its lock on the folder

    def start_and_describe() -> list[Any]:
        run = start()
        host_0_runs.append(run)
        return [str(run.folder), run.config, run.resumed]

    folder, config, resumed = decide(start_and_describe)
    if host_0_runs:
        return host_0_runs[0]
    return run_folder.Run(Path(folder), config, resumed, writes=False)


def load_checkpoint(run: run_folder.Run) -> Checkpoint | None:
    """Load host 0's last checkpoint on every host; None if there is none."""
    arrays: dict[str, np.ndarray] = {}

    def load_and_describe() -> list[Any] | None:
        state = run.load_state() if run.resumed else None
        if state is None:
            return None
        arrays.update(state[0])
        return [{name: (str(a.dtype), a.shape) for name, a in arrays.items()}, state[1]]

    description = decide(load_and_describe)
    if description is None:
        return None
    dtypes_and_shapes, meta = description
    arrays = arrays or {
        name: np.zeros(shape, dtype) for name, (dtype, shape) in dtypes_and_shapes.items()
    }
    with jax.enable_x64(True):
        return {n: np.asarray(devices.replicate(arrays[n])) for n in dtypes_and_shapes}, meta


@contextlib.contextmanager
def watch_for_stop() -> Iterator[Callable[[int], bool]]:
    """Watch for a stop by hand during the steps of a run.

    Yields:
        A function that tells whether all hosts must end after a step, because one was asked to
            stop. Every host calls it after every step, with a number that grows by 1 per call.
    """
    if distributed.global_state.client is not None:  # JAX's own handler tells the other hosts
        yield multihost_utils.reached_preemption_sync_point
        return
    with stopping.watch() as flag:
        yield lambda step: flag.requested


@contextlib.contextmanager
def explain_lost_host(folder: Path | None = None) -> Iterator[None]:
    """Turn the error for a lost host into one line that says how to continue the run.

    Args:
        folder: Folder of the run, once it is known.
    """
    heartbeat.run_path = folder
    try:
        yield
    except LOST_HOST_ERRORS as error:
        if jax.process_count() == 1 or not re.match(_JAX_ERROR_PATTERN, str(error)):
            raise
        reason = first_line(error)
        raise UserError(
            f"another host has ended or cannot be reached: {heartbeat.resume_advice()} ({reason})"
        ) from error


def _initialize(arguments: dict[str, Any]) -> None:
    if arguments.get("process_id") == 0:
        _check_port(int(arguments["coordinator_address"].rpartition(":")[2]))
        progress.say(f"waiting for {arguments['num_processes']} hosts")
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=JAX_HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError) as error:
        remedy = "check --hosts" if arguments else "give --hosts, or --hosts none to run alone"
        raise UserError(f"the hosts cannot be joined ({error}): {remedy}") from error
    signal.signal(signal.SIGINT, _stop_all)
    state = distributed.global_state
    heartbeat.start(state.client, state.process_id)
    with _silence_gloo():
        # Devices connect at their first communication, which must happen on all within half a
        # minute: here, before compilations of different length.
        jax.block_until_ready(devices.replicate([np.zeros(1)]))


def _check_port(port: int) -> None:
    """Refuse a port that is in use: JAX would crash at its exit."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(
            f"--hosts: cannot listen on port {port} ({reason}): choose another port on all hosts"
        ) from error


def _stop_all(*_: object) -> None:
    """Handle Ctrl-C as SIGTERM, which JAX forwards to all hosts; a second Ctrl-C ends this host."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGTERM)


def _broadcast(answer: dict[str, Any]) -> dict[str, Any]:
    """Send host 0's answer to every host: first its length, then its bytes."""
    content = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    size = int(devices.replicate(np.array(len(content), np.int32)))
    row = np.zeros(size, np.uint8)
    row[: len(content)] = content[:size]
    return json.loads(bytes(np.asarray(devices.replicate(row))))


def _gather(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Collect the values of all hosts on every host, as bytes padded to the longest."""
    content = np.frombuffer(json.dumps(values).encode(), np.uint8)
    size = max(map(int, devices.gather_hosts(np.array(len(content), np.int32))))
    row = np.full(size, ord(" "), np.uint8)
    row[: len(content)] = content
    return [json.loads(bytes(row)) for row in devices.gather_hosts(row)]


@contextlib.contextmanager
def _silence_output() -> Iterator[None]:
    """Silence every host but host 0; errors are printed after this context."""
    if is_first():
        yield
        return
    with (
        open(os.devnull, "w") as null,
        contextlib.redirect_stdout(null),
        contextlib.redirect_stderr(null),
    ):
        yield


@contextlib.contextmanager
def _silence_gloo() -> Iterator[None]:
    """Hide the lines that Gloo, which connects CPUs, prints for every connection."""
    sys.stdout.flush()
    stdout = os.dup(1)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def _exit_after_error() -> None:
    """Exit after an error once the other hosts have seen theirs: exiting breaks connections."""
    client: Any = distributed.global_state.client
    with contextlib.suppress(RuntimeError):  # another host goes on, or host 0 is gone
        client.wait_at_barrier("dsdistill/end", round(1e3 * END_BARRIER_SECONDS))
    if is_first():
        time.sleep(HOST_0_LINGER_SECONDS)
    sys.stdout.flush()
    os._exit(1)
