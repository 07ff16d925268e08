"""The long part of a run: checkpointed, resumable, and for KIP validated and the best chosen.

The best support is that of the lowest squared error on the validation images, which is what KIP
minimises on the training images; accuracy on a few hundred images is too coarse to choose by.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dsdistill import kip, label_solve, ridge
from dsdistill.harness import progress, runs
from dsdistill.harness.labeled import Examples
from dsdistill.kernels.networks import Network

CHECKPOINT_EVERY = 10.0  # seconds
VALIDATIONS = 40  # in a run; half a dozen milliseconds each with the fc kernel


@dataclass(frozen=True, eq=False)
class Candidate:
    """A support that may be chosen, and how it does on the validation images."""

    step: int
    images: Float[np.ndarray, "n h w c"]
    labels: Float[np.ndarray, "n k"]
    accuracy: float
    loss: float


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All that a run needs in order to go on: one consistent value, replaced as a whole."""

    done: int
    state: kip.State
    best: Candidate
    seconds: float


Judge = Callable[[int, kip.State], Candidate]


def search(
    run: runs.Run,
    objective: kip.Objective,
    support: kip.Support,
    train: Examples,
    validation: Examples,
    *,
    steps: int,
    target_batch: int,
    seed: int,
) -> tuple[Candidate, float]:
    """Run KIP to the end, from the run's last checkpoint if there is one.

    Returns:
        The best support, and the seconds spent in this and all earlier starts.

    Raises:
        UserError: If the loss is not finite; the last checkpoint stays.
        KeyboardInterrupt: After a checkpoint of the last whole step.
    """
    judge = _judge(objective, validation)
    last = _restored(run, objective, support, judge)
    saved, began = time.monotonic(), time.monotonic() - last.seconds
    every = max(steps // VALIDATIONS, 1)
    stream = kip.distill(
        objective,
        support,
        train,
        steps=steps,
        target_batch=target_batch,
        seed=seed,
        state=last.state,
        done=last.done,
    )
    resume_from = last.done if run.resumed else None
    with (
        runs.Metrics(run.folder, resume_from=resume_from) as metrics,
        progress.bar(steps, start=last.done) as show,
    ):
        try:
            for step in stream:
                best, figures = last.best, {"loss": step.loss}
                if step.done % every == 0 or step.done == steps:
                    found = judge(step.done, step.state)
                    figures |= {
                        "validation_accuracy": found.accuracy,
                        "validation_loss": found.loss,
                    }
                    # Without validation images both are NaN, and the later one is taken.
                    best = best if found.loss > best.loss else found
                metrics.write(step.done, **figures)
                last = Snapshot(step.done, step.state, best, time.monotonic() - began)
                show(step.done, loss=step.loss, validation=best.accuracy)
                if time.monotonic() - saved > CHECKPOINT_EVERY:
                    _save(run, last)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            _save(run, last)
            raise
    _save(run, last)
    return last.best, last.seconds


def accumulated(
    run: runs.Run, network: Network, support: Float[np.ndarray, "n h w c"], train: Examples
) -> tuple[label_solve.Sums, float]:
    """Label Solve's sums over all targets, from the run's last checkpoint if there is one.

    Returns:
        The sums, and the seconds spent in this and all earlier starts.

    Raises:
        KeyboardInterrupt: After a checkpoint of the last whole chunk.
    """
    last, spent = _restored_sums(run)
    saved, began = time.monotonic(), time.monotonic() - spent

    def save() -> None:
        arrays = {name: np.asarray(getattr(last, name)) for name in ("gram_tt", "gram_ty")}
        run.save_state(arrays, {"done": last.done, "seconds": time.monotonic() - began})

    resume_from = last.done if run.resumed else None
    with (
        runs.Metrics(run.folder, resume_from=resume_from) as metrics,
        progress.bar(len(train), "targets", start=last.done) as show,
    ):
        start = last if last.done else None
        try:
            for last in label_solve.accumulate(network, support, train, start):
                seconds = time.monotonic() - began
                metrics.write(last.done, targets_per_second=last.done / seconds)
                show(last.done)
                if time.monotonic() - saved > CHECKPOINT_EVERY:
                    save()
                    saved = time.monotonic()
        except KeyboardInterrupt:
            save()
            raise
    save()
    return last, time.monotonic() - began


def _restored_sums(run: runs.Run) -> tuple[label_solve.Sums, float]:
    """The sums of the last checkpoint and the seconds they took; nothing summed without one."""
    found = run.load_state() if run.resumed else None
    if found is None:
        return label_solve.Sums(0, np.zeros((0, 0)), np.zeros((0, 0))), 0.0
    arrays, meta = found
    return label_solve.Sums(meta["done"], arrays["gram_tt"], arrays["gram_ty"]), meta["seconds"]


def _judge(objective: kip.Objective, validation: Examples) -> Judge:
    """A function that scores a state on the validation images."""
    if not len(validation):  # nothing to choose by
        unknown = float("nan")
        return lambda step, state: Candidate(
            step, np.asarray(state.images), np.asarray(state.labels), unknown, unknown
        )
    validation = kip.resident(validation)
    images, labels = validation.images(), validation.labels()

    def judge(step: int, state: kip.State) -> Candidate:
        x_s, y_s = np.asarray(state.images), np.asarray(state.labels)
        scores = ridge.fit(objective.network, x_s, y_s, objective.ridge)(images)
        accuracy = float((scores.argmax(1) == labels.argmax(1)).mean())
        return Candidate(step, x_s, y_s, accuracy, float(((scores - labels) ** 2).mean() / 2))

    return judge


def _save(run: runs.Run, snapshot: Snapshot) -> None:
    best = snapshot.best
    arrays: dict[str, Any] = {"best.images": best.images, "best.labels": best.labels}
    for i, leaf in enumerate(jax.tree.leaves(snapshot.state)):
        arrays[f"state.{i}"] = np.asarray(leaf)
    run.save_state(
        arrays,
        {
            "done": snapshot.done,
            "seconds": snapshot.seconds,
            "best": {"step": best.step, "accuracy": best.accuracy, "loss": best.loss},
        },
    )


def _restored(
    run: runs.Run, objective: kip.Objective, support: kip.Support, judge: Judge
) -> Snapshot:
    """The last checkpoint, or the start."""
    state = kip.initial_state(objective, support)
    found = run.load_state() if run.resumed else None
    if found is None:
        return Snapshot(0, state, judge(0, state), 0.0)
    arrays, meta = found
    leaves, structure = jax.tree.flatten(state)
    stored = [jnp.asarray(arrays[f"state.{i}"]) for i in range(len(leaves))]
    best = Candidate(images=arrays["best.images"], labels=arrays["best.labels"], **meta["best"])
    return Snapshot(meta["done"], jax.tree.unflatten(structure, stored), best, meta["seconds"])
