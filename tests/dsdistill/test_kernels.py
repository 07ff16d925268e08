"""Kernels against neural-tangents in float64, against finite networks, and their traps."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dsdistill.harness.errors import UserError
from dsdistill.kernels import dense, networks, neural_tangents
from dsdistill.kernels.relu import relu

SHAPE = (6, 6, 3)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def images(n: int, seed: int, dtype=jnp.float64) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((n, *SHAPE)), dtype)


def oracle(depth: int):
    """The same network in neural-tangents."""
    stax = neural_tangents.load().stax
    std = {"W_std": networks.W_STD, "b_std": networks.B_STD}
    hidden = [layer for _ in range(depth) for layer in (stax.Dense(1, **std), stax.Relu())]
    kernel = stax.serial(stax.Flatten(), *hidden, stax.Dense(1, **std))[2]
    return lambda a, b=None: kernel(a, b, "ntk")


def relative(got: jax.Array, expected: jax.Array) -> float:
    return float(jnp.abs(got - expected).max() / jnp.abs(expected).max())


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_fc_equals_neural_tangents(depth):
    x, y = images(7, 0), images(5, 1)
    assert relative(dense.fc_ntk(x, y, depth=depth), oracle(depth)(x, y)) < 1e-12


# On the diagonal neural-tangents itself rounds to about 1e-8 in float64: it takes 1 - c² literally.
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-7), (jnp.float32, 2e-6)])
@pytest.mark.parametrize("depth", [1, 3])
def test_fc_diagonal_is_exact(dtype, tolerance, depth):
    x = images(40, 0)
    expected = oracle(depth)(x)
    got = dense.fc_ntk(x.astype(dtype), x.astype(dtype), depth=depth)
    assert relative(got, expected) < tolerance
    # As numbers of their own too: the closed form of equal inputs is a sum of variances.
    v = 2 * (x.reshape(40, -1) ** 2).mean(1) + 0.01
    ntk = v
    for _ in range(depth):
        v = 2 * v / 2 + 0.01
        ntk = 2 * ntk / 2 + v
    np.testing.assert_allclose(jnp.diag(got), ntk, rtol=tolerance)


def test_fc_in_float32_is_closer_than_neural_tangents():
    x = images(40, 0)
    single = x.astype(jnp.float32)
    expected = oracle(2)(x)
    with jax.enable_x64(False):
        theirs = oracle(2)(single)
        ours = dense.fc_ntk(single, single, depth=2)
    assert relative(ours, expected) < 0.1 * relative(theirs, expected)


@pytest.mark.parametrize("depth", [1, 3])
def test_fc_gradient_equals_neural_tangents(depth):
    x, y = images(4, 0), images(5, 1)
    weight = jnp.asarray(np.random.default_rng(2).standard_normal((4, 5)))
    ours = jax.grad(lambda a: (dense.fc_ntk(a, y, depth=depth) * weight).sum())(x)
    theirs = jax.grad(lambda a: (oracle(depth)(a, y) * weight).sum())(x)
    assert relative(ours, theirs) < 1e-10


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", ["repeated", "zero", "constant", "opposite", "one pixel"])
def test_gradient_is_finite_where_the_angle_is_singular(name, dtype):
    x = images(3, 0, dtype)
    special = {
        "repeated": x,
        "zero": jnp.zeros_like(x),
        "constant": jnp.full_like(x, 0.5),
        "opposite": -x,
        "one pixel": jnp.zeros_like(x).at[:, 2, 3, 0].set(1),
    }[name]
    for a, b in ((x, special), (special, special)):
        value, pullback = jax.vjp(lambda a, b=b: dense.fc_ntk(a, b, depth=2, b_std=0.0), a)
        assert jnp.isfinite(value).all()
        assert jnp.isfinite(pullback(jnp.ones_like(value))[0]).all()


def test_relu_rule_equals_finite_differences():
    rng = np.random.default_rng(0)
    scale = jnp.asarray(rng.uniform(0.5, 2, 50))
    nngp = scale * jnp.asarray(rng.uniform(-0.95, 0.95, 50))
    ntk = jnp.asarray(rng.standard_normal(50))
    check_grads(relu, (nngp, ntk, scale), order=1, modes=["fwd", "rev"], eps=1e-6)


def test_relu_at_the_ends_of_the_angle():
    scale = jnp.array([2.0, 2.0, 2.0])
    nngp, ntk = relu(jnp.array([2.0, -2.0, 0.0]), jnp.ones(3), scale)
    np.testing.assert_allclose(nngp, [1.0, 0.0, 1 / np.pi], atol=1e-15)
    np.testing.assert_allclose(ntk, [0.5, 0.0, 0.25], atol=1e-15)


@pytest.mark.parametrize("name", ["fc", "conv", "convnet3"])
def test_monte_carlo_over_finite_networks(name):
    """The empirical tangent kernel of wide random networks approaches the infinite one."""
    stax, nt = neural_tangents.load().stax, neural_tangents.load().nt
    with jax.enable_x64(False):
        x = images(3, 0, jnp.float32)[:, :, :, :1]
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # 8x8, for three poolings
        std = {"W_std": networks.W_STD, "b_std": networks.B_STD}
        width = 128
        conv = [stax.Conv(width, (3, 3), padding="SAME", **std), stax.Relu()]
        layers = {
            "fc": [stax.Flatten(), stax.Dense(2048, **std), stax.Relu()],
            "conv": [*conv, stax.Flatten()],
            "convnet3": [*conv, stax.AvgPool((2, 2), (2, 2))] * 3 + [stax.Flatten()],
        }[name]
        init, apply, _ = stax.serial(*layers, stax.Dense(1, **std))
        sampled = nt.monte_carlo_kernel_fn(init, apply, jax.random.key(0), n_samples=16)
        estimate = sampled(x, None, "ntk")
        exact = networks.parse(name).kernel(x, x)
    # 16 networks of this width deviate by some percent; a wrong layer by tens of them.
    assert relative(estimate, exact) < 0.06


@pytest.mark.parametrize(
    ("name", "depth", "canonical"),
    [
        ("fc", None, "fc(1)"),
        ("fc", 3, "fc(3)"),
        ("conv", 2, "conv(2)"),
        ("convnet", None, "convnet(3)"),
        ("convnet3", None, "convnet3"),
        ("myrtle", 7, "myrtle(7)"),
    ],
)
def test_every_name_has_a_canonical_form(name, depth, canonical):
    assert networks.parse(name, depth).name == canonical


@pytest.mark.parametrize("name", ["fc(3)", "conv(2)", "convnet3", "myrtle(5)"])
def test_every_kind_of_kernel_is_positive_definite(name):
    network = networks.parse(name)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 8, 1)))
    k = network.kernel(x, x)
    np.testing.assert_allclose(k, k.T, rtol=1e-6)
    assert np.linalg.eigvalsh(np.asarray(k)).min() > 0


@pytest.mark.parametrize(
    ("name", "depth", "message"),
    [
        ("convnett", None, "did you mean 'convnet'"),
        ("convnet3", 2, "has no depth"),
        ("fc", 0, "at least 1, got 0"),
        ("myrtle", 6, "5, 7, 10, got 6"),
        ("no_such_module:net", None, "cannot be imported"),
        ("math:pi", None, "neither a stax network nor a kernel function"),
    ],
)
def test_impossible_networks_are_refused(name, depth, message):
    with pytest.raises(UserError, match=message):
        networks.parse(name, depth)


@pytest.mark.parametrize("part", ["kernel", "symmetric", "slopes", "deviations"])
@pytest.mark.parametrize("name", ["convnet", "myrtle", "CRP-CRPCR-gap"])
def test_images_too_small_for_the_poolings_are_one_line(name, part):
    function = getattr(networks.parse(name), part)
    x = np.zeros((2, 8, 3, 1), np.float32)
    with pytest.raises(UserError, match=r"at least .* pixels for the kernel's poolings, got 8x3"):
        function(x, x) if part in ("kernel", "slopes") else function(x)


def test_network_from_a_module(tmp_path, monkeypatch):
    (tmp_path / "my_network.py").write_text(
        "from neural_tangents import stax\n"
        "net = stax.serial(stax.Flatten(), stax.Dense(1), stax.Erf(), stax.Dense(1))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    network = networks.parse("my_network:net")
    assert network.engine == "neural-tangents"
    assert network.kernel(images(2, 0), images(3, 1)).shape == (2, 3)


def test_without_neural_tangents_one_line_names_the_extra(monkeypatch):
    monkeypatch.setattr(neural_tangents, "load", neural_tangents.load.__wrapped__)
    monkeypatch.setitem(sys.modules, "neural_tangents", None)
    with pytest.raises(UserError, match=r"pip install 'dsdistill\[tangents\]'") as caught:
        networks.parse("my_network:net")
    assert "\n" not in str(caught.value)


def test_tangents_replaces_no_name_of_jax():
    import jax.core
    import jax.interpreters.ad
    import jax.random

    before = {m: dict(vars(m)) for m in (jax.core, jax.random, jax.interpreters.ad)}
    neural_tangents._restore_moved_names()
    for module, names in before.items():
        assert all(vars(module)[name] is value for name, value in names.items())


def test_neural_tangents_works_beyond_kernels():
    stax, nt = neural_tangents.load().stax, neural_tangents.load().nt
    x = images(3, 0)
    init, apply, kernel = stax.serial(stax.Flatten(), stax.Dense(16), stax.Gelu(), stax.Dense(1))
    _, params = init(jax.random.key(0), x.shape)
    assert nt.empirical_ntk_fn(apply)(x, None, params).shape == (3, 3)
    assert nt.batch(kernel, batch_size=1)(x, None, "ntk").shape == (3, 3)
    predict = nt.predict.gradient_descent_mse_ensemble(kernel, x, jnp.ones((3, 1)))
    assert predict(x_test=x, get="ntk").shape == (3, 1)
