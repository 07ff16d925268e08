"""The protocol: one learner, one budget, one tuning, on distilled, random, coreset and full data.

Accuracy on a distilled set alone says little: random images under the same recipe often come
close. So every learner is trained the same way on each kind of data, over several seeds. The
validation images are held out of the training set: they choose the learning rate, from one grid for
all kinds of data, and calibrate probabilities. The test images are read once for each trained
predictor, and never reach a learner.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from dsdistill.harness import memory
from dsdistill.harness.data.labeled_images import Examples, draw_balanced
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import metrics, results
from dsdistill.harness.evaluation.held_out import HeldOut
from dsdistill.harness.evaluation.result_cache import ResultCache
from dsdistill.harness.evaluation.results import Result


class Predict(Protocol):
    """Scores (n, k) of preprocessed images (n, h, w, c); the largest score is the prediction.

    It may have an attribute `facts`: what it says of itself, as in `Result.facts`.
    """

    def __call__(self, images: Float[np.ndarray, "n h w c"], /) -> Float[np.ndarray, "n k"]: ...


class Learner(Protocol):
    """Anything that turns a training set into predictions: ridge regression, a network, a student.

    Attributes:
        name: As it stands in a report.
        limit: Most images it can train on, or None. Of a larger set the evaluation draws so
            many, class-balanced, and the report says so.

    It may have three more: `deterministic`, True where the seed changes nothing, so that one
    training serves all seeds of the same data; `identity`, JSON-compatible, all that its results
    depend on beside data and seed, so that they can be kept for later evaluations; and
    `accelerator`, the name of what it computes on, None for the CPU.
    """

    @property
    def name(self) -> str: ...

    @property
    def limit(self) -> int | None: ...

    def __call__(self, train: Examples, validation: Examples, seed: int, /) -> Predict:
        """Train. `validation` may steer the training; the test images are never passed here."""
        ...


@runtime_checkable
class Tunable(Protocol):
    """A learner whose learning rate is chosen from a grid.

    Attributes:
        rates: The same for every kind of data.
    """

    @property
    def rates(self) -> tuple[float, ...]: ...

    def at(self, rate: float) -> Learner:
        """The learner with that rate."""
        ...


@runtime_checkable
class Augmentable(Protocol):
    """A learner that can be trained with augmentation."""

    def augmented(self) -> Learner:
        """The same learner, with it."""
        ...


@dataclass(frozen=True)
class Arm:
    """One kind of training data.

    Attributes:
        name: `distilled`, `random`, ... as in `Result`.
        draw: The training set for a seed.
        fixed: Whether it is the same for every seed.
        identity: JSON-compatible: what the draw depends on beside the seed. None: its results
            cannot be kept.
        like: Name of an arm with the very same images and labels, whose results are its own.
        images: Number in a draw; None where it is not known before.
    """

    name: str
    draw: Callable[[int], Examples]
    fixed: bool = False
    identity: Mapping[str, Any] | None = None
    like: str | None = None
    images: int | None = None


def evaluate(
    learner: Learner,
    arm: Arm,
    judges: HeldOut,
    seeds: Sequence[int],
    *,
    augmented: bool = False,
    kept: ResultCache | None = None,
    on_result: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Train a learner on one kind of data, once a seed, and score it on the test images.

    The learning rate is chosen once, with the first seed, by the accuracy on the validation
    images; that training counts as the first seed's. A training that fails is a result too, with
    its reason.

    Args:
        learner: Gets the drawn training set, the validation images and the seed.
        arm: Draws the training set.
        judges: Validation and test images in the preprocessing of the training set.
        seeds: Of the draw and of the training.
        augmented: Train an `Augmentable` learner with augmentation.
        kept: Where results of earlier evaluations lie, and these are put.
        on_result: Called with each result as it comes.

    Raises:
        UserError: Without a seed, or for augmentation of a learner that has none.
    """
    if not seeds:
        raise UserError("an evaluation needs at least one seed")
    if augmented:
        if not isinstance(learner, Augmentable):
            raise UserError(f"{learner.name} cannot be trained with augmentation")
        learner = learner.augmented()
    measured: list[Result] = []
    for seed in seeds:
        key = _cache_key(learner, arm, judges, seeds[0], seed)
        found = None
        if kept and key:
            expected = functools.partial(_mismatch, learner, arm, judges, seed, augmented)
            found = kept.get(key, expected)
        if found is None:
            found = _run_seed(learner, arm, judges, seed, measured, augmented)
            if kept and key:
                kept.put(key, found)
        measured.append(found)
        on_result(found)
    return measured


def _mismatch(
    learner: Learner, arm: Arm, judges: HeldOut, seed: int, augmented: bool, found: Result
) -> str | None:
    """What shows that a stored result is not that of this training, or None."""
    named = (found.arm, found.learner, found.augmented, found.seed)
    if named != (arm.name, learner.name, augmented, seed):
        return "it is of another training"
    labels, k = judges.test.data.labels, len(judges.test.data.classes)
    if why := results.problem(found, np.bincount(labels, minlength=k).tolist()):
        return why
    if arm.images is None:
        return None
    if learner.limit is None or arm.images <= learner.limit:
        right = found.images == arm.images
    else:
        right = 0 < found.images <= learner.limit
    return None if right else f"it is of {found.images} images"


def _run_seed(
    learner: Learner,
    arm: Arm,
    judges: HeldOut,
    seed: int,
    before: Sequence[Result],
    augmented: bool,
) -> Result:
    """The result of one seed, given those of the seeds before it."""
    if before and arm.fixed and getattr(learner, "deterministic", False):
        return replace(before[0], seed=seed, train_seconds=0.0, tune_seconds=0.0)
    train = limit_examples(arm.draw(seed), learner.limit, seed)
    begun = Result(
        arm.name, learner.name, augmented, seed, images=len(train), bytes=stored_bytes(train)
    )
    if not isinstance(learner, Tunable) or len(learner.rates) == 0:
        return _score_on_test(begun, _train(learner, train, judges, seed), judges)
    if not before:
        return _tune(learner, begun, train, judges)
    if before[0].rate is None:
        return replace(begun, failure=before[0].failure)
    rate = before[0].rate
    trained = _train(learner.at(rate), train, judges, seed)
    return _score_on_test(replace(begun, rate=rate), trained, judges)


@dataclass(frozen=True)
class _TrainingOutcome:
    """A predictor with what it took, or why there is none."""

    predict: Predict | None
    seconds: float
    failure: str | None = None


def _train(learner: Learner, train: Examples, judges: HeldOut, seed: int) -> _TrainingOutcome:
    began = time.monotonic()
    try:
        predict, failure = learner(train, judges.validation, seed), None
    # A learner may be anybody's, and one that fails must not take the others' results with it: the
    # report shows its reason in the place of its accuracy.
    except Exception as error:
        predict, failure = None, _failure_reason(error)
    return _TrainingOutcome(predict, time.monotonic() - began, failure)


def _tune(learner: Tunable, begun: Result, train: Examples, judges: HeldOut) -> Result:
    """The best of one training a rate by validation accuracy, the likeliest of equals."""
    best, failures, spent = None, [], 0.0
    for rate in learner.rates:
        trained = _train(learner.at(rate), train, judges, begun.seed)
        spent += trained.seconds
        score = None if trained.predict is None else _validation_score(trained.predict, judges)
        if score is None:
            failures.append(trained.failure or "scores that are not finite")
        elif best is None or score > best[0]:
            best = score, rate, trained
    if best is None:
        reason = f"no rate of {len(learner.rates)} trained: {failures[0]}"
        return replace(begun, tune_seconds=spent, failure=reason)
    _, rate, trained = best
    begun = replace(begun, rate=rate, tune_seconds=spent - trained.seconds)
    return _score_on_test(begun, trained, judges)


def _validation_score(predict: Predict, judges: HeldOut) -> tuple[float, float] | None:
    """Validation accuracy, and the likelihood that decides between equals; larger is better."""
    scores = judges.validation_scores(predict)
    if scores is None:
        return None
    accuracy = metrics.accuracy(scores, judges.validation_labels)
    return accuracy, -judges.calibrated(scores)[1]


def _score_on_test(begun: Result, trained: _TrainingOutcome, judges: HeldOut) -> Result:
    """With its figures on the test images."""
    begun = replace(begun, train_seconds=trained.seconds)
    if trained.predict is None:
        return replace(begun, failure=trained.failure, peak_memory=memory.peak())
    try:
        figures = judges.figures(trained.predict)
    except Exception as error:  # as above: a predictor may be anybody's
        return replace(begun, failure=_failure_reason(error), peak_memory=memory.peak())
    facts = getattr(trained.predict, "facts", None)
    return replace(begun, **figures, facts=facts, peak_memory=memory.peak())


def _failure_reason(error: Exception) -> str:
    """The first line of an error; the name of its class too, unless it is written for people."""
    first = next(iter(str(error).strip().splitlines()), "")
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


def _cache_key(
    learner: Learner, arm: Arm, judges: HeldOut, first: int, seed: int
) -> Mapping[str, Any] | None:
    """All that a result depends on; None if that is not known."""
    identity = getattr(learner, "identity", None)
    if arm.identity is None or identity is None or judges.identity is None:
        return None
    return {
        "arm": [arm.name, arm.identity],
        "learner": [learner.name, learner.limit, identity],
        "judges": judges.identity,
        "tuned with seed": first,
        "seed": seed,
    }


def limit_examples(examples: Examples, limit: int | None, seed: int) -> Examples:
    """The examples, or a class-balanced draw of `limit` of them."""
    if limit is None or len(examples) <= limit:
        return examples
    rows = draw_balanced(examples.data.labels, limit, np.random.default_rng(seed))
    targets = None if examples.targets is None else examples.targets[rows]
    return Examples(
        examples.data.select(rows), examples.preprocess, targets, examples.is_preprocessed
    )


def stored_bytes(examples: Examples) -> int:
    """Bytes of the images as they are stored, and of their labels: one index, or k floats."""
    pixels = len(examples) * int(np.prod(examples.data.shape)) * examples.data.store.itemsize
    k = len(examples.data.classes)
    index = 1 if k <= 256 else 2
    return pixels + (len(examples) * index if examples.targets is None else examples.targets.nbytes)
