"""Exact neural tangent kernel of a convolutional ReLU network, without what is never used.

neural-tangents stores the covariance of every pair of pixels, (h w)² numbers for a pair of images.
Most of them never reach the readout. Only the planes that do are computed (`offsets`), level by
level (`planes`), for one image against a block of others at a time. The result is exact.

A ReLU needs the variances of its inputs, of n images instead of n m pairs; the gradient with
respect to them is first summed over the pairs, and then propagated to the pixels in one pass for
each image (`variances`).

Source: Novak et al. (2019), arXiv:1810.05148, and Arora et al. (2019), arXiv:1904.11955, for the
kernel; the planes are this project's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dsdistill.kernels.conv import planes, stages, variances
from dsdistill.kernels.conv.lanes import build_levels, choose_lanes, merge_lanes, split_into_lanes
from dsdistill.kernels.conv.stages import Level, ReluDeviations
from dsdistill.kernels.conv.variances import Deviations, deviations
from dsdistill.kernels.notation import Architecture


def ntk(
    x1: Float[Array, "n h w c"], x2: Float[Array, "m h w c"], network: Architecture
) -> Float[Array, "n m"]:
    """Compute the kernel between two sets of images, in their dtype.

    Differentiable once in both arguments; finite for repeated, constant and zero images.
    """
    return _ntk(x1, x2, network)


def ntk_symmetric(x: Float[Array, "n h w c"], network: Architecture) -> Float[Array, "n n"]:
    """Compute the kernel of a set of images with itself, from half of the pairs.

    The gradient takes one pass over all pairs, with the symmetrised cotangent.
    """
    return _symmetric(x, network)


def slopes(
    x1: Float[Array, "n h w c"], x2: Float[Array, "m h w c"], network: Architecture
) -> tuple[Float[Array, "n m"], Float[Array, "n m h w c"]]:
    """Compute the kernel and, for every pair, its gradient with respect to the first image.

    Slightly more work than the gradient of a weighted sum of all pairs: the gradient with respect
    to the variances, which is summed there, is propagated to the pixels for every pair. Not
    differentiable.
    """
    one, two = _PreparedImages.one_by_one(x1, network), _PreparedImages.in_lanes(x2, network)
    ones = jnp.ones(two.images.shape[-1], x1.dtype)

    def row(item: tuple[Array, _PreparedImages]) -> tuple[Array, Array]:
        x, image = item
        value, direct, logs = lax.map(
            lambda b: _kernel_row_and_adjoint(network, image, b, ones), two
        )
        repeated = jnp.broadcast_to(x, x2.shape)
        through_variances = variances.adjoint(
            repeated, [merge_lanes(g, len(x2)) for g in logs], network
        )
        direct = jnp.moveaxis(merge_lanes(direct, len(x2)), 1, -1)
        return value.reshape(-1)[: len(x2)], direct + through_variances

    return lax.map(row, (x1, one))


def _value(x1: Array, x2: Array, network: Architecture) -> Array:
    one, two = _PreparedImages.one_by_one(x1, network), _PreparedImages.in_lanes(x2, network)
    rows = lax.map(
        lambda a: lax.map(lambda b: _kernel_row(network, a, b), two), one
    )  # (n, blocks, l)
    return rows.reshape(len(x1), -1)[:, : len(x2)]


def _symmetric_value(x: Array, network: Architecture) -> Array:
    one, two = _PreparedImages.one_by_one(x, network), _PreparedImages.in_lanes(x, network)
    lanes = two.images.shape[-1]
    pairs = [(i, j) for j in range(len(two.images)) for i in range(min((j + 1) * lanes, len(x)))]

    def pair_row(item: Array) -> Array:
        return _kernel_row(network, _index(one, item[0]), _index(two, item[1]))

    index = jnp.asarray(pairs)
    values = lax.map(pair_row, index)  # (pairs, lanes)
    whole = jnp.zeros((len(x), len(two.images), lanes), values.dtype)
    upper = whole.at[index[:, 0], index[:, 1]].set(values).reshape(len(x), -1)[:, : len(x)]
    return jnp.triu(upper) + jnp.triu(upper, 1).T


def _gradient(x1: Array, x2: Array, cotangent: Array, network: Architecture) -> Array:
    """Gradient of the sum of cotangent (n, m) times kernel, with respect to x1 at fixed x2."""
    one, two = _PreparedImages.one_by_one(x1, network), _PreparedImages.in_lanes(x2, network)
    lanes = two.images.shape[-1]
    missing = -len(x2) % lanes
    filled = jnp.pad(cotangent, ((0, 0), (0, missing))).reshape(len(x1), -1, lanes)

    def row(item: tuple[_PreparedImages, Array]) -> tuple[Array, list[Array]]:
        image, weights = item

        def block(total: tuple, item: tuple[_PreparedImages, Array]) -> tuple[tuple, None]:
            more = _kernel_row_and_adjoint(network, image, *item)[1:]
            return jax.tree.map(jnp.add, total, more), None

        _, *shapes = jax.eval_shape(
            lambda: _kernel_row_and_adjoint(network, image, _index(two, 0), weights[0])
        )
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tuple(shapes))
        sums, _ = lax.scan(block, zeros, (two, weights))
        return jax.tree.map(lambda total: total.sum(-1), sums)

    direct, logs = lax.map(row, (one, filled))
    direct = jnp.moveaxis(direct, 1, -1)
    return direct + variances.adjoint(x1, logs, network)


_ntk = jax.custom_vjp(_value, nondiff_argnums=(2,))
_ntk.defvjp(
    lambda x1, x2, network: (_value(x1, x2, network), (x1, x2)),
    lambda network, x, g: (
        _gradient(x[0], x[1], g, network),
        _gradient(x[1], x[0], g.T, network),
    ),
)
_symmetric = jax.custom_vjp(_symmetric_value, nondiff_argnums=(1,))
_symmetric.defvjp(
    lambda x, network: (_symmetric_value(x, network), x),
    lambda network, x, g: (_gradient(x, x, g + g.T, network),),
)


class _PreparedImages(NamedTuple):
    """Images, (..., c, h, w, lanes), and their deviations at each ReLU, (..., h, w, lanes)."""

    images: Array
    deviations: Deviations

    @staticmethod
    def one_by_one(x: Array, network: Architecture) -> "_PreparedImages":
        """Prepare single images: (n, c, h, w, 1)."""
        sigmas = [d[..., None] for d in deviations(x, network)]
        return _PreparedImages(jnp.moveaxis(x, -1, 1)[..., None], sigmas)

    @staticmethod
    def in_lanes(x: Array, network: Architecture) -> "_PreparedImages":
        """Prepare blocks of images side by side: (blocks, c, h, w, lanes)."""
        lanes = choose_lanes(x, build_levels(network, x.shape))
        sigmas = [split_into_lanes(d, lanes) for d in deviations(x, network)]
        return _PreparedImages(split_into_lanes(jnp.moveaxis(x, -1, 1), lanes), sigmas)


def _index(side: _PreparedImages, i: Array | int) -> _PreparedImages:
    return jax.tree.map(lambda a: a[i], side)


def _relu_deviations(
    levels: list[Level], one: Deviations, two: Deviations
) -> list[tuple[ReluDeviations, ...]]:
    """Deviations of both sides at each ReLU of each level."""
    pairs = iter(zip(one, two, strict=True))
    return [
        tuple(
            stages.pair_deviations(level.grid, *next(pairs)) for stage in level.stages if stage.relu
        )
        for level in levels
    ]


def _level_inputs(
    levels: list[Level], one: Array, two: Array, sigmas: list[tuple[ReluDeviations, ...]]
) -> tuple[list[stages.LevelInput], Array]:
    """Input of each level, and the planes that the readout sums."""
    source: stages.LevelInput = stages.pad_images(levels[0].grid, one, two)
    sources = []
    for level, sigma in zip(levels, sigmas, strict=True):
        sources.append(source)
        source = planes.forward(level, source, sigma)
    assert not isinstance(source, stages.PaddedImages)  # there is always a level
    return sources, source


def _readout_scale(network: Architecture, levels: list[Level]) -> float:
    """W² divided by the number of entries that the readout averages."""
    h, w = levels[-1].grid.shape
    return network.w_std**2 / (h * w) ** (2 if network.head == "gap" else 1)


def _kernel_row(network: Architecture, one: _PreparedImages, two: _PreparedImages) -> Array:
    """Compute the kernel of one image with each lane."""
    levels = build_levels(network, two.images.shape)
    sigmas = _relu_deviations(levels, one.deviations, two.deviations)
    return _apply_readout(network, levels, _level_inputs(levels, one.images, two.images, sigmas)[1])


def _apply_readout(network: Architecture, levels: list[Level], end: Array) -> Array:
    """Apply the dense readout: K' = W² K + b², T' = W² T + K'."""
    total = end.sum((0, 1))
    return _readout_scale(network, levels) * (total.real + total.imag) + network.b_std**2


def _kernel_row_and_adjoint(
    network: Architecture, one: _PreparedImages, two: _PreparedImages, cotangent: Array
) -> tuple[Array, Array, list[Array]]:
    """Compute the kernel of one image with each lane, and pull back a cotangent of it.

    Returns:
        The kernel, (lanes,); the cotangents of the image, (c, h, w, lanes), and of log σ at each
        ReLU, (h, w, lanes).
    """
    levels = build_levels(network, two.images.shape)
    sigmas = _relu_deviations(levels, one.deviations, two.deviations)
    sources, end = _level_inputs(levels, one.images, two.images, sigmas)
    g = jnp.broadcast_to(_readout_scale(network, levels) * cotangent, end.shape)
    g = lax.complex(g, g) if jnp.iscomplexobj(end) else g
    level_logs: list[list[Array]] = []
    for level, source, sigma in reversed(list(zip(levels, sources, sigmas, strict=True))):
        g, logs = planes.backward(level, source, sigma, g)
        level_logs.insert(0, logs)
    return _apply_readout(network, levels, end), g, [log for logs in level_logs for log in logs]
