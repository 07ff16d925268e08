"""Sentences on accuracies that only repeat how common one class is among the test images."""

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Int

from dsdistill.harness.text import quote

UNEVEN = 1.5  # from this multiple of its even share on, the commonest class is worth a note


def common_class(
    labels: Int[np.ndarray, " n"], classes: Sequence[str], things: str = "test images"
) -> str | None:
    """A sentence on a class that is far more common than others; None where there is none.

    Args:
        labels: Class of each test image.
        classes: Class names, in label order.
        things: What is judged, in the plural.
    """
    shares = np.bincount(labels, minlength=len(classes)) / len(labels)
    common = int(shares.argmax())
    if shares[common] <= UNEVEN / len(classes):
        return None
    return (
        f"{shares[common]:.1%} of the {things} are of class {quote(classes[common])}: "
        "always answering it has that accuracy, whatever the training."
    )


def constant_answer(
    who: str,
    answers: Collection[int],
    labels: Int[np.ndarray, " n"],
    classes: Sequence[str],
    thing: str = "test image",
) -> str | None:
    """A sentence on a predictor that gives all test images one class; None for any other.

    Args:
        who: Name of the predictor.
        answers: Classes that it predicted, each at least once.
        labels, classes: As in `common_class`.
        thing: What is judged.
    """
    predicted = {*map(int, answers)}
    if len(predicted) != 1:
        return None
    (label,) = predicted
    return (
        f"{who} answers {quote(classes[label])} to every {thing}: its accuracy of "
        f"{(labels == label).mean():.1%} is the share of that class."
    )
