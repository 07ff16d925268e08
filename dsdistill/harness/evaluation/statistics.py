"""Statistics over seeds: means with intervals, paired differences, DD-Ranking's scores.

Accuracies are fractions in [0, 1] throughout. The scores pass differences of accuracies through
an exponential, which percentages would make meaningless, so anything else is refused.

Source of the scores: DD-Ranking (National University of Singapore, 2025), arXiv:2505.13300.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95  # level of every interval


@dataclass(frozen=True)
class Summary:
    """The mean of a few values and how well it is known.

    Attributes:
        mean: Arithmetic mean.
        std: Sample standard deviation (n - 1 in the denominator); 0 for one value.
        n: Number of values.
        low, high: 95 % t interval of the mean, cut off at the bounds of the values where they are
            given; both equal the mean for one value, which tells nothing about the spread.
    """

    mean: float
    std: float
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """How two sequences differ, value by value.

    Attributes:
        difference: Summary of the differences first - second.
        p: Two-sided p value of the paired t test that their mean is 0; None where there is no
            test: for one pair, and where all differences are equal.
    """

    difference: Summary
    p: float | None


def summary(
    values: Sequence[float], *, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Summary:
    """Mean, sample deviation and 95 % interval mean ± t(n - 1) std / √n.

    The interval assumes independent draws from a normal distribution. For two values it extends
    12.7 standard errors to either side and easily leaves the range of the values. The mean cannot
    leave it, so what lies outside `bounds` is cut off, and the interval covers the mean as often
    as before.

    Args:
        values: At least one value.
        bounds: Smallest and largest possible value, (0, 1) for accuracies.

    Raises:
        ValueError: If there are no values, or one is not finite or outside the bounds.
    """
    x = np.asarray(values, np.float64)
    if not x.size:
        raise ValueError("a summary needs at least one value, got none")
    if not np.isfinite(x).all():
        raise ValueError(f"a summary needs finite values, got {x.tolist()}")
    low, high = bounds
    if not ((x >= low) & (x <= high)).all():
        raise ValueError(f"values must lie between {low:g} and {high:g}, got {x.tolist()}")
    # Measured from the first value: equal values then have a deviation of exactly 0.
    offsets, n = x - x[0], len(x)
    mean = float(x[0] + offsets.mean())
    if n == 1:
        return Summary(mean, 0.0, n, mean, mean)
    std = float(offsets.std(ddof=1))
    half = _t_quantile(n - 1) * std / math.sqrt(n)
    return Summary(mean, std, n, max(mean - half, low), min(mean + half, high))


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    *,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> PairedDifference:
    """Summarise the differences a - b of pairs that share a seed, and test whether their mean is 0.

    Args:
        a, b: Values in the same order; those at one position belong together.
        bounds: Smallest and largest possible difference, (-1, 1) for accuracies.

    Raises:
        ValueError: If the lengths differ, there are no values, or one is not finite.
    """
    from scipy.stats import ttest_rel

    if len(a) != len(b):
        raise ValueError(f"pairs need sequences of one length, got {len(a)} and {len(b)}")
    difference = summary([x - y for x, y in zip(a, b, strict=True)], bounds=bounds)
    # 0.9 - 0.8 and 0.8 - 0.7 differ in their last digits, which a test would find significant.
    rounding = 4 * float(np.finfo(np.float64).eps) * max(abs(x) for x in (*a, *b))
    if difference.std <= rounding:  # true for one pair too
        return PairedDifference(difference, None)
    return PairedDifference(difference, float(ttest_rel(a, b)[1]))


def hard_label_recovery(full_hard: float, distilled_hard: float) -> float:
    """HLR = acc(full, hard) - acc(distilled, hard): what the distilled images lose; 0 is best.

    Hard labels on both sides exclude what a teacher's or learned labels add.

    Args:
        full_hard: Accuracy after training on all real images, a fraction.
        distilled_hard: Accuracy after training on the distilled images with hard labels, a
            fraction.

    Raises:
        ValueError: If an accuracy is not a fraction.

    Source: DD-Ranking (2025), arXiv:2505.13300.
    """
    _check_fractions(full_hard, distilled_hard)
    return full_hard - distilled_hard


def improvement_over_random(distilled: float, random: float) -> float:
    """IOR = acc(distilled, own recipe) - acc(random, same recipe): what the images are worth.

    Args:
        distilled: Accuracy after training on the distilled set, a fraction.
        random: Accuracy after the same training on as many random real images, a fraction.

    Raises:
        ValueError: If an accuracy is not a fraction.

    Source: DD-Ranking (2025), arXiv:2505.13300.
    """
    _check_fractions(distilled, random)
    return distilled - random


def label_robust_score(hlr: float, ior: float, *, weight: float = 0.5) -> float:
    """LRS = (e^a - e^-1) / (e - e^-1) of a = w IOR - (1 - w) HLR.

    It grows with a from 0 at a = -1 to 1 at a = 1. No gain over random images and no loss against
    all of them, a = 0, score about 0.269.

    Args:
        hlr, ior: Values from `hard_label_recovery` and `improvement_over_random`, in [-1, 1].
        weight: w in [0, 1], the weight of IOR.

    Raises:
        ValueError: If an argument lies outside its range.

    Source: DD-Ranking (2025), arXiv:2505.13300.
    """
    _check_differences(hlr, ior, weight)
    return _score(weight * ior - (1 - weight) * hlr)


def augmentation_robust_score(with_: float, without: float, *, weight: float = 0.5) -> float:
    """ARS = (e^a - e^-1) / (e - e^-1) of a = w with + (1 - w) without.

    The same scale as `label_robust_score`: 0 at a = -1, about 0.269 at a = 0 (no better than
    random images), 1 at a = 1.

    Args:
        with_: acc(distilled) - acc(random), both trained with augmentation, in [-1, 1].
        without: The same difference, both trained without.
        weight: w in [0, 1], the weight of `with_`.

    Raises:
        ValueError: If an argument lies outside its range.

    Source: DD-Ranking (2025), arXiv:2505.13300.
    """
    _check_differences(with_, without, weight)
    return _score(weight * with_ + (1 - weight) * without)


def _score(a: float) -> float:
    return (math.exp(a) - math.exp(-1)) / (math.e - math.exp(-1))


def _check_fractions(*accuracies: float) -> None:
    for value in accuracies:
        if not 0 <= value <= 1:  # NaN too
            raise ValueError(
                f"accuracies are fractions in [0, 1], got {value}: divide percentages by 100"
            )


def _check_differences(first: float, second: float, weight: float) -> None:
    for value in (first, second):
        if not -1 <= value <= 1:
            raise ValueError(
                f"differences of accuracies are fractions in [-1, 1], got {value}: "
                "divide percentages by 100"
            )
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must lie in [0, 1], got {weight}")


def _t_quantile(degrees: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, degrees))
