"""Kernel ridge regression against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from dsdistill.harness.data.preprocess import identity
from dsdistill.harness.errors import UserError
from dsdistill.kernels import networks
from dsdistill.methods import ridge


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((12, 20))
    return factor @ factor.T, rng.standard_normal((12, 9)), rng.standard_normal((12, 3))


def test_solution_and_predictions(problem):
    k_ss, k_st, y_s = problem
    regular = k_ss + 0.1 * np.mean(np.diag(k_ss)) * np.eye(12)
    alpha = np.linalg.inv(regular) @ y_s
    predicted = k_st.T @ alpha
    with jax.enable_x64(True):
        arrays = [jnp.asarray(a) for a in (k_ss, k_st, y_s)]
        np.testing.assert_allclose(ridge.solve(arrays[0], arrays[2], 0.1), alpha, rtol=1e-9)
        np.testing.assert_allclose(ridge.predict(arrays[1], alpha), predicted, rtol=1e-9)


def test_the_ridge_is_relative(problem):
    """Scaling the kernel changes nothing in the predictions."""
    k_ss, k_st, y_s = problem
    with jax.enable_x64(True):
        small = ridge.predict(
            jnp.asarray(k_st), ridge.solve(jnp.asarray(k_ss), jnp.asarray(y_s), 1e-3)
        )
        large = ridge.predict(
            jnp.asarray(7 * k_st), ridge.solve(jnp.asarray(7 * k_ss), jnp.asarray(y_s), 1e-3)
        )
    np.testing.assert_allclose(small, large, rtol=1e-10)


def examples(n: int) -> Examples:
    rng = np.random.default_rng(1)
    images = rng.standard_normal((n, 5, 5, 1), np.float32)
    return Examples(
        LabeledImages(images, np.arange(n) % 3, ("a", "b", "c")), identity(1), is_preprocessed=True
    )


@pytest.mark.heavy
def test_learner_fits_its_training_images_and_predicts_any_number():
    train = examples(30)
    predict = ridge.RidgeLearner(networks.parse("fc"), 1e-9)(train, examples(3), 0)
    np.testing.assert_allclose(predict(train.images()), train.labels(), atol=1e-3)
    many = examples(ridge.CHUNK + 5).images()
    # float32 kernels of another number of images are summed in another order.
    np.testing.assert_allclose(predict(many)[-5:], predict(many[-5:]), atol=1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["conv", "CRP-flatten"])
def test_support_gram_has_an_exact_diagonal(name):
    """neural-tangents in float32 is off by 2e-4 on the diagonal; the reference is its float64."""
    network = networks.parse(name)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((6, 8, 8, 1)), jnp.float32)
    with jax.enable_x64(True):
        tile = ridge.support_tile(network, 6, (8, 8, 1), gradient=True)
        got = jax.jit(lambda x: ridge.support_gram(network, x, tile))(images)
        double = images.astype(jnp.float64)
        expected = jax.jit(lambda x: network.kernel(x, x))(double)
        total = jax.jit(jax.grad(lambda x: ridge.support_gram(network, x, tile).sum()))
        slope = total(images)
    relative = np.abs(np.asarray(got - expected)).max() / np.abs(np.asarray(expected)).max()
    assert relative < 2e-6
    assert np.isfinite(np.asarray(slope)).all()


def test_a_singular_kernel_is_refused():
    train = examples(4)
    twice = np.concatenate([train.images(), train.images()])
    labels = np.concatenate([train.labels(), -train.labels()])
    with pytest.raises(UserError, match=r"singular at a ridge of .*: raise --ridge"):
        ridge.fit(networks.parse("fc"), twice, labels, 0.0)
