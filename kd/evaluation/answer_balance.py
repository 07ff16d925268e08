"""How evenly a teacher's answers for a set of images cover its classes.

A student learns little of a class that its teacher hardly ever gives. Balance is necessary and not
sufficient: images that mean nothing can have balanced answers too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dsdistill.harness.text import abbreviate_names

IMAGES = 10_000  # enough for the shares of the classes
LEAST_SHARE = 0.7  # of ln k, below which the answers are called one-sided


@dataclass(frozen=True, eq=False)
class AnswerBalance:
    """Balance of answers over k classes.

    Attributes:
        entropy: Entropy of the mean of the probabilities, in nats; at most ln k.
        counts: Number of images for each most probable class.
    """

    entropy: float
    counts: Int[np.ndarray, " k"]

    @property
    def share(self) -> float:
        """The entropy as a fraction of its largest value, ln k."""
        return self.entropy / math.log(len(self.counts))

    @property
    def is_one_sided(self) -> bool:
        """Whether so few classes are answered that a student hardly learns the others."""
        return self.share < LEAST_SHARE


def measure(probabilities: Float[np.ndarray, "n k"]) -> AnswerBalance:
    """Measure the balance of a teacher's answers.

    Args:
        probabilities: Answers for n >= 1 images; each row sums to 1, over k >= 2 classes.
    """
    mean = probabilities.astype(np.float64).mean(0)
    positive = mean[mean > 0]  # 0 log 0 is 0
    counts = np.bincount(probabilities.argmax(1), minlength=probabilities.shape[1])
    return AnswerBalance(float(positive @ np.log(1 / positive)), counts)


def describe(balance: AnswerBalance, classes: Sequence[str]) -> list[str]:
    """Describe the balance in a line; in a second one warn of one-sided answers."""
    order = np.argsort(-balance.counts, kind="stable")
    common = abbreviate_names([f"{classes[k]} {balance.counts[k]}" for k in order])
    largest = math.log(len(classes))
    lines = [
        f"transfer set: entropy of the teacher's mean answer {balance.entropy:.2f} of "
        f"{largest:.2f} nats ({balance.share:.0%}), most probable classes of "
        f"{balance.counts.sum()} images: {common}"
    ]
    if balance.is_one_sided:
        lines.append(
            f"warning: the teacher's answers for the transfer set are one-sided (below "
            f"{LEAST_SHARE:.0%} of ln {len(classes)}): the student will hardly learn the other "
            "classes; take images of more kinds"
        )
    return lines
