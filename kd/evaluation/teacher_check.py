"""Check of a teacher before training: how its images are prepared, and how accurate it is.

It is scored on validation images, or where there are none on some of the training images, through
the same adapter and network as in training: a wrong normalisation or order of classes shows here,
and not as a student that learns little.

Where there are few validation images, training images are added to test the order of its classes.
The teacher may have been trained on them, which does no harm: it is then the more certain of the
order in which it learned them.
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

MAX_TEMPERATURE_IMAGES = 10_000  # enough to fit a temperature
ACCURACY_IMAGES = 2_000  # enough for an accuracy: its standard error is at most 1.1 %
FOR_ORDER = 400  # fewest images that test the order of the classes, where there are that many
PER_CLASS = 20  # fewest of them per class, but no more than `ACCURACY_IMAGES` in all


@dataclass(frozen=True, eq=False)
class FirstImages:
    """The first images of a shuffled epoch, enough to score a teacher.

    Attributes:
        batches: Training images in evaluation views, without augmentation.
        images: Number of images, rounded up to whole batches.
    """

    batches: BatchSource
    images: int = ACCURACY_IMAGES

    def in_order(self, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Yield the images, the same in every call; see `EvaluationBatches.in_order`."""
        count = int(np.searchsorted(np.cumsum(self.batches.sizes), self.images)) + 1
        yield from itertools.islice(self.batches.epoch(0, 0), rank, count, world)


@dataclass(frozen=True)
class TeacherQuality:
    """Measurements of a teacher before the training.

    Attributes:
        name: Name of the teacher in messages.
        resolved: How its images are prepared and its classes matched.
        accuracy: Accuracy on the images that it was scored on, a fraction.
        chance: Accuracy that its predictions would have if they were unrelated to the labels; over
            the added training images too, if there are any.
        at_chance: Whether the accuracy on the same images is not significantly above `chance`.
        temperature: T > 0; softmax(logits / T) are its calibrated probabilities.
        images: Number of images that it was scored on.
        order: Description of an order in which its classes are far more accurate; None if none is.
        undecided: Reason why this cannot be decided; None where it can.
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
    """Score a teacher on images with labels, and report the results.

    Args:
        name: Name of the teacher in messages.
        teacher: The teacher, on the device of the batches.
        batches: Validation images, or `FirstImages` where there are none, in the preprocessing that
            the teacher will be given.
        minimum: Smallest accuracy, a fraction; None for a mere warning, and only where the
            teacher is no better than chance.
        part: Kind of the images, for messages.
        more: Function from a number of images to at most that many training images, spread over
            the classes and in the same preprocessing, or None. Where the other images are few,
            these help to decide whether the order of the classes is right and whether the teacher
            guesses; they never count in its accuracy.
        say: Called with each line of the report.

    Raises:
        UserError: If the accuracy is below `minimum`.
    """
    say(f"teacher {name}: {describe(teacher.resolved)}")
    for note in teacher.resolved.notes:
        say(f"teacher {name}: {note}")
    logits, labels = scoring.outputs_and_labels(teacher, batches)
    quality = _measure(name, teacher.resolved, logits, labels)
    predicted, count = logits.argmax(1), logits.shape[1]
    missing = min(max(FOR_ORDER, PER_CLASS * count), ACCURACY_IMAGES) - len(labels)
    added = more(missing) if missing > 0 else None
    kind = part
    if added is not None:
        added_logits, added_labels = scoring.outputs_and_labels(teacher, added)
        predicted = np.concatenate([predicted, added_logits.argmax(1)])
        labels, kind = np.concatenate([labels, added_labels]), f"{part} and training"
        expected, at_chance = chance(predicted, labels)
        quality = replace(quality, chance=expected, at_chance=at_chance)
    order, undecided = _better_order(
        teacher, predicted, labels, count, f"{len(labels)} {kind} images"
    )
    quality = replace(quality, order=order, undecided=undecided)
    say(
        f"teacher {name}: accuracy {quality.accuracy:.1%} on {quality.images} {part} images, "
        f"calibration temperature {quality.temperature:.3g}"
    )
    if minimum is not None and quality.accuracy < minimum:
        raise UserError(
            f"teacher {name} has {part} accuracy {quality.accuracy:.1%}, below "
            f"--min-teacher-accuracy {minimum:g}: check {_suspects(quality)}"
        )
    if quality.order:
        say(f"warning: teacher {name} seems to have its classes in another order: {quality.order}")
    elif quality.at_chance:
        say(
            f"warning: teacher {name} cannot be told from chance ({quality.chance:.1%}): check "
            f"{_suspects(quality)}"
        )
    if quality.undecided:
        say(f"warning: teacher {name}: {quality.undecided}")
    return quality


def describe(resolved: ResolvedTeacher) -> str:
    """Describe in one line how a model's images are prepared and its classes matched."""
    h, w = resolved.size
    mean, std = (",".join(f"{x:.3f}" for x in values) for values in (resolved.mean, resolved.std))
    kind = f"{resolved.kind}, " if resolved.kind != "standardise" else ""
    prepared = f"{h}x{w} {resolved.interpolation}, {kind}mean {mean} std {std}"
    if resolved.matched == class_names.BY_FEATURES.how:
        return f"{prepared}, teaches {resolved.matched}"
    return f"{prepared}, classes matched {resolved.matched}"


def chance_accuracy(predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> float:
    """Expected accuracy of predictions of the same frequencies that are unrelated to the labels.

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
    expected, at_chance = chance(logits.argmax(1), labels)
    # At regular intervals, since data may be sorted by class.
    rows = slice(None, None, math.ceil(n / MAX_TEMPERATURE_IMAGES))
    temperature = metrics.fit_temperature(logits[rows], labels[rows])
    return TeacherQuality(name, resolved, accuracy, expected, at_chance, temperature, n)


def chance(predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> tuple[float, bool]:
    """Accuracy by chance, and whether the predictions are not significantly better."""
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
    """Describe an order of the classes in which the teacher is far more accurate.

    Args:
        teacher: The teacher, with `count` outputs.
        predicted, labels, count: As in `class_order.find_better`.
        images: Number and kind of the images, for messages.

    Returns:
        Description of the order or None, and the reason why it cannot be decided whether there is
        one or None.
    """
    if teacher.members is not None:  # another order of its classes is no order of the groups
        return None, None
    classes = teacher.resolved.classes or tuple(map(str, range(count)))
    outputs = None if teacher.outputs is None else teacher.outputs.tolist()
    positions, likely = outputs or list(range(count)), {}
    if sorted(positions) == list(range(count)):
        orders = class_names.likely_orders(classes)
        likely = {name: [order[p] for p in positions] for name, order in orders.items()}
    order = class_order.find_better(predicted, labels, count, likely)
    accuracy = (predicted == labels).mean()
    if order is not None:
        text = class_order.describe(order, float(accuracy), classes, outputs)
        return f"on {images} {text}", None
    fit = class_order.best_fit(predicted, labels, count)
    if fit is None or class_order.is_decidable(labels, count, likely):
        return None, None
    return None, (
        f"{images} are too few to tell whether its classes are in another order ({accuracy:.1%} "
        f"are right in the present one, {fit:.1%} in the order that fits them best, which means "
        "nothing for so few): check the order, or add images"
    )


def _suspects(quality: TeacherQuality) -> str:
    """Name the likely causes of a low accuracy."""
    suspects = (
        f"its classes and their order (matched {quality.resolved.matched}; --class-map), and its "
        "normalisation and image size"
    )
    if not quality.order:
        return suspects
    return f"{suspects}; its classes seem to be in another order: {quality.order}"
