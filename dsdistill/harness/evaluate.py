"""The protocol: one learner, one budget, on distilled, random, coreset and full data.

Accuracy on a distilled set alone says little: random images under the same recipe often come
close. So every learner is trained the same way on each of the four, over several seeds. The
validation images are held out of the training set and may steer a learner; the test images are
read once for each trained predictor and never reach a learner.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float

from dsdistill.harness.errors import UserError
from dsdistill.harness.labeled import Examples, balanced


class Predict(Protocol):
    """Scores (n, k) of preprocessed images (n, h, w, c); the largest score is the prediction."""

    def __call__(self, images: Float[np.ndarray, "n h w c"], /) -> Float[np.ndarray, "n k"]: ...


class Learner(Protocol):
    """Anything that turns a training set into predictions: ridge regression, a network, a student.

    Attributes:
        name: As it stands in a report.
        limit: Most images it can train on, or None. Of a larger set the evaluation draws so
            many, class-balanced, and the report says so.
    """

    @property
    def name(self) -> str: ...

    @property
    def limit(self) -> int | None: ...

    def __call__(self, train: Examples, validation: Examples, seed: int, /) -> Predict:
        """Train. `validation` may steer the training; the test images are never passed here."""
        ...


@dataclass(frozen=True)
class Arm:
    """One kind of training data.

    Attributes:
        name: `distilled`, `random`, `coreset` or `full`.
        draw: The training set for a seed.
    """

    name: str
    draw: Callable[[int], Examples]


@dataclass(frozen=True)
class Row:
    """One learner on one kind of data, over all seeds.

    Attributes:
        data, learner: Names.
        seeds: One training each.
        accuracy: On the test images, a fraction a seed.
        mean, std: Of the accuracies; the deviation is the sample's (n - 1), 0 for one seed.
        n: Number of seeds.
        images: Images the learner trained on.
        bytes: Of those images and their labels, as stored.
        train_seconds: Mean over the seeds, training alone.
    """

    data: str
    learner: str
    seeds: list[int]
    accuracy: list[float]
    mean: float
    std: float
    n: int
    images: int
    bytes: int
    train_seconds: float


def evaluate(
    learner: Learner,
    arm: Arm,
    validation: Examples,
    test: Examples,
    seeds: Sequence[int],
    *,
    on_seed: Callable[[float], None] = lambda accuracy: None,
) -> Row:
    """Train a learner on one kind of data, once a seed, and score it on the test images.

    Args:
        learner: Gets the drawn training set, the validation images and the seed.
        arm: Draws the training set.
        validation, test: In the same preprocessing as the training set.
        seeds: Of the draw and of the training.
        on_seed: Called with each accuracy as it comes.
    """
    accuracies, seconds, used = [], [], None
    for seed in seeds:
        used = within_limit(arm.draw(seed), learner.limit, seed)
        began = time.monotonic()
        predict = learner(used, validation, seed)
        seconds.append(time.monotonic() - began)
        accuracies.append(accuracy(predict, test))
        on_seed(accuracies[-1])
    if used is None:
        raise UserError("an evaluation needs at least one seed")
    return Row(
        data=arm.name,
        learner=learner.name,
        seeds=list(seeds),
        accuracy=accuracies,
        mean=float(np.mean(accuracies)),
        std=float(np.std(accuracies, ddof=1)) if len(seeds) > 1 else 0.0,
        n=len(seeds),
        images=len(used),
        bytes=stored_bytes(used),
        train_seconds=float(np.mean(seconds)),
    )


def within_limit(examples: Examples, limit: int | None, seed: int) -> Examples:
    """The examples, or a class-balanced draw of `limit` of them."""
    if limit is None or len(examples) <= limit:
        return examples
    rows = balanced(examples.data.labels, limit, np.random.default_rng(seed))
    targets = None if examples.targets is None else examples.targets[rows]
    return Examples(examples.data.select(rows), examples.preprocess, targets, examples.ready)


def accuracy(predict: Predict, test: Examples) -> float:
    """Fraction of the test images whose largest score is that of their class."""
    right = 0
    for rows in test.batches():
        right += int((predict(test.images(rows)).argmax(1) == test.data.labels[rows]).sum())
    return right / len(test)


def stored_bytes(examples: Examples) -> int:
    """Bytes of the images as they are stored, and of their labels: one index, or k floats."""
    pixels = len(examples) * int(np.prod(examples.data.shape)) * examples.data.store.itemsize
    k = len(examples.data.classes)
    index = 1 if k <= 256 else 2
    return pixels + (len(examples) * index if examples.targets is None else examples.targets.nbytes)
