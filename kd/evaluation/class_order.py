"""A test of whether a teacher's outputs belong to the data's classes in another order.

A teacher that was trained with its classes in another order is as good as ever, but its outputs
have the wrong names. The assignment of outputs to classes that its confusion matrix favours then
has a far higher accuracy than the present one. For a weak teacher that is also true of the images
from which the assignment was fitted, so every order is tested on other images than those.

The test is by betting. Under the hypothesis that no other order is more accurate in the long run,
an image that only one of two orders predicts right favours the present one at least as often as the
other. A gambler who starts with 1 and stakes a share of the fortune on the other order each time,
one that was fitted to earlier images or known beforehand, then has no more than 1 on average, and
reaches 100 with a probability of at most 1 %, for any number of images, classes and looks. The
argument holds for each image by itself, even for one that the teacher was trained on: the teacher
may have memorised it, but then in the order that it was trained in.

Source: Ville (1939); Shafer (2021), "Testing by betting"; the assignment is Kuhn's (1955).
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from dsdistill.harness.text import quote

FALSE_ALARM_RATE = 0.01  # largest, among teachers whose present order is the best
STAKES = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of the fortune; which one is best is unknown
REFITS = 10  # times that an order is fitted again, to the images so far
FEW = 4_000  # images times classes up to which it is fitted again after every image
# Least gain in accuracy on the moved classes: a smaller one may come from two similar classes.
MIN_ACCURACY_RATIO = 2.0
# An untrained network gives similar images similar outputs, so some order fits it better than the
# present one, and not by chance. But it recognises few classes, and badly: no order of 180 such
# networks (three kinds, on digits and on Fashion-MNIST) reached either of these two values.
KNOWN = 0.9  # share of the moved classes of which at least one image in twenty is recognised
WELL = 2 / 3  # share of recognised images, as the mean over the moved classes


@dataclass(frozen=True)
class ClassOrder:
    """An order of the classes in which a teacher's outputs are more accurate.

    Attributes:
        classes: Index of the class that each output belongs to.
        accuracy: Accuracy in this order, a fraction.
        name: Name of the order, where it is a known one.
    """

    classes: tuple[int, ...]
    accuracy: float
    name: str | None = None


def find_better(
    predicted: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    count: int,
    likely: Mapping[str, Sequence[int]] | None = None,
) -> ClassOrder | None:
    """Find another order of the classes in which predictions are right far more often.

    Args:
        predicted: Index of the largest output of each image.
        labels: Class of each image.
        count: Number of classes and of outputs.
        likely: Orders to try first, in the form of `ClassOrder.classes`, by name.

    Returns:
        The order, or None if there is none. For a teacher whose present order is the best, the
        probability of an order is at most `FALSE_ALARM_RATE`.
    """
    likely = {k: v for k, v in (likely or {}).items() if tuple(v) != tuple(range(count))}
    known = [np.asarray(order) for order in likely.values()]
    fortunes = [_log_fortune(*_count_bets(predicted, labels, order)) for order in known]
    fortunes.append(_log_fortune(*_bets_on_fitted_orders(predicted, labels, count)))
    # The mean of fortunes is a fortune too: that of a gambler who divided the money among them.
    if np.logaddexp.reduce(fortunes) - math.log(len(fortunes)) < -math.log(FALSE_ALARM_RATE):
        return None
    # Prefer the known orders that won most; otherwise take the order that fits the images.
    best = max(fortunes)
    candidates: list[tuple[str | None, Int[np.ndarray, " k"]]] = [
        (name, order)
        for name, order, fortune in zip(likely, known, fortunes, strict=False)
        if fortune == best
    ]
    candidates.append((None, _assignment(predicted, labels, count)))
    for name, order in candidates:
        if _is_far_better(predicted, labels, order):
            accuracy = float((order[predicted] == labels).mean())
            return ClassOrder(tuple(order.tolist()), accuracy, name)
    return None


def is_decidable(
    labels: Int[np.ndarray, " n"], count: int, likely: Mapping[str, Sequence[int]] | None = None
) -> bool:
    """Whether `find_better` would find the order of a perfect teacher from images of these classes.

    Args:
        labels: Class of each image.
        count, likely: As in `find_better`.
    """
    return find_better((labels + 1) % count, labels, count, likely) is not None


def best_fit(
    predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], count: int
) -> float | None:
    """Accuracy in the order that fits these images best; None if it is not far better.

    It means nothing for few images, where such an order exists for any teacher that guesses.

    Args:
        predicted, labels, count: As in `find_better`.
    """
    order = _assignment(predicted, labels, count)
    if not _is_far_better(predicted, labels, order):
        return None
    return float((order[predicted] == labels).mean())


def describe(
    order: ClassOrder, accuracy: float, classes: Sequence[str], outputs: Sequence[int] | None = None
) -> str:
    """Describe an order in words, with the class map that establishes it.

    Args:
        order: The better order.
        accuracy: Accuracy in the present order, a fraction.
        classes: Names of the data's classes, in order.
        outputs: Index of the model's output for each class; None where they are the same.
    """
    moved = [(i, to) for i, to in enumerate(order.classes) if i != to]
    examples = ", ".join(f"{quote(classes[i])} is {quote(classes[to])}" for i, to in moved[:3])
    more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
    mapping = {
        classes[to]: outputs[i] if outputs is not None else i for i, to in enumerate(order.classes)
    }
    ordered = {name: mapping[name] for name in classes if name in mapping}
    text = json.dumps(ordered if len(ordered) <= 20 else dict(list(ordered.items())[:5]))
    text = text if len(ordered) <= 20 else f"{text[:-1]}, ...}}"
    name = order.name or "another order"
    return (
        f"accuracy {accuracy:.1%}, but {order.accuracy:.1%} with its classes in {name} (what it "
        f"calls {examples}{more}): --class-map FILE with {text}"
    )


def _bets_on_fitted_orders(
    predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], count: int
) -> tuple[int, int]:
    """Count bets on fitted orders, each fitted to the images before those that it is tested on."""
    shuffled = np.random.default_rng(0).permutation(len(labels))  # data may be sorted by class
    predicted, labels = predicted[shuffled], labels[shuffled]
    looks = len(labels) if len(labels) * count <= FEW else REFITS
    edges = np.linspace(0, len(labels), looks + 1).astype(int)
    won = lost = 0
    for start, end in itertools.pairwise(edges[1:]):
        order = _assignment(predicted[:start], labels[:start], count)
        more, less = _count_bets(predicted[start:end], labels[start:end], order)
        won, lost = won + more, lost + less
    return won, lost


def _count_bets(
    predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], order: Int[np.ndarray, " k"]
) -> tuple[int, int]:
    """Count the images that only the other order, and only the present order predicts right."""
    other, present = order[predicted] == labels, predicted == labels
    return int((other & ~present).sum()), int((present & ~other).sum())


def _log_fortune(won: int, lost: int) -> float:
    """Logarithm of the fortune that 1 has become, divided evenly among the stakes."""
    fortunes = [won * math.log1p(share) + lost * math.log1p(-share) for share in STAKES]
    return float(np.logaddexp.reduce(fortunes)) - math.log(len(STAKES))


def _assignment(
    predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], count: int
) -> Int[np.ndarray, " k"]:
    """One class for each output such that most predictions are right."""
    # SciPy takes half a second, and a teacher in the right order is often known without it.
    from scipy.optimize import linear_sum_assignment

    confusion = np.bincount(labels * count + predicted, minlength=count**2).reshape(count, count)
    # Half an image in favour of the present order breaks ties.
    rows, columns = linear_sum_assignment(confusion + 0.5 * np.eye(count), maximize=True)
    order = np.empty(count, int)
    order[columns] = rows
    return order


def _is_far_better(
    predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], order: Int[np.ndarray, " k"]
) -> bool:
    """Whether the moved classes are recognised, and far better, as a mean over classes.

    A mean over classes is the same in every order for a network that always predicts one class,
    however frequent the classes are.
    """
    seen = np.unique(labels)
    moved = seen[order[seen] != seen]
    if not len(moved):
        return False
    other, present = (
        np.array([(answers[labels == i] == i).mean() for i in moved])
        for answers in (order[predicted], predicted)
    )
    recognised = (other >= 0.05).mean() >= KNOWN or other.mean() >= WELL
    return bool(recognised and other.mean() >= MIN_ACCURACY_RATIO * present.mean())
