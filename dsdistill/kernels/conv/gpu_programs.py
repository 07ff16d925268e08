"""What one program of `gpu` does: where it reads and writes, and one stage for its pixels.

All pixels of a program are one array, since Triton compiles long programs slowly: with an array
for each pixel it took 47 s for the longest, and now takes one.
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

SQUARE_PIXELS = 4  # pixels: a program takes a square, whose windows share most of what they read
LANES_PER_PROGRAM = 32  # of a program: 128 bytes that lie side by side
WARPS_PER_PROGRAM = 4  # of 32 threads, for one program

WINDOW_SHIFTS = list(itertools.product((-1, 0, 1), repeat=2))


class Covariances(NamedTuple):
    """K and T, or cotangents of them; T is None where it is not wanted, or is still K."""

    nngp: Any
    ntk: Any = None

    @staticmethod
    def from_complex(x: Array) -> "Covariances":
        return Covariances(x.real, x.imag) if stages.is_complex(x) else Covariances(x)

    def map(self, function: Callable[..., Any], *others: "Covariances") -> "Covariances":
        every = zip(self, *others, strict=True)
        return Covariances(*(None if parts[0] is None else function(*parts) for parts in every))


@dataclass(frozen=True)
class ProgramPixels:
    """Where a program reads and writes: pixels (p, 1) of some plane and lanes (1, l).

    Attributes:
        grid: The planes.
        y, x: Row and column of each pixel; at first of the program's square.
        lanes: Which.
        row, column: Of the plane, by its two offsets.
        valid: Whether there is such a plane.
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
        return self.y.shape[0], self.lanes.shape[1]

    @property
    def plane(self) -> Any:
        return self.row * len(self.grid.x) + self.column

    def square(self) -> "ProgramPixels":
        """All pixels of the square."""
        i = lax.broadcasted_iota(jnp.int32, (SQUARE_PIXELS * SQUARE_PIXELS, 1), 0)
        return replace(
            self,
            y=self.y * SQUARE_PIXELS + i // SQUARE_PIXELS,
            x=self.x * SQUARE_PIXELS + i % SQUARE_PIXELS,
        )

    def at(self, plane: Array) -> "ProgramPixels":
        """In a plane."""
        columns = jnp.int32(len(self.grid.x))
        plane = plane.astype(jnp.int32)
        return replace(self, row=lax.div(plane, columns), column=lax.rem(plane, columns))

    def pairs(self, coarse: Grid, plane: Array) -> "ProgramPixels":
        """The 16 pairs of pixels, each in its plane, that are pooled into a pixel of a plane."""
        i = lax.broadcasted_iota(jnp.int32, (16, 1), 0)
        a, b, c, d = ((i >> shift) & 1 for shift in (3, 2, 1, 0))
        columns = jnp.int32(len(coarse.x))
        row, one = _fine_index(self.grid.y, coarse.y, lax.div(plane, columns), c - a)
        column, two = _fine_index(self.grid.x, coarse.x, lax.rem(plane, columns), d - b)
        y, x = 2 * self.y + a, 2 * self.x + b
        return replace(self, y=y, x=x, row=row, column=column, valid=one & two)

    def inside(self, dy: int = 0, dx: int = 0) -> Array:
        """Whether the pixels, shifted, lie inside the image."""
        (h, w), y, x = self.grid.shape, self.y + dy, self.x + dx
        return (y >= 0) & (y < h) & (x >= 0) & (x < w) & self.valid

    def mask(self) -> Array:
        """Whether both pixels of each pair lie inside their images."""
        y = _q_is_inside(self.grid.y, self.y + self.row)
        return self.inside() & y & _q_is_inside(self.grid.x, self.x + self.column)

    def entries(self, ref: Any, *index: Any) -> Any:
        """The part (p, l) of an array that has these indices for each pixel."""
        lanes = self.lanes if ref.shape[-1] > 1 else 0
        every = (jnp.asarray(i, jnp.int32) for i in (*index, lanes))
        return ref.at[*(jnp.broadcast_to(i, self.shape) for i in every)]

    def read(self, ref: Any, *index: Any, inside: Array) -> Array:
        """Such a part, 0 where the pixels do not lie inside."""
        mask = jnp.broadcast_to(inside, self.shape)
        return triton.load(self.entries(ref, *index), mask=mask, other=0.0)

    def here(self, planes: Any, dy: int = 0, dx: int = 0) -> Array:
        """Of all planes, the entries of this one, shifted."""
        return self.read(planes, self.plane, self.y + dy, self.x + dx, inside=self.inside(dy, dx))

    def box(self, planes: Any) -> Array:
        """The same, summed up over the windows."""
        return functools.reduce(jnp.add, (self.here(planes, dy, dx) for dy, dx in WINDOW_SHIFTS))

    def one(self, ref: Any, *index: int, dy: int = 0, dx: int = 0, margin: int = 0) -> Array:
        """Of the image, which may have a margin."""
        y, x = self.y + dy + margin, self.x + dx + margin
        return self.read(ref, *index, y, x, inside=self.inside(dy, dx))

    def other(self, ref: Any, *index: int, dy: int = 0, dx: int = 0) -> Array:
        """Of the lanes, at the q of each pixel, from an extended array."""
        y, x = self.row + 1 + self.y + dy, self.column + 1 + self.x + dx
        return self.read(ref, *index, y, x, inside=self.inside(dy, dx))

    def write(self, ref: Any, value: Array, *index: int) -> None:
        """Into this plane of all planes."""
        place = self.entries(ref, *index, self.plane, self.y, self.x)
        triton.store(place, value, mask=jnp.broadcast_to(self.inside(), self.shape))

    def cotangent(self, kind: str, given: Covariances, coarse: Grid | None) -> Covariances:
        """Of what leaves a stage, see `Cotangent`."""
        if kind == "window":
            return given.map(self.box)
        if kind == "plane":
            return given.map(self.here)
        if kind == "all":
            return given.map(self.one)
        assert coarse is not None  # the planes are pooled
        row, one = _coarse_index(self.grid.y, coarse.y, self.row, self.y)
        column, two = _coarse_index(self.grid.x, coarse.x, self.column, self.x)
        y, x = self.y >> 1, self.x >> 1
        inside = one & two & (y < coarse.shape[0]) & (x < coarse.shape[1])
        plane = row * len(coarse.x) + column
        return given.map(lambda ref: self.read(ref, plane, y, x, inside=inside))


def _q_is_inside(axis: AxisOffsets, i: Array) -> Array:
    """Whether the q of pixel and plane lies inside the image, by the sum of their indices."""
    if axis.radius is None:
        return (lax.rem(i, jnp.full_like(i, axis.period)) < axis.size) & (i >= 0)
    return (i >= axis.radius) & (i < axis.radius + axis.size)


def _fine_index(fine: AxisOffsets, coarse: AxisOffsets, i: Array, d: Array) -> tuple[Array, Array]:
    """The index of the offset that is d more than twice the i-th one, and whether there is one."""
    if fine.radius is None or coarse.radius is None:
        j = 2 * i + d
        return jnp.where(j < 0, j + fine.period, j), j >= -1
    j = 2 * (i - coarse.radius) + d + fine.radius
    valid = (j >= 0) & (j <= 2 * fine.radius)
    return jnp.where(valid, j, 0), valid


def _coarse_index(
    fine: AxisOffsets, coarse: AxisOffsets, i: Array, pixel: Array
) -> tuple[Array, Array]:
    """The index of the coarse offset to which the i-th one is pooled, and whether there is one."""
    if fine.radius is None or coarse.radius is None:
        j = (i + (pixel & 1)) >> 1
        return jnp.where(j < coarse.period, j, j - coarse.period), j >= 0
    j = ((i - fine.radius + (pixel & 1)) >> 1) + coarse.radius
    return j, (j >= 0) & (j <= 2 * coarse.radius)


class StageProgram:
    """One stage for the pixels of a program.

    Args:
        level, stage: Which stage of what.
        spot: The pixels.
        source: References to what enters it.
        sigma: To the deviations at its ReLU.
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
            total = source.map(spot.box if conv else spot.here)
        if not conv:
            return total
        nngp = jnp.where(spot.mask(), self.level.weight * total.nngp + self.level.bias, 0)
        if total.ntk is None:
            return Covariances(nngp, nngp)
        ntk = jnp.where(spot.mask(), self.level.weight * total.ntk, 0)
        return Covariances(nngp, ntk + nngp)

    def product(self, dy: int, dx: int) -> Array:
        """The product of two pixels of the images, shifted, summed up over channels."""
        one, two = self.source
        at = {"dy": dy, "dx": dx}
        parts = (
            self.spot.one(one, c, margin=1, **at) * self.spot.other(two, c, **at)
            for c in range(two.shape[0])
        )
        return functools.reduce(jnp.add, parts)

    def scales(self) -> tuple[Array, Array]:
        """n = σ1 σ2 and 1 / n."""
        spot, sigma = self.spot, self.sigma
        n = spot.one(sigma.one) * spot.other(sigma.two)
        return n, spot.one(sigma.one_inverse) * spot.other(sigma.two_inverse)

    def after(self) -> Covariances:
        """K and T after the stage."""
        nngp, ntk = self.preactivations()
        if not self.stage.relu:
            return Covariances(nngp, ntk)
        n, n_inverse = self.scales()
        cos, sine, gain, _ = relu.angle(nngp * n_inverse)
        return Covariances(n * (sine + cos * gain), None if ntk is None else ntk * gain)

    def window_cotangent(self, g: Covariances) -> tuple[Covariances, Array | None]:
        """Cotangents of what enters, up to the adjoint of the convolution, and of log σ1."""
        log = None
        if self.stage.relu:
            nngp, ntk = self.preactivations()
            n, n_inverse = self.scales()
            cos, sine, gain, slope = relu.angle(nngp * n_inverse)
            direct, log = g.nngp * gain, g.nngp * n * sine
            if g.ntk is not None:
                turned = g.ntk * (nngp if ntk is None else ntk) * slope
                direct, log = direct + turned * n_inverse, log - turned * cos
            g = Covariances(direct, None if g.ntk is None else g.ntk * gain)
        if self.stage.conv:
            weight = jnp.where(self.spot.mask(), self.level.weight, 0).astype(g.nngp.dtype)
            g = Covariances(g.nngp if g.ntk is None else g.nngp + g.ntk, g.ntk)
            g = g.map(lambda x: weight * x)
        return g, log
