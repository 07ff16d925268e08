"""Held-out images: validation images choose between predictors, test images are read once."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import metrics
from dsdistill.harness.runs import progress


class Predict(Protocol):
    """Scores (n, k) of preprocessed images (n, h, w, c); the largest score is the prediction.

    It may have an attribute `facts`, its own measurements, as in `Result.facts`.
    """

    def __call__(self, images: Float[np.ndarray, "n h w c"], /) -> Float[np.ndarray, "n k"]: ...


@runtime_checkable
class ExamplesPredict(Protocol):
    """A predictor that reads examples itself, since it keeps what it has computed of them."""

    def predict_examples(self, examples: Examples, rows: slice) -> Float[np.ndarray, "n k"]:
        """Scores of some of the examples, as those of their images."""
        ...


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Validation and test images, in the preprocessing of the training sets.

    Attributes:
        validation: Images held out of the training set.
        test: Test images, read once for each trained predictor.
        teacher: Function from preprocessed images to a teacher's logits; None to compare with no
            teacher.
        identity: JSON-compatible description of all of these; None if there is none, in which
            case results cannot be cached.
    """

    validation: Examples
    test: Examples
    teacher: Predict | None = None
    identity: Mapping[str, Any] | None = None

    @property
    def validation_labels(self) -> Int[np.ndarray, " n"]:
        """Classes of the validation images."""
        return self.validation.data.labels

    def validation_scores(self, predict: Predict) -> Float[np.ndarray, "n k"] | None:
        """Scores of the validation images; None if one is not finite."""
        scores = predict_scores(predict, self.validation)
        return scores if np.isfinite(scores).all() else None

    def calibrate(self, scores: Float[np.ndarray, "n k"]) -> tuple[float, float]:
        """Fit a temperature to scores of the validation images; return it with their NLL.

        Scores of a regression are not logits: one fitted temperature turns the scores of every
        learner into probabilities in the same way.

        Returns:
            Temperature, and NLL in nats.
        """
        labels = self.validation_labels
        temperature = metrics.fit_temperature(scores, labels)
        return temperature, metrics.nll(metrics.softmax(scores, temperature), labels)

    def measure(self, predict: Predict) -> dict[str, Any]:
        """Measure a predictor on the test images; the keys are fields of `Result`.

        Raises:
            UserError: If a score is not finite.
        """
        validation, scores = self.validation_scores(predict), predict_scores(predict, self.test)
        if validation is None or not np.isfinite(scores).all():
            raise UserError("scores that are not finite")
        labels, k = self.test.data.labels, len(self.test.data.classes)
        probabilities = metrics.softmax(scores, self.calibrate(validation)[0])
        confusion = metrics.confusion(scores.argmax(1), labels, k)
        return {
            "accuracy": metrics.accuracy(scores, labels),
            "validation_accuracy": metrics.accuracy(validation, self.validation_labels),
            "nll": metrics.nll(probabilities, labels),
            "calibration_error": metrics.expected_calibration_error(probabilities, labels),
            "per_class": metrics.per_class_accuracy(confusion),
            "confusion": confusion.tolist(),
            **self._compare_with_teacher(scores, probabilities),
        }

    def _compare_with_teacher(
        self, scores: Float[np.ndarray, "n k"], probabilities: Float[np.ndarray, "n k"]
    ) -> dict[str, float]:
        if self.teacher is None:
            return {}
        logits = self._teacher_logits
        return {
            "teacher_agreement": metrics.agreement(scores, logits),
            "teacher_kl": metrics.kl(metrics.softmax(logits), probabilities),
        }

    @cached_property
    def _teacher_logits(self) -> Float[np.ndarray, "n k"]:
        """The teacher's logits of the test images, computed once."""
        assert self.teacher is not None
        return predict_scores(self.teacher, self.test)


def accuracy(predict: Predict, examples: Examples, unit: str) -> float:
    """Fraction of the images whose largest score is that of their class.

    Args:
        predict: Function from preprocessed images to scores.
        examples: Images and labels to score it on.
        unit: Name of one batch in the progress display.
    """
    batches = progress.track_if_slow(examples.batches(), unit)
    return metrics.accuracy(predict_scores(predict, examples, batches), examples.data.labels)


def predict_scores(
    predict: Predict, examples: Examples, batches: Iterable[slice] | None = None
) -> Float[np.ndarray, "n k"]:
    """Scores of all images, in float64.

    Args:
        predict: Function from preprocessed images to scores.
        examples: The images.
        batches: Slices that cover them all; by default `examples.batches()`.

    Raises:
        UserError: If they are not one row per image and one column per class.
    """
    k, parts = len(examples.data.classes), []
    for rows in batches or examples.batches():
        if isinstance(predict, ExamplesPredict):
            given = predict.predict_examples(examples, rows)
        else:
            given = predict(examples.images(rows))
        scores, n = np.asarray(given, np.float64), len(examples.data.labels[rows])
        if scores.shape != (n, k):
            raise UserError(
                f"scores of {n} images of {k} classes must have the shape ({n}, {k}), got "
                f"{scores.shape}"
            )
        parts.append(scores)
    return np.concatenate(parts)
