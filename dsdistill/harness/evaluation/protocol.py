"""The protocol: one learner, budget and tuning for distilled, random, coreset and full data.

Accuracy on a distilled set alone says little: random images under the same recipe often come
close. So every learner is trained the same way on each kind of data, over several seeds. The
validation images are held out of the training set: they choose the learning rate, from one grid for
all kinds of data, and calibrate probabilities. The test images are read once for each trained
predictor; a learner never sees them.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dsdistill.harness import memory
from dsdistill.harness.data.labeled_images import Examples, draw_balanced
from dsdistill.harness.errors import UserError, first_line
from dsdistill.harness.evaluation import metrics, results
from dsdistill.harness.evaluation.held_out import HeldOut, Predict
from dsdistill.harness.evaluation.result_cache import ResultCache
from dsdistill.harness.evaluation.results import Result


class Learner(Protocol):
    """Anything that turns a training set into predictions: ridge regression, a network, a student.

    Attributes:
        name: Name in a report.
        limit: Largest number of images it can train on, or None. From a larger set the evaluation
            draws that many, class-balanced, and the report says so.

    It may have four more: `deterministic`, True if the seed changes nothing, so that one
    training serves all seeds of the same data; `identity`, a JSON-compatible value of all that
    its results depend on besides data and seed, so that they can be cached for later evaluations;
    `accelerator`, the name of the device it computes on, None for the CPU; and `prepare`, a
    function that is given training and validation images before the time of a training counts,
    for what all trainings share.
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
        rates: The grid, the same for every kind of data.
    """

    @property
    def rates(self) -> tuple[float, ...]: ...

    def with_rate(self, rate: float) -> Learner:
        """The same learner with one learning rate."""
        ...


@runtime_checkable
class Augmentable(Protocol):
    """A learner that can be trained with augmentation."""

    def with_augmentation(self) -> Learner:
        """The same learner with augmentation."""
        ...


@dataclass(frozen=True)
class Arm:
    """One kind of training data.

    Attributes:
        name: `distilled`, `random`, ... as in `Result`.
        draw: Function from a seed to the training set.
        fixed: Whether the training set is the same for every seed.
        identity: JSON-compatible value of all that the draw depends on besides the seed; None if
            that is unknown, in which case results cannot be cached.
        duplicate_of: Name of an arm with identical images and labels, whose results this one
            shares.
        images: Number of images in a draw; None where it is not known beforehand.
    """

    name: str
    draw: Callable[[int], Examples]
    fixed: bool = False
    identity: Mapping[str, Any] | None = None
    duplicate_of: str | None = None
    images: int | None = None


def evaluate(
    learner: Learner,
    arm: Arm,
    held_out: HeldOut,
    seeds: Sequence[int],
    *,
    augmented: bool = False,
    cache: ResultCache | None = None,
    on_result: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Train a learner on one kind of data, once per seed, and score it on the test images.

    The learning rate is chosen once, with the first seed, by the accuracy on the validation
    images; that training counts as the first seed's. A training that fails is a result too, with
    its reason.

    Args:
        learner: Called with the drawn training set, the validation images and the seed.
        arm: The kind of data, which draws the training set.
        held_out: Validation and test images in the preprocessing of the training set.
        seeds: Seeds of the draw and of the training.
        augmented: Whether to train an `Augmentable` learner with augmentation.
        cache: Results of earlier evaluations, to which these are added; None for no cache.
        on_result: Called with each result as it comes.

    Raises:
        UserError: Without a seed, or for augmentation of a learner that has none.
    """
    if not seeds:
        raise UserError("an evaluation needs at least one seed")
    if augmented:
        if not isinstance(learner, Augmentable):
            raise UserError(f"{learner.name} cannot be trained with augmentation")
        learner = learner.with_augmentation()
    measured: list[Result] = []
    for seed in seeds:
        key = _cache_key(learner, arm, held_out, seeds[0], seed)
        result = None
        if cache and key:
            problem = functools.partial(_mismatch, learner, arm, held_out, seed, augmented)
            result = cache.get(key, problem)
        if result is None:
            result = _run_seed(learner, arm, held_out, seed, measured, augmented)
            if cache and key:
                cache.put(key, result)
        measured.append(result)
        on_result(result)
    return measured


def _mismatch(
    learner: Learner, arm: Arm, held_out: HeldOut, seed: int, augmented: bool, stored: Result
) -> str | None:
    """Why a stored result cannot be that of this training; None if it can."""
    training = (stored.arm, stored.learner, stored.augmented, stored.seed)
    if training != (arm.name, learner.name, augmented, seed):
        return "it is of another training"
    labels, k = held_out.test.data.labels, len(held_out.test.data.classes)
    if why := results.problem(stored, np.bincount(labels, minlength=k).tolist()):
        return why
    if arm.images is None:
        return None
    if learner.limit is None or arm.images <= learner.limit:
        plausible = stored.images == arm.images
    else:
        plausible = 0 < stored.images <= learner.limit
    return None if plausible else f"it is of {stored.images} images"


def _run_seed(
    learner: Learner,
    arm: Arm,
    held_out: HeldOut,
    seed: int,
    earlier: Sequence[Result],
    augmented: bool,
) -> Result:
    """Train and score one seed, given the results of the seeds before it."""
    if earlier and arm.fixed and getattr(learner, "deterministic", False):
        return replace(earlier[0], seed=seed, train_seconds=0.0, tune_seconds=0.0)
    train = limit_examples(arm.draw(seed), learner.limit, seed)
    begun = Result(
        arm.name, learner.name, augmented, seed, images=len(train), bytes=stored_bytes(train)
    )
    if not isinstance(learner, Tunable) or len(learner.rates) == 0:
        return _score_on_test(begun, _train(learner, train, held_out, seed), held_out)
    if not earlier:
        return _tune(learner, begun, train, held_out)
    if earlier[0].rate is None:
        return replace(begun, failure=earlier[0].failure)
    rate = earlier[0].rate
    trained = _train(learner.with_rate(rate), train, held_out, seed)
    return _score_on_test(replace(begun, rate=rate), trained, held_out)


@dataclass(frozen=True)
class _TrainingOutcome:
    """A predictor with the seconds of its training, or the reason why there is none."""

    predict: Predict | None
    seconds: float
    failure: str | None = None


def _train(learner: Learner, train: Examples, held_out: HeldOut, seed: int) -> _TrainingOutcome:
    prepare = getattr(learner, "prepare", None)
    began = time.monotonic()
    try:
        if prepare is not None:
            prepare(train, held_out.validation)
            began = time.monotonic()
        predict, failure = learner(train, held_out.validation, seed), None
    # A learner may be third-party code, and one that fails must not cost the others' results: the
    # report shows the reason in place of its accuracy.
    except Exception as error:
        predict, failure = None, _failure_reason(error)
    return _TrainingOutcome(predict, time.monotonic() - began, failure)


def _tune(learner: Tunable, begun: Result, train: Examples, held_out: HeldOut) -> Result:
    """Train once per rate; keep the best validation accuracy, among equals the best likelihood."""
    best, failures, seconds = None, [], 0.0
    for rate in learner.rates:
        trained = _train(learner.with_rate(rate), train, held_out, begun.seed)
        seconds += trained.seconds
        score = None if trained.predict is None else _validation_score(trained.predict, held_out)
        if score is None:
            failures.append(trained.failure or "scores that are not finite")
        elif best is None or score > best[0]:
            best = score, rate, trained
    if best is None:
        reason = f"no rate of {len(learner.rates)} trained: {failures[0]}"
        return replace(begun, tune_seconds=seconds, failure=reason)
    _, rate, trained = best
    begun = replace(begun, rate=rate, tune_seconds=seconds - trained.seconds)
    return _score_on_test(begun, trained, held_out)


def _validation_score(predict: Predict, held_out: HeldOut) -> tuple[float, float] | None:
    """Validation accuracy, and the likelihood that decides between equals; larger is better."""
    scores = held_out.validation_scores(predict)
    if scores is None:
        return None
    accuracy = metrics.accuracy(scores, held_out.validation_labels)
    return accuracy, -held_out.calibrate(scores)[1]


def _score_on_test(begun: Result, trained: _TrainingOutcome, held_out: HeldOut) -> Result:
    """Complete a result with its figures on the test images."""
    begun = replace(begun, train_seconds=trained.seconds)
    if trained.predict is None:
        return replace(begun, failure=trained.failure, peak_memory=memory.peak())
    try:
        figures = held_out.measure(trained.predict)
    except Exception as error:  # as above: a predictor may be third-party code
        return replace(begun, failure=_failure_reason(error), peak_memory=memory.peak())
    facts = getattr(trained.predict, "facts", None)
    return replace(begun, **figures, facts=facts, peak_memory=memory.peak())


def _failure_reason(error: Exception) -> str:
    """First line of an error, after the name of its class unless it is a `UserError`."""
    return first_line(error, kind=not isinstance(error, UserError))


def _cache_key(
    learner: Learner, arm: Arm, held_out: HeldOut, first_seed: int, seed: int
) -> Mapping[str, Any] | None:
    """All that a result depends on; None if that is not known."""
    identity = getattr(learner, "identity", None)
    if arm.identity is None or identity is None or held_out.identity is None:
        return None
    return {
        "arm": [arm.name, arm.identity],
        "learner": [learner.name, learner.limit, identity],
        "judges": held_out.identity,
        "tuned with seed": first_seed,
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
    """Bytes of the stored images and of their labels: one index per image, or k floats."""
    pixels = len(examples) * int(np.prod(examples.data.shape)) * examples.data.store.itemsize
    k = len(examples.data.classes)
    index = 1 if k <= 256 else 2
    return pixels + (len(examples) * index if examples.targets is None else examples.targets.nbytes)
