"""Ctrl-C and SIGTERM as a flag that a loop polls.

Python runs a signal's handler between any two instructions, also inside a callback of JAX or of the
garbage collector, where an exception is printed and lost. So inside `watch` the first signal only
sets a flag, which the loop checks after each step; a later one raises KeyboardInterrupt at once,
and one more ends the process. Outside `watch` the first signal raises, or if it arrives in a
callback, raises when that returns; the flag stays set for a later loop.
"""

import _weakrefset
import contextlib
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

Value = TypeVar("Value")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds within which a second signal counts as the first: a launcher passes on a Ctrl-C that the
# terminal has sent to its processes as well.
ECHO_SECONDS = 1.0
# CPU seconds after which a signal that arrived in a callback is raised again.
RETRY_SECONDS = 0.02


class StopInterrupt(KeyboardInterrupt):
    """Stop of a command by a signal; the message says what is kept and how to continue."""


class StopFlag:
    """The handler of both signals.

    Attributes:
        requested: Whether a stop was requested.
        is_polled: Whether a running loop polls the flag.
        is_finished: Whether the work that the signals would end is done.
    """

    def __init__(self) -> None:
        self.requested = False
        self.is_polled = False
        self.is_finished = False
        self._since = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and now - self._since < ECHO_SECONDS:
            return
        first, self.requested, self._since = not self.requested, True, now
        if self.is_polled and first:
            # Not print: the signal may have arrived in the middle of one.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step; a second signal stops at once\n")
            return
        if not first:
            for handled in SIGNALS:
                signal.signal(handled, signal.SIG_DFL)
        self._interrupt(frame)

    def _interrupt(self, frame: FrameType | None) -> None:
        """Raise now, or in a callback, which would lose the exception, as soon as it has returned.

        No thread does this: starting one may wait for a lock that the interrupted code holds. Nor
        SIGALRM, which other libraries use.
        """
        if not _in_callback(frame) or not hasattr(signal, "setitimer"):
            raise KeyboardInterrupt

        def retry(number: int, frame: FrameType | None) -> None:
            if not self.is_polled and not self.is_finished:
                self._interrupt(frame)

        signal.signal(signal.SIGVTALRM, retry)
        signal.setitimer(signal.ITIMER_VIRTUAL, RETRY_SECONDS)

    def check(self) -> None:
        """End the current work if a stop was requested.

        Raises:
            KeyboardInterrupt: If a stop was requested.
        """
        if self.requested:
            raise KeyboardInterrupt


def _in_callback(frame: FrameType | None) -> bool:
    """Whether an exception raised in this frame would be printed and lost."""
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    files = {weakref.__file__, _weakrefset.__file__}
    while frame is not None:
        code = frame.f_code
        if code in callbacks or code.co_name == "__del__" or code.co_filename in files:
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def handle_signals() -> Iterator[StopFlag]:
    """Handle both signals for a command: raise KeyboardInterrupt, or set the flag inside `watch`.

    An ignored signal stays ignored, as SIGINT is in a shell's background job.

    Yields:
        The flag. In a thread other than the main one, and where another library handles the
        signals, it is never set.
    """
    flag, before = StopFlag(), {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, flag)
    try:
        yield flag
    finally:
        flag.is_finished = True
        for number, handler in before.items():
            if signal.getsignal(number) is flag:
                signal.signal(number, handler)


@contextlib.contextmanager
def watch() -> Iterator[StopFlag]:
    """Let the first signal set a flag instead of raising; for a loop that checks after each step.

    Yields:
        The flag; already set if the exception of an earlier signal was lost.
    """
    current = [signal.getsignal(number) for number in SIGNALS]
    flags = [handler for handler in current if isinstance(handler, StopFlag)]
    with contextlib.nullcontext(flags[0]) if flags else handle_signals() as flag:
        was_polled, flag.is_polled = flag.is_polled, True
        try:
            yield flag
        finally:
            flag.is_polled = was_polled


@contextlib.contextmanager
def explain_stop(command: str = "", result: Path | None = None) -> Iterator[None]:
    """Turn an interrupt into a message that says what is kept and how to continue.

    Args:
        command: Command line that continues, as from `shell.resume_line`; empty if nothing has
            been written.
        result: File whose presence means that the run is complete.

    Raises:
        StopInterrupt: If the block was interrupted.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        message = f"stopped; continue with `{command}`"
        if not command:
            message = "stopped before the run began: nothing was written"
        elif result is not None and result.exists():
            message = f"stopped; {result} is complete"
        raise StopInterrupt(message) from error


def call_interruptibly(work: Callable[[], Value]) -> Value:
    """Call a function that spends minutes outside Python, where no signal handler can run.

    A signal ends the wait for it. The work continues in its thread, and ends with the process.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = work()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]
