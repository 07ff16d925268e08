"""The adjoint of what the layers of one resolution do to one plane, see `stages`.

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
    """Where one stage writes down what is used more than once, each with a margin of zeros.

    Attributes:
        before: K, or K + i T, before its ReLU; None if it has none.
        left: The cotangent of what enters it, before the adjoint of its convolution.
    """

    preactivations: Array | None
    window_cotangent: Array


class StagesAdjoint:
    """The stages of one level, backwards; every method is a pure function of its arguments."""

    def __init__(self, run: Stages, cotangent: Array) -> None:
        self.run, self.cotangent = run, cotangent

    def zero_buffers(self) -> list[StageBuffers]:
        """Zeros."""
        run, found = self.run, []
        for i, stage in enumerate(run.stages):
            place = run.zero_plane(run.has_tangent(i), 1)
            found.append(StageBuffers(place if stage.relu else None, place))
        return found

    def logs(self) -> list[Array]:
        """Zeros, for the cotangent of log σ1 at each ReLU."""
        return [self.run.zero_plane(False) for stage in self.run.stages if stage.relu]

    def zero_total(self) -> Array:
        """What `added` starts from."""
        run = self.run
        if isinstance(run.source, PaddedImages):
            return jnp.stack([run.zero_plane(False)] * len(run.source.two))
        return jnp.zeros_like(run.source)

    def add_plane(self, total: Array, entry: PlaneIndex, left: Array) -> Array:
        """What one plane says about the image, or the plane itself, added to the others."""
        run = self.run
        g = self.input_cotangent(0, left)
        if not isinstance(run.source, PaddedImages):
            return lax.dynamic_update_slice(total, g[None], (entry.plane, 0, 0, 0))
        return total + g * run.slice_second(run.source.two, entry) / len(run.source.two)

    def backpropagate(
        self, blocks: Array, places: list[StageBuffers], planes: list[Array], entry: PlaneIndex
    ) -> tuple[Array, list[StageBuffers], list[Array]]:
        """One plane back through all stages.

        Args:
            blocks: A place for the cotangent of the plane that leaves the last stage.
            places: Of each stage.
            planes: That have entered each stage.
            entry: Of the plane.

        Returns:
            The same places, and the cotangents of log σ1 at each ReLU.
        """
        places, logs = list(places), []
        blocks = self.unpool(blocks, entry)
        g = self.fine(blocks)
        for i in reversed(range(len(places))):
            places[i], log = self.backpropagate_stage(i, places[i], planes[i], g, entry)
            logs += [] if log is None else [log]
            g = self.input_cotangent(i, places[i].window_cotangent)
        return blocks, places, logs[::-1]

    def blocks(self) -> Array:
        """Zeros, one for each pixel of a plane that is pooled: row, 0 or 1, column, 0 or 1."""
        h, w = self.run.level.coarse.shape if self.run.level.coarse else (0, 0)
        return jnp.zeros((h, 2, w, 2, self.run.lanes), self.cotangent.dtype)

    def unpool(self, blocks: Array, entry: PlaneIndex) -> Array:
        """The cotangent of the pixels of one plane that are pooled, after the last stage."""
        if self.run.level.coarse is None:
            return blocks
        for parity, part in enumerate(self.run.parities()):
            g = self.cotangent[entry.to[parity]][:, None, :, None]
            blocks = lax.dynamic_update_slice(blocks, g, (0, part.y, 0, part.x, 0))
        return blocks

    def fine(self, blocks: Array) -> Array:
        """The cotangent of one plane after the last stage."""
        if self.run.level.coarse is None:
            return self.cotangent
        h, _, w, _, lanes = blocks.shape
        rows, columns = self.run.level.grid.shape
        even = blocks.reshape(2 * h, 2 * w, lanes)
        return jnp.pad(even, ((0, rows - 2 * h), (0, columns - 2 * w), (0, 0)))

    def input_cotangent(self, i: int, left: Array) -> Array:
        """The cotangent of the plane that entered stage i."""
        run = self.run
        conv = run.stages[i].conv
        return window_sum_padded(left, run.whole) if conv else slice_pixels(left, run.whole, 1, 1)

    def backpropagate_stage(
        self, i: int, place: StageBuffers, z: Array, g: Array, entry: PlaneIndex
    ) -> tuple[StageBuffers, Array | None]:
        """One stage: what it writes down, and the cotangent of log σ1 if it has a ReLU."""
        run = self.run
        if place.preactivations is None:
            left = self.convolution_adjoint(i, g, entry)
            return place._replace(
                window_cotangent=write_plane(place.window_cotangent, left, entry.plane)
            ), None
        before = pack_complex(*run.preactivations(i, entry, z, run.whole))
        before = write_plane(
            place.preactivations, before if run.has_tangent(i) else before.real, entry.plane
        )
        left = self.window_cotangent(i, before[1:-1, 1:-1], g, entry)
        log = self.log(i, read_plane(before, entry.plane), g, entry)
        return StageBuffers(before, write_plane(place.window_cotangent, left, entry.plane)), log

    def window_cotangent(self, i: int, before: Array, g: Array, entry: PlaneIndex) -> Array:
        """The cotangent of what enters stage i, up to the adjoint of its convolution."""
        _, n_inverse = self.run.scales(i, entry, self.run.whole)
        _, _, gain, slope = relu.angle(before.real * n_inverse)
        if not is_complex(g):
            return self.convolution_adjoint(i, g * gain, entry)
        turned = g.imag * self.tangent(before) * slope * n_inverse
        return self.convolution_adjoint(
            i, lax.complex(g.real * gain + turned, g.imag * gain), entry
        )

    def log(self, i: int, before: Array, g: Array, entry: PlaneIndex) -> Array:
        """The cotangent of log σ1 at stage i."""
        n, n_inverse = self.run.scales(i, entry, self.run.whole)
        cos, sine, _, slope = relu.angle(before.real * n_inverse)
        if not is_complex(g):
            return g * n * sine
        return g.real * n * sine - g.imag * self.tangent(before) * slope * cos

    def tangent(self, before: Array) -> Array:
        """T, which begins as K."""
        return before.imag if is_complex(before) else before

    def convolution_adjoint(self, i: int, g: Array, entry: PlaneIndex) -> Array:
        """From the cotangents of K and T after a convolution to those of the windows' sums."""
        run = self.run
        if run.stages[i].conv:
            g = lax.complex(g.real + g.imag, g.imag) if is_complex(g) else g
            g = run.level.weight * run.inside(entry, run.whole) * g
        return g if run.has_tangent(i) else g.real
