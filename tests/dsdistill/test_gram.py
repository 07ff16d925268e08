"""Tiles: results that do not depend on them, and sizes that fit the free memory."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsdistill.harness import memory
from dsdistill.harness.errors import UserError
from dsdistill.kernels import gram, networks, neural_tangents
from dsdistill.kernels.gram import Tile


def images(n: int, seed: int, size: int = 8) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((n, size, size, 1)), jnp.float32)


def stored_covariances(monkeypatch) -> networks.InfiniteNetwork:
    """A network of neural-tangents, which keeps every pair of pixels of every pair of images."""
    stax = neural_tangents.load().stax
    block = (stax.Conv(1, (3, 3), padding="SAME"), stax.Relu(), stax.AvgPool((2, 2), (2, 2)))
    net = stax.serial(*block, *block, stax.Flatten(), stax.Dense(1))
    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(net=net))
    return networks.parse("mine:net")


@pytest.mark.parametrize("tile", [Tile(5, 7), Tile(2, 3), Tile(1, 1), Tile(5, 2), Tile(4, 7)])
def test_tiles_change_neither_value_nor_gradient(tile):
    kernel, x, y = networks.parse("fc", 2).kernel, images(5, 0), images(7, 1)

    def whole(x):
        return kernel(x, y)

    def tiled(x):
        return gram.gram(kernel, x, y, tile)

    np.testing.assert_allclose(tiled(x), whole(x), rtol=1e-5)
    weight = jnp.asarray(np.random.default_rng(2).standard_normal((5, 7)), jnp.float32)
    expected = jax.grad(lambda x: (whole(x) * weight).sum())(x)
    got = jax.jit(jax.grad(lambda x: (tiled(x) * weight).sum()))(x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_a_matrix_that_fits_is_one_tile():
    assert gram.plan_tile(networks.parse("fc"), 100, 5000, (28, 28, 1), gradient=True) == Tile(
        100, 5000
    )


@pytest.mark.parametrize("gradient", [False, True])
def test_plan_keeps_to_the_budget_and_uses_it(monkeypatch, gradient):
    network, shape = stored_covariances(monkeypatch), (16, 16, 1)
    monkeypatch.setattr(memory, "available", lambda: 2**30)
    tile = gram.plan_tile(network, 100, 5000, shape, gradient=gradient)
    cost = gram._traced_bytes(network.kernel, tile, shape, gradient, jnp.float32)
    assert 2**28 < cost <= 2**29


@pytest.mark.parametrize(("stored", "share"), [(True, 1), (False, gram.MAX_MEMORY_FRACTION)])
def test_traced_bytes_bound_what_the_compiler_takes(monkeypatch, stored, share):
    """Traced bytes bound the memory of stored covariances; planes stay within the budget."""
    network = stored_covariances(monkeypatch) if stored else networks.parse("CRP-flatten")
    shape, tile = (16, 16, 1), Tile(4, 6)
    x, y = images(4, 0, 16), images(6, 1, 16)
    compiled = jax.jit(jax.grad(lambda x: network.kernel(x, y).sum())).lower(x).compile()
    analysis = compiled.memory_analysis()
    taken = analysis.temp_size_in_bytes
    traced = gram._traced_bytes(network.kernel, tile, shape, True, jnp.float32)
    assert share * taken <= traced < 4 * taken


def test_a_pair_that_does_not_fit_is_refused_with_the_figures(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 2**22)
    with pytest.raises(
        UserError, match=r"convnet\(1\) needs \S+ MiB for one pair of 112x112 .* can be used"
    ):
        gram.plan_tile(networks.parse("convnet", 1), 10, 10, (112, 112, 3), gradient=True)


def test_peak_of_a_chain_is_two_arrays():
    def chain(x):
        return jnp.tanh(jnp.sin(jnp.cos(x)))

    jaxpr = jax.make_jaxpr(chain)(jnp.zeros(1000, jnp.float32)).jaxpr
    # The caller keeps the input; each step needs its argument and its result.
    assert gram.peak_bytes(jaxpr) == 3 * 4000
