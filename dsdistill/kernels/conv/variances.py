"""Variances of the pre-activations of an image, which a ReLU needs of each image by itself.

They are the plane of offset 0 of the recursion on an image and itself. It depends on a narrower
band of planes than the kernel does: the last ReLU reads only the offset 0, whatever the readout
reads.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dsdistill.kernels.conv import planes, stages
from dsdistill.kernels.conv.lanes import attach_grids, choose_lanes, merge_lanes, split_into_lanes
from dsdistill.kernels.conv.offsets import grids
from dsdistill.kernels.conv.stages import Level
from dsdistill.kernels.notation import Architecture

Deviations = list[Float[Array, "n h w"]]


def deviations(x: Float[Array, "n h w c"], network: Architecture) -> Deviations:
    """Deviations of the pre-activations of each image, at each ReLU."""
    lanes = choose_lanes(x, _levels_to_last_relu(network, x.shape))
    blocks = lax.map(
        lambda b: _propagate(b, network)[0], split_into_lanes(jnp.moveaxis(x, -1, 1), lanes)
    )
    return [merge_lanes(d, len(x)) for d in blocks]


def _levels_to_last_relu(network: Architecture, shape: tuple[int, ...]) -> list[Level]:
    """Levels up to the last ReLU, without T, for a shape as in `build_levels`."""
    last = max([i for i, level in enumerate(network.levels) if any(s.relu for s in level)] or [0])
    planes_of_levels = grids(*shape[1:3], last, everywhere=False)
    levels = attach_grids(network, network.levels[: last + 1], planes_of_levels)
    return [replace(level, tangent=False) for level in levels]


def _propagate(
    x: Array, network: Architecture
) -> tuple[Deviations, list[Level], list[stages.LevelInput], list[Array]]:
    """Propagate the covariance of images (c, h, w, lanes) with themselves.

    Returns:
        Deviations at each ReLU, levels, input of each level, and input variance of each level.
    """
    levels = _levels_to_last_relu(network, x.shape)
    sources: list[stages.LevelInput] = [stages.pad_images(levels[0].grid, x, x)]
    variances, deviations = [jnp.mean(x * x, 0)], []
    for level in levels:
        level_deviations = _level_deviations(level, variances[-1])
        deviations += level_deviations
        if level.coarse is None:
            break
        sigmas = tuple(stages.pair_deviations(level.grid, d, d) for d in level_deviations)
        pooled = planes.forward(level, sources[-1], sigmas)
        sources.append(pooled)
        variances.append(pooled[level.coarse.centre])
    return deviations, levels, sources, variances


def _level_deviations(level: Level, variance: Array) -> Deviations:
    """Deviations at each ReLU of a level, from its input variance."""
    deviations = []
    for stage in level.stages:
        if stage.conv:
            variance = level.weight * stages.window_sum(variance) + level.bias
        if stage.relu:
            # A finite slope at 0, the variance of a zero image without bias.
            deviations.append(jnp.sqrt(jnp.maximum(variance, jnp.finfo(variance.dtype).tiny)))
            variance = variance / 2
    return deviations


def adjoint(x: Float[Array, "n h w c"], logs: Deviations, network: Architecture) -> Array:
    """Map cotangents of log σ at each ReLU, (n, h, w) each, to the cotangent of the images."""
    lanes = choose_lanes(x, _levels_to_last_relu(network, x.shape))
    items = (
        split_into_lanes(jnp.moveaxis(x, -1, 1), lanes),
        [split_into_lanes(g, lanes) for g in logs],
    )
    grads = lax.map(lambda item: _propagate_adjoint(item[0], item[1], network), items)
    return jnp.moveaxis(merge_lanes(grads, len(x)), 1, -1)


def _propagate_adjoint(x: Array, logs: list[Array], network: Architecture) -> Array:
    """Compute `adjoint` for one block of images, (c, h, w, lanes).

    A variance is the kernel of a pixel with itself, where both sides move: twice the derivative in
    the first side alone, which `planes.backward` returns.
    """
    deviations, levels, sources, variances = _propagate(x, network)
    rest = list(zip(deviations, logs, strict=True))
    g: Array | None = None
    for level, source, variance in reversed(list(zip(levels, sources, variances, strict=True))):
        count = sum(stage.relu for stage in level.stages)
        pairs, rest = rest[len(rest) - count :], rest[: len(rest) - count]
        sigmas = tuple(stages.pair_deviations(level.grid, d, d) for d, _ in pairs)
        more = [jnp.zeros_like(d) for d, _ in pairs]
        below = jnp.zeros((len(level.grid) + 1, *variance.shape), x.dtype)
        if g is not None:
            below, more = planes.backward(level, source, sigmas, g)
        pull = jax.vjp(lambda v, level=level: _level_deviations(level, v), variance)[1]
        # The cotangent of σ is that of log σ, divided by σ.
        at_centre = pull([(log + m) / d for (d, log), m in zip(pairs, more, strict=True)])[0]
        if isinstance(source, stages.PaddedImages):
            direct = 2 * at_centre * x / len(x)
            return direct if g is None else direct + below
        g = below.at[level.grid.centre].add(2 * at_centre)
    raise AssertionError("the first level starts with images")
