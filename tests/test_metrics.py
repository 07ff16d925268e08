"""Metrics against values computed by hand."""

import numpy as np
import pytest

from dsdistill.harness import metrics


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
