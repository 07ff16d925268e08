"""A look at a teacher before it teaches: what was resolved for it, and how good it is.

It is judged on validation images, or where there are none on some of those that the student will
be trained on, through the very path used in training, adapter and network: a
wrong normalisation or order of classes shows here, and not as a student that learns little.

Where the validation images are few, training images are added for the question whether the order of
its classes is right. That the teacher may have learned them does no harm there: then it is the more
certain of the order that it learned them in.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import metrics
from dsdistill.harness.runs import progress
from kd.data.batching import Batch, BatchSource, EvaluationBatches
from kd.evaluation import class_order, scoring
from kd.models.teachers import ResolvedTeacher, Teacher
from kd.models.zoo import class_names

MAX_TEMPERATURE_IMAGES = 10_000  # images enough for a temperature
ACCURACY_IMAGES = 2_000  # images enough for an accuracy: its standard error is at most 1.1 %
FOR_ORDER = 400  # images at least that judge the order of the classes, where there are so many
PER_CLASS = 20  # and of each class, but no more than `ACCURACY_IMAGES` in all


@dataclass(frozen=True, eq=False)
class FirstImages:
    """The first images of a shuffled epoch: enough to judge a teacher by.

    Attributes:
        batches: In evaluation views, unchanged.
        images: Their number, up to a batch.
    """

    batches: BatchSource
    images: int = ACCURACY_IMAGES

    def in_order(self, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The images, always the same; every `world`-th batch."""
        count = int(np.searchsorted(np.cumsum(self.batches.sizes), self.images)) + 1
        yield from itertools.islice(self.batches.epoch(0, 0), rank, count, world)


@dataclass(frozen=True)
class TeacherQuality:
    """What is known of a teacher before the training.

    Attributes:
        name: As given.
        resolved: How its images are prepared and its classes matched.
        accuracy: On the images that it was judged on, a fraction.
        chance: The accuracy of such answers if they had nothing to do with the labels; with the
            training images that were added, where some were.
        at_chance: Whether the accuracy, with them, is not significantly above that.
        temperature: softmax(logits / this) are its calibrated probabilities.
        images: Their number.
        order: In which its classes make far more sense, in words; None where there is none.
        undecided: Why that cannot be told, in words; None where it can.
    """

    name: str
    resolved: ResolvedTeacher
    accuracy: float
    chance: float
    at_chance: bool
    temperature: float
    images: int
    order: str | None = None
    undecided: str | None = None


def check(
    name: str,
    teacher: Teacher,
    batches: EvaluationBatches,
    *,
    minimum: float | None = None,
    part: str = "validation",
    more: Callable[[int], EvaluationBatches | None] = lambda count: None,
    say: Callable[[str], None] = progress.say,
) -> TeacherQuality:
    """Judge a teacher on images with labels, and say what was found.

    Args:
        name: How messages call it.
        teacher: On the device of the batches.
        batches: Of validation images, or `FirstImages` where there are none, in the space that the
            teacher will be given.
        minimum: Least accuracy, a fraction; None for a warning alone, where it is no better than
            chance.
        part: What the images are, for messages.
        more: Called with a number of images; gives up to that many training images, spread over the
            classes and in the same space, or None. They judge the order of the classes, and whether
            the teacher guesses, where the others are few; never its accuracy.
        say: Called with each line; processes that show nothing give their own.

    Raises:
        UserError: If the accuracy is below `minimum`.
    """
    say(f"teacher {name}: {describe(teacher.resolved)}")
    for note in teacher.resolved.notes:
        say(f"teacher {name}: {note}")
    logits, labels = scoring.outputs_and_labels(teacher, batches)
    facts = _measure(name, teacher.resolved, logits, labels)
    predicted, count = logits.argmax(1), logits.shape[1]
    lacking = min(max(FOR_ORDER, PER_CLASS * count), ACCURACY_IMAGES) - len(labels)
    further = more(lacking) if lacking > 0 else None
    kind = part
    if further is not None:
        others, theirs = scoring.outputs_and_labels(teacher, further)
        predicted = np.concatenate([predicted, others.argmax(1)])
        labels, kind = np.concatenate([labels, theirs]), f"{part} and training"
        expected, at_chance = _chance(predicted, labels)
        facts = replace(facts, chance=expected, at_chance=at_chance)
    order, undecided = _better_order(
        teacher, predicted, labels, count, f"{len(labels)} {kind} images"
    )
    facts = replace(facts, order=order, undecided=undecided)
    say(
        f"teacher {name}: accuracy {facts.accuracy:.1%} on {facts.images} {part} images, "
        f"calibration temperature {facts.temperature:.3g}"
    )
    if minimum is not None and facts.accuracy < minimum:
        raise UserError(
            f"teacher {name} has {part} accuracy {facts.accuracy:.1%}, below "
            f"--min-teacher-accuracy {minimum:g}: check {_suspects(facts)}"
        )
    if facts.order:
        say(f"warning: teacher {name} seems to have its classes in another order: {facts.order}")
    elif facts.at_chance:
        say(
            f"warning: teacher {name} cannot be told from chance ({facts.chance:.1%}): check "
            f"{_suspects(facts)}"
        )
    if facts.undecided:
        say(f"warning: teacher {name}: {facts.undecided}")
    return facts


def describe(resolved: ResolvedTeacher) -> str:
    """One line of how a model's images are prepared and its classes matched."""
    (h, w), numbers = (
        resolved.size,
        "mean {} std {}".format(
            *(",".join(f"{x:.3f}" for x in values) for values in (resolved.mean, resolved.std))
        ),
    )
    kind = f"{resolved.kind}, " if resolved.kind != "standardise" else ""
    return f"{h}x{w} {resolved.interpolation}, {kind}{numbers}, classes matched {resolved.matched}"


def chance_accuracy(predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> float:
    """The accuracy to expect of predictions with these frequencies but unrelated to the labels.

    Source: the agreement by chance in Cohen (1960), "A coefficient of agreement for nominal
    scales".
    """
    k = int(max(predicted.max(), labels.max())) + 1
    shares = [np.bincount(values, minlength=k) / len(values) for values in (predicted, labels)]
    return float(shares[0] @ shares[1])


def _measure(
    name: str,
    resolved: ResolvedTeacher,
    logits: Float[np.ndarray, "n k"],
    labels: Int[np.ndarray, " n"],
) -> TeacherQuality:
    n, accuracy = len(labels), metrics.accuracy(logits, labels)
    expected, at_chance = _chance(logits.argmax(1), labels)
    some = slice(
        None, None, math.ceil(n / MAX_TEMPERATURE_IMAGES)
    )  # every so many: data may be sorted by class
    temperature = metrics.fit_temperature(logits[some], labels[some])
    return TeacherQuality(name, resolved, accuracy, expected, at_chance, temperature, n)


def _chance(predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> tuple[float, bool]:
    """The accuracy by chance, and whether that of the predictions may be no better."""
    expected = chance_accuracy(predicted, labels)
    # Three standard deviations of the mean of n coin tosses.
    limit = expected + 3 * math.sqrt(expected * (1 - expected) / len(labels))
    return expected, bool((predicted == labels).mean() <= limit)


def _better_order(
    teacher: Teacher,
    predicted: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    count: int,
    images: str,
) -> tuple[str | None, str | None]:
    """Another order of the classes in which the teacher is far better, in words.

    Args:
        teacher: Whose largest outputs were `predicted`, of `count` ones.
        predicted, labels, count: As in `class_order.find_better`.
        images: What they are, for messages.

    Returns:
        The order, and why it cannot be told whether there is one; None where there is nothing to
        say.
    """
    classes = teacher.resolved.classes or tuple(map(str, range(count)))
    outputs = None if teacher.outputs is None else teacher.outputs.tolist()
    positions, likely = outputs or list(range(count)), {}
    if sorted(positions) == list(range(count)):
        orders = class_names.likely_orders(classes)
        likely = {name: [order[p] for p in positions] for name, order in orders.items()}
    order, own = (
        class_order.find_better(predicted, labels, count, likely),
        (predicted == labels).mean(),
    )
    if order is not None:
        text = class_order.describe(order, float(own), classes, outputs)
        return f"on {images} {text}", None
    fit = class_order.best_fit(predicted, labels, count)
    if fit is None or class_order.is_decidable(labels, count, likely):
        return None, None
    return None, (
        f"{images} are too few to tell whether its classes are in another order ({own:.1%} are "
        f"right in its own, {fit:.1%} in the order that fits them best, which says nothing of so "
        "few): make sure of the order, or bring more images"
    )


def _suspects(facts: TeacherQuality) -> str:
    plain = (
        f"its classes and their order (matched {facts.resolved.matched}; --class-map), and its "
        "normalisation and image size"
    )
    return (
        f"{plain}; its classes seem to be in another order: {facts.order}" if facts.order else plain
    )
