"""Which process of a training has died, from the beats in a store."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from dsdistill.harness.errors import UserError
from kd.parallel import heartbeat

RESET = RuntimeError("Read error [127.0.0.1]:1: Connection reset by peer")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.HashStore:
    """The store of a process group that nothing else needs."""
    made = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: made)
    monkeypatch.setattr(heartbeat, "SECONDS_BETWEEN_BEATS", 0.02)
    monkeypatch.setattr(heartbeat, "SECONDS_UNTIL_DEAD", 0.5)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    return made


def _watched(error: Exception) -> BaseException:
    """What process 1 of 4 raises instead of an error."""
    on: Any = SimpleNamespace(num_processes=4, process_index=1)
    with pytest.raises(Exception) as caught, heartbeat.watch(on, Path("run")):  # noqa: PT011
        raise error
    return caught.value


def test_the_process_whose_heartbeat_stopped_is_named_and_no_other(store: dist.HashStore) -> None:
    store.set("beat-0", "7")  # killed
    store.set("beat-2", heartbeat.ENDED)  # has seen it, too
    alive = threading.Event()
    on: Any = SimpleNamespace(num_processes=4, process_index=3)

    def live() -> None:
        with heartbeat.watch(on, Path("run")):
            alive.wait()

    other = threading.Thread(target=live)
    other.start()
    try:
        line = str(_watched(RESET))
    finally:
        alive.set()
        other.join()
    assert line.startswith("process 0 of 4 has died: go on with as many processes and `kd train")
    assert store.get("beat-1") == store.get("beat-3") == heartbeat.ENDED


def test_torchruns_agent_names_it_and_nothing_waits(store: dist.HashStore, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    error = _watched(RESET)
    assert isinstance(error, UserError)
    assert str(error).startswith("another process of 4 has died, which torchrun names: go on with")
    assert not store.check(["beat-1"])


def test_another_error_is_not_taken_for_a_death(store: dist.HashStore) -> None:
    error = RuntimeError("the loss is not finite")
    assert _watched(error) is error
