"""The protocol with learners made of NumPy, whose results are known by hand."""

import numpy as np
import pytest

from dsdistill.harness import controls, evaluate, labeled, report
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluate import Arm
from dsdistill.harness.labeled import Examples, Labeled
from dsdistill.harness.preprocess import identity


def examples(n: int, seed: int = 0) -> Examples:
    """Two classes around two centres, alternating."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    images = rng.normal(labels[:, None, None, None], 0.1, (n, 2, 2, 1)).astype(np.float32)
    return Examples(Labeled(images, labels, ("dark", "light")), identity(1))


class Constant:
    """Predicts one class whatever it sees, and remembers what it was given."""

    name, limit = "constant", None

    def __init__(self) -> None:
        self.seen: list[tuple[Examples, Examples, int]] = []

    def __call__(self, train, validation, seed, /):
        self.seen.append((train, validation, seed))
        return lambda images: np.tile([seed == 0, seed != 0], (len(images), 1)).astype(float)


def test_a_row_holds_what_was_measured():
    learner, train, validation, test = Constant(), examples(10), examples(4), examples(5)
    row = evaluate.evaluate(learner, Arm("full", lambda seed: train), validation, test, [0, 1])
    assert row.accuracy == [3 / 5, 2 / 5]  # labels 0, 1, 0, 1, 0
    assert row.mean == pytest.approx(0.5)
    assert row.std == pytest.approx(np.sqrt(2) * 0.1)  # n - 1 in the denominator
    assert (row.n, row.images, row.bytes, row.seeds) == (2, 10, 10 * (4 * 4 + 1), [0, 1])
    assert row.train_seconds >= 0


def test_a_learner_never_sees_the_test_images():
    learner, train, validation, test = Constant(), examples(10), examples(4, 1), examples(5, 2)
    evaluate.evaluate(learner, Arm("full", lambda seed: train), validation, test, [0, 1])
    hidden = {image.tobytes() for image in test.images()}
    for given, held, _ in learner.seen:
        for part in (given, held):
            assert hidden.isdisjoint(image.tobytes() for image in part.images())


def test_test_images_of_several_batches(monkeypatch):
    monkeypatch.setattr(labeled, "BATCH", 2)
    assert evaluate.accuracy(lambda images: np.ones((len(images), 2)), examples(5)) == 3 / 5


def test_a_limit_is_a_balanced_draw():
    learner, train = Constant(), examples(10)
    learner.limit = 4
    row = evaluate.evaluate(learner, Arm("full", lambda seed: train), examples(2), examples(2), [0])
    assert row.images == 4
    assert np.bincount(learner.seen[0][0].data.labels).tolist() == [2, 2]


def test_one_seed_has_no_deviation_and_none_is_refused():
    arm = Arm("full", lambda seed: examples(4))
    assert evaluate.evaluate(Constant(), arm, examples(2), examples(2), [0]).std == 0
    with pytest.raises(UserError, match="at least one seed"):
        evaluate.evaluate(Constant(), arm, examples(2), examples(2), [])


def test_random_is_balanced_and_follows_the_seed():
    train = examples(40)
    drawn = controls.random(train, 5, 0)
    assert np.bincount(drawn.data.labels).tolist() == [5, 5]
    assert len(np.unique(drawn.images().reshape(10, -1), axis=0)) == 10
    np.testing.assert_array_equal(drawn.images(), controls.random(train, 5, 0).images())
    assert not np.array_equal(drawn.images(), controls.random(train, 5, 1).images())


def test_coreset_covers_the_clusters_of_a_class():
    """Four tight groups in each class: k-means takes one image of each."""
    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
    rng = np.random.default_rng(0)
    images = np.repeat(np.tile(corners, (2, 1)), 6, axis=0) + rng.normal(0, 0.01, (48, 2))
    data = Labeled(images.astype(np.float32).reshape(48, 1, 2, 1), np.arange(48) // 24, ("a", "b"))
    chosen = controls.coreset(Examples(data, identity(1)), 4, 0)
    assert len(chosen) == 8
    for label in (0, 1):
        mine = chosen.images()[chosen.data.labels == label].reshape(4, 2)
        assert {tuple(row) for row in mine.round().astype(int)} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_coreset_takes_no_image_twice():
    distance = np.array([[0.0, 0.1], [1.0, 1.0], [2.0, 0.5]])  # both centres nearest to image 0
    assert controls._nearest(distance).tolist() == [0, 2]


def test_report_in_markdown():
    arm = Arm("random", lambda seed: examples(10))
    row = evaluate.evaluate(Constant(), arm, examples(2), examples(5), [0, 1])
    facts = {"title": "kip on x", "notes": ["a note"], "commands": ["dsdistill kip x"]}
    text = report.markdown([row], facts)
    assert "| random | constant | 50.0 ± 14.1 | 2 | 10 | 170 B | 0.0 s |" in text
    assert "- a note" in text
    assert "    dsdistill kip x" in text
