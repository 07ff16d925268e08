"""A command line in this process: what it would print and end with in a process of its own.

Importing JAX and torch takes seconds; here they are imported once for all tests.
"""

import contextlib
import io
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock


def run(
    main: Callable[[], None], program: str, arguments: tuple[object, ...], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with the devices that JAX already has.

    Args:
        main: The function that the command calls.
        program: Name of the command.
        arguments: Words of its line.
        folder: Current folder meanwhile.

    Returns:
        Exit code, output and errors, as `subprocess.run` has them. Warnings are among the errors.
    """
    words = [program, *map(str, arguments)]
    out, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
            mock.patch.object(sys, "argv", words),
            mock.patch("dsdistill.parallel.devices.use_all"),
            _warnings_on(errors),
        ):
            code = _exit_code(main, errors)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    texts = (stream.buffer.getvalue().decode() for stream in (out, errors))  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(words, code, *texts)


def _exit_code(main: Callable[[], None], errors: io.TextIOWrapper) -> int:
    """What the interpreter makes of the end of a program."""
    try:
        main()
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        errors.write(f"{stop.code}\n")
        return 1
    except BaseException:
        errors.write(traceback.format_exc())
        return 1
    return 0


@contextlib.contextmanager
def _warnings_on(errors: io.TextIOWrapper):
    """Write warnings where a program does, instead of to pytest's summary."""

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        errors.write(warnings.formatwarning(message, category, filename, lineno, line))

    with warnings.catch_warnings():
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning):
            warnings.simplefilter("ignore", category)
        warnings.simplefilter("ignore", ResourceWarning)
        warnings.showwarning = show
        yield
