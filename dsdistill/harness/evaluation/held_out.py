"""The images that judge a predictor: validation images choose, test images are read once."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import metrics
from dsdistill.harness.runs import progress

ScoreFunction = Callable[[Float[np.ndarray, "n h w c"]], Float[np.ndarray, "n k"]]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Validation and test images, in the preprocessing of the training sets.

    Attributes:
        validation: Held out of the training set.
        test: Read once for each trained predictor.
        teacher: Logits of preprocessed images; None where there is none to compare with.
        identity: JSON-compatible: what all of these are. None: results cannot be kept.
    """

    validation: Examples
    test: Examples
    teacher: ScoreFunction | None = None
    identity: Mapping[str, Any] | None = None

    @property
    def validation_labels(self) -> Int[np.ndarray, " n"]:
        """Classes of the validation images."""
        return self.validation.data.labels

    def validation_scores(self, predict: ScoreFunction) -> Float[np.ndarray, "n k"] | None:
        """Scores of the validation images; None if one is not finite."""
        scores = _predict_scores(predict, self.validation)
        return scores if np.isfinite(scores).all() else None

    def calibrated(self, scores: Float[np.ndarray, "n k"]) -> tuple[float, float]:
        """The temperature that suits scores of the validation images best, and their NLL with it.

        Scores of a regression are no logits: with one fitted temperature they become probabilities
        worth judging, those of every learner in the same way.

        Returns:
            Temperature, and NLL in nats.
        """
        labels = self.validation_labels
        temperature = metrics.fit_temperature(scores, labels)
        return temperature, metrics.nll(metrics.softmax(scores, temperature), labels)

    def figures(self, predict: ScoreFunction) -> dict[str, Any]:
        """Everything that is measured of a predictor, by the names of `Result`.

        Raises:
            UserError: If a score is not finite.
        """
        held, scores = self.validation_scores(predict), _predict_scores(predict, self.test)
        if held is None or not np.isfinite(scores).all():
            raise UserError("scores that are not finite")
        labels, k = self.test.data.labels, len(self.test.data.classes)
        probabilities = metrics.softmax(scores, self.calibrated(held)[0])
        confusion = metrics.confusion(scores.argmax(1), labels, k)
        return {
            "accuracy": metrics.accuracy(scores, labels),
            "validation_accuracy": metrics.accuracy(held, self.validation_labels),
            "nll": metrics.nll(probabilities, labels),
            "calibration_error": metrics.expected_calibration_error(probabilities, labels),
            "per_class": metrics.per_class_accuracy(confusion),
            "confusion": confusion.tolist(),
            **self._beside_teacher(scores, probabilities),
        }

    def _beside_teacher(
        self, scores: Float[np.ndarray, "n k"], probabilities: Float[np.ndarray, "n k"]
    ) -> dict[str, float]:
        if self.teacher is None:
            return {}
        answers = self._answers
        return {
            "teacher_agreement": metrics.agreement(scores, answers),
            "teacher_kl": metrics.kl(metrics.softmax(answers), probabilities),
        }

    @cached_property
    def _answers(self) -> Float[np.ndarray, "n k"]:
        """The teacher's logits of the test images, asked for once."""
        assert self.teacher is not None
        return _predict_scores(self.teacher, self.test)


def accuracy(predict: ScoreFunction, examples: Examples, unit: str) -> float:
    """Fraction of the images whose largest score is that of their class.

    Args:
        predict, examples: Who is judged, by which images.
        unit: What live progress calls them.
    """
    batches = progress.track_if_slow(examples.batches(), unit)
    return metrics.accuracy(_predict_scores(predict, examples, batches), examples.data.labels)


def _predict_scores(
    predict: ScoreFunction, examples: Examples, batches: Iterable[slice] | None = None
) -> Float[np.ndarray, "n k"]:
    """Scores of all images, in float64.

    Raises:
        UserError: If they are not one row an image and one column a class.
    """
    k, parts = len(examples.data.classes), []
    for rows in batches or examples.batches():
        images = examples.images(rows)
        scores = np.asarray(predict(images), np.float64)
        if scores.shape != (len(images), k):
            raise UserError(
                f"scores of {len(images)} images of {k} classes must have the shape "
                f"({len(images)}, {k}), got {scores.shape}"
            )
        parts.append(scores)
    return np.concatenate(parts)
