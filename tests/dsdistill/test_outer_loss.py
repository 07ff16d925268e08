"""Outer losses of KIP: value, gradient, curvature, and the scale that fits a batch best."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from dsdistill.harness.data.labeled_images import centred_one_hot
from dsdistill.methods import outer_loss
from dsdistill.methods.outer_loss import CrossEntropy, SquaredError
from dsdistill.parallel import devices

RNG = np.random.default_rng(0)
M, K = 40, 4
CLASSES = RNG.integers(0, K, M)
LABELS = centred_one_hot(CLASSES, K).astype(np.float64)
PREDICTIONS = 0.3 * LABELS + 0.2 * RNG.standard_normal((M, K))
WEIGHTS = RNG.random(M)
WEIGHTS /= WEIGHTS.sum()


def cross_entropy(predictions: np.ndarray, scale: float) -> float:
    """Weighted mean of the negative log probabilities of the smoothed labels, by scipy."""
    logits = scale * predictions
    log = logits - scipy.special.logsumexp(logits, axis=1, keepdims=True)
    share = outer_loss.SMOOTHING
    return float(-WEIGHTS @ ((1 - share) * log[np.arange(M), CLASSES] + share * log.mean(1)))


def best_scale(predictions: np.ndarray) -> float:
    """The scale of least cross-entropy, whatever its size."""
    found = scipy.optimize.minimize_scalar(
        lambda log: cross_entropy(predictions, np.exp(log)), bounds=(-3, 8), method="bounded"
    )
    return float(np.exp(found.x))


def value(outer, predictions) -> jax.Array:
    return outer.value(predictions, jnp.asarray(LABELS), jnp.asarray(WEIGHTS), lambda part: part)


def quadratic(outer, v: np.ndarray) -> list[np.ndarray]:
    """Gradient, H v, and R as a matrix, computed as in a step."""

    def work(whole, real, *rows):
        model = outer.quadratic(*rows)
        root = jax.vmap(model.root)(jnp.eye(M * K).reshape(-1, M, K))
        return model.gradient, model.product(whole), root

    with jax.enable_x64(True):
        rows = map(jnp.asarray, (PREDICTIONS, LABELS, WEIGHTS))
        arrays = jax.jit(devices.shard_targets(work))(jnp.asarray(v), M, *rows)
        return [np.asarray(array) for array in arrays]


@pytest.mark.parametrize("factor", [2.0, 20.0])
def test_the_scale_is_the_one_of_least_cross_entropy(factor):
    predictions = factor * PREDICTIONS
    expected = best_scale(predictions)
    assert 3 / factor < expected < outer_loss.largest_scale(K)
    with jax.enable_x64(True):
        args = map(jnp.asarray, (predictions, LABELS, WEIGHTS))
        scale = float(outer_loss.fit_scale(*args, lambda part: part))
        loss = float(value(CrossEntropy(), jnp.asarray(predictions)))
    assert scale == pytest.approx(expected, rel=1e-3)
    assert loss == pytest.approx(cross_entropy(predictions, expected), rel=1e-6)


def test_small_predictions_are_not_scaled_up_without_limit():
    """A loss that is blind to scale would let predictions shrink until networks see only noise."""
    limit = outer_loss.largest_scale(K)
    with jax.enable_x64(True):
        args = (jnp.asarray(LABELS), jnp.asarray(WEIGHTS))
        for factor in (0.1, 0.01):
            predictions = factor * PREDICTIONS
            assert best_scale(predictions) > limit
            scale = float(outer_loss.fit_scale(jnp.asarray(predictions), *args, lambda part: part))
            assert scale == pytest.approx(limit)
            loss = float(value(CrossEntropy(), jnp.asarray(predictions)))
            assert loss == pytest.approx(cross_entropy(predictions, limit), rel=1e-6)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_labels_at_the_largest_scale_are_confident(classes):
    label = centred_one_hot(np.array([0]), classes)[0].astype(np.float64)
    probabilities = scipy.special.softmax(outer_loss.largest_scale(classes) * label)
    assert probabilities[0] == pytest.approx(outer_loss.CONFIDENCE)


def test_predictions_without_fault_or_merit_have_a_finite_scale():
    """The best of labels that are predicted as they are gives the smoothed probabilities."""
    with jax.enable_x64(True):
        scales = [
            float(outer_loss.fit_scale(*map(jnp.asarray, (p, LABELS, WEIGHTS)), lambda part: part))
            for p in (LABELS, -LABELS)
        ]
    share = outer_loss.SMOOTHING
    assert scales[0] == pytest.approx(np.log((1 - share + share / K) / (share / K)), rel=1e-6)
    assert scales[1] == outer_loss.SMALLEST_SCALE


@pytest.mark.parametrize("outer", outer_loss.OUTER_LOSSES.values(), ids=outer_loss.OUTER_LOSSES)
def test_the_gradient_is_that_of_the_value(outer):
    """Also through the fitted scale, whose own change has no effect to the first order."""
    v = np.random.default_rng(1).standard_normal((M, K))
    gradient, _, _ = quadratic(outer, v)
    with jax.enable_x64(True):
        automatic = jax.grad(lambda p: value(outer, p))(jnp.asarray(PREDICTIONS))
        ends = [float(value(outer, jnp.asarray(PREDICTIONS + s * v))) for s in (1e-5, -1e-5)]
    np.testing.assert_allclose(gradient, automatic, rtol=1e-9, atol=1e-12)
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float((gradient * v).sum()), rel=1e-6)


def test_the_curvature_of_the_squared_error_is_exact():
    v = np.random.default_rng(1).standard_normal((M, K))
    _, product, root = quadratic(SquaredError(), v)
    np.testing.assert_allclose(product, WEIGHTS[:, None] * v / K, rtol=1e-12)
    check_root(product, root, v)


def test_the_curvature_of_the_cross_entropy_is_that_at_the_fitted_scale():
    v = np.random.default_rng(1).standard_normal((M, K))
    scale = min(best_scale(PREDICTIONS), outer_loss.largest_scale(K))
    _, product, root = quadratic(CrossEntropy(), v)
    q = scipy.special.softmax(scale * PREDICTIONS, axis=1)
    blocks = [np.diag(row) - np.outer(row, row) for row in q]
    expected = [w * scale**2 * h @ row for w, h, row in zip(WEIGHTS, blocks, v, strict=True)]
    np.testing.assert_allclose(product, expected, rtol=1e-3, atol=1e-6)
    check_root(product, root, v)


def check_root(product: np.ndarray, root: np.ndarray, v: np.ndarray) -> None:
    """R R^T v = H v."""
    columns = root.reshape(M * K, M * K)  # row i is R e_i
    np.testing.assert_allclose(columns.T @ (columns @ v.ravel()), product.ravel(), atol=1e-12)


def test_the_loss_of_predicting_nothing():
    assert outer_loss.zero_value(CrossEntropy(), 3) == pytest.approx(np.log(3))
    error = 0.5 * (4 / 9 + 1 / 9 + 1 / 9) / 3
    assert outer_loss.zero_value(SquaredError(), 3) == pytest.approx(error, rel=1e-6)
