"""Results of an evaluation: one per training, and rows over all seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsdistill.harness.evaluation import statistics
from dsdistill.harness.evaluation.statistics import Summary


@dataclass(frozen=True)
class Result:
    """One learner trained once on one kind of data, and scored once on the test images.

    A training that failed has its reason in `failure` and None for what could not be measured.

    Attributes:
        arm: Kind of data: `distilled`, `distilled-hard`, `distilled-teacher`, `random`, `k-means`,
            `herding` or `full`.
        learner: Name of the learner.
        augmented: Whether it was trained with augmentation.
        seed: Seed of the draw of the data and of the training.
        images: Number of images it was trained on.
        bytes: Stored size of those images and their labels.
        rate: Learning rate chosen on the validation images; None where there is none to choose.
        accuracy: Fraction of the test images predicted right.
        validation_accuracy: Fraction of the validation images predicted right.
        nll: Mean negative log-likelihood of the test images, in nats, under probabilities
            calibrated on the validation images.
        calibration_error: Expected calibration error of these probabilities, 15 bins, a fraction.
        per_class: Test accuracy of each class; None for a class without test images.
        confusion: Number of test images by true class (row) and predicted class (column).
        teacher_agreement: Fraction of the test images on which learner and teacher agree.
        teacher_kl: KL(teacher || learner), mean over the test images, in nats.
        train_seconds: Seconds of this training.
        tune_seconds: Seconds of the other trainings that chose the rate, in the first seed's
            result only.
        peak_memory: Largest size of the process until the end of this training, in bytes.
        facts: The learner's own measurements: `parameters`, `flops` (multiply-adds of one image,
            doubled), `latency_ms` ({"1": ..., "64": ...}), `curve` ([[step, training loss], ...]).
        failure: Reason why there is no accuracy; None where there is one.
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
        results: One result per seed, in the order of the seeds.
        accuracy: Summary over all seeds; None if any of them failed, since a mean of the others
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


_FRACTIONS = ("accuracy", "validation_accuracy", "calibration_error", "teacher_agreement")
_REQUIRED = ("accuracy", "validation_accuracy", "nll", "calibration_error", "confusion")
_COUNTS = ("images", "bytes", "peak_memory")
_AMOUNTS = ("rate", "nll", "teacher_kl", "train_seconds", "tune_seconds")
_TOLERANCE = 1e-9  # largest difference between two ways to compute the same figure


def problem(result: Result, test_counts: Sequence[int]) -> str | None:
    """Why a stored result is impossible; None if it is plausible.

    A checksum detects damage, but not a result that another program has written.

    Args:
        result: The stored result, whose fields may be of any type.
        test_counts: Number of test images of each class.
    """
    for name, value in asdict(result).items():
        if not _all_finite(value):
            return f"{name} is not finite"
    texts = (result.arm, result.learner, result.failure or "")
    if not all(isinstance(text, str) for text in texts) or not isinstance(result.augmented, bool):
        return "its names are not text, or `augmented` is not a truth value"
    if not _is_count(result.seed) or any(not _is_count(getattr(result, name)) for name in _COUNTS):
        return "a number is not whole, or is negative"
    for name in (*_FRACTIONS, *_AMOUNTS):
        value, largest = getattr(result, name), 1 if name in _FRACTIONS else math.inf
        if value is not None and not (_is_number(value) and -_TOLERANCE <= value <= largest):
            return f"{name} is {value!r}"
    if result.facts is not None and not isinstance(result.facts, Mapping):
        return f"facts are {result.facts!r}"
    if result.failure is not None:
        return None if result.accuracy is None else "it failed and yet has an accuracy"
    if any(getattr(result, name) is None for name in _REQUIRED):
        return "it has neither figures nor a reason for having none"
    return _contradiction(result, test_counts)


def _contradiction(result: Result, test_counts: Sequence[int]) -> str | None:
    """How accuracy, accuracies per class and confusion matrix contradict each other, or None."""
    confusion: Any = result.confusion
    k = len(test_counts)
    square = isinstance(confusion, Sequence) and len(confusion) == k
    if not square or not all(isinstance(row, Sequence) and len(row) == k for row in confusion):
        return f"its confusion matrix is not {k}x{k}"
    if not all(_is_count(count) for row in confusion for count in row):
        return "its confusion matrix has other entries than counts"
    if [sum(row) for row in confusion] != list(test_counts):
        return "its confusion matrix is of other test images"
    right = [confusion[label][label] for label in range(k)]
    if abs(sum(right) / sum(test_counts) - (result.accuracy or 0.0)) > _TOLERANCE:
        return f"accuracy is {result.accuracy}, but its confusion matrix gives another"
    shares = [r / n if n else None for r, n in zip(right, test_counts, strict=True)]
    accuracies = result.per_class
    if (
        not isinstance(accuracies, Sequence)
        or len(accuracies) != k
        or not all(map(_nearly_equal, accuracies, shares))
    ):
        return "its accuracies per class are not those of the confusion matrix"
    return None


def _nearly_equal(a: Any, b: float | None) -> bool:
    return a is b if a is None or b is None else _is_number(a) and abs(a - b) <= _TOLERANCE


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _all_finite(value: Any) -> bool:
    """Whether all numbers in nested lists and objects are finite."""
    if isinstance(value, Mapping):
        return all(map(_all_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_all_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def group_by_training(results: Sequence[Result]) -> list[Row]:
    """Group results by learner, augmentation and arm, in the order in which these first appear."""
    groups: dict[tuple[str, str, bool], list[Result]] = {}
    for result in results:
        groups.setdefault((result.learner, result.arm, result.augmented), []).append(result)
    return [
        Row(arm, learner, augmented, tuple(group), _summary(group))
        for (learner, arm, augmented), group in groups.items()
    ]


def _summary(group: Sequence[Result]) -> Summary | None:
    values = [result.accuracy for result in group if result.accuracy is not None]
    if len(values) < len(group):
        return None
    return statistics.summary(values, bounds=(0.0, 1.0))
