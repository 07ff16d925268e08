"""The convolutional kernel against neural-tangents and a plain oracle; its numerical traps."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import kernel_oracle as oracle
import numpy as np
import pytest
from sklearn.datasets import load_digits

from dsdistill.harness.data import datasets
from dsdistill.harness.paths import data_root
from dsdistill.kernels import notation
from dsdistill.kernels.conv import conv_kernel

SINGLE = jnp.float32
# What is promised of the engine against neural-tangents in float64, in the max norm. Where no
# angle nearly vanishes all of them agree to about 1e-14.
VALUE, GRADIENT = 1e-6, 1e-5
TIGHT = 1e-11


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def images(n: int, seed: int, h: int, w: int, c: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, h, w, c))


def digits(n: int) -> np.ndarray:
    return load_digits().images[:n, :, :, None] / 16


def relative(got: Any, expected: Any) -> float:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    scale = abs(expected).max()
    return float(abs(got - expected).max() / (scale if scale > 0 else 1))


def engine(text: str, b_std: float = 0.1) -> Any:
    """The kernel of x1 and x2, and the gradient in x1 of its sum weighted by g; compiled once."""
    return _engine(text, b_std)


@functools.cache
def _engine(text: str, b_std: float) -> Any:
    network = notation.parse(text, b_std=b_std)
    return with_gradient(lambda x1, x2: conv_kernel.ntk(x1, x2, network))


def with_gradient(kernel: Any) -> Any:
    @jax.jit
    def run(x1: jax.Array, x2: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, pull = jax.vjp(lambda x: kernel(x, x2), x1)
        return value, pull(g)[0]

    return run


def double(run: Any, *arrays: Any) -> Any:
    return run(*(jnp.asarray(np.asarray(a, np.float64)) for a in arrays))


def single(run: Any, *arrays: Any) -> Any:
    """Run as in production: float32, outside of x64 mode."""
    with jax.enable_x64(False):
        return run(*(jnp.asarray(np.asarray(a, np.float32)) for a in arrays))


def weights(n: int, m: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((n, m))


def errors(
    results: Any, x1: Any, x2: Any, g: Any, text: str, b_std: float = 0.1
) -> tuple[float, float]:
    """Relative errors of value and gradient, the latter along random directions."""
    network = notation.parse(text, b_std=b_std)
    value, gradient = (np.asarray(a, np.float64) for a in results)
    directions = np.random.default_rng(4).standard_normal((4, *gradient.shape))
    along = [(gradient * d).sum((1, 2, 3)) for d in directions]
    expected = [(oracle.slopes(x1, x2, network, d) * g).sum(1) for d in directions]
    return relative(value, oracle.ntk(x1, x2, network)), relative(along, expected)


# ---- against the oracles


@pytest.mark.parametrize("text", ["CR-2xCRP-flatten", "CRP-CR-gap"])
def test_plain_oracle_equals_neural_tangents(text):
    x, y, g = images(2, 0, 5, 4, 3), images(2, 1, 5, 4, 3), weights(2, 2)
    theirs = double(with_gradient(oracle.neural_tangents(notation.parse(text))), x, y, g)
    assert max(errors(theirs, x, y, g, text)) < TIGHT


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("3xCRP-flatten", (9, 11, 1)),  # odd at two resolutions
        ("CRP-flatten", (2, 2, 1)),  # the smallest image
        ("2xCR-flatten", (5, 7, 3)),
        ("CR-2xCRP-CR-gap", (9, 6, 3)),
        ("CCRP-CPR-flatten", (7, 7, 2)),
        ("P-CRP-flatten", (7, 5, 64)),
        ("CP-gap", (5, 4, 1)),
        ("gap", (3, 5, 2)),
        ("flatten", (3, 2, 3)),
    ],
)
def test_equals_the_oracle(text, shape):
    x, y, g = images(2, 0, *shape), images(3, 1, *shape), weights(2, 3)
    value, gradient = errors(double(engine(text), x, y, g), x, y, g, text)
    assert value < TIGHT
    assert gradient < TIGHT
    y[1] = x[0]  # an entry between identical images
    value, gradient = errors(double(engine(text), x, y, g), x, y, g, text)
    assert value < VALUE
    assert gradient < GRADIENT


def test_real_images_equal_neural_tangents():
    """Digits have large areas of zeros; the first image is in both sets."""
    text = "3xCRP-flatten"
    x, two, g = digits(4), [0, 2, 3], weights(2, 3)
    results = double(engine(text), x[:2], x[two], g)
    assert max(errors(results, x[:2], x[two], g, text)) < VALUE
    kernel = oracle.stax_kernel(notation.parse(text))
    theirs = double(jax.jit(lambda x: kernel(x, None, "ntk")), x)
    assert relative(results[0], theirs[:2, np.array(two)]) < VALUE


@pytest.mark.fashion
def test_fashion_equals_neural_tangents():
    text = "CR-3xCRP-flatten"
    train = datasets.load("fashion-mnist", root=data_root()).train
    x = train.images(np.arange(4)) / 255.0
    value, gradient = double(engine(text), x[:2], x[2:], weights(2, 2))
    theirs = with_gradient(oracle.neural_tangents(notation.parse(text)))
    expected, expected_gradient = double(theirs, x[:2], x[2:], weights(2, 2))
    assert relative(value, expected) < VALUE
    assert relative(gradient, expected_gradient) < GRADIENT


# ---- float32


@pytest.mark.parametrize(("text", "data"), [("3xCRP-flatten", "digits"), ("CRP-CR-gap", "random")])
def test_float32_is_closer_than_neural_tangents(text, data):
    x = digits(4) if data == "digits" else images(4, 0, 6, 6, 1)
    x, g, network = np.float32(x), weights(4, 4), notation.parse(text)
    expected = oracle.ntk(np.float64(x), np.float64(x), network)
    results = single(engine(text), x, x, g)
    kernel = oracle.stax_kernel(network)
    theirs = single(jax.jit(lambda a: kernel(a, None, "ntk")), x)
    assert results[0].dtype == SINGLE
    assert relative(results[0], expected) < min(VALUE, relative(theirs, expected))
    diagonal = relative(np.diag(results[0]), np.diag(expected))
    assert diagonal < 0.1 * relative(np.diag(theirs), np.diag(expected))
    assert errors(results, np.float64(x), np.float64(x), g, text)[1] < GRADIENT


def test_float32_stays_float32_in_x64_mode():
    x, network = jnp.zeros((2, 4, 4, 1), SINGLE), notation.parse("2xCRP-flatten")
    loss = jax.value_and_grad(lambda a: conv_kernel.ntk(a, x, network).sum())
    assert [s.dtype for s in jax.eval_shape(loss, x)] == [SINGLE, SINGLE]


# ---- traps: design.md, section 5


def check_trap(x1: Any, x2: Any, *, b_std: float = 0.1, text: str = "2xCRP-flatten") -> None:
    """Require finite values in float32 and float64, and full precision in float64."""
    g = weights(len(x1), len(x2))
    results = double(engine(text, b_std), x1, x2, g)
    for array in (*results, *single(engine(text, b_std), x1, x2, g)):
        assert np.isfinite(array).all()
    value, gradient = errors(results, x1, x2, g, text, b_std)
    assert value < VALUE
    assert gradient < GRADIENT


UNBIASED = {"b_std": 0.0, "text": "CRP-flatten"}
X, Y = np.random.default_rng(3).standard_normal((2, 2, 7, 6, 1))


def test_trap_duplicates():
    check_trap(X, X)


def test_trap_duplicates_under_global_pooling():
    check_trap(X[:, :4, :5], X[:, :4, :5], text="CRP-CR-gap")


def test_trap_constant_images():
    x = np.full(X.shape, 0.5)
    check_trap(x, x)
    check_trap(x, -2 * x)


def test_trap_zero_images():
    zero = np.zeros(X.shape)
    check_trap(X, zero)
    check_trap(zero, X)
    check_trap(zero, zero)


def test_trap_zero_images_without_bias():
    """The kernel is 0; the root of a variance of 0 has no slope, but a finite one is given.

    A variance of 0 is taken for the smallest normal number, whose root shows in float32.
    """
    zero, g = np.zeros(X.shape), weights(2, 2)
    for x1, x2 in ((X, zero), (zero, X), (zero, zero)):
        for run in (double, single):
            value, gradient = run(engine(UNBIASED["text"], 0.0), x1, x2, g)
            assert abs(value).max() < 1e-18
            assert np.isfinite(gradient).all()


def test_trap_one_pixel_images():
    x, y = X[:, :1, :1], Y[:, :1, :1]
    check_trap(x, x, text="CR-flatten")
    check_trap(x, y, text="CR-flatten")


def test_trap_one_lit_pixel():
    x = np.zeros(X.shape)
    x[:, 2, 3] = 1
    check_trap(x, x)
    check_trap(x, x, **UNBIASED)


def test_trap_zero_background():
    mask = np.zeros(X.shape)
    mask[:, 2:5, 2:4] = 1
    x, y = abs(X) * mask, abs(Y) * mask
    check_trap(x, y)
    check_trap(x, x)
    check_trap(x, y, **UNBIASED)


def test_trap_multiples():
    check_trap(3 * X, X)
    check_trap(3 * X, X, **UNBIASED)  # all angles vanish
    check_trap(-3 * X, X)
    check_trap(-3 * X, X, **UNBIASED)


def test_trap_nearly_coincident_images():
    """Nearly equal images are ill-conditioned in float32 and exact in float64."""
    check_trap(X, X + 1e-4 * Y)


def test_trap_equal_pixels_are_exact_in_float32():
    """Trap 2: near c = 1 rounding does not decide about the angle."""
    x, network = np.float32(X), notation.parse("2xCRP-flatten")
    value, _ = single(engine("2xCRP-flatten"), x, x, weights(2, 2))
    expected = oracle.ntk(np.float64(x), np.float64(x), network)
    assert relative(np.diag(value), np.diag(expected)) < 3e-7


def test_trap_dropped_rows_get_a_gradient():
    """Trap 4: 7 rows pool to 3, but a convolution before the pooling still reads the last row."""
    _, gradient = double(engine("2xCRP-flatten"), X, Y, weights(2, 2))
    assert (abs(gradient[:, -1]) > 1e-4 * abs(gradient).max()).all()


# ---- both sides, symmetry, lanes


def test_gradients_of_both_sides():
    """The gradient in x2 equals that in x1 with the arguments exchanged."""
    text = "CRP-flatten"
    x, y, g = images(2, 0, 6, 5, 2), images(3, 1, 6, 5, 2), weights(2, 3)
    network = notation.parse(text)
    second = with_gradient(lambda y, x: conv_kernel.ntk(x, y, network).T)
    value, gradient = double(second, y, x, g.T)
    turned, expected = double(engine(text), y, x, g.T)
    assert relative(value, turned) < TIGHT
    assert relative(gradient, expected) < TIGHT


@pytest.mark.parametrize("text", ["CRP-flatten", "CRP-gap"])
def test_symmetric_equals_both_arguments(text):
    # More images than float64 has lanes: blocks above, on and below the diagonal.
    network, x, g = notation.parse(text), images(10, 0, 4, 5, 1), weights(10, 10)
    run = with_gradient(lambda x, _: conv_kernel.ntk_symmetric(x, network))
    value, gradient = double(run, x, x, g)
    expected, first = double(engine(text), x, x, g)
    _, second = double(engine(text), x, x, g.T)
    np.testing.assert_array_equal(value, value.T)
    np.testing.assert_allclose(value, expected, rtol=TIGHT)
    assert relative(gradient, first + second) < TIGHT


@pytest.mark.parametrize(
    ("text", "shape"), [("CR-2xCRP-flatten", (6, 5, 1)), ("CRP-CR-gap", (4, 5, 3))]
)
def test_slopes_are_the_gradient_of_every_entry(text, shape):
    """Slopes equal gradients, also for an image in both sets and for one of zeros."""
    x, y = images(2, 0, *shape), images(9, 1, *shape)
    y[3], y[4] = x[1], 0
    run = jax.jit(lambda x, y: conv_kernel.slopes(x, y, notation.parse(text)))
    value, slopes = double(run, x, y)
    expected, _ = double(engine(text), x, y, weights(2, 9))
    np.testing.assert_allclose(value, expected, rtol=TIGHT)
    for i, j in np.ndindex(2, 9):
        g = np.zeros((2, 9))
        g[i, j] = 1
        _, gradient = double(engine(text), x, y, g)
        assert relative(slopes[i, j], gradient[i]) < TIGHT


@pytest.mark.parametrize(("n", "m"), [(3, 17), (17, 3)])
def test_lanes_are_independent(n, m):
    """Padding lanes of the last block do not change the result."""
    x, y, g = images(n, 0, 5, 4, 1), images(m, 1, 5, 4, 1), weights(n, m)
    value, gradient = single(engine("CRP-flatten"), x, y, g)
    values, gradients = np.zeros((n, m)), np.zeros(x.shape)
    for i, j in np.ndindex(n, m):
        one, slope = single(engine("CRP-flatten"), x[[i]], y[[j]], g[[i]][:, [j]])
        values[i, j] = one[0, 0]
        gradients[i] += slope[0]
    assert relative(value, values) < VALUE
    assert relative(gradient, gradients) < GRADIENT
