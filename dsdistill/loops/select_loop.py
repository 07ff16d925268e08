"""The long parts of a selection: passes of exchanges, or scores of crops, with checkpoints."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Float

from dsdistill.harness import stopping
from dsdistill.harness.runs import progress, run_folder
from dsdistill.loops import checkpoints
from dsdistill.loops.checkpoints import explain_mismatch, metrics_writer, require
from dsdistill.methods import ridge_selection
from dsdistill.methods.ridge_selection import Choice, Problem

Arrays = dict[str, np.ndarray]


def choose_by_ridge(
    run: run_folder.Run, problem: Problem, images_per_class: int, sweeps: int
) -> tuple[Choice, float]:
    """Choose images by `ridge_selection`, from the run's last checkpoint if there is one.

    Args:
        run: Folder of checkpoints and figures.
        problem, images_per_class, sweeps: As for `ridge_selection.select`.

    Returns:
        The choice, and the seconds spent in this and all earlier starts.

    Raises:
        KeyboardInterrupt: If stopped by hand, after a checkpoint.
    """
    shape = images_per_class, len(problem.train.data.classes)
    choice, spent = Choice(np.full(shape, ridge_selection.EMPTY), 0, 0, 1.0), 0.0
    if (stored := _load(run)) is not None:
        arrays, meta = stored
        with explain_mismatch(run):
            rows, spent = arrays["rows"], float(meta["seconds"])
            choice = Choice(rows, int(meta["passes"]), int(meta["unchanged"]), float(meta["loss"]))
            require(rows.shape == shape, "the choice has another shape")
            inside = ((rows >= ridge_selection.EMPTY) & (rows < len(problem.train))).all()
            require(bool(inside), "images that the data do not have are chosen")
    total = ridge_selection.passes(images_per_class, sweeps)

    def state() -> tuple[Arrays, dict[str, Any]]:
        meta = {"passes": choice.passes, "unchanged": choice.unchanged, "loss": choice.loss}
        return {"rows": choice.rows}, meta

    stream = ridge_selection.select(problem, images_per_class, sweeps=sweeps, start=choice)
    with (
        _saved(run, spent, state) as (after_step, seconds),
        metrics_writer(run, choice.passes) as write,
        progress.bar(total, "passes", start=choice.passes) as show,
    ):
        for choice in stream:
            write(choice.passes, loss=choice.loss)
            show(choice.passes, loss=choice.loss)
            after_step()
        show(total, loss=choice.loss)
    return choice, seconds()


def score_crops(
    run: run_folder.Run,
    sizes: Sequence[int],
    score: Callable[[int], Iterator[Float[np.ndarray, " n"]]],
) -> tuple[Float[np.ndarray, " t"], float]:
    """Score batches of crops, from the run's last checkpoint if there is one.

    Args:
        run: Folder of checkpoints.
        sizes: Number of crops of each batch.
        score: Function that yields the scores of the batches from a number on.

    Returns:
        Scores of all batches, and the seconds spent in this and all earlier starts.

    Raises:
        KeyboardInterrupt: If stopped by hand, after a checkpoint.
    """
    ends = np.cumsum(sizes)
    scores, done, spent = np.zeros(int(ends[-1]), np.float64), 0, 0.0
    if (stored := _load(run)) is not None:
        arrays, meta = stored
        with explain_mismatch(run):
            done, spent = int(meta["done"]), float(meta["seconds"])
            require(0 <= done <= len(sizes), f"{done} of {len(sizes)} batches are done")
            require(arrays["scores"].shape == scores.shape, "the number of crops is another")
            scores = arrays["scores"].astype(np.float64)

    def state() -> tuple[Arrays, dict[str, Any]]:
        return {"scores": scores}, {"done": done}

    start = int(ends[done - 1]) if done else 0
    with (
        _saved(run, spent, state) as (after_step, seconds),
        progress.bar(len(scores), "crops", start=start) as show,
    ):
        for values in score(done):
            scores[ends[done] - sizes[done] : ends[done]] = values
            show(int(ends[done]))
            done += 1
            after_step()
    return scores, seconds()


@contextmanager
def _saved(
    run: run_folder.Run, spent: float, state: Callable[[], tuple[Arrays, dict[str, Any]]]
) -> Iterator[tuple[Callable[[], None], Callable[[], float]]]:
    """Save the state of a loop from time to time, at its end, and when it is stopped.

    Args:
        run: Folder of the checkpoint.
        spent: Seconds of earlier starts.
        state: Function that returns the state after the last whole step.

    Yields:
        A function to be called after each step, which ends a loop that is stopped by hand; and one
            that returns the seconds of all starts.
    """
    began = time.monotonic() - spent
    saved = time.monotonic()

    def seconds() -> float:
        return time.monotonic() - began

    def save() -> None:
        arrays, meta = state()
        run.save_state(arrays, meta | {"seconds": seconds()})

    with stopping.watch() as flag:

        def after_step() -> None:
            nonlocal saved
            due = time.monotonic() - saved > checkpoints.SECONDS_BETWEEN_CHECKPOINTS
            if due or flag.requested:
                save()
                saved = time.monotonic()
            flag.check()

        yield after_step, seconds
        save()


def _load(run: run_folder.Run) -> tuple[Arrays, dict[str, Any]] | None:
    return run.load_state() if run.resumed else None
