"""What `kd train` asks of a training: one of images, or one of texts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from torch import nn

from kd.data.batching import BatchSource
from kd.objectives.schemes import Objective
from kd.options import TrainOptions
from kd.parallel.engine import Engine
from kd.recipe import Recipe
from kd.training.checkpoint import TrainingState

# Measures a network on the validation data: metrics by name.
Validate = Callable[[nn.Module], Mapping[str, float]]


class Training(Protocol):
    """Networks, data and loss of a training, assembled and checked, nothing written yet."""

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe, in which no field is left to a default."""
        ...

    @property
    def on(self) -> Engine:
        """Device, precision and processes."""
        ...

    @property
    def seed(self) -> int:
        """Seed of all random choices."""
        ...

    @property
    def student_name(self) -> str: ...

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """Names of the teachers; empty to train on labels alone."""
        ...

    @property
    def validation_count(self) -> int | None:
        """Number of validation examples; None if unknown."""
        ...

    def build_objective(self) -> Objective:
        """Build the objective, with its taps and projectors."""
        ...

    def check_options(self) -> None:
        """Refuse options that have no effect on these data.

        Raises:
            UserError: If one is given.
        """
        ...

    def load(self) -> BatchSource:
        """Load the training batches, neither augmented nor with teachers' logits.

        Raises:
            UserError: If there are too few examples for the loss or the number of processes.
        """
        ...

    def check_step(self, objective: Objective, source: BatchSource) -> None:
        """Refuse a loss that does not work with these data and networks, see `training.dry_run`.

        Args:
            objective: The objective, not yet compiled.
            source: Batches from `load`.

        Raises:
            UserError: If the loss raises, is not finite, or trains no weights.
        """
        ...

    def compile(self, objective: Objective, source: BatchSource) -> None:
        """Compile the student.

        Args:
            objective: The objective, which has passed `check_step`.
            source: Batches from `load`.
        """
        ...

    def check_teachers(self) -> None:
        """Report how well each teacher does on validation data, or else on training data.

        Raises:
            UserError: If one does not do well enough.
        """
        ...

    def input_hashes(self) -> dict[str, str]:
        """SHA-256 of all that the training depends on besides its options, by a name for messages.

        Call it before the first step.
        """
        ...

    def prepare(self, objective: Objective, source: BatchSource) -> BatchSource:
        """Augment the training batches and add the teachers' logits where these can be stored.

        Args:
            objective: The objective.
            source: Batches from `load`.
        """
        ...

    def validator(self) -> Validate | None:
        """A function that measures a network on the validation data; None without such data."""
        ...

    def finished(self, state: TrainingState) -> Self:
        """The training with the best weights in its student, and the student's outputs calibrated.

        Args:
            state: State after the last step.
        """
        ...

    def figures(self, state: TrainingState) -> dict[str, Any]:
        """Measure the finished student on validation and test data; describe both for the report.

        The test data are used only here.
        """
        ...

    def latency(self) -> dict[str, float | int]:
        """Measure the finished student's latency on the CPU, in a second or less for most."""
        ...

    def save(self, folder: Path) -> None:
        """Write the student to the folder of its run."""
        ...


class Named(Protocol):
    """A student, as far as every training knows it."""

    @property
    def name(self) -> str: ...


class Parts(Protocol):
    """What the parts of every training have."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def on(self) -> Engine: ...

    @property
    def student(self) -> Named: ...

    @property
    def teacher_names(self) -> tuple[str, ...]: ...


AnyParts = TypeVar("AnyParts", bound=Parts)


@dataclass(frozen=True, eq=False)
class AssembledTraining(Generic[AnyParts]):
    """The members of a `Training` that follow from its parts alike for images and texts.

    Attributes:
        parts: Networks, data and loss.
        options: Options that they were assembled from.
    """

    parts: AnyParts
    options: TrainOptions

    @property
    def recipe(self) -> Recipe:
        return self.parts.recipe

    @property
    def on(self) -> Engine:
        return self.parts.on

    @property
    def seed(self) -> int:
        return self.options.seed

    @property
    def student_name(self) -> str:
        return self.parts.student.name

    @property
    def teacher_names(self) -> tuple[str, ...]:
        return self.parts.teacher_names
