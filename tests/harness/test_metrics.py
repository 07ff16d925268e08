"""Metrics against values computed by hand."""

import numpy as np
import pytest

from dsdistill.harness.evaluation import metrics


def test_softmax_by_hand() -> None:
    logits = np.log([[1.0, 3.0], [5.0, 5.0]])
    np.testing.assert_allclose(metrics.softmax(logits), [[0.25, 0.75], [0.5, 0.5]], rtol=1e-14)
    # At T = 1/2 the probabilities are squared: 1 to 9.
    np.testing.assert_allclose(metrics.softmax(logits, 0.5)[0], [0.1, 0.9], rtol=1e-14)


def test_softmax_does_not_overflow() -> None:
    np.testing.assert_array_equal(metrics.softmax(np.array([[1e4, 0.0]])), [[1.0, 0.0]])


def test_accuracy_and_agreement() -> None:
    a = np.array([[0.1, 0.9], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    b = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.3, 0.7]])
    assert metrics.accuracy(a, np.array([1, 0, 1, 0])) == 0.5
    assert metrics.agreement(a, b) == 0.5
    assert metrics.agreement(a, a) == 1.0


def test_nll_by_hand() -> None:
    p = np.array([[0.5, 0.5], [0.25, 0.75]])
    assert metrics.nll(p, np.array([0, 1])) == pytest.approx((np.log(2) + np.log(4 / 3)) / 2)
    assert np.isfinite(metrics.nll(np.array([[1.0, 0.0]]), np.array([1])))


def test_calibration_error_by_hand() -> None:
    # Two bins: confidences 0.5 (right) and 0.5 (wrong) fall into (0, 0.5]: gap 0. 0.9 (right),
    # 0.8 (wrong) into (0.5, 1]: accuracy 0.5, confidence 0.85, gap 0.35, weight 1/2.
    p = np.array([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1], [0.8, 0.2]])
    labels = np.array([0, 1, 0, 1])
    assert metrics.expected_calibration_error(p, labels, bins=2) == pytest.approx(0.175)


def test_calibration_error_of_a_sure_and_right_model_is_zero() -> None:
    p = np.eye(3)
    assert metrics.expected_calibration_error(p, np.arange(3)) == 0
    assert metrics.expected_calibration_error(p, np.array([1, 2, 0])) == 1


def test_confusion_by_scikit_learn() -> None:
    from sklearn.metrics import confusion_matrix

    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 5, 60), rng.integers(0, 5, 60)
    found = metrics.confusion(predicted, labels, 6)  # of class 5 there is none
    expected = confusion_matrix(labels, predicted, labels=range(6))
    np.testing.assert_array_equal(found, expected)
    assert np.issubdtype(found.dtype, np.integer)
    # 20 · 16 does not fit into the small integers in which labels may be stored.
    small = metrics.confusion(np.array([3], np.uint8), np.array([16], np.uint8), 20)
    assert small[16, 3] == small.sum() == 1


@pytest.mark.parametrize(("predicted", "label"), [(2, 0), (-1, 0), (0, 2), (0, -1)])
def test_confusion_with_a_class_that_is_not_there(predicted: int, label: int) -> None:
    with pytest.raises(ValueError, match="classes must lie in 0 to 1"):
        metrics.confusion(np.array([predicted]), np.array([label]), 2)


def test_per_class_accuracy_by_hand() -> None:
    confusion = np.array([[3, 1, 0], [0, 0, 0], [2, 0, 2]])
    assert metrics.per_class_accuracy(confusion) == [0.75, None, 0.5]


def test_per_class_accuracies_average_to_the_accuracy() -> None:
    rng = np.random.default_rng(1)
    scores, labels = rng.normal(size=(50, 4)), rng.integers(0, 4, 50)
    found = metrics.per_class_accuracy(metrics.confusion(scores.argmax(1), labels, 4))
    weights = np.bincount(labels, minlength=4)
    mean = np.average(np.array(found, float), weights=weights)
    assert mean == pytest.approx(metrics.accuracy(scores, labels))


def test_kl_by_scipy() -> None:
    from scipy.stats import entropy

    rng = np.random.default_rng(2)
    p, q = rng.dirichlet(np.ones(4), 30), rng.dirichlet(np.ones(4), 30)
    p[0] = [0, 0.5, 0.5, 0]  # 0 log 0 is 0
    assert metrics.kl(p, q) == pytest.approx(entropy(p, q, axis=1).mean(), rel=1e-12)
    assert metrics.kl(p, p) == 0
    assert metrics.kl(p, q) != pytest.approx(metrics.kl(q, p), rel=0.1)


def test_kl_of_a_probability_that_underflowed() -> None:
    # log of the smallest positive float64 is -708.4; SciPy has infinity here.
    found = metrics.kl(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]))
    assert found == pytest.approx(708.396, abs=1e-3)


def test_fitted_temperature_is_where_the_nll_is_smallest() -> None:
    rng = np.random.default_rng(3)
    scores, labels = rng.normal(size=(200, 3)), rng.integers(0, 3, 200)
    scores[np.arange(200), labels] += 1
    found = metrics.fit_temperature(scores, labels)
    grid = np.geomspace(0.1, 10, 1000)
    losses = [metrics.nll(metrics.softmax(scores, t), labels) for t in grid]
    assert found == pytest.approx(grid[np.argmin(losses)], rel=0.01)  # the grid's step is 0.5 %
    # Scaled scores need the scaled temperature.
    assert metrics.fit_temperature(scores / 10, labels) == pytest.approx(found / 10, rel=1e-3)
