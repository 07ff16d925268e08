"""What a distilled set is compared with: draws, clusters and herding, on images chosen by hand."""

import numpy as np
import pytest

from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from dsdistill.harness.data.preprocess import fit, identity
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import controls


def examples(n: int, seed: int = 0) -> Examples:
    """Two classes around two centres, alternating."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    images = rng.normal(labels[:, None, None, None], 0.1, (n, 2, 2, 1)).astype(np.float32)
    return Examples(LabeledImages(images, labels, ("dark", "light")), identity(1))


def coloured(n: int) -> Examples:
    """Two classes in random order, uint8, two channels of different scales, standardised."""
    rng = np.random.default_rng(1)
    images = (rng.random((n, 3, 2, 2)) * [255, 60]).astype(np.uint8)
    data = LabeledImages(images, rng.permutation(np.arange(n) % 2), ("a", "b"))
    return Examples(data, fit("standardise", data.chunks, data.shape))


def test_random_is_balanced_and_follows_the_seed():
    train = examples(40)
    drawn = controls.random(train, 5, 0)
    assert np.bincount(drawn.data.labels).tolist() == [5, 5]
    assert len(np.unique(drawn.images().reshape(10, -1), axis=0)) == 10
    np.testing.assert_array_equal(drawn.images(), controls.random(train, 5, 0).images())
    assert not np.array_equal(drawn.images(), controls.random(train, 5, 1).images())


def test_k_means_covers_the_clusters_of_a_class():
    """Four tight groups in each class: k-means takes one image of each."""
    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
    rng = np.random.default_rng(0)
    images = np.repeat(np.tile(corners, (2, 1)), 6, axis=0) + rng.normal(0, 0.01, (48, 2))
    data = LabeledImages(
        images.astype(np.float32).reshape(48, 1, 2, 1), np.arange(48) // 24, ("a", "b")
    )
    chosen = controls.k_means(Examples(data, identity(1)), 4, 0)
    assert len(chosen) == 8
    for label in (0, 1):
        mine = chosen.images()[chosen.data.labels == label].reshape(4, 2)
        assert {tuple(row) for row in mine.round().astype(int)} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_at_one_image_per_class_k_means_and_herding_take_the_central_one():
    """The real image nearest to the mean of its class."""
    train = coloured(60)
    images, labels = train.images().reshape(60, -1).astype(np.float64), train.data.labels
    central = []
    for label in (0, 1):
        mine = images[labels == label]
        central.append(mine[np.linalg.norm(mine - mine.mean(0), axis=1).argmin()])
    for chosen in (controls.k_means(train, 1, 0), controls.herding(train, 1)):
        assert chosen.data.labels.tolist() == [0, 1]
        np.testing.assert_allclose(chosen.images().reshape(2, -1), central)


def test_k_means_takes_no_image_twice():
    distance = np.array([[0.0, 0.1], [1.0, 1.0], [2.0, 0.5]])  # both centres nearest to image 0
    assert controls._nearest_images(distance).tolist() == [0, 2]


def greedy(pixels: np.ndarray, count: int) -> list[int]:
    """Herding as its definition has it: the mean of every possible next choice, in float64."""
    pixels = pixels.astype(np.float64)
    taken: list[int] = []
    for _ in range(count):
        distance = {
            i: np.linalg.norm(pixels[[*taken, i]].mean(0) - pixels.mean(0))
            for i in range(len(pixels))
            if i not in taken
        }
        taken.append(min(distance, key=distance.__getitem__))
    return taken


def test_herding_by_brute_force():
    train = coloured(40)
    chosen = controls.herding(train, 12)
    expected = []
    for label in (0, 1):
        members = np.flatnonzero(train.data.labels == label)
        expected += members[greedy(train.images(members).reshape(20, -1), 12)].tolist()
    assert chosen.data.rows is not None
    assert chosen.data.rows.tolist() == expected
    np.testing.assert_array_equal(chosen.images(), train.images(np.array(expected)))


def test_herding_of_images_far_from_zero():
    """At 1000 times the spread, uncentred float32 squares would all be the same."""
    rng = np.random.default_rng(2)
    images = (1e3 + rng.random((20, 3, 3, 1))).astype(np.float32)
    train = Examples(LabeledImages(images, np.zeros(20, int), ("a",)), identity(1))
    rows = controls.herding(train, 10).data.rows
    assert rows is not None
    assert rows.tolist() == greedy(images.reshape(20, -1), 10)


def test_herding_of_all_images_is_the_whole_class():
    train = examples(12)
    before = train.data.store.copy()
    rows = controls.herding(train, 6).data.rows
    assert rows is not None
    assert sorted(rows.tolist()) == list(range(12))
    np.testing.assert_array_equal(train.data.store, before)


def test_herding_takes_no_image_twice_even_of_equal_ones():
    images = np.ones((5, 2, 2, 1), np.float32)
    train = Examples(
        LabeledImages(images, np.zeros(5, int), ("a",)), identity(1), is_preprocessed=True
    )
    rows = controls.herding(train, 4).data.rows
    assert rows is not None
    assert len(set(rows.tolist())) == 4


def test_herding_stands_for_its_class_better_than_chance():
    train = coloured(200)
    images, labels = train.images(), train.data.labels

    def gap(chosen: Examples) -> float:
        return sum(
            float(
                np.linalg.norm(
                    chosen.images()[chosen.data.labels == k].mean(0) - images[labels == k].mean(0)
                )
            )
            for k in (0, 1)
        )

    herded = gap(controls.herding(train, 10))
    assert herded < min(gap(controls.random(train, 10, seed)) for seed in range(20))


def test_one_class_is_read_at_a_time(monkeypatch):
    read: list[np.ndarray] = []
    original = Examples.images
    train = coloured(40)

    def images(self, indices=slice(None)):
        read.append(train.data.labels[indices])
        return original(self, indices)

    monkeypatch.setattr(Examples, "images", images)
    controls.herding(train, 3)
    assert [np.unique(labels).tolist() for labels in read] == [[0], [1]]


@pytest.mark.parametrize("name", controls.CONTROLS)
def test_an_arm_by_name(name):
    train = examples(40)
    arm = controls.arm(name, train, 5)
    expected = {
        "random": lambda: controls.random(train, 5, 3),
        "k-means": lambda: controls.k_means(train, 5, 3),
        "herding": lambda: controls.herding(train, 5),
        "full": lambda: train,
    }
    assert arm.name == name
    np.testing.assert_array_equal(arm.draw(3).images(), expected[name]().images())


@pytest.mark.parametrize(("name", "same"), [("herding", True), ("full", True), ("random", False)])
def test_which_arms_follow_the_seed(name, same):
    arm = controls.arm(name, examples(40), 5)
    assert np.array_equal(arm.draw(0).images(), arm.draw(1).images()) is same


@pytest.mark.parametrize("name", ["random", "k-means", "herding"])
def test_too_few_images_of_a_class(name):
    with pytest.raises(UserError, match="'dark' has 5 training images, fewer than the 6"):
        controls.arm(name, examples(10), 6).draw(0)


def test_an_unknown_control_names_the_known_ones():
    with pytest.raises(UserError, match="did you mean 'herding'"):
        controls.arm("hering", examples(4), 1)
