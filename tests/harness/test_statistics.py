"""Summaries against SciPy called directly; DD-Ranking's scores against values worked by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from dsdistill.harness.evaluation import statistics
from dsdistill.harness.evaluation.results import Result, group_by_training
from dsdistill.harness.evaluation.scores import SetScores, score_learners

FIVE = [0.81, 0.79, 0.84, 0.80, 0.83]
OTHER = [0.78, 0.80, 0.79, 0.77, 0.81]
AT_ZERO = 1 / (math.e + 1)  # (1 - 1/e) / (e - 1/e), about 0.269


def test_a_summary_by_scipy():
    found = statistics.summary(FIVE)
    mean, sem = np.mean(FIVE), stats.sem(FIVE)
    assert (found.mean, found.std) == pytest.approx((mean, np.std(FIVE, ddof=1)), rel=1e-12)
    assert found.n == 5
    interval = stats.t.interval(0.95, 4, loc=mean, scale=sem)
    assert (found.low, found.high) == pytest.approx(interval, rel=1e-12)


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(0.5, 0.1, (400, 4)).tolist()
    found = [statistics.summary(draw) for draw in draws]
    covered = np.mean([s.low <= 0.5 <= s.high for s in found])
    # Three standard deviations of 400 coin tosses; with a normal quantile it would be about 0.86.
    assert covered == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 400))


def test_one_value_has_no_deviation():
    assert statistics.summary([0.7]) == statistics.Summary(0.7, 0.0, 1, 0.7, 0.7)


def test_equal_values_have_a_deviation_of_exactly_zero():
    # NumPy's own deviation of these is 1.7e-17: its mean is not quite 0.1.
    assert statistics.summary([0.1, 0.1, 0.1]) == statistics.Summary(0.1, 0.0, 3, 0.1, 0.1)


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [math.inf, 0.5]])
def test_what_has_no_summary(values):
    with pytest.raises(ValueError, match=r"at least one|finite"):
        statistics.summary(values)


def test_an_interval_ends_where_its_values_do():
    """Two seeds: t of one degree of freedom is 12.7, so 0.9 and 1 span 0.315 to 1.585."""
    found = statistics.summary([0.9, 1.0], bounds=(0, 1))
    assert (found.low, found.high) == (pytest.approx(0.95 - 12.7062 * 0.05, abs=1e-4), 1.0)
    found = statistics.summary([0.0, 0.1], bounds=(0, 1))
    assert (found.low, found.high) == (0.0, pytest.approx(0.05 + 12.7062 * 0.05, abs=1e-4))
    assert (
        statistics.paired_difference([1.0, 0.9], [0.1, 0.2], bounds=(-1, 1)).difference.high == 1.0
    )
    with pytest.raises(ValueError, match="between 0 and 1"):
        statistics.summary([0.5, 1.5], bounds=(0, 1))


def test_pairs_by_scipy():
    found = statistics.paired_difference(FIVE, OTHER)
    expected = stats.ttest_rel(FIVE, OTHER)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-12)
    assert found.difference.mean == pytest.approx(np.mean(FIVE) - np.mean(OTHER), rel=1e-9)
    limits = found.difference.low, found.difference.high
    assert limits == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_the_other_way_round_only_the_sign_changes():
    one, other = (
        statistics.paired_difference(FIVE, OTHER),
        statistics.paired_difference(OTHER, FIVE),
    )
    assert one.p == pytest.approx(other.p, rel=1e-12)
    assert one.difference.mean == pytest.approx(-other.difference.mean, rel=1e-12)


def test_no_test_where_there_is_none():
    assert statistics.paired_difference([0.9], [0.8]).p is None
    assert statistics.paired_difference(FIVE, FIVE).p is None
    # The differences are 0.1 but for rounding, for which SciPy gives a p of about 1e-31.
    found = statistics.paired_difference([0.9, 0.8, 0.7], [0.8, 0.7, 0.6])
    assert found.p is None
    assert found.difference.mean == pytest.approx(0.1)


def test_pairs_of_different_lengths():
    with pytest.raises(ValueError, match="got 2 and 1"):
        statistics.paired_difference([0.1, 0.2], [0.1])


def test_recovery_and_improvement_are_differences():
    assert statistics.hard_label_recovery(0.9, 0.7) == pytest.approx(0.2)
    assert statistics.improvement_over_random(0.8, 0.65) == pytest.approx(0.15)
    assert statistics.improvement_over_random(0.65, 0.8) == pytest.approx(-0.15)


@pytest.mark.parametrize(
    ("hlr", "ior", "expected"),
    [(0, 0, AT_ZERO), (0.3, 0.3, AT_ZERO), (-1, 1, 1), (1, -1, 0)],
)
def test_the_label_robust_score_at_its_landmarks(hlr, ior, expected):
    assert statistics.label_robust_score(hlr, ior) == pytest.approx(expected, abs=1e-15)


def test_the_label_robust_score_by_hand():
    # a = 0.5 · 0.3 - 0.5 · 0.1 = 0.1: (1.105170918 - 0.367879441) / 2.350402387
    assert statistics.label_robust_score(0.1, 0.3) == pytest.approx(0.313687342, abs=1e-9)
    # a = 0.8 · 0.3 - 0.2 · 0.1 = 0.22: (1.246076731 - 0.367879441) / 2.350402387
    found = statistics.label_robust_score(0.1, 0.3, weight=0.8)
    assert found == pytest.approx(0.373636997, abs=1e-9)


def test_the_augmentation_robust_score_by_hand():
    # a = 0.5 · 0.3 + 0.5 · 0.1 = 0.2: (1.221402758 - 0.367879441) / 2.350402387
    assert statistics.augmentation_robust_score(0.3, 0.1) == pytest.approx(0.363139232, abs=1e-9)
    # Of one weight alone counts one difference: a = 0.3, then 0.1.
    for weight, a in ((1, 0.3), (0, 0.1)):
        expected = (math.exp(a) - 1 / math.e) / (math.e - 1 / math.e)
        found = statistics.augmentation_robust_score(0.3, 0.1, weight=weight)
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("value", [80.0, -0.1, math.nan])
def test_accuracies_that_are_no_fractions(value):
    for formula in (statistics.hard_label_recovery, statistics.improvement_over_random):
        for pair in ((value, 0.5), (0.5, value)):
            with pytest.raises(ValueError, match="fractions"):
                formula(*pair)


@pytest.mark.parametrize("value", [15.0, -1.1, math.nan])
def test_differences_that_are_no_fractions(value):
    for formula in (statistics.label_robust_score, statistics.augmentation_robust_score):
        for pair in ((value, 0.5), (0.5, value)):
            with pytest.raises(ValueError, match="fractions"):
                formula(*pair)
        with pytest.raises(ValueError, match="weight"):
            formula(0.1, 0.1, weight=1.5)


def results(arm, accuracies, *, learner="net", augmented=False, first=0):
    """One result a seed; None for a training that failed."""
    return [
        Result(
            arm,
            learner,
            augmented,
            seed,
            images=10,
            bytes=1,
            accuracy=a,
            failure=None if a else "x",
        )
        for seed, a in enumerate(accuracies, start=first)
    ]


def complete(*, learner="net", augmented=False, shift=0.0):
    """Accuracies of mean 0.9, 0.6, 0.7 and 0.5, all shifted."""
    arms = {"full": 0.9, "distilled-hard": 0.6, "distilled": 0.7, "random": 0.5}
    return [
        result
        for arm, mean in arms.items()
        for result in results(
            arm, [mean + shift - 0.01, mean + shift + 0.01], learner=learner, augmented=augmented
        )
    ]


def one(found):
    return score_learners(group_by_training(found))[0]


def test_the_scores_of_a_learner():
    found = one(complete())
    # HLR = 0.9 - 0.6, IOR = 0.7 - 0.5, a = 0.1 - 0.15 = -0.05.
    expected = (math.exp(-0.05) - 1 / math.e) / (math.e - 1 / math.e)
    assert (found.hlr, found.ior, found.lrs) == pytest.approx((0.3, 0.2, expected))
    assert (found.learner, found.ars) == ("net", None)
    assert found.versus_random is not None
    assert found.versus_random.difference.mean == pytest.approx(0.2)


def test_rows_without_augmentation_come_first():
    augmented = complete(augmented=True, shift=0.05)
    augmented[-2:] = results("random", [0.4, 0.4], augmented=True)
    found = one(augmented + complete())
    assert (found.hlr, found.ior) == pytest.approx((0.3, 0.2))
    # 0.75 - 0.4 with augmentation and 0.7 - 0.5 without: a = 0.275.
    expected = (math.exp(0.275) - 1 / math.e) / (math.e - 1 / math.e)
    assert found.ars == pytest.approx(expected)


def test_augmented_rows_where_there_are_no_others():
    found = one(complete(augmented=True, shift=0.05))
    assert (found.hlr, found.ior) == pytest.approx((0.3, 0.2))
    assert found.versus_random is not None
    assert found.ars is None


def test_the_two_kinds_of_rows_are_never_mixed():
    plain = [r for r in complete() if r.arm != "random"]
    found = one([*plain, *results("random", [0.5, 0.5], augmented=True)])
    assert found.hlr == pytest.approx(0.3)
    assert (found.ior, found.lrs, found.ars, found.versus_random) == (None, None, None, None)


def test_a_failed_seed_leaves_no_score():
    found = [r for r in complete() if r.arm != "random"] + results("random", [0.5, None])
    assert one(found).hlr == pytest.approx(0.3)
    assert (one(found).ior, one(found).lrs, one(found).versus_random) == (None, None, None)


def test_pairs_are_of_the_same_seed():
    first = results("distilled", [0.6, 0.7, 0.9])  # seeds 0, 1, 2
    second = results("random", [0.5, 0.4, 0.1], first=1)  # seeds 1, 2, 3
    found = one(first + second[::-1]).versus_random
    assert found is not None
    assert found.difference.n == 2
    assert found.difference.mean == pytest.approx(((0.7 - 0.5) + (0.9 - 0.4)) / 2)
    assert found.p == pytest.approx(stats.ttest_rel([0.7, 0.9], [0.5, 0.4]).pvalue)
    assert one(first + results("random", [0.5], first=7)).versus_random is None


def test_further_sets_are_paired_with_random_images():
    further = results("other", [0.8, 0.9]) + results("other-hard", [0.8, None])
    plain = one(complete() + further)
    assert one(complete()).further == {}
    assert list(plain.further) == ["other", "other-hard"]
    other = plain.further["other"]
    assert other is not None
    assert other.difference.mean == pytest.approx(0.85 - 0.5)
    assert other.p == pytest.approx(stats.ttest_rel([0.8, 0.9], [0.49, 0.51]).pvalue)
    assert plain.further["other-hard"] is None
    assert one(complete() + results("other", [0.8, 0.9], augmented=True)).further == {}


def test_one_line_a_learner():
    found = score_learners(
        group_by_training(complete(learner="b") + results("full", [0.9], learner="a"))
    )
    assert [s.learner for s in found] == ["b", "a"]
    assert found[1] == SetScores("a", None, None, None, None, None)
