"""One program of `gpu`: where it reads and writes, and one stage for its pixels.

All pixels of a program form one array, since Triton compiles long programs slowly: with an array
per pixel the longest took 47 s to compile, now it takes 1 s.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from dsdistill.kernels import relu
from dsdistill.kernels.conv import stages
from dsdistill.kernels.conv.offsets import AxisOffsets, Grid
from dsdistill.kernels.conv.stages import Level, PaddedImages
from dsdistill.kernels.notation import Stage

pl: Any
triton: Any
try:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton
except ImportError:  # deprecated since JAX 0.11
    pl = triton = None

SQUARE_PIXELS = 4  # side of a program's square of pixels: its windows share most of their reads
LANES_PER_PROGRAM = 32  # 128 contiguous bytes
WARPS_PER_PROGRAM = 4  # of 32 threads each

WINDOW_SHIFTS = list(itertools.product((-1, 0, 1), repeat=2))


class Covariances(NamedTuple):
    """K and T, or their cotangents; T is None where it is not needed, or still equals K."""

    nngp: Any
    ntk: Any = None

    @staticmethod
    def from_complex(x: Array) -> "Covariances":
        """Unpack K + i T, or K alone."""
        return Covariances(x.real, x.imag) if stages.is_complex(x) else Covariances(x)

    def map(self, function: Callable[..., Any], *others: "Covariances") -> "Covariances":
        """Apply a function to K and to T, where there is one."""
        pairs = zip(self, *others, strict=True)
        return Covariances(*(None if parts[0] is None else function(*parts) for parts in pairs))


@dataclass(frozen=True)
class ProgramPixels:
    """Location that a program reads and writes: pixels (p, 1) of a plane, and lanes (1, l).

    Attributes:
        grid: The planes.
        y, x: Row and column of each pixel; initially of the program's square.
        lanes: Indices of the lanes.
        row, column: Indices of the plane along the two offset axes.
        valid: Whether such a plane exists.
    """

    grid: Grid
    y: Array
    x: Array
    lanes: Array
    row: Any = 0
    column: Any = 0
    valid: Any = True

    @property
    def shape(self) -> tuple[int, int]:
        """Number of pixels and of lanes."""
        return self.y.shape[0], self.lanes.shape[1]

    @property
    def plane(self) -> Any:
        """Index of the plane."""
        return self.row * len(self.grid.x) + self.column

    def square(self) -> "ProgramPixels":
        """Expand to all pixels of the square."""
        i = lax.broadcasted_iota(jnp.int32, (SQUARE_PIXELS * SQUARE_PIXELS, 1), 0)
        return replace(
            self,
            y=self.y * SQUARE_PIXELS + i // SQUARE_PIXELS,
            x=self.x * SQUARE_PIXELS + i % SQUARE_PIXELS,
        )

    def at(self, plane: Array) -> "ProgramPixels":
        """Move to a plane."""
        columns = jnp.int32(len(self.grid.x))
        plane = plane.astype(jnp.int32)
        return replace(self, row=lax.div(plane, columns), column=lax.rem(plane, columns))

    def pairs(self, coarse: Grid, plane: Array) -> "ProgramPixels":
        """Expand to the 16 pairs of pixels, each in its plane, that pool into a coarse pixel."""
        i = lax.broadcasted_iota(jnp.int32, (16, 1), 0)
        a, b, c, d = ((i >> shift) & 1 for shift in (3, 2, 1, 0))
        columns = jnp.int32(len(coarse.x))
        row, y_valid = _fine_index(self.grid.y, coarse.y, lax.div(plane, columns), c - a)
        column, x_valid = _fine_index(self.grid.x, coarse.x, lax.rem(plane, columns), d - b)
        y, x = 2 * self.y + a, 2 * self.x + b
        return replace(self, y=y, x=x, row=row, column=column, valid=y_valid & x_valid)

    def inside(self, dy: int = 0, dx: int = 0) -> Array:
        """Whether the pixels, shifted, lie inside the image."""
        (h, w), y, x = self.grid.shape, self.y + dy, self.x + dx
        return (y >= 0) & (y < h) & (x >= 0) & (x < w) & self.valid

    def mask(self) -> Array:
        """Whether both pixels of each pair lie inside their images."""
        y_inside = _q_is_inside(self.grid.y, self.y + self.row)
        return self.inside() & y_inside & _q_is_inside(self.grid.x, self.x + self.column)

    def entries(self, ref: Any, *index: Any) -> Any:
        """Reference to the entries (p, l) of an array at these indices of each pixel."""
        lanes = self.lanes if ref.shape[-1] > 1 else 0
        indices = (jnp.asarray(i, jnp.int32) for i in (*index, lanes))
        return ref.at[*(jnp.broadcast_to(i, self.shape) for i in indices)]

    def read(self, ref: Any, *index: Any, inside: Array) -> Array:
        """Read entries at these indices of each pixel, 0 for pixels outside."""
        mask = jnp.broadcast_to(inside, self.shape)
        return triton.load(self.entries(ref, *index), mask=mask, other=0.0)

    def read_plane(self, planes: Any, dy: int = 0, dx: int = 0) -> Array:
        """Read the pixels of this plane, shifted, from all planes."""
        return self.read(planes, self.plane, self.y + dy, self.x + dx, inside=self.inside(dy, dx))

    def read_window_sum(self, planes: Any) -> Array:
        """Read the pixels of this plane, summed over their 3x3 windows."""
        return functools.reduce(
            jnp.add, (self.read_plane(planes, dy, dx) for dy, dx in WINDOW_SHIFTS)
        )

    def read_image(self, ref: Any, *index: int, dy: int = 0, dx: int = 0, margin: int = 0) -> Array:
        """Read the pixels, shifted, from an array of the image, which may have a margin."""
        y, x = self.y + dy + margin, self.x + dx + margin
        return self.read(ref, *index, y, x, inside=self.inside(dy, dx))

    def read_lanes(self, ref: Any, *index: int, dy: int = 0, dx: int = 0) -> Array:
        """Read the q of each pixel, shifted, from an extended array of the lanes."""
        y, x = self.row + 1 + self.y + dy, self.column + 1 + self.x + dx
        return self.read(ref, *index, y, x, inside=self.inside(dy, dx))

    def write(self, ref: Any, value: Array, *index: int) -> None:
        """Write the pixels of this plane into all planes."""
        entries = self.entries(ref, *index, self.plane, self.y, self.x)
        triton.store(entries, value, mask=jnp.broadcast_to(self.inside(), self.shape))

    def cotangent(self, kind: str, refs: Covariances, coarse: Grid | None) -> Covariances:
        """Read the cotangent of the output of a stage, of a `kind` of `gpu.Cotangent`."""
        if kind == "window":
            return refs.map(self.read_window_sum)
        if kind == "plane":
            return refs.map(self.read_plane)
        if kind == "all":
            return refs.map(self.read_image)
        assert coarse is not None  # the planes are pooled
        row, y_valid = _coarse_index(self.grid.y, coarse.y, self.row, self.y)
        column, x_valid = _coarse_index(self.grid.x, coarse.x, self.column, self.x)
        y, x = self.y >> 1, self.x >> 1
        inside = y_valid & x_valid & (y < coarse.shape[0]) & (x < coarse.shape[1])
        plane = row * len(coarse.x) + column
        return refs.map(lambda ref: self.read(ref, plane, y, x, inside=inside))


def _q_is_inside(axis: AxisOffsets, i: Array) -> Array:
    """Whether the q of a pixel in a plane lies inside the image, by the sum of their indices."""
    if axis.radius is None:
        return (lax.rem(i, jnp.full_like(i, axis.period)) < axis.size) & (i >= 0)
    return (i >= axis.radius) & (i < axis.radius + axis.size)


def _fine_index(fine: AxisOffsets, coarse: AxisOffsets, i: Array, d: Array) -> tuple[Array, Array]:
    """Index of the offset that is d plus twice the i-th one, and whether it exists."""
    if fine.radius is None or coarse.radius is None:
        j = 2 * i + d
        return jnp.where(j < 0, j + fine.period, j), j >= -1
    j = 2 * (i - coarse.radius) + d + fine.radius
    valid = (j >= 0) & (j <= 2 * fine.radius)
    return jnp.where(valid, j, 0), valid


def _coarse_index(
    fine: AxisOffsets, coarse: AxisOffsets, i: Array, pixel: Array
) -> tuple[Array, Array]:
    """Index of the coarse offset that the i-th one is pooled into, and whether it exists."""
    if fine.radius is None or coarse.radius is None:
        j = (i + (pixel & 1)) >> 1
        return jnp.where(j < coarse.period, j, j - coarse.period), j >= 0
    j = ((i - fine.radius + (pixel & 1)) >> 1) + coarse.radius
    return j, (j >= 0) & (j <= 2 * coarse.radius)


class StageProgram:
    """One stage for the pixels of a program.

    Args:
        level: Level of the stage.
        stage: The stage.
        spot: Pixels of the program.
        source: References to the input of the stage.
        sigma: References to the deviations at its ReLU.
    """

    def __init__(
        self, level: Level, stage: Stage, spot: ProgramPixels, source: Any, sigma: Any
    ) -> None:
        self.level, self.stage = level, stage
        self.spot, self.source, self.sigma = spot, source, sigma

    def preactivations(self) -> Covariances:
        """K and T before the ReLU."""
        spot, source, conv = self.spot, self.source, self.stage.conv
        if isinstance(source, PaddedImages):
            parts = (self.product(dy, dx) for dy, dx in (WINDOW_SHIFTS if conv else [(0, 0)]))
            total = Covariances(functools.reduce(jnp.add, parts) / source.two.shape[0])
        else:
            total = source.map(spot.read_window_sum if conv else spot.read_plane)
        if not conv:
            return total
        nngp = jnp.where(spot.mask(), self.level.weight * total.nngp + self.level.bias, 0)
        if total.ntk is None:
            return Covariances(nngp, nngp)
        ntk = jnp.where(spot.mask(), self.level.weight * total.ntk, 0)
        return Covariances(nngp, ntk + nngp)

    def product(self, dy: int, dx: int) -> Array:
        """Product of the pixels of image and lanes, shifted, summed over channels."""
        one, two = self.source
        shift = {"dy": dy, "dx": dx}
        parts = (
            self.spot.read_image(one, c, margin=1, **shift) * self.spot.read_lanes(two, c, **shift)
            for c in range(two.shape[0])
        )
        return functools.reduce(jnp.add, parts)

    def scales(self) -> tuple[Array, Array]:
        """n = σ1 σ2 and 1 / n."""
        spot, sigma = self.spot, self.sigma
        n = spot.read_image(sigma.one) * spot.read_lanes(sigma.two)
        return n, spot.read_image(sigma.one_inverse) * spot.read_lanes(sigma.two_inverse)

    def after(self) -> Covariances:
        """K and T after the stage."""
        nngp, ntk = self.preactivations()
        if not self.stage.relu:
            return Covariances(nngp, ntk)
        n, n_inverse = self.scales()
        cos, sine, gain, _ = relu.angle(nngp * n_inverse)
        return Covariances(n * (sine + cos * gain), None if ntk is None else ntk * gain)

    def window_cotangent(self, g: Covariances) -> tuple[Covariances, Array | None]:
        """Cotangents of the window sums (of the input without a convolution), and of log σ1."""
        log = None
        if self.stage.relu:
            nngp, ntk = self.preactivations()
            n, n_inverse = self.scales()
            cos, sine, gain, slope = relu.angle(nngp * n_inverse)
            direct, log = g.nngp * gain, g.nngp * n * sine
            if g.ntk is not None:
                angular = g.ntk * (nngp if ntk is None else ntk) * slope
                direct, log = direct + angular * n_inverse, log - angular * cos
            g = Covariances(direct, None if g.ntk is None else g.ntk * gain)
        if self.stage.conv:
            weight = jnp.where(self.spot.mask(), self.level.weight, 0).astype(g.nngp.dtype)
            g = Covariances(g.nngp if g.ntk is None else g.nngp + g.ntk, g.ntk)
            g = g.map(lambda x: weight * x)
        return g, log
