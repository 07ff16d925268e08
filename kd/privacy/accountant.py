"""What noisy votes cost: Rényi differential privacy of the Gaussian mechanism, as (ε, δ).

Adding or removing one private image changes one teacher, which moves one vote from one class to
another: two counts change by 1, so the counts have the L2 sensitivity √2, and the largest of them
1. Noise of deviation σ on every count costs an order α of Rényi divergence α / σ², and noise of
deviation σ₁ on the largest count, which decides whether a query is answered, α / (2 σ₁²). Costs
add up, also where later queries depend on earlier answers; a bound on the numbers of queries and of
answers that always holds bounds the whole (Feldman and Zrnic 2021, arXiv:2008.11193).

Source: Papernot et al. (2018), arXiv:1802.08908, Confident-GNMax; the analysis that does not depend
on the data. Conversion to (ε, δ): Balle et al. (2020), arXiv:1905.09982, theorem 21.
"""

import math
from collections.abc import Iterable

# Any order above 1 gives a bound; these are dense enough that the best is within 1e-3 of the least.
ORDERS = tuple(1 + 1e-3 * 1e9 ** (i / 3999) for i in range(4000))


def rdp(order: float, *, answers: int, sigma: float, queries: int = 0, sigma1: float = 1) -> float:
    """Rényi divergence of an order that answers and the tests before them can have at most.

    Args:
        order: α > 1.
        answers: Number of answers.
        sigma: Deviation of the noise on each count of an answer, in votes.
        queries: Number of tests whether to answer, also of queries that were not answered.
        sigma1: Deviation of the noise in these tests, in votes.
    """
    return order * (answers / sigma**2 + queries / (2 * sigma1**2))


def epsilon(
    *,
    answers: int,
    sigma: float,
    delta: float,
    queries: int = 0,
    sigma1: float = 1,
    orders: Iterable[float] = ORDERS,
) -> float:
    """The smallest ε for which the votes are (ε, δ)-differentially private by this analysis.

    Args:
        answers, sigma, queries, sigma1: As for `rdp`.
        delta: δ in (0, 1).
        orders: Orders α > 1 that are tried.
    """
    if not (answers or queries):
        return 0.0
    cost = {"answers": answers, "sigma": sigma, "queries": queries, "sigma1": sigma1}
    return max(0.0, min(_epsilon_at(a, rdp(a, **cost), delta) for a in orders))


def _epsilon_at(order: float, divergence: float, delta: float) -> float:
    return divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
