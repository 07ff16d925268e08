"""What noisy votes cost: closed forms, published figures, and opacus where it is installed."""

import math

import numpy as np
import pytest
from scipy import optimize

from dsdistill.harness.errors import UserError
from kd.privacy import accountant, settings


def test_the_divergence_is_that_of_two_gaussians() -> None:
    """Of N(0, σ² I) and N(d, σ² I) it is α |d|² / (2 σ²), where votes move by d = (1, -1)."""
    order, sigma = 3.5, 7.0
    votes = np.array([1.0, -1.0])
    assert accountant.rdp(order, answers=1, sigma=sigma) == pytest.approx(
        order * (votes @ votes) / (2 * sigma**2)
    )
    test = accountant.rdp(order, answers=0, sigma=1, queries=1, sigma1=sigma)
    assert test == pytest.approx(order / (2 * sigma**2))


def test_the_divergence_by_numerical_integration() -> None:
    """1 / (α - 1) log ∫ p^α q^(1 - α) of one count, with the other one independent of it."""
    order, sigma = 4.0, 3.0
    x = np.linspace(-60, 60, 200_001)

    def density(mean: float) -> np.ndarray:
        return np.exp(-((x - mean) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))

    integral = np.trapezoid(density(1) ** order * density(0) ** (1 - order), x)
    one_count = math.log(integral) / (order - 1)
    assert accountant.rdp(order, answers=1, sigma=sigma) == pytest.approx(2 * one_count, rel=1e-6)


def test_costs_of_queries_and_answers_add_up() -> None:
    whole = accountant.rdp(9, answers=500, sigma=40, queries=700, sigma1=100)
    parts = [
        accountant.rdp(9, answers=500, sigma=40),
        700 * accountant.rdp(9, answers=0, sigma=40, queries=1, sigma1=100),
    ]
    assert whole == pytest.approx(sum(parts))
    assert accountant.rdp(9, answers=2, sigma=5) == 2 * accountant.rdp(9, answers=1, sigma=5)


def test_epsilon_is_the_least_over_all_orders() -> None:
    cost = {"answers": 500, "sigma": 40.0, "delta": 1e-5}

    def at(order: float) -> float:
        return accountant.epsilon(**cost, orders=[order])

    least = optimize.minimize_scalar(at, bounds=(1.01, 100), method="bounded").fun
    assert least <= accountant.epsilon(**cost) <= least + 1e-3
    assert round(accountant.epsilon(**cost), 2) == 3.62


@pytest.mark.parametrize(("answers", "sigma", "rounded"), [(1000, 40, 5.38), (1000, 100, 1.91)])
def test_other_figures_of_the_same_analysis(answers: int, sigma: float, rounded: float) -> None:
    assert round(accountant.epsilon(answers=answers, sigma=sigma, delta=1e-5), 2) == rounded


def test_more_answers_less_noise_and_smaller_delta_cost_more() -> None:
    base = {"answers": 100, "sigma": 40.0, "delta": 1e-5}
    first = accountant.epsilon(**base)
    for change in ({"answers": 101}, {"sigma": 39.0}, {"delta": 1e-6}, {"queries": 1}):
        assert accountant.epsilon(**base | change) > first
    assert accountant.epsilon(answers=0, sigma=40, delta=1e-5) == 0
    assert accountant.epsilon(answers=500, sigma=1e-3, delta=1e-5) > 1e6


def test_it_equals_opacus() -> None:
    rdp = pytest.importorskip("opacus.accountants.analysis.rdp")
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
    for answers, sigma in ((500, 40.0), (1000, 100.0), (1, 0.7)):
        multiplier = sigma / math.sqrt(2)
        theirs = rdp.compute_rdp(q=1, noise_multiplier=multiplier, steps=answers, orders=orders)
        spent, _ = rdp.get_privacy_spent(orders=orders, rdp=theirs, delta=1e-5)
        ours = accountant.epsilon(answers=answers, sigma=sigma, delta=1e-5, orders=orders)
        assert ours == pytest.approx(float(spent), abs=1e-9)


def test_refused_queries_are_paid() -> None:
    with_test = settings.parse("teachers=9,sigma=40,threshold=5,sigma1=100,queries=700,answers=500")
    plain = settings.parse("teachers=9,sigma=40,answers=500")
    assert with_test.bounds(5000) == (700, 500)
    assert with_test.epsilon(5000) > plain.epsilon(5000)
    more = settings.parse("teachers=9,sigma=40,threshold=5,sigma1=100,queries=900,answers=500")
    assert more.epsilon(5000) > with_test.epsilon(5000)


def test_fewer_public_images_than_queries_bound_both() -> None:
    asked = settings.parse("teachers=9,sigma=40,threshold=5,sigma1=100")
    assert asked.bounds(30) == (30, 30)
    assert settings.parse("teachers=9,sigma=40,answers=500").bounds(30) == (30, 30)


def test_a_limit_says_how_many_answers_fit() -> None:
    spending = settings.parse("teachers=9,sigma=40,answers=500")
    spending.require_at_most(3.63, 5000)
    with pytest.raises(UserError, match=r"epsilon 3.62 .* --max-epsilon is 1: answers=\d+ would"):
        spending.require_at_most(1, 5000)
    try:
        spending.require_at_most(1, 5000)
    except UserError as error:
        fit = int(str(error).split("answers=")[1].split()[0])
    cost = {"sigma": 40.0, "delta": 1e-5}
    assert accountant.epsilon(answers=fit, **cost) <= 1
    assert accountant.epsilon(answers=fit + 1, **cost) > 1
    with pytest.raises(UserError, match=r"raise sigma$"):
        spending.require_at_most(1e-6, 5000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("teachers=9", "--pate needs sigma"),
        ("sigma=9", "--pate needs teachers"),
        ("teachers=1,sigma=9", "teachers must be at least 2, got 1"),
        ("teachers=9,sigma=0", "sigma must be positive and finite, got 0"),
        ("teachers=9,sigma=nan", "sigma must be positive and finite, got nan"),
        ("teachers=9,sigma=x", "sigma must be a number, got 'x'"),
        ("teachers=9.5,sigma=1", "teachers must be a number, got '9.5'"),
        ("teachers=9,sigma=1,sigma=2", "takes each setting once"),
        ("teachers=9,sigma", "takes each setting once, as in teachers=50, got sigma"),
        ("teacher=9,sigma=1", "unknown setting of --pate"),
        ("teachers=9,sigma=1,delta=1", r"delta must be in \(0, 1\), got 1"),
        ("teachers=9,sigma=1,threshold=5", "threshold and sigma1 belong together"),
        ("teachers=9,sigma=1,queries=5", "queries has no effect without threshold"),
        ("teachers=9,sigma=1,answers=0", "answers must be at least 1, got 0"),
    ],
)
def test_settings_that_break_a_rule_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings.parse(text)
