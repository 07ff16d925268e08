"""Ctrl-C and SIGTERM as a flag, where an exception could be lost."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from dsdistill.harness import command_line, shell, stopping
from dsdistill.harness.stopping import handle_signals, watch

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def _send(number: int) -> None:
    os.kill(os.getpid(), number)


class Callback:
    """Sends a signal where Python prints an exception and goes on: while an object is removed."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        _send(self.number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_a_callback_stops_the_loop(number):
    before = signal.getsignal(number)
    with handle_signals(), watch() as stop:
        assert not stop.requested
        Callback(number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            stop.check()
    assert signal.getsignal(number) is before


def _compute() -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        pass


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("where", ["removal", "collection", "weak reference"])
def test_a_signal_in_a_callback_outside_a_loop_ends_the_work_as_well(number, where, capsys):
    """JAX has a callback of the garbage collector: exceptions in it are printed and lost."""
    sent = []

    def callback(*_: object) -> None:
        if not sent:
            sent.append(number)
            _send(number)

    def work() -> None:
        if where == "removal":
            Callback(number)
        elif where == "collection":
            gc.collect()
        else:
            weakref.finalize(type("Plain", (), {})(), callback)
        _compute()

    if where == "collection":
        gc.callbacks.append(callback)
    try:
        with handle_signals(), pytest.raises(KeyboardInterrupt):
            work()
    finally:
        if where == "collection":
            gc.callbacks.remove(callback)
    assert "ignored" not in capsys.readouterr().err


def test_a_signal_that_was_lost_before_the_loop_stops_it(monkeypatch):
    monkeypatch.setattr(stopping, "RETRY_SECONDS", 1000.0)
    with handle_signals():
        Callback(signal.SIGTERM)
        with watch() as stop:
            assert stop.requested
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def test_outside_a_loop_a_signal_ends_the_work_at_once():
    with handle_signals(), pytest.raises(KeyboardInterrupt):
        _send(signal.SIGTERM)


def test_a_second_signal_ends_the_loop_at_once_and_an_echo_does_not(monkeypatch):
    with handle_signals(), watch() as stop:
        _send(signal.SIGINT)
        _send(signal.SIGTERM)  # a launcher passes the first one on
        assert stop.requested
        monkeypatch.setattr(stopping, "ECHO_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            _send(signal.SIGINT)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with watch() as stop:
            _send(signal.SIGINT)
            assert not stop.requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_watched():
    found = []

    def work() -> None:
        with watch() as stop:
            found.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_long_work_outside_python_ends_at_a_signal():
    script = (
        "import ctypes, sys\n"
        "from dsdistill.harness import stopping\n"
        "libc = ctypes.CDLL(None)\n"
        "with stopping.handle_signals():\n"
        "    print('begun', flush=True)\n"
        "    stopping.call_interruptibly(lambda: [libc.usleep(900_000) for _ in range(60)])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=20)
    assert error.strip().endswith("KeyboardInterrupt")


def test_interruptible_work_returns_and_raises_as_without():
    assert stopping.call_interruptibly(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        stopping.call_interruptibly(lambda: 1 // 0)


def test_a_command_says_what_is_kept(monkeypatch, capsys):
    class Options:
        pass

    def stopped(_: Options) -> None:
        raise stopping.StopInterrupt("stopped; continue with --resume")

    monkeypatch.setattr(command_line, "_parse", lambda *_: Options())
    with pytest.raises(SystemExit, match=r"^p: stopped; continue with --resume$"):
        command_line.main("p", "", {"work": (Options, stopped)}, "stopped")


def test_a_stop_says_what_is_kept_and_how_to_go_on(tmp_path):
    result = tmp_path / "result"
    kip = shell.resume_line("dsdistill kip", Path("a run"))
    for line, words in (
        ("", "stopped before the run began: nothing was written"),
        (kip, "stopped; continue with `dsdistill kip --resume --out 'a run'`"),
    ):
        with pytest.raises(stopping.StopInterrupt) as caught, stopping.explain_stop(line, result):
            raise KeyboardInterrupt
        assert str(caught.value) == words
    result.touch()
    with (
        pytest.raises(stopping.StopInterrupt) as caught,
        stopping.explain_stop("dsdistill", result),
    ):
        raise KeyboardInterrupt
    assert str(caught.value) == f"stopped; {result} is complete"
