"""Accuracies that only repeat how common one class is among the test images, said in a sentence."""

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Int

from dsdistill.harness.text import quote

UNEVEN = 1.5  # times its even share, that the commonest class has in uneven test images


def common_class(labels: Int[np.ndarray, " n"], classes: Sequence[str]) -> str | None:
    """A sentence on a class that is far more common than others; None where there is none.

    Args:
        labels: The class of each test image.
        classes: Names, in label order.
    """
    shares = np.bincount(labels, minlength=len(classes)) / len(labels)
    common = int(shares.argmax())
    if shares[common] <= UNEVEN / len(classes):
        return None
    return (
        f"{shares[common]:.1%} of the test images are of class {quote(classes[common])}: "
        "always answering it has that accuracy, whatever the training."
    )


def constant_answer(
    who: str, answers: Collection[int], labels: Int[np.ndarray, " n"], classes: Sequence[str]
) -> str | None:
    """A sentence on a predictor that answers the same to all test images; None of another one.

    Args:
        who: What is judged.
        answers: The classes that it answered with, each at least once.
        labels, classes: As in `common_class`.
    """
    given = {*map(int, answers)}
    if len(given) != 1:
        return None
    (label,) = given
    return (
        f"{who} answers {quote(classes[label])} to every test image: its accuracy of "
        f"{(labels == label).mean():.1%} is the share of that class."
    )
