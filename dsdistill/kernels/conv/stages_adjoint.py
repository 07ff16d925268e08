"""Adjoint of the layers of one resolution on one plane, see `stages`.

The adjoint of the sum over a window is the sum over the window.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from dsdistill.kernels import relu
from dsdistill.kernels.conv.stages import (
    PaddedImages,
    PlaneIndex,
    Stages,
    is_complex,
    pack_complex,
    read_plane,
    slice_pixels,
    window_sum_padded,
    write_plane,
)


class StageBuffers(NamedTuple):
    """Buffers of one stage for what is used more than once, each with a margin of zeros.

    Attributes:
        preactivations: K, or K + i T, before its ReLU; None if it has none.
        window_cotangent: Cotangent of the window sums of its convolution; of its input if it has
            no convolution.
    """

    preactivations: Array | None
    window_cotangent: Array


class StagesAdjoint:
    """Stages of one level, backwards; every method is a pure function of its arguments."""

    def __init__(self, run: Stages, cotangent: Array) -> None:
        self.run, self.cotangent = run, cotangent

    def zero_buffers(self) -> list[StageBuffers]:
        """Buffers of zeros for each stage."""
        run, buffers = self.run, []
        for i, stage in enumerate(run.stages):
            zeros = run.zero_plane(run.has_tangent(i), 1)
            buffers.append(StageBuffers(zeros if stage.relu else None, zeros))
        return buffers

    def logs(self) -> list[Array]:
        """Zeros for the cotangent of log σ1 at each ReLU."""
        return [self.run.zero_plane(False) for stage in self.run.stages if stage.relu]

    def zero_total(self) -> Array:
        """Initial total of `add_plane`."""
        run = self.run
        if isinstance(run.source, PaddedImages):
            return jnp.stack([run.zero_plane(False)] * len(run.source.two))
        return jnp.zeros_like(run.source)

    def add_plane(self, total: Array, entry: PlaneIndex, left: Array) -> Array:
        """Add the contribution of one plane to the cotangent of the image, or of all planes."""
        run = self.run
        g = self.input_cotangent(0, left)
        if not isinstance(run.source, PaddedImages):
            return lax.dynamic_update_slice(total, g[None], (entry.plane, 0, 0, 0))
        return total + g * run.slice_second(run.source.two, entry) / len(run.source.two)

    def backpropagate(
        self,
        blocks: Array,
        stage_buffers: list[StageBuffers],
        planes: list[Array],
        entry: PlaneIndex,
    ) -> tuple[Array, list[StageBuffers], list[Array]]:
        """Backpropagate one plane through all stages.

        Args:
            blocks: Buffer for the cotangent of the output plane of the last stage.
            stage_buffers: Buffers of each stage.
            planes: Input plane of each stage.
            entry: Index of the plane.

        Returns:
            The updated buffers, and the cotangents of log σ1 at each ReLU.
        """
        stage_buffers, logs = list(stage_buffers), []
        blocks = self.unpool(blocks, entry)
        g = self.fine(blocks)
        for i in reversed(range(len(stage_buffers))):
            stage_buffers[i], log = self.backpropagate_stage(
                i, stage_buffers[i], planes[i], g, entry
            )
            logs += [] if log is None else [log]
            g = self.input_cotangent(i, stage_buffers[i].window_cotangent)
        return blocks, stage_buffers, logs[::-1]

    def blocks(self) -> Array:
        """Zeros for each pooled pixel of a plane: (row, 0 or 1, column, 0 or 1, lanes)."""
        h, w = self.run.level.coarse.shape if self.run.level.coarse else (0, 0)
        return jnp.zeros((h, 2, w, 2, self.run.lanes), self.cotangent.dtype)

    def unpool(self, blocks: Array, entry: PlaneIndex) -> Array:
        """Distribute the cotangent of pooled planes to the pixels of one plane."""
        if self.run.level.coarse is None:
            return blocks
        for parity, part in enumerate(self.run.parities()):
            g = self.cotangent[entry.to[parity]][:, None, :, None]
            blocks = lax.dynamic_update_slice(blocks, g, (0, part.y, 0, part.x, 0))
        return blocks

    def fine(self, blocks: Array) -> Array:
        """Cotangent of one plane after the last stage."""
        if self.run.level.coarse is None:
            return self.cotangent
        h, _, w, _, lanes = blocks.shape
        rows, columns = self.run.level.grid.shape
        even = blocks.reshape(2 * h, 2 * w, lanes)
        return jnp.pad(even, ((0, rows - 2 * h), (0, columns - 2 * w), (0, 0)))

    def input_cotangent(self, i: int, left: Array) -> Array:
        """Cotangent of the input plane of stage i."""
        run = self.run
        conv = run.stages[i].conv
        return window_sum_padded(left, run.whole) if conv else slice_pixels(left, run.whole, 1, 1)

    def backpropagate_stage(
        self, i: int, buffers: StageBuffers, z: Array, g: Array, entry: PlaneIndex
    ) -> tuple[StageBuffers, Array | None]:
        """Backpropagate one stage: its buffers, and the cotangent of log σ1 if it has a ReLU."""
        run = self.run
        if buffers.preactivations is None:
            left = self.convolution_adjoint(i, g, entry)
            return buffers._replace(
                window_cotangent=write_plane(buffers.window_cotangent, left, entry.plane)
            ), None
        before = pack_complex(*run.preactivations(i, entry, z, run.whole))
        before = write_plane(
            buffers.preactivations, before if run.has_tangent(i) else before.real, entry.plane
        )
        left = self.window_cotangent(i, before[1:-1, 1:-1], g, entry)
        log = self.log(i, read_plane(before, entry.plane), g, entry)
        return StageBuffers(before, write_plane(buffers.window_cotangent, left, entry.plane)), log

    def window_cotangent(self, i: int, before: Array, g: Array, entry: PlaneIndex) -> Array:
        """Cotangent of the window sums of stage i, or of its input without a convolution."""
        _, n_inverse = self.run.scales(i, entry, self.run.whole)
        _, _, gain, slope = relu.angle(before.real * n_inverse)
        if not is_complex(g):
            return self.convolution_adjoint(i, g * gain, entry)
        angular = g.imag * self.tangent(before) * slope * n_inverse
        return self.convolution_adjoint(
            i, lax.complex(g.real * gain + angular, g.imag * gain), entry
        )

    def log(self, i: int, before: Array, g: Array, entry: PlaneIndex) -> Array:
        """Cotangent of log σ1 at stage i."""
        n, n_inverse = self.run.scales(i, entry, self.run.whole)
        cos, sine, _, slope = relu.angle(before.real * n_inverse)
        if not is_complex(g):
            return g * n * sine
        return g.real * n * sine - g.imag * self.tangent(before) * slope * cos

    def tangent(self, before: Array) -> Array:
        """T, which equals K while it is not stored."""
        return before.imag if is_complex(before) else before

    def convolution_adjoint(self, i: int, g: Array, entry: PlaneIndex) -> Array:
        """Map the cotangents of K and T after a convolution to those of its window sums."""
        run = self.run
        if run.stages[i].conv:
            g = lax.complex(g.real + g.imag, g.imag) if is_complex(g) else g
            g = run.level.weight * run.inside(entry, run.whole) * g
        return g if run.has_tangent(i) else g.real
