"""What an evaluation finds: one result a training, and rows of all seeds together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsdistill.harness import statistics
from dsdistill.harness.statistics import Summary


@dataclass(frozen=True)
class Result:
    """One learner trained once on one kind of data, and judged once on the test images.

    A training that failed has its reason in `failure` and None for what could not be measured.

    Attributes:
        arm: Kind of data: `distilled`, `distilled-hard`, `distilled-teacher`, `random`, `k-means`,
            `herding` or `full`.
        learner: Name.
        augmented: Whether it was trained with augmentation.
        seed: Of the draw of the data and of the training.
        images: Number it was trained on.
        bytes: Of those images and their labels, as stored.
        rate: The learning rate that was chosen on the validation images; None where there is none.
        accuracy: On the test images, a fraction.
        validation_accuracy: A fraction.
        nll: Of the test images, mean in nats, of probabilities calibrated on the validation images.
        calibration_error: Of the same probabilities, 15 bins, a fraction.
        per_class: Accuracy on the test images of each class; None for a class that has none.
        confusion: Test images by true class (row) and predicted class (column).
        teacher_agreement: Fraction of the test images on which learner and teacher agree.
        teacher_kl: KL(teacher || learner), mean over the test images, in nats.
        train_seconds: Of this training.
        tune_seconds: Of all trainings that chose the rate; counted in the first seed alone.
        peak_memory: Largest size of the process until the end of this training, in bytes.
        facts: What the learner says of itself: `parameters`, `flops` (multiply-adds of one image,
            doubled), `latency_ms` ({"1": ..., "64": ...}), `curve` ([[step, training loss], ...]).
        failure: Why there is no accuracy.
    """

    arm: str
    learner: str
    augmented: bool
    seed: int
    images: int
    bytes: int
    rate: float | None = None
    accuracy: float | None = None
    validation_accuracy: float | None = None
    nll: float | None = None
    calibration_error: float | None = None
    per_class: Sequence[float | None] | None = None
    confusion: Sequence[Sequence[int]] | None = None
    teacher_agreement: float | None = None
    teacher_kl: float | None = None
    train_seconds: float = 0.0
    tune_seconds: float = 0.0
    peak_memory: int = 0
    facts: Mapping[str, Any] | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Row:
    """One learner on one kind of data, over all seeds.

    Attributes:
        arm, learner, augmented: As in the results.
        results: One a seed, in the order of the seeds.
        accuracy: Of all seeds together; None if any of them failed, since a mean of the others
            would flatter.
    """

    arm: str
    learner: str
    augmented: bool
    results: tuple[Result, ...]
    accuracy: Summary | None

    @property
    def failures(self) -> tuple[Result, ...]:
        """The results without an accuracy."""
        return tuple(r for r in self.results if r.accuracy is None)

    def mean(self, name: str) -> float | None:
        """Mean over the seeds of a numeric attribute of the results; None if any lacks it."""
        values = [getattr(result, name) for result in self.results]
        return None if None in values else float(sum(values) / len(values))


def rows(results: Sequence[Result]) -> list[Row]:
    """The results by learner, augmentation and arm, in the order in which they first appear."""
    groups: dict[tuple[str, str, bool], list[Result]] = {}
    for result in results:
        groups.setdefault((result.learner, result.arm, result.augmented), []).append(result)
    return [
        Row(arm, learner, augmented, tuple(group), _summary(group))
        for (learner, arm, augmented), group in groups.items()
    ]


def _summary(group: Sequence[Result]) -> Summary | None:
    values = [result.accuracy for result in group if result.accuracy is not None]
    return statistics.summary(values) if len(values) == len(group) else None
