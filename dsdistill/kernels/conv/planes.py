"""All planes of one resolution, one after the other through its stages.

The form follows from XLA: it fuses a loop body into as few kernels as it can, and evaluates a value
again wherever it is used: nine times in a convolution's window, twice for two results. A value
written into an array that the loop carries is computed once, and in place. So every plane that is
used more than once is written into such an array (`stages.write_plane`), which stays in the
processor's cache, and K and T are one complex number, so that each kernel has a single result.
Lanes come last because they are vectorised.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from dsdistill.kernels.conv import first_level, gpu
from dsdistill.kernels.conv.offsets import Grid
from dsdistill.kernels.conv.stages import Level, LevelInput, PlaneIndex, ReluDeviations, Stages
from dsdistill.kernels.conv.stages_adjoint import StagesAdjoint


def forward(level: Level, source: LevelInput, sigmas: tuple[ReluDeviations, ...]) -> Array:
    """Compute all planes of a level, pooled or summed.

    Args:
        level: The level.
        source: The images, or the result of `forward` for the previous level.
        sigmas: Deviations at each ReLU.

    Returns:
        If another level follows, its planes and one unused one: (len(coarse) + 1, h/2, w/2,
        lanes). If the readout follows, the sum over all planes, (h, w, lanes).
    """
    if gpu.covers(level, source):
        total = gpu.forward(level, source, sigmas)
    elif first_level.covers(source, level):
        total = first_level.forward(level, source, sigmas[0])
    else:
        total = _sum_planes(Stages(level, source, sigmas))
    return total if level.coarse is None else total * _pooling_weights(level.coarse, total)


def _sum_planes(run: Stages) -> Array:
    """Compute `forward`, with sums in place of means."""

    def step(carry: tuple[Array, list[Array]], entry: PlaneIndex) -> tuple[tuple, None]:
        total, buffers = carry
        buffers = run.stage_inputs(buffers, entry)
        return (run.add_plane(total, entry, buffers[-1]), buffers), None

    (total, _), _ = lax.scan(step, (run.zero_total(), run.buffers()), _plane_indices(run.level))
    return total


def backward(
    level: Level, source: LevelInput, sigmas: tuple[ReluDeviations, ...], cotangent: Array
) -> tuple[Array, list[Array]]:
    """Adjoint of `forward` in the first side only; the planes are computed again.

    Args:
        level, source, sigmas: Arguments of `forward`.
        cotangent: Cotangent of its result: of K in the real part, of T in the imaginary part.

    Returns:
        Cotangent of the image, (c, h, w, lanes), or of the planes, (n + 1, h, w, lanes), not yet
        summed over lanes; and of the logarithm of the image's deviations at each ReLU, (h, w,
        lanes).
    """
    if level.coarse is not None:
        cotangent = cotangent * _pooling_weights(level.coarse, cotangent)
    if gpu.covers(level, source):
        return gpu.backward(level, source, sigmas, cotangent)
    if first_level.covers(source, level, channels=1):
        return first_level.backward(level, source, sigmas[0], cotangent)
    run = Stages(level, source, sigmas)
    reversal = StagesAdjoint(run, cotangent)

    def step(carry: tuple, entry: PlaneIndex) -> tuple[tuple, None]:
        total, logs, buffers, blocks, stage_buffers = carry
        buffers = run.stage_inputs(buffers, entry)
        blocks, stage_buffers, more = reversal.backpropagate(blocks, stage_buffers, buffers, entry)
        logs = [log + new for log, new in zip(logs, more, strict=True)]
        return (
            reversal.add_plane(total, entry, stage_buffers[0].window_cotangent),
            logs,
            buffers,
            blocks,
            stage_buffers,
        ), None

    start = (
        reversal.zero_total(),
        reversal.logs(),
        run.buffers(),
        reversal.blocks(),
        reversal.zero_buffers(),
    )
    (total, logs, *_), _ = lax.scan(step, start, _plane_indices(level))
    return total, logs


def _plane_indices(level: Level) -> PlaneIndex:
    """Indices of every plane, stacked."""
    grid = level.grid
    n = len(grid)
    to = grid.coarse_planes(level.coarse) if level.coarse else np.zeros((n, 4), int)
    return PlaneIndex(jnp.arange(n), jnp.asarray(grid.starts), jnp.asarray(to))


def _pooling_weights(grid: Grid, like: Array) -> Array:
    """1/16 where both pixels lie inside their images; with a further plane of zeros."""
    y, x = (jnp.asarray(axis.valid / 4, like.real.dtype) for axis in (grid.y, grid.x))
    weights = (y[:, None, :, None] * x[None, :, None]).reshape(-1, *grid.shape, 1)
    return jnp.concatenate([weights, jnp.zeros_like(weights[:1])])
