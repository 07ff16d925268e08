"""A KIP run: draw targets, step, validate, keep the best, write a checkpoint.

The run goes on from its last checkpoint, and its result is the same to the bit. How long it will
take is observed from outside, by `duration.KipDuration`.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import run_folder
from dsdistill.loops import checkpoints, selection
from dsdistill.loops.checkpoints import explain_mismatch, metrics_writer, require
from dsdistill.loops.duration import KipDuration
from dsdistill.loops.plan import Plan, Span
from dsdistill.loops.selection import Candidate, Scorer
from dsdistill.methods import kip, outer_loss
from dsdistill.methods.initial_support import Support
from dsdistill.parallel import devices, hosts

DIVERGENCE_FACTOR = 10  # a loss this many times too large is a sign of divergence
DIVERGENCE_STEPS = 10  # and this number of them in a row is the proof
OnStep = Callable[[int, Mapping[str, float]], None]
SNAPSHOT_FIELDS = ("done", "seconds", "lowest", "stale", "limit", "high")  # in a checkpoint


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All that a run needs in order to go on: one consistent value, replaced as a whole.

    Attributes:
        done: Steps of all phases.
        state: Support, labels and the optimizer's memory after them.
        best: The best of the candidates so far.
        seconds: Time spent in all starts.
        lowest: Lowest validation loss of the phase, its start left out: what `patience` goes by. A
            start from a distilled set may be better than the first steps that leave it.
        stale: Validations in a row that found nothing lower.
        limit: A loss above it is a sign of divergence; infinite before a phase's first step.
        high: Steps in a row whose loss was.
    """

    done: int
    state: kip.State
    best: Candidate
    seconds: float
    lowest: float = math.inf
    stale: int = 0
    limit: float = math.inf
    high: int = 0


def run_to_end(
    run: run_folder.Run,
    plan: Plan,
    support: Support,
    train: Examples,
    validation: Examples,
    on_step: OnStep = lambda step, figures: None,
) -> tuple[Candidate, Snapshot]:
    """Run KIP to the end, from the run's last checkpoint if there is one.

    Args:
        run: The folder that metrics and checkpoints are written to.
        plan: What is done.
        support: Where it starts, and which pixels stay.
        train: Targets are drawn from these.
        validation: A fixed part of these scores the supports of the run, all of them its end.
        on_step: Called after each step with its number and its figures.

    Returns:
        The best support, with its figures on all validation images, and the state at the end.

    Raises:
        UserError: If a step does not fit into memory, before anything is computed; if the loss is
            not finite, or stays far above what it was at first, after a checkpoint of the last good
            step.
        RuntimeError, ValueError: If another host is lost, see `hosts.LOST_HOST_ERRORS`; after the
            same checkpoint.
        KeyboardInterrupt: After a checkpoint of the last whole step.
    """
    sample = selection.subset(validation, plan.validation_images, plan.seed)
    score = _make_scorer(plan, sample)
    stored = hosts.load_checkpoint(run)
    for phase in plan.phases:
        phase.objective.check_memory(support, train, plan.target_batch)
    restored = _restore_snapshot(run, stored, plan, support) if stored else None
    duration = KipDuration(plan, support, train)
    duration.announce(restored.done if restored else 0)
    last = good = restored or _first_snapshot(plan, support, score)
    saved = time.monotonic()
    with metrics_writer(run, last.done) as write, hosts.watch_for_stop() as stopping:
        try:
            for span in _spans_left(plan, last.done):
                last = _enter(span, last)
                if _is_out_of_patience(plan, span, last):
                    break  # it had stopped before the checkpoint
                began = time.monotonic() - last.seconds
                with (
                    span.phase.objective.stepper(
                        support, train, plan.target_batch, plan.seed
                    ) as stepper,
                    duration.observe(span, last.done) as observe,
                ):
                    while last.done < span.end and not _is_out_of_patience(plan, span, last):
                        targets = stepper.draw(last.done)
                        step = stepper.step(last.state, targets, last.done)
                        candidate = None
                        if span.is_validated(step.done):
                            candidate = score(step.done, step.state.images, step.state.labels)
                        seconds = time.monotonic() - began
                        reached = _next_snapshot(span, step, last, candidate, train, seconds)
                        observe(step, reached.best)
                        figures = _figures(plan, span, step, candidate)
                        write(reached.done, **figures)
                        on_step(reached.done, figures)
                        last = reached  # a stop before this repeats the step, and writes its line
                        if stopping(last.done):
                            raise KeyboardInterrupt
                        if last.high >= DIVERGENCE_STEPS:
                            raise _divergence_error(span, last, step)
                        if last.high:
                            continue  # perhaps diverging: not worth keeping yet
                        good = last
                        if time.monotonic() - saved > checkpoints.SECONDS_BETWEEN_CHECKPOINTS:
                            _save(run, last)
                            saved = time.monotonic()
        except (UserError, *hosts.LOST_HOST_ERRORS):
            _save(run, good)
            raise
        except KeyboardInterrupt:
            _save(run, last)
            raise
    _save(run, last)
    return _choose_candidate(plan, last, sample, validation), last


def _spans_left(plan: Plan, done: int) -> Iterable[Span]:
    """The phases that are not over after `done` steps."""
    return [span for span in plan.spans if done < span.end]


def _enter(span: Span, last: Snapshot) -> Snapshot:
    """The start of a phase: images and labels as they are, everything else afresh.

    A snapshot from within the phase stays as it is. Its state is brought to where later ones will
    be: otherwise the second step compiles anew.
    """
    if last.done > span.first:
        return replace(last, state=devices.replicate(last.state))
    images, labels = np.asarray(last.state.images), np.asarray(last.state.labels)
    state = span.phase.objective.restart(jnp.asarray(images), jnp.asarray(labels))
    fresh = {"lowest": math.inf, "stale": 0, "limit": math.inf, "high": 0}
    return replace(last, state=devices.replicate(state), **fresh)


def _is_out_of_patience(plan: Plan, span: Span, last: Snapshot) -> bool:
    return not span.is_warm_up and plan.patience is not None and last.stale >= plan.patience


def _next_snapshot(
    span: Span,
    step: kip.Step,
    last: Snapshot,
    candidate: Candidate | None,
    train: Examples,
    seconds: float,
) -> Snapshot:
    """The snapshot after a step, and after the validation if there was one.

    A loss is high beside the phase's first one, and beside that of predicting 0: a start from a
    distilled set has a small first loss, which a healthy run may leave far behind.
    """
    best, lowest, stale = last.best, last.lowest, last.stale
    if candidate is not None:
        best = candidate if selection.is_better(candidate, best) else best
        stale = 0 if candidate.loss < lowest else stale + 1
        lowest = min(lowest, candidate.loss)
    limit = last.limit
    if limit == math.inf:
        zero_loss = outer_loss.zero_value(span.phase.objective.outer, len(train.data.classes))
        limit = DIVERGENCE_FACTOR * max(step.loss, zero_loss)
    high = last.high + 1 if step.loss > limit else 0
    return Snapshot(step.done, step.state, best, seconds, lowest, stale, limit, high)


def _figures(
    plan: Plan, span: Span, step: kip.Step, candidate: Candidate | None
) -> dict[str, float]:
    """What is recorded of a step."""
    figures: dict[str, float] = {"loss": step.loss}
    if len(span.phase.objective.networks) > 1:
        figures["network"] = step.network
    if candidate is not None:
        figures |= {"validation_accuracy": candidate.accuracy, "validation_loss": candidate.loss}
    return figures | ({"phase": span.number} if len(plan.phases) > 1 else {})


def _divergence_error(span: Span, last: Snapshot, step: kip.Step) -> UserError:
    what = f"the loss diverges: for {DIVERGENCE_STEPS} steps in a row above {last.limit:.3g}"
    return span.phase.objective.divergence_error(f"{what}, {step.loss:.3g} at step {step.done}")


def _make_scorer(plan: Plan, validation: Examples, unit: str | None = None) -> Scorer:
    objective = plan.phases[-1].objective
    return selection.scorer(objective.fit, objective.outer, validation, unit=unit)


def _choose_candidate(
    plan: Plan, last: Snapshot, sample: Examples, validation: Examples
) -> Candidate:
    """The better of the best and the last, by all validation images."""
    if len(sample) == len(validation):
        return last.best
    images, labels = np.asarray(last.state.images), np.asarray(last.state.labels)
    end = replace(last.best, step=last.done, images=images, labels=labels)
    candidates = [last.best] if last.best.step == last.done else [last.best, end]
    return selection.choose_final(candidates, _make_scorer(plan, validation, "validation images"))


def _save(run: run_folder.Run, snapshot: Snapshot) -> None:
    best = snapshot.best
    arrays = {"best.images": best.images, "best.labels": best.labels}
    for i, leaf in enumerate(jax.tree.leaves(snapshot.state)):
        arrays[f"state.{i}"] = np.asarray(leaf)
    counts = {name: getattr(snapshot, name) for name in SNAPSHOT_FIELDS}
    figures = {"step": best.step, "accuracy": best.accuracy, "loss": best.loss}
    run.save_state(arrays, counts | {"best": figures})


def _first_snapshot(plan: Plan, support: Support, score: Scorer) -> Snapshot:
    state = plan.phases[0].objective.initial_state(support)
    return Snapshot(0, state, score(0, state.images, state.labels), 0.0)


def _restore_snapshot(
    run: run_folder.Run, stored: hosts.Checkpoint, plan: Plan, support: Support
) -> Snapshot:
    """The snapshot of a checkpoint.

    Raises:
        RunError: If it is not one of this run.
    """
    arrays, meta = stored
    with explain_mismatch(run):
        done = meta["done"]
        require(type(done) is int and 0 <= done <= plan.steps, "done is another")
        state = plan.last_phase(done).objective.initial_state(support)
        leaves, structure = jax.tree.flatten(state)
        values = [arrays[f"state.{i}"] for i in range(len(leaves))]
        for i, (old, new) in enumerate(zip(values, leaves, strict=True)):
            same = old.shape == np.shape(new) and old.dtype == np.asarray(new).dtype
            require(same, f"state.{i} is {old.dtype} {old.shape}")
        best = Candidate(images=arrays["best.images"], labels=arrays["best.labels"], **meta["best"])
        require(best.images.shape == support.images.shape, "the best images' shape is another")
        require(best.labels.shape == support.labels.shape, "the best labels' shape is another")
        counts = {name: meta[name] for name in SNAPSHOT_FIELDS}
        require(all(type(x) in (int, float) for x in counts.values()), "a figure is no number")
    state = jax.tree.unflatten(structure, [jnp.asarray(array) for array in values])
    return Snapshot(state=state, best=best, **counts)
