"""What a KIP run does: phases of steps, and when it validates.

A run is one phase, or two: with `--warm-up`, steps with a cheap kernel come first. Steps are
numbered through all phases, and each phase starts the optimizer and its schedule afresh. Supports
are scored with the kernel of the last phase; those of a warm-up only at its two ends.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from jaxtyping import Array, Float

from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation.held_out import Predict
from dsdistill.kernels.networks import InfiniteNetwork
from dsdistill.methods.initial_support import Support
from dsdistill.methods.kip import State, Step, Targets
from dsdistill.methods.optimizer import Optimizer
from dsdistill.methods.outer_loss import OuterLoss

VALIDATIONS_PER_PHASE = 40


class Stepper(Protocol):
    """Compiled steps of one objective, as `methods.kip.Stepper` documents them."""

    def draw(self, step: int) -> Targets: ...

    def step(self, state: State, targets: Targets, step: int) -> Step: ...


class Objective(Protocol):
    """What steps minimise, as `methods.kip.KipObjective` documents it."""

    @property
    def networks(self) -> tuple[InfiniteNetwork, ...]: ...

    @property
    def optimizer(self) -> Optimizer: ...

    @property
    def outer(self) -> OuterLoss: ...

    @property
    def ridge(self) -> float: ...

    def load_targets(self, train: Examples) -> Examples: ...

    def initial_state(self, support: Support) -> State: ...

    def restart(self, images: Float[Array, "n h w c"], labels: Float[Array, "n k"]) -> State: ...

    def stepper(
        self, support: Support, train: Examples, target_batch: int, seed: int
    ) -> AbstractContextManager[Stepper]: ...

    def fit(
        self,
        images: Float[np.ndarray, "n h w c"],
        labels: Float[np.ndarray, "n k"],
        unit: str | None = None,
    ) -> Predict: ...

    def check_memory(self, support: Support, train: Examples, targets: int) -> None: ...

    def divergence_error(self, what: str) -> UserError: ...


@dataclass(frozen=True)
class Phase:
    """Steps that minimise one objective.

    Attributes:
        objective: What they minimise.
        steps: Number of steps.
    """

    objective: Objective
    steps: int


@dataclass(frozen=True)
class Span:
    """A phase with its place in the run.

    Attributes:
        phase: The phase.
        number: Its number, from 1.
        first: Number of steps before it.
        is_warm_up: Whether another phase follows.
    """

    phase: Phase
    number: int
    first: int
    is_warm_up: bool

    @property
    def end(self) -> int:
        """Number of steps of the run when the phase is over."""
        return self.first + self.phase.steps

    @property
    def validation_interval(self) -> int:
        """Steps from one validation to the next."""
        steps = self.phase.steps
        return steps if self.is_warm_up else max(steps // VALIDATIONS_PER_PHASE, 1)

    def is_validated(self, done: int) -> bool:
        """Whether the support is validated after `done` steps of the run."""
        return (done - self.first) % self.validation_interval == 0 or done == self.end

    def validations_left(self, done: int) -> int:
        """Validations of this phase after `done` steps of the run."""
        here = min(max(done - self.first, 0), self.phase.steps)
        interval = self.validation_interval
        return -(-self.phase.steps // interval) - here // interval


@dataclass(frozen=True)
class Plan:
    """What a KIP run does.

    Attributes:
        phases: In turn; the last is what the run is for, one before it is a warm-up. The first
            network of the last one scores the supports.
        target_batch: Targets per step.
        seed: Seed of all draws.
        patience: Stop after this number of validations in a row, of the last phase, without an
            improvement; None: never.
        validation_images: Validation images that score supports during the run.
        closing_images: Images that are predicted after the last step, for the expected duration.
    """

    phases: tuple[Phase, ...]
    target_batch: int
    seed: int
    patience: int | None = None
    validation_images: int = 1000
    closing_images: int = 0

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The phases with their places."""
        ends = [sum(phase.steps for phase in self.phases[:i]) for i in range(len(self.phases))]
        last = len(self.phases)
        return tuple(
            Span(phase, number, first, number < last)
            for number, (phase, first) in enumerate(zip(self.phases, ends, strict=True), 1)
        )

    def last_phase(self, done: int) -> Phase:
        """The phase of the last of `done` steps; the first phase before any step."""
        return next(span.phase for span in self.spans if done <= span.end)

    @property
    def steps(self) -> int:
        """Number of steps of all phases."""
        return sum(phase.steps for phase in self.phases)
