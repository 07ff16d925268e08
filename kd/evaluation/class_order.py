"""Whether the outputs of a teacher seem to belong to the data's classes in another order.

A teacher that was trained with its classes in another order is as good as ever, but answers with
the wrong names. The assignment of outputs to classes that its confusion matrix favours then has a
far higher accuracy than its own. So does any weak teacher's on the images it was found on: the
images that judge an order are others than those that it was found on.

The test is by betting. Under the hypothesis that no other order is more accurate in the long run,
an image that two orders judge differently speaks for the teacher's own at least as often as for the
other. A gambler who stakes a share of the fortune on the other order each time, an order found on
earlier images or known beforehand, then has no more than 1 on average, and reaches 100 with a
probability of at most 1 %, whatever the number of images, classes and looks. That holds for each
image by itself, so also where some of them are images that the teacher was trained on: it may have
learned them by heart, but then in the order that it was trained in.

Source: Ville (1939); Shafer (2021), "Testing by betting"; the assignment is Kuhn's (1955).
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from scipy.optimize import linear_sum_assignment

FALSE_ALARM_RATE = 0.01  # of teachers whose own order is the best
STAKES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the fortune that are staked; which is best is not known
REFITS = 10  # times that an order is found anew, on the images so far
FEW = 4_000  # images times classes up to which it is after each image: there each one counts
# That the moved classes must be better by: less may be two classes that are alike.
MIN_ACCURACY_RATIO = 2.0
# An untrained network answers alike to images that are alike, so some order fits it better than its
# own, and not by chance. But it knows few classes, and badly: of 180 (three kinds, on digits and on
# Fashion-MNIST) no order had either of these.
KNOWN = 0.9  # share of the moved classes of which one image in twenty at least is recognised
WELL = 2 / 3  # or of the images of the moved classes that are recognised, each class counted alike


@dataclass(frozen=True)
class ClassOrder:
    """An order in which a teacher's outputs make more sense.

    Attributes:
        classes: The class that each output is of, by number.
        accuracy: With it, a fraction.
        name: Whose order it is, where it is a known one.
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
    """Find another order of the classes with which predictions are right far more often.

    Args:
        predicted: The largest output of each image.
        labels: Its class.
        count: Number of classes and of outputs.
        likely: Orders to try first, as of `Order.classes`, by their names.

    Returns:
        None if there is none. The probability of another answer for a teacher whose own order is
        the best is at most `FALSE_ALARM_RATE`.
    """
    likely = {k: v for k, v in (likely or {}).items() if tuple(v) != tuple(range(count))}
    known = [np.asarray(order) for order in likely.values()]
    fortunes = [_log_fortune(*_count_bets(predicted, labels, order)) for order in known]
    fortunes.append(_log_fortune(*_bets_on_fitted_orders(predicted, labels, count)))
    # The mean of fortunes is a fortune: the gambler has divided the money among them.
    if np.logaddexp.reduce(fortunes) - math.log(len(fortunes)) < -math.log(FALSE_ALARM_RATE):
        return None
    # The first of the known orders that explains it, and otherwise what the images say.
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
    """Whether `find_better` finds the order of a flawless teacher from images of these classes.

    Args:
        labels: The class of each image.
        count, likely: As in `find_better`.
    """
    return find_better((labels + 1) % count, labels, count, likely) is not None


def best_fit(
    predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], count: int
) -> float | None:
    """The accuracy in the order that fits these very images best, if it is far better there.

    Of few images that says nothing: there is always such an order for a teacher that guesses.

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
    """An order in words, with the class map that brings it about.

    Args:
        order: That is better.
        accuracy: With the present one.
        classes: Names of the data's classes, in order.
        outputs: The model's output that was taken for each class; None where they are the same.
    """
    moved = [(i, to) for i, to in enumerate(order.classes) if i != to]
    some = ", ".join(f"{classes[i]!r} is {classes[to]!r}" for i, to in moved[:3])
    more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
    mapping = {
        classes[to]: outputs[i] if outputs is not None else i for i, to in enumerate(order.classes)
    }
    first = {name: mapping[name] for name in classes if name in mapping}
    text = json.dumps(first if len(first) <= 20 else dict(list(first.items())[:5]))
    text = text if len(first) <= 20 else f"{text[:-1]}, ...}}"
    named = f" in {order.name}" if order.name else " in another order"
    return (
        f"accuracy {accuracy:.1%}, but {order.accuracy:.1%} with its classes{named} (what it calls "
        f"{some}{more}): --class-map FILE with {text}"
    )


def _bets_on_fitted_orders(
    predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], count: int
) -> tuple[int, int]:
    """Bets on orders that are found, each on the images before those that it is judged by."""
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
    """Images that only the other order has right, and those that only the present one has."""
    other, own = order[predicted] == labels, predicted == labels
    return int((other & ~own).sum()), int((own & ~other).sum())


def _log_fortune(won: int, lost: int) -> float:
    """Logarithm of what 1 has become, divided evenly among the shares that are staked."""
    grown = [won * math.log1p(share) + lost * math.log1p(-share) for share in STAKES]
    return float(np.logaddexp.reduce(grown)) - math.log(len(STAKES))


def _assignment(
    predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], count: int
) -> Int[np.ndarray, " k"]:
    """The class of each output, one each, that makes most predictions right."""
    confusion = np.bincount(labels * count + predicted, minlength=count**2).reshape(count, count)
    # Half an image for the present order decides where the images do not.
    rows, columns = linear_sum_assignment(confusion + 0.5 * np.eye(count), maximize=True)
    order = np.empty(count, int)
    order[columns] = rows
    return order


def _is_far_better(
    predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], order: Int[np.ndarray, " k"]
) -> bool:
    """Whether the moved classes are recognised, and far better, each counted alike.

    A network that always answers with one class is as good in every order, however frequent the
    classes are.
    """
    present = np.unique(labels)
    moved = present[order[present] != present]
    if not len(moved):
        return False
    other, own = (
        np.array([(answers[labels == i] == i).mean() for i in moved])
        for answers in (order[predicted], predicted)
    )
    recognised = (other >= 0.05).mean() >= KNOWN or other.mean() >= WELL
    return bool(recognised and other.mean() >= MIN_ACCURACY_RATIO * own.mean())
