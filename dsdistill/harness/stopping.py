"""A stop by hand or by a scheduler: Ctrl-C and SIGTERM as a flag that a loop asks.

Python runs a signal's handler between any two instructions, in a callback of JAX or of the garbage
collector too, and an exception raised there is printed and lost. So inside `watch` the first signal
sets a flag alone, which the loop asks after each step; a later one raises KeyboardInterrupt at
once, and one more ends the process. Outside it the first one raises, in a callback as soon as that
is over, and the flag stays up for a loop that comes later.
"""

import _weakrefset
import contextlib
import gc
import os
import shlex
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

Value = TypeVar("Value")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds in which a second signal counts as the first: a launcher passes on a Ctrl-C that the
# terminal has sent to its processes as well.
ECHO_SECONDS = 1.0
# Seconds of computing after which a signal that came in a callback is looked at again.
RETRY_SECONDS = 0.02


class StopInterrupt(KeyboardInterrupt):
    """A command that was told to stop; the message says what is kept and how it goes on."""


class StopFlag:
    """The handler of both signals.

    Attributes:
        requested: Whether a stop was asked for.
        waits: Whether a loop is at work that asks for the flag.
        over: Whether the work is over that the signals would end.
    """

    def __init__(self) -> None:
        self.requested = False
        self.waits = False
        self.over = False
        self._since = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and now - self._since < ECHO_SECONDS:
            return
        first, self.requested, self._since = not self.requested, True, now
        if self.waits and first:
            # Not print: the signal may have come in the middle of one.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step; once more ends at once\n")
            return
        if not first:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
        self._interrupt(frame)

    def _interrupt(self, frame: FrameType | None) -> None:
        """Raise, if an exception comes through here; else when the callback is over.

        Not a thread: to start one may wait for a lock that the interrupted code holds. Not SIGALRM,
        which other libraries use.
        """
        if not _in_callback(frame) or not hasattr(signal, "setitimer"):
            raise KeyboardInterrupt

        def again(number: int, frame: FrameType | None) -> None:
            if not self.waits and not self.over:
                self._interrupt(frame)

        signal.signal(signal.SIGVTALRM, again)
        signal.setitimer(signal.ITIMER_VIRTUAL, RETRY_SECONDS)

    def check(self) -> None:
        """End what is at work if a stop was asked for.

        Raises:
            KeyboardInterrupt: If one was.
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
    """Let both signals raise KeyboardInterrupt, and be noticed by every `watch` inside.

    For a command. A signal that is ignored stays so, as SIGINT is in a shell's background.

    Yields:
        The flag. In a thread other than the main one, and where another library handles the
        signals, it follows nothing.
    """
    flag, before = StopFlag(), {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, flag)
    try:
        yield flag
    finally:
        flag.over = True
        for number, handler in before.items():
            if signal.getsignal(number) is flag:
                signal.signal(number, handler)


@contextlib.contextmanager
def watch() -> Iterator[StopFlag]:
    """Let the first signal set a flag instead of raising; for a loop that asks after each step.

    Yields:
        The flag; up already if an earlier exception of a signal was lost.
    """
    current = [signal.getsignal(number) for number in SIGNALS]
    flags = [handler for handler in current if isinstance(handler, StopFlag)]
    with contextlib.nullcontext(flags[0]) if flags else handle_signals() as flag:
        waited, flag.waits = flag.waits, True
        try:
            yield flag
        finally:
            flag.waits = waited


@contextlib.contextmanager
def explain_stop(command: Sequence[str] = (), result: Path | None = None) -> Iterator[None]:
    """Say after a stop by hand what is kept, and how the command goes on.

    Args:
        command: The words of the line that goes on; none before anything is written.
        result: The file whose presence means that nothing is left to do.

    Raises:
        Stopped: If there was a stop.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        message = f"stopped; continue with `{shlex.join(command)}`"
        if not command:
            message = "stopped before the run began: nothing was written"
        elif result is not None and result.exists():
            message = f"stopped; {result} is complete"
        raise StopInterrupt(message) from error


def call_interruptibly(work: Callable[[], Value]) -> Value:
    """Call a function that spends minutes outside Python, where no handler runs before its end.

    A signal ends the wait for it. The work goes on in its thread, and ends with the process.
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
