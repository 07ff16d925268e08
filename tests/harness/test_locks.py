"""One process works in a run's folder; a dead one holds nothing."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsdistill.harness.runs import locks, run_folder
from dsdistill.harness.runs.run_folder import RunError

HOLDER = """
import sys, time
from pathlib import Path
from dsdistill.harness.runs import run_folder as runs
run = runs.start(Path(sys.argv[1]), {"steps": 1}, result="result")
print("begun", flush=True)
time.sleep(60)
"""
# All of them come to each folder at the same moment, which is the worst one.
RIVAL = """
import sys, time
from pathlib import Path
from dsdistill.harness.runs import run_folder as runs
begun = []
for i, folder in enumerate(sorted(Path(sys.argv[1]).iterdir())):
    time.sleep(max(0.0, float(sys.argv[2]) + 0.03 * i - time.time()))
    try:
        begun.append(runs.start(folder / "run", {"by": sys.argv[3]}, result="result"))
        print(folder.name, flush=True)
    except runs.RunError as error:
        assert "in use" in str(error) or "already holds a run" in str(error), error
time.sleep(1)
"""


def _start(folder: Path, *, resume: bool = False) -> run_folder.Run:
    return run_folder.start(folder, {"steps": 1}, result="result", resume=resume)


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    yield process
    process.kill()
    process.wait()


def test_a_living_run_is_refused_to_others_and_a_killed_one_is_not(holder, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match=f"run is in use by process {holder.pid}: wait until"):
        _start(tmp_path / "run", resume=True)
    with pytest.raises(RunError, match="already holds a run"):
        _start(tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with _start(tmp_path / "run", resume=True) as run:
        assert run.resumed


def test_of_many_that_start_at_once_exactly_one_begins(tmp_path):
    names = [f"{i:02}" for i in range(40)]
    for name in names:
        (tmp_path / name).mkdir()
    when = str(time.time() + 2.5)
    command = [sys.executable, "-c", RIVAL, tmp_path, when]
    rivals = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(3)
    ]
    begun = [line for process in rivals for line in process.communicate()[0].split()]
    assert all(process.returncode == 0 for process in rivals)
    assert sorted(begun) == names


def test_a_closed_run_leaves_no_lock_file_and_can_be_resumed_in_the_same_process(tmp_path):
    with _start(tmp_path) as run, pytest.raises(RunError, match="another run of this process"):
        _start(tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    run.close()
    with _start(tmp_path, resume=True):
        run.close()  # an old handle closes nothing of others
        assert (tmp_path / locks.LOCK_FILE).exists()


def test_a_run_that_is_dropped_gives_its_folder_free(tmp_path):
    _start(tmp_path)
    assert not (tmp_path / locks.LOCK_FILE).exists()


def test_a_refused_start_leaves_nothing(tmp_path):
    with pytest.raises(RunError, match="no run to resume"):
        _start(tmp_path, resume=True)
    assert not any(tmp_path.iterdir())


def test_a_forked_child_neither_holds_nor_removes_the_lock(tmp_path):
    """As a worker that loads images, and outlives its killed parent."""
    run = _start(tmp_path)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        del run
        os.write(write, b"1" if (tmp_path / locks.LOCK_FILE).exists() else b"0")
        time.sleep(60)
        os._exit(0)
    try:
        assert os.read(read, 1) == b"1"
        with pytest.raises(RunError, match="in use"):
            _start(tmp_path, resume=True)
        run.close()
        _start(tmp_path, resume=True).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lock_file_that_was_replaced_is_tried_again(tmp_path, monkeypatch):
    """Its holder removes it between our opening and our locking."""
    real, calls = locks.os.open, []

    def slow(path, *rest):
        handle = real(path, *rest)
        calls.append(path)
        if len(calls) == 1:
            Path(path).unlink()
        return handle

    with monkeypatch.context() as patch:
        patch.setattr(locks.os, "open", slow)
        lock = locks.acquire(tmp_path)
    assert len(calls) == 2
    with pytest.raises(locks.LockHeld):
        locks.acquire(tmp_path)
    lock.release()
    assert not any(tmp_path.iterdir())


def test_a_lock_that_is_sent_to_another_process_holds_nothing(tmp_path):
    lock = locks.acquire(tmp_path)
    pickle.loads(pickle.dumps(lock)).release()
    with pytest.raises(locks.LockHeld):
        locks.acquire(tmp_path)
    lock.release()


def test_without_locks_of_the_system_a_run_starts_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    with _start(tmp_path) as run:
        assert [path.name for path in run.folder.iterdir()] == ["config.json"]
