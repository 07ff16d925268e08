"""The steps of a KIP run, phase by phase: a stream of snapshots, which `search` writes down.

A run is one phase, or two: with `--warm-up`, steps with a cheap kernel come first. Steps are
numbered through all phases, and each phase starts Adam and its schedule afresh. Supports are
judged with the kernel of the last phase, and those of a warm-up only at its two ends.
"""

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dsdistill.harness.data.labeled_images import Examples, centred_one_hot
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from dsdistill.loops import selection, timing
from dsdistill.loops.selection import Candidate, Scorer
from dsdistill.methods import kip
from dsdistill.methods.initial_support import Support

VALIDATIONS_PER_PHASE = 40  # in a phase
DIVERGENCE_FACTOR = 10  # a loss so many times too large is a sign of divergence
DIVERGENCE_STEPS = 10  # and so many of them in a row are the proof


@dataclass(frozen=True)
class Phase:
    """A stretch of steps that minimise one objective."""

    objective: kip.KipObjective
    steps: int


@dataclass(frozen=True)
class Plan:
    """What a KIP run does.

    Attributes:
        phases: In turn; the last is what the run is for, one before it is a warm-up. The first
            network of the last one judges.
        target_batch: Targets a step.
        seed: Of all draws.
        patience: Stop after so many validations in a row, of the last phase, without an
            improvement; None: never.
        validation_images: Validation images that judge during the run.
        closing_images: Images that are predicted after the last step, for the expected duration.
    """

    phases: tuple[Phase, ...]
    target_batch: int
    seed: int
    patience: int | None = None
    validation_images: int = 1000
    closing_images: int = 0

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(phase.steps for phase in self.phases)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All that a run needs in order to go on: one consistent value, replaced as a whole.

    Attributes:
        done: Steps of all phases.
        state: After them.
        best: Of the candidates so far.
        seconds: Spent in all starts.
        lowest: Validation loss of the phase, the start left out: what `patience` goes by. A start
            from a distilled set may be better than the first steps that leave it.
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


StepRecord = tuple[Snapshot, dict[str, float]]  # with the figures to record of the step


def snapshots(
    plan: Plan, support: Support, train: Examples, judge: Scorer, last: Snapshot
) -> Generator[StepRecord, None, None]:
    """Run KIP on from a snapshot, one step for each item taken.

    Args:
        plan, support, train: What is done, from where, on which targets.
        judge: Of every candidate.
        last: Where to go on; its state belongs to the phase that its steps are in.

    Yields:
        The snapshot after each step, and the figures to record of it.

    Raises:
        UserError: If the loss is not finite, or stays far above what it was at first.
    """
    first = 0
    for number, phase in enumerate(plan.phases, 1):
        if last.done < first + phase.steps:
            start = _enter_phase(phase, last) if last.done <= first else last
            later = _later_cost(plan, plan.phases[number:], support, train)
            for last, figures in _steps(plan, phase, first, support, train, judge, start, later):
                yield last, figures | ({"phase": number} if len(plan.phases) > 1 else {})
        first += phase.steps


def announce(plan: Plan, n: int, train: Examples, done: int) -> None:
    """Say how long a run will take before it begins, if its first two steps take long.

    Args:
        plan, train: As in `snapshots`.
        n: Images in the support.
        done: Steps that are done already.
    """
    pairs = n * (
        timing.FLOAT64_COST * n + plan.target_batch
    )  # of a step, as if all were with targets
    total, first, here, tiles, measured = 0.0, 0, 0, [], []
    for phase in plan.phases:
        here = min(max(done - first, 0), phase.steps)
        steps, first = phase.steps - here, first + phase.steps
        optimizer, networks = phase.objective.optimizer, phase.objective.networks
        tiles = [
            timing.time_tile(each, train, min(steps, 2) * pairs, optimizer) for each in networks
        ]
        long = [tile for tile in tiles if tile is not None]  # the others take next to nothing
        total += steps * pairs * sum(t.seconds / t.pairs for t in long) / len(networks)
        measured += long
    if tiles[0] is not None:  # of the network that validates
        validations = _validations(plan, plan.phases[-1], here) + (done == 0)
        images = plan.closing_images + validations * plan.validation_images
        total += timing.prediction_seconds(images, n, *tiles[0])
    if measured:
        progress.announce_duration(total, "tile", *measured[-1])


def _enter_phase(phase: Phase, last: Snapshot) -> Snapshot:
    """The start of a phase: images and labels as they are, everything else afresh."""
    images, labels = np.asarray(last.state.images), np.asarray(last.state.labels)
    state = kip.restart(phase.objective, jnp.asarray(images), jnp.asarray(labels))
    return replace(last, state=state, lowest=math.inf, stale=0, limit=math.inf, high=0)


def _steps(
    plan: Plan,
    phase: Phase,
    first: int,
    support: Support,
    train: Examples,
    judge: Scorer,
    last: Snapshot,
    later: "_LaterCost",
) -> Generator[StepRecord, None, None]:
    """The steps of one phase, after `first` steps of others."""
    warm_up, end = phase is not plan.phases[-1], first + phase.steps
    every = _validation_interval(plan, phase)
    patience = math.inf if warm_up or plan.patience is None else plan.patience
    if last.stale >= patience:
        return  # it had stopped before the checkpoint
    stream = kip.distill(
        phase.objective,
        support,
        train,
        steps=end,
        target_batch=plan.target_batch,
        seed=plan.seed,
        state=last.state,
        done=last.done,
    )
    nothing = _zero_prediction_loss(len(train.data.classes))
    began = time.monotonic() - last.seconds
    with contextlib.closing(stream), _progress(plan, phase, first, last.done, later) as show:
        for step in stream:
            due = (step.done - first) % every == 0 or step.done == end
            found = judge(step.done, step.state.images, step.state.labels) if due else None
            last = _next_snapshot(step, last, found, nothing, time.monotonic() - began)
            show(step, last.best)
            yield last, _figures(phase, step, found)
            if last.high >= DIVERGENCE_STEPS:
                raise _divergence_error(phase, last, step)
            if last.stale >= patience:
                return


def _next_snapshot(
    step: kip.Step, last: Snapshot, found: Candidate | None, nothing: float, seconds: float
) -> Snapshot:
    """The snapshot after a step, and after the validation if there was one.

    A loss is high beside the phase's first one, and beside that of predicting `nothing`: a start
    from a distilled set has a small first loss, which a healthy run may leave far behind.
    """
    best, lowest, stale = last.best, last.lowest, last.stale
    if found is not None:
        best = found if selection.is_better(found, best) else best
        stale = 0 if found.loss < lowest else stale + 1
        lowest = min(lowest, found.loss)
    limit = last.limit if last.limit < math.inf else DIVERGENCE_FACTOR * max(step.loss, nothing)
    high = last.high + 1 if step.loss > limit else 0
    return Snapshot(step.done, step.state, best, seconds, lowest, stale, limit, high)


def _figures(phase: Phase, step: kip.Step, found: Candidate | None) -> dict[str, float]:
    figures: dict[str, float] = {"loss": step.loss}
    if len(phase.objective.networks) > 1:
        figures["network"] = step.network
    if found is not None:
        figures |= {"validation_accuracy": found.accuracy, "validation_loss": found.loss}
    return figures


def _divergence_error(phase: Phase, last: Snapshot, step: kip.Step) -> UserError:
    what = f"the loss diverges: for {DIVERGENCE_STEPS} steps in a row above {last.limit:.3g}"
    return kip.divergence_error(phase.objective, f"{what}, {step.loss:.3g} at step {step.done}")


def _zero_prediction_loss(k: int) -> float:
    """The loss of a prediction of 0 for every target."""
    return 0.5 * float(np.mean(centred_one_hot(np.arange(k), k) ** 2))


def _validation_interval(plan: Plan, phase: Phase) -> int:
    """Steps from one validation to the next."""
    return max(phase.steps // VALIDATIONS_PER_PHASE, 1) if phase is plan.phases[-1] else phase.steps


def _validations(plan: Plan, phase: Phase, here: int = 0) -> int:
    """After `here` steps of a phase, to its end."""
    every = _validation_interval(plan, phase)
    return -(-phase.steps // every) - here // every


class _LaterCost(NamedTuple):
    """What the phases after one will take: seconds of their steps, and how many validations."""

    seconds: float
    validations: int


def _later_cost(
    plan: Plan, rest: tuple[Phase, ...], support: Support, train: Examples
) -> _LaterCost:
    """As two steps of each say, which are thrown away."""
    size, seed = plan.target_batch, plan.seed
    each = [timing.step_seconds(p.objective, support, train, size, seed=seed) for p in rest]
    seconds = sum(phase.steps * one for phase, one in zip(rest, each, strict=True))
    return _LaterCost(seconds, sum(_validations(plan, phase) for phase in rest))


@contextlib.contextmanager
def _progress(
    plan: Plan, phase: Phase, first: int, done: int, later: _LaterCost
) -> Iterator[Callable[..., None]]:
    """Live progress of a phase; its first line says how long all that is left will take."""
    times, said = timing.StepTimer(len(phase.objective.networks)), False
    unit = "step" if phase is plan.phases[-1] else "warm-up step"

    def display(step: kip.Step, best: Candidate) -> None:
        nonlocal said
        here, seconds = step.done - first, times.seconds(step)
        if seconds is not None and not said and here < phase.steps:
            validations = _validations(plan, phase, here) + later.validations
            images = plan.closing_images + validations * plan.validation_images
            left = (phase.steps - here) * seconds + later.seconds
            left += timing.prediction_seconds(images, len(best.images), seconds, step.pairs)
            progress.announce_duration(left, unit, seconds, step.pairs)
            said = True
        if said or here == phase.steps:
            rate = {"pairs/s": progress.format_amount(step.pairs / step.seconds)}
            known = {} if math.isnan(best.accuracy) else {"validation": best.accuracy}
            show(here, loss=step.loss, **known, **rate)

    with progress.bar(phase.steps, f"{unit}s", start=done - first) as show:
        yield display
