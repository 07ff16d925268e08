"""The protocol with learners made of NumPy, whose results are known by hand."""

import hashlib
import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from dsdistill.commands import evaluate as evaluate_command
from dsdistill.commands import evaluation_parts
from dsdistill.harness.data import labeled_images
from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from dsdistill.harness.data.preprocess import identity
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import held_out, protocol, results
from dsdistill.harness.evaluation.held_out import HeldOut
from dsdistill.harness.evaluation.protocol import Arm, evaluate
from dsdistill.harness.evaluation.result_cache import ResultCache


def examples(n: int, seed: int = 0) -> Examples:
    """Two classes around two centres, alternating."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    images = rng.normal(labels[:, None, None, None], 0.1, (n, 2, 2, 1)).astype(np.float32)
    return Examples(LabeledImages(images, labels, ("dark", "light")), identity(1))


def judging(**of) -> HeldOut:
    return HeldOut(examples(8, 1), examples(5, 2), identity={"test": 5}, **of)


FULL = Arm("full", lambda seed: examples(10), fixed=True, identity={"n": 10})


@dataclass
class Constant:
    """Predicts one class whatever it sees, and remembers what it was given."""

    name: str = "constant"
    limit: int | None = None
    identity: object = "constant"
    deterministic: bool = False

    def __post_init__(self) -> None:
        self.seen: list[tuple[Examples, Examples, int]] = []

    def __call__(self, train, validation, seed, /):
        self.seen.append((train, validation, seed))
        return lambda images: np.tile([seed == 0, seed != 0], (len(images), 1)).astype(float)


@dataclass
class Graded:
    """Right on a share of all images that depends on its rate; `bad` rates give NaN or an error."""

    share: dict[float, float]
    bad: tuple[float, ...] = ()
    raising: bool = False
    name: str = "graded"
    limit: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        self.trained: list[tuple[float | None, int]] = []

    @property
    def rates(self) -> tuple[float, ...]:
        return tuple(self.share)

    def with_rate(self, rate: float) -> "Graded":
        chosen = replace(self, rate=rate)
        chosen.trained = self.trained
        return chosen

    def __call__(self, train, validation, seed, /):
        self.trained.append((self.rate, seed))
        if self.rate in self.bad and self.raising:
            raise FloatingPointError("loss is nan\nat step 3")

        def predict(images):
            light = images.mean((1, 2, 3)) > 0.5
            rng = np.random.default_rng(0)
            flip = rng.permutation(len(images)) >= round(self.share[self.rate] * len(images))
            scores = np.stack([light == flip, light != flip], 1).astype(float)
            return scores * np.nan if self.rate in self.bad else scores

        return predict


def test_a_result_holds_what_was_measured():
    found = evaluate(Constant(), FULL, judging(), [0, 1])
    assert [r.accuracy for r in found] == [3 / 5, 2 / 5]  # labels 0, 1, 0, 1, 0
    assert [r.validation_accuracy for r in found] == [1 / 2, 1 / 2]
    first = found[0]
    assert (first.images, first.bytes, first.seed) == (10, 10 * (4 * 4 + 1), 0)
    assert first.confusion == [[3, 0], [2, 0]]
    assert first.per_class == [1.0, 0.0]
    # Whatever it sees it says the same, so its calibrated probabilities are one half each.
    assert first.nll == pytest.approx(np.log(2), abs=1e-3)
    assert first.calibration_error == pytest.approx(0.1, abs=2e-3)
    (row,) = results.group_by_training(found)
    assert row.accuracy is not None
    assert row.accuracy.mean == pytest.approx(0.5)
    assert row.accuracy.std == pytest.approx(np.sqrt(2) * 0.1)  # n - 1 in the denominator


def test_a_learner_never_sees_the_test_images():
    learner, judge = Constant(), judging()
    evaluate(learner, FULL, judge, [0, 1])
    hidden = {image.tobytes() for image in judge.test.images()}
    for given, held, _ in learner.seen:
        for part in (given, held):
            assert hidden.isdisjoint(image.tobytes() for image in part.images())


class _Counted(Examples):
    """Images that remember how often they were read."""

    reads = 0

    def images(self, indices=slice(None)):
        type(self).reads += 1
        return super().images(indices)


def test_the_tuner_never_reads_the_test_images():
    """Five trainings, of which three choose the rate: the test images are read twice."""
    inner = examples(5, 2)
    _Counted.reads = 0
    test = _Counted(inner.data, inner.preprocess)
    learner = Graded({0.1: 0.25, 0.2: 1.0, 0.3: 0.5})
    found = evaluate(learner, FULL, HeldOut(examples(8, 1), test), [4, 5])
    assert learner.trained == [(0.1, 4), (0.2, 4), (0.3, 4), (0.2, 5)]
    assert _Counted.reads == 2
    assert [r.rate for r in found] == [0.2, 0.2]
    assert [r.accuracy for r in found] == [1.0, 1.0]
    assert found[0].tune_seconds > 0
    assert found[1].tune_seconds == 0


def test_the_choice_follows_the_validation_images_even_where_the_test_images_disagree():
    class Fooled(Graded):
        """Right on the eight validation images at 0.9, on the five test images at 0.1."""

        def __call__(self, train, validation, seed, /):
            size = 8 if self.rate == 0.9 else 5

            def predict(images):
                light = images.mean((1, 2, 3)) > 0.5
                said = light if len(images) == size else ~light
                return np.stack([~said, said], 1).astype(float)

            return predict

    (found,) = evaluate(Fooled({0.1: 0, 0.9: 0}), FULL, judging(), [0])
    assert (found.rate, found.validation_accuracy, found.accuracy) == (0.9, 1.0, 0.0)


@pytest.mark.parametrize("raising", [False, True])
def test_a_rate_that_fails_is_not_chosen(raising: bool):
    learner = Graded({0.1: 0.5, 9.0: 1.0}, bad=(9.0,), raising=raising)
    (found,) = evaluate(learner, FULL, judging(), [0])
    assert found.rate == 0.1
    assert found.failure is None


@pytest.mark.parametrize(
    ("raising", "reason"),
    [(True, "FloatingPointError: loss is nan"), (False, "scores that are not finite")],
)
def test_a_learner_that_fails_is_reported_with_its_reason(raising: bool, reason: str):
    learner = Graded({9.0: 1.0}, bad=(9.0,), raising=raising)
    found = evaluate(learner, FULL, judging(), [0, 1])
    assert [r.accuracy for r in found] == [None, None]
    assert all(r.failure == f"no rate of 1 trained: {reason}" for r in found)
    assert learner.trained == [(9.0, 0)]  # the second seed has no rate to be trained at


def test_one_failed_seed_leaves_no_mean():
    class Once(Constant):
        def __call__(self, train, validation, seed, /):
            if seed == 1:
                raise UserError("loss is nan at step 7")
            return super().__call__(train, validation, seed)

    found = evaluate(Once(), FULL, judging(), [0, 1, 2])
    (row,) = results.group_by_training(found)
    assert row.accuracy is None
    assert [r.seed for r in row.failures] == [1]
    assert row.failures[0].failure == "loss is nan at step 7"
    assert found[2].accuracy == 2 / 5


@pytest.mark.parametrize("shape", [(3,), (2, 2, 1)])
def test_scores_of_another_shape_are_a_failure(shape: tuple[int, ...]):
    class Odd(Constant):
        def __call__(self, train, validation, seed, /):
            return lambda images: np.zeros((len(images), *shape))

    (found,) = evaluate(Odd(), FULL, judging(), [0])
    assert found.failure is not None
    assert "must have the shape (8, 2)" in found.failure


def test_a_learner_without_randomness_is_trained_once_on_the_same_data():
    learner = Constant(deterministic=True)
    found = evaluate(learner, FULL, judging(), [0, 1, 2])
    assert len(learner.seen) == 1
    assert [r.seed for r in found] == [0, 1, 2]
    assert [r.accuracy for r in found] == [3 / 5] * 3
    assert found[1].train_seconds == 0
    drawn = replace(FULL, fixed=False)
    evaluate(learner, drawn, judging(), [0, 1])
    assert len(learner.seen) == 3


def test_augmentation_is_asked_of_the_learner():
    class Bold(Constant):
        def with_augmentation(self):
            return replace(self, name="constant", identity="bold")

    (found,) = evaluate(Bold(), FULL, judging(), [0], augmented=True)
    assert found.augmented
    with pytest.raises(UserError, match="constant cannot be trained with augmentation"):
        evaluate(Constant(), FULL, judging(), [0], augmented=True)


def test_figures_beside_a_teacher():
    def teacher(images):
        return np.tile([2.0, 0.0], (len(images), 1))

    (found,) = evaluate(Constant(), FULL, judging(teacher=teacher), [0])
    assert found.teacher_agreement == 1.0
    p = np.exp(2) / (1 + np.exp(2))
    expected = p * np.log(2 * p) + (1 - p) * np.log(2 * (1 - p))  # against one half each
    assert found.teacher_kl == pytest.approx(expected, abs=1e-3)


def test_test_images_of_several_batches(monkeypatch):
    monkeypatch.setattr(labeled_images, "IMAGES_PER_BATCH", 2)

    def constant(images):
        return np.ones((len(images), 2))

    assert held_out.accuracy(constant, examples(5), "test images") == 3 / 5


def test_a_limit_is_a_balanced_draw():
    learner = Constant(limit=4)
    (found,) = evaluate(learner, FULL, judging(), [0])
    assert found.images == 4
    assert np.bincount(learner.seen[0][0].data.labels).tolist() == [2, 2]


def test_no_seed_is_refused():
    with pytest.raises(UserError, match="at least one seed"):
        evaluate(Constant(), FULL, judging(), [])


@pytest.fixture
def kept(tmp_path):
    said: list[str] = []
    return ResultCache(tmp_path / "own", tmp_path / "shared", ("full",), said.append), said


def test_what_was_measured_is_not_measured_again(kept):
    store, _ = kept
    first = evaluate(Constant(), FULL, judging(), [0, 1], cache=store)
    again = Constant()
    assert evaluate(again, FULL, judging(), [0, 1], cache=store) == first
    assert again.seen == []
    # Stopped after the first seed: only the second is trained.
    for path in store.folder.iterdir():
        if json.loads(json.loads(path.read_text())["content"])["key"]["seed"] == 1:
            path.unlink()
    alone, half = replace(store, shared=None), Constant()
    assert [r.accuracy for r in evaluate(half, FULL, judging(), [0, 1], cache=alone)] == [0.6, 0.4]
    assert [seed for *_, seed in half.seen] == [1]


def test_another_evaluation_shares_only_what_does_not_depend_on_its_set(kept, tmp_path):
    store, _ = kept
    distilled = replace(FULL, name="distilled")
    for arm in (FULL, distilled):
        evaluate(Constant(), arm, judging(), [0], cache=store)
    other, learner = replace(store, folder=tmp_path / "other"), Constant()
    for arm in (FULL, distilled):
        evaluate(learner, arm, judging(), [0], cache=other)
    assert len(learner.seen) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda learner, arm, judge: (replace(learner, identity="other"), arm, judge),
        lambda learner, arm, judge: (learner, replace(arm, identity={"n": 11}), judge),
        lambda learner, arm, judge: (learner, arm, replace(judge, identity={"test": 6})),
        lambda learner, arm, judge: (replace(learner, identity=None), arm, judge),
    ],
)
def test_anything_else_is_measured(kept, change):
    store, _ = kept
    evaluate(Constant(), FULL, judging(), [0], cache=store)
    learner, arm, judge = change(Constant(), FULL, judging())
    evaluate(learner, arm, judge, [0], cache=store)
    assert len(learner.seen) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("0.6", "0.9"),
        lambda text: "[]",
        lambda text: "",
    ],
)
def test_a_damaged_result_is_measured_anew(kept, damage):
    store, said = kept
    alone = replace(store, shared=None)
    evaluate(Constant(), FULL, judging(), [0], cache=alone)
    (path,) = alone.folder.iterdir()
    path.write_text(damage(path.read_text()))
    learner = Constant()
    assert evaluate(learner, FULL, judging(), [0], cache=alone)[0].accuracy == 0.6
    assert len(learner.seen) == 1
    assert len(said) == 1
    assert "is damaged" in said[0]
    evaluate(learner, FULL, judging(), [0], cache=alone)
    assert len(learner.seen) == 1


def _resigned(path, **changes):
    """A stored result with other figures, and a checksum that fits them."""
    content = json.loads(json.loads(path.read_text())["content"])
    content["result"] |= changes
    text = json.dumps(content, sort_keys=True)
    sha = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps({"sha256": sha, "content": text}))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"accuracy": 1.6}, "accuracy is 1.6"),
        ({"accuracy": -0.2}, "accuracy is -0.2"),
        ({"accuracy": float("nan")}, "accuracy is not finite"),
        ({"accuracy": "0.6"}, "accuracy is '0.6'"),
        ({"accuracy": True}, "accuracy is True"),
        ({"accuracy": 0.9}, "its confusion matrix gives another"),
        ({"accuracy": None}, "neither figures nor a reason"),
        ({"confusion": [[2, 1], [1, 2]]}, "of other test images"),
        ({"confusion": [[3, 0], [3, -1]]}, "other entries than counts"),
        ({"confusion": [[3]]}, "is not 2x2"),
        ({"confusion": [[3, 0], 2]}, "is not 2x2"),
        ({"per_class": [1.0, 0.5]}, "not those of the confusion matrix"),
        ({"calibration_error": 2.0}, "calibration_error is 2.0"),
        ({"nll": -1.0}, "nll is -1.0"),
        ({"nll": float("inf")}, "nll is not finite"),
        ({"seed": 1}, "of another training"),
        ({"learner": "ridge"}, "of another training"),
        ({"arm": "random"}, "of another training"),
        ({"augmented": True}, "of another training"),
        ({"images": 9}, "of 9 images"),
        ({"images": -10}, "not whole, or is negative"),
        ({"failure": "none"}, "it failed and yet has an accuracy"),
        ({"train_seconds": float("-inf")}, "train_seconds is not finite"),
        ({"facts": [1]}, "facts are"),
        ({"facts": {"curve": [[1, float("nan")]]}}, "facts is not finite"),
        ({"unknown": 1}, "unexpected keyword"),
    ],
)
def test_a_result_that_cannot_be_is_measured_anew(kept, changes, why):
    """Signed again, so that its checksum is right."""
    store, said = kept
    arm = replace(FULL, images=10)
    first = evaluate(Constant(), arm, judging(), [0], cache=store)
    for folder in (store.folder, store.shared):
        (path,) = folder.iterdir()
        _resigned(path, **changes)
    learner = Constant()
    (again,) = evaluate(learner, arm, judging(), [0], cache=store)
    assert replace(again, train_seconds=0, peak_memory=0) == replace(
        first[0], train_seconds=0, peak_memory=0
    )
    assert len(learner.seen) == 1
    assert all(why in line for line in said), said
    assert len(said) == 2


def test_a_result_of_a_limited_draw_has_at_most_so_many_images(kept):
    store, said = kept
    arm, limited = replace(FULL, images=10), Constant(limit=6)
    evaluate(limited, arm, judging(), [0], cache=store)
    assert limited.seen
    again = Constant(limit=6)
    evaluate(again, arm, judging(), [0], cache=store)
    assert (again.seen, said) == ([], [])


def test_a_failure_is_not_shared(kept, tmp_path):
    class Failing(Constant):
        def __call__(self, train, validation, seed, /):
            super().__call__(train, validation, seed)
            raise MemoryError("too large")

    store, _ = kept
    (found,) = evaluate(Failing(), FULL, judging(), [0], cache=store)
    assert found.failure == "MemoryError: too large"
    later = Failing()
    evaluate(later, FULL, judging(), [0], cache=replace(store, folder=tmp_path / "other"))
    assert len(later.seen) == 1


def test_stored_bytes_count_labels_as_they_are():
    plain = examples(10)
    assert protocol.stored_bytes(plain) == 10 * (16 + 1)
    soft = replace(plain, targets=np.zeros((10, 2), np.float32))
    assert protocol.stored_bytes(soft) == 10 * (16 + 8)


def _answers(confusion, arm="distilled"):
    return results.Result(arm, "mlp", False, 0, 10, 10, confusion=confusion)


def test_an_accuracy_that_is_the_share_of_a_class_is_said():
    """Eight of ten test images are dark: answering it always has 80 %."""
    images = np.zeros((10, 1, 1, 1), np.float32)
    test = LabeledImages(images, np.array([0] * 8 + [1] * 2), ("dark", "light"))
    always, mixed = _answers([[8, 0], [2, 0]]), _answers([[7, 1], [0, 2]], "random")
    share, constant = evaluate_command.majority_notes([always, mixed], test)
    assert share.startswith("80.0% of the test images are of class 'dark'")
    assert "mlp on distilled answers 'dark' to every test image" in constant
    assert "80.0%" in constant
    even = LabeledImages(images, np.arange(10) % 2, ("dark", "light"))
    assert evaluate_command.majority_notes([_answers([[4, 1], [1, 4]])], even) == []
    # Of several seeds one that answers otherwise is enough.
    assert len(evaluate_command.majority_notes([always, _answers([[7, 1], [2, 0]])], test)) == 1


def test_controls_that_cannot_be_drawn_are_refused_before_anything_is_trained():
    train = LabeledImages(
        np.zeros((5, 1, 1, 1), np.float32), np.array([0, 0, 0, 1, 1]), ("dark", "light")
    )
    evaluation_parts.check_controls(("random", "full"), train, 2)
    evaluation_parts.check_controls(("full",), train, 3)
    with pytest.raises(
        UserError, match=r"3 images per class, .* 2 training images of class 'light'"
    ):
        evaluation_parts.check_controls(("random", "full"), train, 3)
