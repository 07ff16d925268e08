"""What the loops share: lines of metrics, and checkpoints that are those of the run."""

import contextlib
from collections.abc import Callable, Iterator

from dsdistill.harness.runs import metrics_file, run_folder

SECONDS_BETWEEN_CHECKPOINTS = 10.0


@contextlib.contextmanager
def metrics_writer(run: run_folder.Run, done: int) -> Iterator[Callable[..., None]]:
    """A function that records the figures of a step, after the `done` steps that are recorded."""
    if not run.writes:
        yield lambda step, **figures: None
        return
    with metrics_file.Metrics(run.folder, resume_from=done if run.resumed else None) as metrics:
        yield metrics.write


@contextlib.contextmanager
def explain_mismatch(run: run_folder.Run) -> Iterator[None]:
    """Say in one line that a checkpoint is not of this run.

    Raises:
        RunError: If what is done inside finds a key, a type or a value that does not fit.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise run_folder.RunError(
            f"{run.folder / run_folder.CHECKPOINT} is not of this run or of another version "
            f"({reason}){run_folder.REMEDY}"
        ) from error


def require(holds: bool, otherwise: str) -> None:
    """Refuse a part of a checkpoint; inside `explain_mismatch`.

    Raises:
        ValueError: With the reason, unless it holds.
    """
    if not holds:
        raise ValueError(otherwise)
