"""The variance of every pre-activation of an image: how a ReLU sees one image by itself.

It is the plane of offset 0 of the recursion on an image and itself. What leads there is a narrower
band than the kernel needs: the last ReLU reads the offset 0 alone, whatever the readout reads.
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
    """The deviation of every pre-activation of each image, for each ReLU."""
    lanes = choose_lanes(x, _levels_to_last_relu(network, x.shape))
    found = lax.map(
        lambda b: _propagate(b, network)[0], split_into_lanes(jnp.moveaxis(x, -1, 1), lanes)
    )
    return [merge_lanes(d, len(x)) for d in found]


def _levels_to_last_relu(network: Architecture, shape: tuple[int, ...]) -> list[Level]:
    """The levels up to the last ReLU, without T; images as for `levels_of`."""
    last = max([i for i, level in enumerate(network.levels) if any(s.relu for s in level)] or [0])
    every = grids(*shape[1:3], last, everywhere=False)
    levels = attach_grids(network, network.levels[: last + 1], every)
    return [replace(level, tangent=False) for level in levels]


def _propagate(
    x: Array, network: Architecture
) -> tuple[Deviations, list[Level], list[stages.LevelInput], list[Array]]:
    """The covariance of images (c, h, w, lanes) with themselves.

    Returns:
        Deviations, levels, what enters each level, and the variance that enters each level.
    """
    levels = _levels_to_last_relu(network, x.shape)
    sources: list[stages.LevelInput] = [stages.pad_images(levels[0].grid, x, x)]
    variances, deviations = [jnp.mean(x * x, 0)], []
    for level in levels:
        here = _level_deviations(level, variances[-1])
        deviations += here
        if level.coarse is None:
            break
        sigmas = tuple(stages.pair_deviations(level.grid, d, d) for d in here)
        after = planes.forward(level, sources[-1], sigmas)
        sources.append(after)
        variances.append(after[level.coarse.centre])
    return deviations, levels, sources, variances


def _level_deviations(level: Level, variance: Array) -> Deviations:
    """The deviations at each ReLU of a level, from the variance that enters it."""
    deviations = []
    for stage in level.stages:
        if stage.conv:
            variance = level.weight * stages.window_sum(variance) + level.bias
        if stage.relu:
            # A finite slope at 0, which a zero image without bias has.
            deviations.append(jnp.sqrt(jnp.maximum(variance, jnp.finfo(variance.dtype).tiny)))
            variance = variance / 2
    return deviations


def adjoint(x: Float[Array, "n h w c"], logs: Deviations, network: Architecture) -> Array:
    """From cotangents of log σ at each ReLU, (n, h, w), to one of the images."""
    lanes = choose_lanes(x, _levels_to_last_relu(network, x.shape))
    items = (
        split_into_lanes(jnp.moveaxis(x, -1, 1), lanes),
        [split_into_lanes(g, lanes) for g in logs],
    )
    grads = lax.map(lambda item: _propagate_adjoint(item[0], item[1], network), items)
    return jnp.moveaxis(merge_lanes(grads, len(x)), 1, -1)


def _propagate_adjoint(x: Array, logs: list[Array], network: Architecture) -> Array:
    """The same for one block, (c, h, w, lanes).

    A variance is the entry of a pixel with itself, where both sides of the symmetric kernel
    move: twice the derivative in the first side alone, which `planes.backward` gives.
    """
    deviations, levels, sources, variances = _propagate(x, network)
    rest = list(zip(deviations, logs, strict=True))
    g: Array | None = None
    for level, source, variance in reversed(list(zip(levels, sources, variances, strict=True))):
        count = sum(stage.relu for stage in level.stages)
        here, rest = rest[len(rest) - count :], rest[: len(rest) - count]
        sigmas = tuple(stages.pair_deviations(level.grid, d, d) for d, _ in here)
        more = [jnp.zeros_like(d) for d, _ in here]
        below = jnp.zeros((len(level.grid) + 1, *variance.shape), x.dtype)
        if g is not None:
            below, more = planes.backward(level, source, sigmas, g)
        pull = jax.vjp(lambda v, level=level: _level_deviations(level, v), variance)[1]
        # A cotangent of log σ is one of σ divided by σ.
        at_centre = pull([(log + m) / d for (d, log), m in zip(here, more, strict=True)])[0]
        if isinstance(source, stages.PaddedImages):
            direct = 2 * at_centre * x / len(x)
            return direct if g is None else direct + below
        g = below.at[level.grid.centre].add(2 * at_centre)
    raise AssertionError("the first level begins with images")
