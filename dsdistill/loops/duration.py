"""The expected duration of a KIP run, and its live progress, observed from outside the loop."""

import contextlib
import math
from collections.abc import Callable, Iterator

from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.runs import progress
from dsdistill.loops import timing
from dsdistill.loops.plan import Plan, Span
from dsdistill.loops.selection import Candidate
from dsdistill.methods import kip
from dsdistill.methods.initial_support import Support
from dsdistill.methods.kip import KipObjective


class KipDuration:
    """Says how long a run will take: before it begins, and by its own first steps."""

    def __init__(self, plan: Plan, support: Support, train: Examples) -> None:
        self._plan, self._support, self._train = plan, support, train

    def announce(self, done: int) -> None:
        """Say how long the run will take before it begins, if its first two steps take long.

        Args:
            done: Steps that are done already.
        """
        plan, n = self._plan, len(self._support.images)
        pairs = n * (timing.FLOAT64_COST * n + plan.target_batch)  # as if all were with targets
        total, tiles, measured = 0.0, [], []
        for span in plan.spans:
            steps = span.end - min(max(done, span.first), span.end)
            optimizer, networks = span.phase.objective.optimizer, span.phase.objective.networks
            tiles = [
                timing.time_tile(network, self._train, min(steps, 2) * pairs, optimizer)
                for network in networks
            ]
            long = [tile for tile in tiles if tile is not None]  # the others take next to nothing
            total += steps * pairs * sum(t.seconds / t.pairs for t in long) / len(networks)
            measured += long
        if tiles[0] is not None:  # of the network that validates
            validations = plan.spans[-1].validations_left(done) + (done == 0)
            images = plan.closing_images + validations * plan.validation_images
            total += timing.prediction_seconds(images, n, *tiles[0])
        if measured:
            progress.announce_duration(total, "tile", *measured[-1])

    @contextlib.contextmanager
    def observe(self, span: Span, done: int) -> Iterator[Callable[[kip.Step, Candidate], None]]:
        """Live progress of a phase; its first line says how long all that is left will take.

        Args:
            span: The phase.
            done: Steps of the run that are done already.

        Yields:
            A function to call after each step, with the step and the best candidate so far.
        """
        later = [other for other in self._plan.spans if other.number > span.number]
        later_seconds = sum(other.phase.steps * self._step_seconds(other) for other in later)
        later_validations = sum(other.validations_left(0) for other in later)
        timer, announced = timing.StepTimer(len(span.phase.objective.networks)), False
        unit = "warm-up step" if span.is_warm_up else "step"

        def display(step: kip.Step, best: Candidate) -> None:
            nonlocal announced
            here, seconds = step.done - span.first, timer.seconds(step)
            if seconds is not None and not announced and step.done < span.end:
                validations = span.validations_left(step.done) + later_validations
                images = self._plan.closing_images + validations * self._plan.validation_images
                left = (span.end - step.done) * seconds + later_seconds
                n = len(self._support.images)
                left += timing.prediction_seconds(images, n, seconds, step.pairs)
                progress.announce_duration(left, unit, seconds, step.pairs)
                announced = True
            if announced or step.done == span.end:
                rate = {"pairs/s": progress.format_amount(step.pairs / step.seconds)}
                known = {} if math.isnan(best.accuracy) else {"validation": best.accuracy}
                show(here, loss=step.loss, **known, **rate)

        with progress.bar(span.phase.steps, f"{unit}s", start=done - span.first) as show:
            yield display

    def _step_seconds(self, span: Span) -> float:
        """Seconds of a step of a later phase, by two steps that are thrown away."""
        plan, objective = self._plan, span.phase.objective
        assert isinstance(objective, KipObjective), "a warm-up is one of kernels of pixels"
        return timing.step_seconds(
            objective, self._support, self._train, plan.target_batch, seed=plan.seed
        )
