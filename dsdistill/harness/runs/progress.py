"""Progress of long work: a live bar on a terminal, an occasional plain line elsewhere.

Everything goes to standard error; lines printed during a live bar appear above it.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from dsdistill.harness import text

MAX_FIGURE_CHARACTERS = 60  # of a figure with its name: a bar has one line
SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal

ShowProgress = Callable[..., None]
_shown: ContextVar[bool] = ContextVar("progress is shown", default=True)


@contextmanager
def silenced(silent: bool = True) -> Iterator[None]:
    """Print neither progress nor lines inside the block, in this thread; for calls from Python."""
    token = _shown.set(not silent)
    try:
        yield
    finally:
        _shown.reset(token)


@contextmanager
def bar(total: int, unit: str = "steps", start: int = 0) -> Iterator[ShowProgress]:
    """Show progress and the remaining time.

    Args:
        total: Total units of work.
        unit: What is counted.
        start: Units done before this process (a resumed run); they do not count towards the speed.

    Yields:
        `show(done, **figures)`, which may be called at any rate; figures are named numbers, or
            strings that are shown as they are.
    """
    if sys.stderr.isatty() and _shown.get():
        with _live_bar(total, unit, start) as show:
            yield show
    else:
        yield _plain_lines(total, unit)


@contextmanager
def _live_bar(total: int, unit: str, start: int) -> Iterator[ShowProgress]:
    from rich import progress

    columns = (
        progress.BarColumn(),
        progress.TextColumn(f"{{task.completed:.0f}}/{{task.total:.0f}} {unit}"),
        progress.TextColumn("{task.fields[figures]}", markup=False),  # learner and data names
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=text.console(stderr=True)) as display:
        task = display.add_task("", total=total, completed=start, figures="")

        def show(done: int, **figures: float | str) -> None:
            display.update(task, completed=done, figures=_format_figures(figures))

        yield show


def _plain_lines(total: int, unit: str) -> ShowProgress:
    last = time.monotonic()
    first: tuple[float, int] | None = None  # the first unit compiles: the speed counts after it

    def show(done: int, **figures: float | str) -> None:
        nonlocal first, last
        now = time.monotonic()
        began, done_then = first = first or (now, done)
        if now - last < SECONDS_BETWEEN_LINES and done < total:
            return
        last = now
        words = [f"{done}/{total} {unit}", _format_figures(figures)]
        if done > done_then:
            seconds = (now - began) / (done - done_then) * (total - done)
            words.append(f"{format_clock(seconds)} left")
        say("  ".join(words))

    return show


def track_if_slow(parts: Sequence[slice], unit: str) -> Iterator[slice]:
    """Iterate over slices, with a bar if the time of the first one predicts a long wait.

    Args:
        parts: Consecutive slices of equal size; the last may be smaller.
        unit: What is counted, such as `test images`.
    """
    began = time.monotonic()
    yield from parts[:1]
    if (time.monotonic() - began) * len(parts[1:]) < SECONDS_BETWEEN_LINES:
        yield from parts[1:]
        return
    with bar(parts[-1].stop, unit, start=parts[0].stop) as show:
        show(parts[0].stop)
        for part in parts[1:]:
            yield part
            show(part.stop)


def say(line: str) -> None:
    """Print one line for the user, on standard error."""
    if not _shown.get():
        return
    print(text.printable(line), file=sys.stderr, flush=True)


def note(line: str) -> None:
    """Print one line on a choice made for the user; once, and only in the first process."""
    if _shown.get() and os.environ.get("RANK", "0") == "0":  # as torchrun numbers its processes
        _say_once(line)


@functools.cache
def _say_once(line: str) -> None:
    say(line)


def announce_duration(total: float, unit: str, seconds: float, pairs: int) -> None:
    """Print how long a run will take, extrapolated from a measured part of it.

    Args:
        total: Seconds to the end of the run.
        unit: Name of the measured part, such as `step`.
        seconds: Duration of the measured part.
        pairs: Pairs of images whose kernel it evaluated.
    """
    rate = format_amount(pairs / seconds)
    say(
        f"expected: {format_duration(total)} to the end of the run "
        f"({format_duration(seconds)} per {unit}, {rate} pairs of images per second)"
    )


def format_amount(number: float) -> str:
    """Format a large number, such as 1.2 million."""
    for unit, word in ((1e9, " billion"), (1e6, " million")):
        if number >= unit:
            return f"{number / unit:.3g}{word}"
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def format_duration(seconds: float) -> str:
    """Format a rough duration, such as 12 min or 0.7 s."""
    if seconds < 0.1:
        return f"{1e3 * seconds:.2g} ms"
    for unit, word in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            size = seconds / unit
            return f"{size:.0f} {word}" if size >= 10 else f"{size:.1f} {word}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _format_figures(figures: Mapping[str, float | str]) -> str:
    shown = {name: v if isinstance(v, str) else f"{v:.4g}" for name, v in figures.items()}
    pairs = ((name.replace("_", " "), word) for name, word in shown.items())
    return "  ".join(text.shorten(f"{name} {word}", MAX_FIGURE_CHARACTERS) for name, word in pairs)


def format_clock(seconds: float) -> str:
    """Format a duration as on a clock, such as 1:02:03 or 0:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
