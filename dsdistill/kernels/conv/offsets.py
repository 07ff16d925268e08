"""Which pairs of pixels a convolutional kernel needs, level by level.

The covariance between pixel p of one image and pixel q of another is kept as a *plane* for each
offset o: K[p, o] with q = p + o. Convolutions and ReLUs stay within a plane; 2x2 pooling of
stride 2 maps the fine offsets 2 O + {-1, 0, 1} to the coarse offset O. Followed backwards from
the readout this says which offsets matter at all:

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
    """The offsets along one image axis, at one resolution.

    Attributes:
        size: Pixels.
        radius: Offsets -radius ... radius, or None for the cyclic offsets 0 ... period - 1.
        period: Of cyclic offsets, at least size + 1.
    """

    size: int
    radius: int | None
    period: int = 0

    def __len__(self) -> int:
        return self.period if self.radius is None else 2 * self.radius + 1

    @property
    def offsets(self) -> Int[np.ndarray, " d"]:
        """q - p of every plane."""
        return np.arange(len(self)) - (self.radius or 0)

    def extend(self, x: Array, axis: int) -> Array:
        """Along `axis`, x with zeros where q lies outside the image.

        Position `starts[i] + 1 + p` holds the q of pixel p at offset i, for p from -1 to size.
        """
        if self.radius is None:
            gap = _zeros(x, axis, self.period - self.size)
            return jnp.concatenate([_zeros(x, axis, 1), x, gap, x, gap], axis)
        margin = _zeros(x, axis, self.radius + 1)
        return jnp.concatenate([margin, x, margin], axis)

    @property
    def starts(self) -> Int[np.ndarray, " d"]:
        """Where the pixel p = -1 finds its q in an extended array."""
        return np.arange(len(self))

    @property
    def valid(self) -> Bool[np.ndarray, "d size"]:
        """Whether q lies inside the image."""
        q = np.arange(self.size) + self.offsets[:, None]
        q = q % self.period if self.radius is None else q
        return (q >= 0) & (q < self.size)

    def coarse_offsets(self, coarse: "AxisOffsets") -> Int[np.ndarray, "2 d"]:
        """For even and odd p, the coarse offset index that each offset goes to, or -1."""
        to = (self.offsets + np.arange(2)[:, None]) // 2
        if coarse.radius is None:
            return to % coarse.period
        return np.where(np.abs(to) <= coarse.radius, to + coarse.radius, -1)


@dataclass(frozen=True)
class Grid:
    """The planes of one resolution: every combination of the offsets of two axes."""

    y: AxisOffsets
    x: AxisOffsets

    @property
    def shape(self) -> tuple[int, int]:
        return self.y.size, self.x.size

    def __len__(self) -> int:
        return len(self.y) * len(self.x)

    def extend(self, images: Array) -> Array:
        """Images (..., h, w, lanes) with zeros around, from which `starts` cuts."""
        return self.x.extend(self.y.extend(images, -3), -2)

    @property
    def starts(self) -> Int[np.ndarray, "n 2"]:
        """Where a plane with a margin of one pixel begins in an extended array."""
        return _combine(self.y.starts, self.x.starts)

    def coarse_planes(self, coarse: "Grid") -> Int[np.ndarray, "n 4"]:
        """Where the pixels of each parity (y then x) go: a coarse plane, or len(coarse)."""
        parts = []
        for y in self.y.coarse_offsets(coarse.y):
            for x in self.x.coarse_offsets(coarse.x):
                both = _combine(y, x)
                inside = (both >= 0).all(1)
                parts.append(np.where(inside, both @ [len(coarse.x), 1], len(coarse)))
        return np.stack(parts, 1)

    @property
    def centre(self) -> int:
        """The plane of offset 0."""
        return (self.y.radius or 0) * len(self.x) + (self.x.radius or 0)


@functools.cache
def grids(height: int, width: int, poolings: int, everywhere: bool) -> tuple[Grid, ...]:
    """The planes needed at each resolution, finest first.

    Args:
        height, width: Of the images.
        poolings: How many.
        everywhere: Whether the readout averages over all pixels (GlobalAvgPool) or pairs each
            pixel with itself (Flatten).

    Raises:
        UserError: If the images are too small for the poolings.
    """
    smallest = 1 << poolings
    if min(height, width) < smallest:
        raise UserError(
            f"images must have at least {smallest}x{smallest} pixels for the kernel's poolings, "
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
    """Every combination, the second running fastest."""
    return np.stack(np.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2)


def _zeros(x: Array, axis: int, count: int) -> Array:
    shape = list(x.shape)
    shape[axis] = count
    return jnp.zeros(shape, x.dtype)
