"""Pairs of pixels that a convolutional kernel needs, level by level.

The covariance between pixel p of one image and pixel q of another is kept as a *plane* for each
offset o: K[p, o] with q = p + o. Convolutions and ReLUs stay within a plane; 2x2 pooling of
stride 2 maps the fine offsets 2 O + {-1, 0, 1} to the coarse offset O. Followed backwards from
the readout this determines which offsets matter at all:

- Flatten reads the offset 0, so before it |o| <= r, with r = 0, and 2 r + 1 before a pooling;
- GlobalAvgPool reads every offset. There o is cyclic, q = p + o modulo a period longer than the
  image: one period of planes holds all pairs, where -(h - 1) ... h - 1 holds four times as many
  entries as there are pairs. The period's spare pixels keep the two ends of the image apart.
"""

import functools
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dsdistill.harness.errors import UserError


@dataclass(frozen=True)
class AxisOffsets:
    """Offsets along one image axis, at one resolution.

    Attributes:
        size: Number of pixels.
        radius: r of the offsets -r ... r, or None for the cyclic offsets 0 ... period - 1.
        period: Period of cyclic offsets, at least size + 1.
    """

    size: int
    radius: int | None
    period: int = 0

    def __len__(self) -> int:
        return self.period if self.radius is None else 2 * self.radius + 1

    @property
    def offsets(self) -> Int[np.ndarray, " d"]:
        """Offset q - p of every plane."""
        return np.arange(len(self)) - (self.radius or 0)

    def extend(self, x: Array, axis: int) -> Array:
        """Extend x along `axis` with zeros where q lies outside the image.

        Position `starts[i] + 1 + p` holds the q of pixel p at offset i, for p from -1 to size.
        """
        if self.radius is None:
            gap = _zeros(x, axis, self.period - self.size)
            return jnp.concatenate([_zeros(x, axis, 1), x, gap, x, gap], axis)
        margin = _zeros(x, axis, self.radius + 1)
        return jnp.concatenate([margin, x, margin], axis)

    @property
    def starts(self) -> Int[np.ndarray, " d"]:
        """Position of the q of pixel p = -1 in an extended array, for every offset."""
        return np.arange(len(self))

    @property
    def valid(self) -> Bool[np.ndarray, "d size"]:
        """Whether q lies inside the image, for every offset and p."""
        q = np.arange(self.size) + self.offsets[:, None]
        q = q % self.period if self.radius is None else q
        return (q >= 0) & (q < self.size)

    def coarse_offsets(self, coarse: "AxisOffsets") -> Int[np.ndarray, "2 d"]:
        """Index of the coarse offset that each offset is pooled into, for even and odd p; or -1."""
        to = (self.offsets + np.arange(2)[:, None]) // 2
        if coarse.radius is None:
            return to % coarse.period
        return np.where(np.abs(to) <= coarse.radius, to + coarse.radius, -1)


@dataclass(frozen=True)
class Grid:
    """Planes of one resolution: every combination of the offsets along two axes."""

    y: AxisOffsets
    x: AxisOffsets

    @property
    def shape(self) -> tuple[int, int]:
        return self.y.size, self.x.size

    def __len__(self) -> int:
        return len(self.y) * len(self.x)

    def extend(self, images: Array) -> Array:
        """Extend images (..., h, w, lanes) with zeros, so that planes can be sliced at `starts`."""
        return self.x.extend(self.y.extend(images, -3), -2)

    @property
    def starts(self) -> Int[np.ndarray, "n 2"]:
        """Position of each plane, with a margin of one pixel, in an extended array."""
        return _combine(self.y.starts, self.x.starts)

    def coarse_planes(self, coarse: "Grid") -> Int[np.ndarray, "n 4"]:
        """Coarse plane that the pixels of each parity (y, x) are pooled into, or len(coarse)."""
        parts = []
        for y in self.y.coarse_offsets(coarse.y):
            for x in self.x.coarse_offsets(coarse.x):
                both = _combine(y, x)
                inside = (both >= 0).all(1)
                parts.append(np.where(inside, both @ [len(coarse.x), 1], len(coarse)))
        return np.stack(parts, 1)

    @property
    def centre(self) -> int:
        """Index of the plane of offset 0."""
        return (self.y.radius or 0) * len(self.x) + (self.x.radius or 0)


@functools.cache
def grids(height: int, width: int, poolings: int, everywhere: bool) -> tuple[Grid, ...]:
    """Planes needed at each resolution, finest first.

    Args:
        height, width: Size of the images, in pixels.
        poolings: Number of poolings.
        everywhere: Whether the readout averages over all pixels (GlobalAvgPool) or pairs each
            pixel with itself (Flatten).

    Raises:
        UserError: If the images are too small for the poolings.
    """
    min_size = 1 << poolings
    if min(height, width) < min_size:
        raise UserError(
            f"images must have at least {min_size}x{min_size} pixels for the kernel's poolings, "
            f"got {height}x{width}: take larger images or fewer poolings"
        )
    axes = [_axes(size, poolings, everywhere) for size in (height, width)]
    return tuple(Grid(y, x) for y, x in zip(*axes, strict=True))


def _axes(size: int, poolings: int, everywhere: bool) -> list[AxisOffsets]:
    sizes = [size >> level for level in range(poolings + 1)]
    if everywhere:
        last = sizes[-1] + 1
        return [AxisOffsets(s, None, last << (poolings - level)) for level, s in enumerate(sizes)]
    radii = [min((1 << (poolings - level)) - 1, s - 1) for level, s in enumerate(sizes)]
    return [AxisOffsets(s, r) for s, r in zip(sizes, radii, strict=True)]


def _combine(y: np.ndarray, x: np.ndarray) -> Int[np.ndarray, "n 2"]:
    """All combinations, with the second index running fastest."""
    return np.stack(np.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2)


def _zeros(x: Array, axis: int, count: int) -> Array:
    shape = list(x.shape)
    shape[axis] = count
    return jnp.zeros(shape, x.dtype)
