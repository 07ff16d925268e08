"""Shards of private images, and answers with noise."""

import random

import numpy as np
import pytest

from dsdistill.harness.data.labeled_images import LabeledImages
from kd.privacy import settings, votes

RNG = np.random.default_rng(0)
IMAGES = LabeledImages(
    RNG.integers(0, 256, (300, 4, 4, 1), np.uint8), RNG.integers(0, 3, 300), ("a", "b", "c")
)


def _contents(images: LabeledImages, count: int) -> list[list[bytes]]:
    """The images of each shard, in their order."""
    rows = votes.shards(images, count)
    return [[images.images(np.array([r])).tobytes() for r in shard] for shard in rows]


def test_shards_are_disjoint_and_whole() -> None:
    rows = np.concatenate(votes.shards(IMAGES, 7))
    assert sorted(rows.tolist()) == list(range(300))


def test_one_image_more_or_less_changes_one_shard_and_not_the_order_of_any() -> None:
    before = _contents(IMAGES, 7)
    for gone in (0, 123, 299):
        rest = np.delete(np.arange(300), gone)
        after = _contents(IMAGES.select(rest), 7)
        changed = [i for i in range(7) if before[i] != after[i]]
        assert len(changed) == 1
        missing = IMAGES.images(np.array([gone])).tobytes()
        kept = list(before[changed[0]])
        kept.remove(missing)
        assert after[changed[0]] == kept


def test_the_order_of_the_data_does_not_matter() -> None:
    order = np.random.default_rng(1).permutation(300)
    assert _contents(IMAGES.select(order), 7) == _contents(IMAGES, 7)


def test_copies_are_in_one_shard() -> None:
    twice = IMAGES.select(np.r_[np.arange(300), 5, 5])
    holding = [s for s in votes.shards(twice, 7) if {5, 300, 301} & set(s.tolist())]
    assert len(holding) == 1
    assert {5, 300, 301} <= set(holding[0].tolist())


VOTES = np.array([[0, 9, 1], [4, 3, 3], [10, 0, 0], [5, 5, 0]])


def test_without_noise_the_most_votes_win() -> None:
    plain = settings.parse("teachers=10,sigma=1")
    assert votes.noisy_answers(VOTES[:3], plain, noise=lambda sigma: 0.0) == [1, 0, 0]


def test_a_query_on_which_teachers_disagree_is_refused() -> None:
    strict = settings.parse("teachers=10,sigma=1,threshold=6,sigma1=2")
    answers = votes.noisy_answers(VOTES, strict, noise=lambda sigma: 0.0)
    assert answers == [1, votes.REFUSED, 0, votes.REFUSED]


def test_each_kind_of_noise_has_its_deviation_and_is_drawn_anew() -> None:
    drawn: list[float] = []

    def noise(sigma: float) -> float:
        drawn.append(sigma)
        return 0.0

    votes.noisy_answers(VOTES, settings.parse("teachers=10,sigma=3,threshold=6,sigma1=2"), noise)
    assert drawn == [2, 3, 3, 3, 2, 2, 3, 3, 3, 2]


def test_nothing_is_asked_after_the_last_answer_or_query() -> None:
    few = settings.parse("teachers=10,sigma=1,threshold=6,sigma1=2,answers=1")
    assert votes.noisy_answers(VOTES[[1, 0, 2]], few, lambda sigma: 0.0) == [votes.REFUSED, 1]
    two = settings.parse("teachers=10,sigma=1,threshold=6,sigma1=2,queries=2")
    assert len(votes.noisy_answers(VOTES, two, lambda sigma: 0.0)) == 2
    assert len(votes.noisy_answers(VOTES, settings.parse("teachers=10,sigma=1,answers=3"))) == 3


def test_noise_is_the_systems_and_no_seed_repeats_it() -> None:
    draws = []
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        draws.append([votes.system_noise(40.0) for _ in range(4000)])
    assert not set(draws[0]) & set(draws[1])
    # Of 4000 draws the deviation of the mean is 0.63, that of the deviation 0.45: five of each.
    assert np.mean(draws[0]) == pytest.approx(0, abs=3.2)
    assert np.std(draws[0]) == pytest.approx(40, abs=2.3)


def test_the_same_query_is_answered_anew_each_time() -> None:
    level = np.tile([50, 50, 0], (200, 1))
    answers = votes.noisy_answers(level, settings.parse("teachers=100,sigma=10"))
    assert 40 < answers.count(0) < 160
