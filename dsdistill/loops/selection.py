"""Which support of a run is the best: judged on a fixed part of the validation images, then on all.

During the run each candidate is judged on one class-balanced subset, drawn once, so that
candidates compare like with like at a small cost. At the end the best of them and the last one
are judged on all validation images; the better one is chosen, and its figures are those reported.

The best is that of the lowest outer loss, which is what KIP minimises on the training images;
accuracy on a few hundred images is too coarse to choose by.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Float

from dsdistill.harness.data.labeled_images import Examples, LabeledImages, draw_balanced
from dsdistill.harness.evaluation.held_out import Predict
from dsdistill.methods import outer_loss
from dsdistill.methods.outer_loss import OuterLoss
from dsdistill.methods.targets import load_into_memory

UNKNOWN = float("nan")  # the figures where there are no validation images


@dataclass(frozen=True, eq=False)
class Candidate:
    """A support that may be chosen, and how it does on the validation images."""

    step: int
    images: Float[np.ndarray, "n h w c"]
    labels: Float[np.ndarray, "n k"]
    accuracy: float
    loss: float


SupportImages = Float[Array, "n h w c"] | Float[np.ndarray, "n h w c"]
SupportLabels = Float[Array, "n k"] | Float[np.ndarray, "n k"]
Scorer = Callable[[int, SupportImages, SupportLabels], Candidate]


def scorer(
    fit: Callable[[np.ndarray, np.ndarray, str | None], Predict],
    outer: OuterLoss,
    validation: Examples,
    *,
    unit: str | None = None,
) -> Scorer:
    """A function that scores a support on these validation images.

    Args:
        fit: Function of a support's images and labels, and of `unit`, that returns its predictor.
        outer: The loss of the predictions.
        validation: Without any, both figures are NaN.
        unit: What live progress calls them; None shows none.
    """
    if not len(validation):
        return lambda step, x_s, y_s: Candidate(
            step, np.asarray(x_s), np.asarray(y_s), UNKNOWN, UNKNOWN
        )
    validation = load_into_memory(validation)
    images, labels = validation.images(), validation.labels()

    def score(step: int, x_s: SupportImages, y_s: SupportLabels) -> Candidate:
        support, y_s = np.asarray(x_s), np.asarray(y_s)
        scores = fit(support, y_s, unit)(images)
        accuracy = float((scores.argmax(1) == labels.argmax(1)).mean())
        return Candidate(step, support, y_s, accuracy, outer_loss.mean_value(outer, scores, labels))

    return score


def subset(validation: Examples, count: int, seed: int) -> Examples:
    """`count` validation images, as many of each class, or all where there are not more."""
    if len(validation) <= count:
        return validation
    rows = draw_balanced(validation.data.labels, count, np.random.default_rng([seed, 2]))
    data: LabeledImages = validation.data.select(rows)
    return Examples(data, validation.preprocess)


def is_better(found: Candidate, best: Candidate) -> bool:
    """Whether a later candidate takes the place of the best: NaN, of no validation, always does."""
    return not found.loss > best.loss


def choose_final(candidates: Sequence[Candidate], judge: Scorer) -> Candidate:
    """The candidate of the lowest error by another judge, with its figures; of equals the first."""
    judged = [judge(c.step, c.images, c.labels) for c in candidates]
    return min(judged, key=lambda candidate: candidate.loss)
