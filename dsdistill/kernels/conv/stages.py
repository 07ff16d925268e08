"""Effect of the layers of one resolution on one plane.

A plane holds the kernels at one offset (see `offsets`) between one image and several others, the
lanes, as (h, w, lanes): the covariance K alone, or K + i T with the tangent kernel T. With s the
sum over a 3x3 window, zero outside the images,

    convolution    K' = W²/9 s(K) + b²,   T' = W²/9 s(T) + K'
    ReLU           as in `relu`
    pooling        the mean over the four pixels of p and the four of q
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from dsdistill.kernels import relu
from dsdistill.kernels.conv.offsets import Grid
from dsdistill.kernels.notation import Stage

MAX_UNROLLED_CHANNELS = 4  # a sum over more channels is left to XLA


@dataclass(frozen=True)
class Level:
    """Layers and planes of one resolution.

    Attributes:
        stages: Stages in order.
        grid: Planes of this resolution.
        coarse: Planes after the pooling; None if the readout follows.
        weight, bias: W²/9 and b² of the convolutions.
        tangent: Whether T is computed beside K.
    """

    stages: tuple[Stage, ...]
    grid: Grid
    coarse: Grid | None
    weight: float
    bias: float
    tangent: bool = True


class ReluDeviations(NamedTuple):
    """Deviations σ of the pre-activations of one ReLU, and their inverses.

    Attributes:
        one, one_inverse: σ and 1 / σ of the image, (h, w, 1 or lanes).
        two, two_inverse: σ and 1 / σ of the lanes, (h, w, lanes), extended by `Grid.extend`.
    """

    one: Array
    one_inverse: Array
    two: Array
    two_inverse: Array


class PaddedImages(NamedTuple):
    """Pixels that enter a network: their covariance is the mean of products over channels.

    Attributes:
        one: The image with a margin of zeros, (c, h + 2, w + 2, 1 or lanes).
        two: The lanes, (c, h, w, lanes), extended by `Grid.extend`.
    """

    one: Array
    two: Array


class PlaneIndex(NamedTuple):
    """One plane: its index, the start of its q, and the coarse plane of its pixels by parity."""

    plane: Array
    start: Array
    to: Array


class PixelSlice(NamedTuple):
    """Every `step`-th pixel of a plane from (y, x) on: h rows and w columns."""

    y: int
    x: int
    h: int
    w: int
    step: int


LevelInput = PaddedImages | Array  # an array: planes of the previous level, (n + 1, h, w, lanes)


def pair_deviations(grid: Grid, one: Array, two: Array) -> ReluDeviations:
    """Combine the deviations of an image, (h, w, 1 or lanes), and of the lanes, (h, w, lanes)."""
    extended = grid.extend(two)
    return ReluDeviations(one, reciprocal_or_zero(one), extended, reciprocal_or_zero(extended))


def pad_images(grid: Grid, one: Array, two: Array) -> PaddedImages:
    """Combine an image, (c, h, w, 1 or lanes), and the lanes, (c, h, w, lanes)."""
    return PaddedImages(pad_margin(one), grid.extend(two))


def reciprocal_or_zero(x: Array) -> Array:
    """1 / x, or 0 where x is 0."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)


class Stages:
    """Stages of one level; every method is a pure function of its arguments."""

    def __init__(
        self, level: Level, source: LevelInput, sigmas: tuple[ReluDeviations, ...]
    ) -> None:
        self.level, self.source = level, source
        self.stages = level.stages or (Stage(False, False),)
        rest = iter(sigmas)
        self.sigmas = [next(rest) if stage.relu else None for stage in self.stages]
        first = source.two if isinstance(source, PaddedImages) else source
        self.lanes, self.dtype = first.shape[-1], first.real.dtype
        h, w = level.grid.shape
        self.whole = PixelSlice(0, 0, h, w, 1)
        self.mask = level.grid.extend(jnp.ones((h, w, 1), self.dtype))

    def has_tangent(self, i: int) -> bool:
        """Whether the planes that enter stage i hold T beside K."""
        if not isinstance(self.source, PaddedImages) and is_complex(self.source):
            return True
        return self.level.tangent and any(stage.conv for stage in self.stages[:i])

    def zero_plane(self, complex_: bool, edge: int = 0) -> Array:
        """Plane of zeros, with a margin of `edge` pixels."""
        h, w = self.level.grid.shape
        shape = (h + 2 * edge, w + 2 * edge, self.lanes)
        return jnp.zeros(shape, _complex_dtype(self.dtype) if complex_ else self.dtype)

    def buffers(self) -> list[Array]:
        """Buffer of each stage for its input plane, with a margin of zeros."""
        return [self.zero_plane(self.has_tangent(i), 1) for i in range(len(self.stages))]

    def stage_inputs(self, buffers: list[Array], entry: PlaneIndex) -> list[Array]:
        """Write the input of each stage into its buffer, for one plane."""
        planes = [write_plane(buffers[0], self.first_input(entry), entry.plane)]
        for i, buffer in enumerate(buffers[1:]):
            after = pack_complex(*self.apply(i, entry, planes[i], self.whole))
            planes.append(write_plane(buffer, after, entry.plane))
        return planes

    def first_input(self, entry: PlaneIndex) -> Array:
        """Input plane of the first stage."""
        if not isinstance(self.source, PaddedImages):
            return self.source[entry.plane]
        one, two = self.source.one[:, 1:-1, 1:-1], self.source.two
        if len(two) > MAX_UNROLLED_CHANNELS:
            return jnp.sum(one * self.slice_second(two, entry), 0) / len(two)
        # XLA does not vectorise its own sum over a leading axis.
        products = [a * self.slice_second(b, entry) for a, b in zip(one, two, strict=True)]
        return functools.reduce(jnp.add, products) / len(two)

    def slice_second(self, extended: Array, entry: PlaneIndex) -> Array:
        """Slice the q of a plane from an extended array of the second side, the lanes."""
        h, w = self.level.grid.shape
        lead, (y, x) = extended.shape[:-3], entry.start + 1
        size = (*lead, h, w, extended.shape[-1])
        return lax.dynamic_slice(extended, (*[0] * len(lead), y, x, 0), size)

    def inside(self, entry: PlaneIndex, part: PixelSlice) -> Array:
        """1 where q lies inside the image, 0 elsewhere."""
        return slice_pixels(self.slice_second(self.mask, entry), part)

    def preactivations(
        self, i: int, entry: PlaneIndex, z: Array, part: PixelSlice
    ) -> tuple[Array, Array | None]:
        """K and T before the ReLU of stage i; T is None while it is 0 or not needed."""
        if not self.stages[i].conv:
            centre = slice_pixels(z, part, 1, 1)
            return (centre.real, centre.imag) if is_complex(z) else (centre, None)
        total, mask = window_sum_padded(z, part), self.inside(entry, part)
        nngp = (self.level.weight * total.real + self.level.bias) * mask
        if not self.level.tangent:
            return nngp, None
        if not is_complex(z):
            return nngp, nngp
        return nngp, self.level.weight * total.imag * mask + nngp

    def scales(self, i: int, entry: PlaneIndex, part: PixelSlice) -> tuple[Array, Array]:
        """n = σ1 σ2 and 1 / n at the ReLU of stage i."""
        deviations = self.sigmas[i]
        assert deviations is not None  # the stage has a ReLU
        one, one_inverse, two, two_inverse = deviations
        n = slice_pixels(one, part) * slice_pixels(self.slice_second(two, entry), part)
        return n, slice_pixels(one_inverse, part) * slice_pixels(
            self.slice_second(two_inverse, entry), part
        )

    def apply(
        self, i: int, entry: PlaneIndex, z: Array, part: PixelSlice
    ) -> tuple[Array, Array | None]:
        """K and T after stage i."""
        nngp, ntk = self.preactivations(i, entry, z, part)
        if not self.stages[i].relu:
            return nngp, ntk
        n, n_inverse = self.scales(i, entry, part)
        cos, sine, gain, _ = relu.angle(nngp * n_inverse)
        return n * (sine + cos * gain), None if ntk is None else ntk * gain

    def zero_total(self) -> Array:
        """Initial total of `add_plane`."""
        both = self.has_tangent(len(self.stages))
        if self.level.coarse is None:
            return self.zero_plane(both)
        shape = (len(self.level.coarse) + 1, *self.level.coarse.shape, self.lanes)
        return jnp.zeros(shape, _complex_dtype(self.dtype) if both else self.dtype)

    def add_plane(self, total: Array, entry: PlaneIndex, z: Array) -> Array:
        """Apply the last stage to a plane and add the result to the planes it is pooled into."""
        i = len(self.stages) - 1
        if self.level.coarse is None:
            return total + pack_complex(*self.apply(i, entry, z, self.whole))
        for parity, part in enumerate(self.parities()):
            more = pack_complex(*self.apply(i, entry, z, part))[None]
            at = (entry.to[parity], 0, 0, 0)
            old = lax.dynamic_slice(total, at, more.shape)
            total = lax.dynamic_update_slice(total, old + more, at)
        return total

    def parities(self) -> list[PixelSlice]:
        """Pixels that a pooling treats alike: even and odd rows, even and odd columns."""
        h, w = self.level.grid.shape
        return [PixelSlice(y, x, h // 2, w // 2, 2) for y in (0, 1) for x in (0, 1)]


def is_complex(x: Array) -> bool:
    """Whether an array holds K + i T."""
    return jnp.issubdtype(x.dtype, jnp.complexfloating)


def _complex_dtype(dtype: Any) -> Any:
    return jnp.result_type(dtype, jnp.complex64)


def pack_complex(nngp: Array, ntk: Array | None) -> Array:
    """Pack K and T into K + i T, or K alone."""
    return nngp if ntk is None else lax.complex(nngp, ntk)


def write_plane(buffer: Array, plane: Array, i: Array) -> Array:
    """Write a plane into a buffer (..., h + 2, w + 2, lanes) with a margin of zeros.

    XLA writes what a loop carries in place. It must not know the position, or it would replace the
    plane read back by the plane itself and compute it again for every use; so the position depends
    on i >= 0.
    """
    one = jnp.sign(i + 1)
    at = [jnp.zeros_like(one)] * (plane.ndim - 3) + [one, one, jnp.zeros_like(one)]
    return lax.dynamic_update_slice(buffer, plane, at)


def read_plane(buffer: Array, i: Array) -> Array:
    """Read the plane in a buffer, for a second use that XLA cannot identify with the first.

    Otherwise it would store common subexpressions of both uses, such as a square root.
    """
    one = jnp.sign(i + 2)
    at = [jnp.zeros_like(one)] * (buffer.ndim - 3) + [one, one, jnp.zeros_like(one)]
    *lead, h, w, lanes = buffer.shape
    return lax.dynamic_slice(buffer, at, (*lead, h - 2, w - 2, lanes))


def pad_margin(z: Array) -> Array:
    """Pad (..., h, w, lanes) with one pixel of zeros on each side."""
    return jnp.pad(z, [(0, 0)] * (z.ndim - 3) + [(1, 1), (1, 1), (0, 0)])


def slice_pixels(z: Array, part: PixelSlice, dy: int = 0, dx: int = 0) -> Array:
    """Slice part of a plane, shifted by (dy, dx)."""
    y, x, h, w, step = part
    y, x = y + dy, x + dx
    stop = (y + step * (h - 1) + 1, x + step * (w - 1) + 1, z.shape[-1])
    return lax.slice(z, (y, x, 0), stop, (step, step, 1))


def window_sum(z: Array) -> Array:
    """Sum over the 3x3 window of each pixel of (h, w, lanes), zero outside."""
    h, w, _ = z.shape
    return window_sum_padded(pad_margin(z), PixelSlice(0, 0, h, w, 1))


def window_sum_padded(z: Array, part: PixelSlice) -> Array:
    """Sum over the 3x3 window of each pixel, for a plane with a margin."""
    columns = [[slice_pixels(z, part, dy, dx) for dy in range(3)] for dx in range(3)]
    left, middle, right = (top + centre + bottom for top, centre, bottom in columns)
    return left + middle + right
