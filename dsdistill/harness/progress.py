"""Progress of long work: a live bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_EVERY = 10.0  # seconds between lines where there is no terminal

Show = Callable[..., None]


@contextmanager
def bar(total: int, unit: str = "steps", start: int = 0) -> Iterator[Show]:
    """Show progress on standard error.

    Args:
        total: Units of work in all.
        unit: What is counted.
        start: Units already done before now (a resumed run); they do not count as speed.

    Yields:
        `show(done, **figures)`: call it as often as you like; figures are named numbers.
    """
    if sys.stderr.isatty():
        with _live(total, unit, start) as show:
            yield show
    else:
        yield _lines(total, unit, start)


@contextmanager
def _live(total: int, unit: str, start: int) -> Iterator[Show]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.BarColumn(),
        progress.TextColumn(f"{{task.completed:.0f}}/{{task.total:.0f}} {unit}"),
        progress.TextColumn("{task.fields[figures]}"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as display:
        task = display.add_task("", total=total, completed=start, figures="")

        def show(done: int, **figures: float) -> None:
            display.update(task, completed=done, figures=_words(figures))

        yield show


def _lines(total: int, unit: str, start: int) -> Show:
    began = last = time.monotonic()

    def show(done: int, **figures: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_EVERY and done < total:
            return
        last = now
        left = (now - began) / max(done - start, 1) * (total - done)
        line = f"{done}/{total} {unit}  {_words(figures)}  {clock(left)} left"
        print(line, file=sys.stderr, flush=True)

    return show


def _words(figures: dict[str, float]) -> str:
    return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())


def clock(seconds: float) -> str:
    """A duration for people, such as 1:02:03 or 0:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
