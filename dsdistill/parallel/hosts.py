"""Several hosts: each runs the same command on the same data, and `jax.distributed` joins them.

Every host holds the same support and takes the same steps; targets are shared out over the devices
of all hosts (`kernels.devices`). Host 0 alone writes and shows progress. What a clock or a file
decides is decided there and sent to the others, for hosts that part wait for each other forever.
A stop by hand is agreed on: all hosts end after the same step. A host that dies ends the run.
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
from jax._src import distributed  # its key-value store, which JAX gives out nowhere else
from jax.experimental import multihost_utils

from dsdistill.harness import stopping
from dsdistill.harness.errors import UserError, first_line
from dsdistill.harness.runs import progress, run_folder
from dsdistill.parallel import devices, heartbeat, launchers

# Seconds of silence after which JAX aborts; `heartbeat` ends the process before that.
JAX_HEARTBEAT_SECONDS = 60
END_BARRIER_SECONDS = 5.0  # seconds after an error in which the others may end as well
HOST_0_LINGER_SECONDS = 2.0  # and more that host 0 stays, over which all are connected
LOST_HOST_ERRORS = (
    RuntimeError,
    ValueError,
)  # JAX's error when a host is lost; of some programs it is NumPy's
Checkpoint = tuple[dict[str, np.ndarray], dict[str, Any]]  # arrays, and the rest
# How it opens.
_JAX_ERROR_PATTERN = "(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): "


@contextlib.contextmanager
def join(hosts: str | None) -> Iterator[None]:
    """Work as one of several hosts, if there are several; before JAX computes anything.

    Args:
        hosts: As the user wrote it, see `cluster.parse`.

    Raises:
        UserError: If the hosts cannot be joined, or one of them is lost.
    """
    where = launchers.parse(hosts)
    if where is None:
        yield
        return
    _initialize(where)
    try:
        with _silence_output(), explain_lost_host():
            yield
    except BaseException:
        # JAX would first wait for the other hosts to end as well, and then abort.
        atexit.register(_exit_after_error)
        raise


def is_first() -> bool:
    """Whether this is host 0, which writes and decides; true of a host on its own."""
    return jax.process_index() == 0


def decide(choose: Callable[[], Any]) -> Any:
    """What host 0 chooses, on every host.

    Args:
        choose: Called on host 0 alone; JSON-compatible.

    Raises:
        UserError: On every host, if `choose` raises it or an OSError on host 0.
    """
    if jax.process_count() == 1:
        return choose()
    answer: dict[str, Any] = {}
    try:
        answer = {"value": choose()} if is_first() else {}
    except (UserError, OSError) as error:
        answer = {"error": str(error)}
    answer = _broadcast(answer)
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def check_same(values: Mapping[str, Any]) -> None:
    """Refuse to go on where a value that all hosts must share is not host 0's.

    Args:
        values: By name; JSON-compatible.

    Raises:
        UserError: On every host, if one differs.
    """
    if jax.process_count() == 1:
        return
    expected, *others = _gather(values)
    for index, found in enumerate(others, start=1):
        for name, value in expected.items():
            if json.dumps(found.get(name)) != json.dumps(value):  # NaN equals NaN
                raise UserError(
                    f"all hosts need the same {name}: host 0 has {value}, "
                    f"host {index} has {found.get(name)}"
                )


def open_run(start: Callable[[], run_folder.Run]) -> run_folder.Run:
    """The run that host 0 starts or resumes; other hosts learn its configuration and write nothing.

    Raises:
        UserError: On every host, if host 0 cannot open its folder.
    """

    runs_here: list[run_folder.Run] = []  # host 0's, with its lock on the folder

    def described() -> list[Any]:
        run = start()
        runs_here.append(run)
        return [str(run.folder), run.config, run.resumed]

    folder, config, resumed = decide(described)
    return (
        runs_here[0] if runs_here else run_folder.Run(Path(folder), config, resumed, writes=False)
    )


def load_checkpoint(run: run_folder.Run) -> Checkpoint | None:
    """Host 0's last checkpoint, or None if there is none."""
    arrays: dict[str, np.ndarray] = {}

    def described() -> list[Any] | None:
        found = run.load_state() if run.resumed else None
        if found is None:
            return None
        arrays.update(found[0])
        return [{name: (str(a.dtype), a.shape) for name, a in arrays.items()}, found[1]]

    answer = decide(described)
    if answer is None:
        return None
    forms, meta = answer
    arrays = arrays or {name: np.zeros(shape, dtype) for name, (dtype, shape) in forms.items()}
    with jax.enable_x64(True):
        return {name: np.asarray(devices.replicate(arrays[name])) for name in forms}, meta


@contextlib.contextmanager
def watch_for_stop() -> Iterator[Callable[[int], bool]]:
    """Watch for a stop by hand during the steps of a run.

    Yields:
        Whether all hosts end after a step, since one was told to stop; called by every host after
            every step, with a number that grows by one from call to call.
    """
    if distributed.global_state.client is not None:  # JAX's own handler tells the other hosts
        yield multihost_utils.reached_preemption_sync_point
        return
    with stopping.watch() as flag:
        yield lambda step: flag.requested


@contextlib.contextmanager
def explain_lost_host(folder: Path | None = None) -> Iterator[None]:
    """Say in one line that a host is lost, and how the run goes on.

    Args:
        folder: Of the run, once it is known.
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


def _initialize(where: dict[str, Any]) -> None:
    if where.get("process_id") == 0:
        _check_port(int(where["coordinator_address"].rpartition(":")[2]))
        progress.say(f"waiting for {where['num_processes']} hosts")
    try:
        jax.distributed.initialize(**where, heartbeat_timeout_seconds=JAX_HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError) as error:
        how = "give --hosts, or --hosts none to run alone" if not where else "check --hosts"
        raise UserError(f"the hosts cannot be joined ({error}): {how}") from error
    signal.signal(signal.SIGINT, _stop_all)
    state = distributed.global_state
    heartbeat.start(state.client, state.process_id)
    with _silence_gloo():
        # Devices connect when they first need each other, and must do so within half a minute of
        # each other: now, not after compilations of different length.
        jax.block_until_ready(devices.replicate([np.zeros(1)]))


def _check_port(port: int) -> None:
    """Refuse a port that is taken: JAX would crash at its end."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"--hosts: cannot listen on port {port}: {reason}") from error


def _stop_all(*_: object) -> None:
    """Ctrl-C: as SIGTERM, which JAX passes on to all hosts. The second one ends this host."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGTERM)


def _broadcast(answer: dict[str, Any]) -> dict[str, Any]:
    """Host 0's answer, on every host: as bytes, after their number."""
    content = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    size = int(devices.replicate(np.array(len(content), np.int32)))
    row = np.zeros(size, np.uint8)
    row[: len(content)] = content[:size]
    return json.loads(bytes(np.asarray(devices.replicate(row))))


def _gather(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every host's values, on every host: as bytes, all rows as long as the longest."""
    content = np.frombuffer(json.dumps(values).encode(), np.uint8)
    size = max(map(int, devices.gather_hosts(np.array(len(content), np.int32))))
    row = np.full(size, ord(" "), np.uint8)
    row[: len(content)] = content
    return [json.loads(bytes(row)) for row in devices.gather_hosts(row)]


@contextlib.contextmanager
def _silence_output() -> Iterator[None]:
    """Host 0 speaks for all; the errors of the others come after this."""
    if is_first():
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


@contextlib.contextmanager
def _silence_gloo() -> Iterator[None]:
    """Gloo, which connects CPUs, announces every connection on standard output."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _exit_after_error() -> None:
    """End after an error, once the others have seen theirs: the end breaks their connections."""
    client: Any = distributed.global_state.client
    with contextlib.suppress(RuntimeError):  # not all of them end, or host 0 has
        client.wait_at_barrier("dsdistill/end", round(1e3 * END_BARRIER_SECONDS))
    if is_first():
        time.sleep(HOST_0_LINGER_SECONDS)
    sys.stdout.flush()
    os._exit(1)
