"""A first level of one convolution, one ReLU and a pooling, whole blocks of pixels at a time.

For a pixel P of the image and Q = P + O of the lanes at the coarse resolution, pooling sums the 16
pairs of a pixel in the block 2 P + {0, 1}² and one in 2 Q + {0, 1}². These pairs depend only on two
patches of 4x4 pixels, which start at 2 P - 1 and at 2 Q - 1. So a coarse plane is computed from the
images in one fused loop, and the finer planes, which `planes` would compute one by one, are never
stored.

The images are stored as patches: entry (j, k) of an array holds the pixels j rows below and k
columns to the right of the corners of all patches. Every pixel is stored four times, but pixels
that are read together are adjacent.
"""

import functools
import itertools
from collections.abc import Iterable
from typing import NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from dsdistill.kernels import relu
from dsdistill.kernels.conv.stages import (
    MAX_UNROLLED_CHANNELS,
    Level,
    LevelInput,
    PaddedImages,
    ReluDeviations,
    read_plane,
    write_plane,
)
from dsdistill.kernels.notation import Stage

PixelPair = tuple[int, int, int, int]  # row and column in the image's block, then in the lanes'

BLOCK_PIXELS = [(j, k) for j in range(2) for k in range(2)]
PATCH_PIXELS = [(j, k) for j in range(4) for k in range(4)]


def covers(
    source: LevelInput, level: Level, channels: int = MAX_UNROLLED_CHANNELS
) -> TypeGuard[PaddedImages]:
    """Whether a level has this form: blocks tile the images, and there are few channels."""
    return (
        isinstance(source, PaddedImages)
        and level.stages == (Stage(conv=True, relu=True),)
        and level.coarse is not None
        and level.tangent
        and level.grid.shape == tuple(2 * size for size in level.coarse.shape)
        and len(source.two) <= channels
    )


def forward(level: Level, source: PaddedImages, sigma: ReluDeviations) -> Array:
    """Compute the pooled planes and one unused one; sums, not yet means."""
    assert level.coarse is not None  # see `covers`
    tiles = _Patches.extract(level, source, sigma)
    starts = jnp.asarray(level.coarse.starts)
    shape = jax.eval_shape(tiles.coarse_plane, starts[0])
    empty = jnp.zeros((len(starts) + 1, *shape.shape), shape.dtype)

    def step(planes: Array, item: tuple[Array, Array]) -> tuple[Array, None]:
        i, start = item
        plane = tiles.coarse_plane(start)[None]
        return lax.dynamic_update_slice(planes, plane, (i, 0, 0, 0)), None

    return lax.scan(step, empty, (jnp.arange(len(starts)), starts))[0]


def backward(
    level: Level, source: PaddedImages, sigma: ReluDeviations, cotangent: Array
) -> tuple[Array, list[Array]]:
    """Adjoint of `forward` for images of one channel, with the results of `planes.backward`."""
    assert level.coarse is not None  # see `covers`
    tiles = _Patches.extract(level, source, sigma)
    starts = jnp.asarray(level.coarse.starts)

    def step(carry: tuple, item: tuple[Array, Array, Array]) -> tuple[tuple, None]:
        before, left, patches, logs = carry
        i, start, g = item
        before = write_plane(before, tiles.preactivations(start), i)
        left = write_plane(left, tiles.window_cotangent(before[..., 1:-1, 1:-1, :], start, g), i)
        logs = logs + tiles.log(read_plane(before, i), start, g)
        pairs = left[..., 1:-1, 1:-1, :]
        patches = [
            total + tiles.pixel_cotangent(p, pairs, start)
            for p, total in zip(PATCH_PIXELS, patches, strict=True)
        ]
        return (before, left, patches, logs), None

    h, w, lanes = cotangent.shape[1:]
    pairs = jnp.zeros((2, 2, 2, 2, h + 2, w + 2, lanes), cotangent.real.dtype)
    blank = jnp.zeros((h, w, lanes), pairs.dtype)
    empty = pairs, pairs, [blank] * len(PATCH_PIXELS), pairs[..., 1:-1, 1:-1, :]
    items = jnp.arange(len(starts)), starts, cotangent[:-1]
    (_, _, patches, logs), _ = lax.scan(step, empty, items)
    return _fold_patches(patches)[None], [_interleave(logs.sum((2, 3)))]


class _Patches(NamedTuple):
    """Patches of an image and of the lanes, and the deviations in their blocks.

    Attributes:
        level: Level to compute.
        one: Patches of the image for each channel, (4, 4, h/2, w/2, 1 or lanes).
        two: Patches of the lanes for each channel, (4, 4, ...), for all offsets.
        sigma: Deviations as (2, 2, ...) blocks.
    """

    level: Level
    one: list[Array]
    two: list[Array]
    sigma: ReluDeviations

    @staticmethod
    def extract(level: Level, source: PaddedImages, sigma: ReluDeviations) -> "_Patches":
        """Extract the patches of all images and the blocks of their deviations."""
        grid, coarse = level.grid, level.coarse
        assert coarse is not None
        h, w = coarse.shape
        size = len(coarse.y) + h - 1, len(coarse.x) + w - 1
        # Corner of the first patch for the first coarse offset.
        y = int(2 * coarse.y.offsets[0]) + (grid.y.radius or 0)
        x = int(2 * coarse.x.offsets[0]) + (grid.x.radius or 0)
        one = [_extract_patches(channel, 4, 0, 0, (h, w)) for channel in source.one]
        two = [_extract_patches(channel, 4, y, x, size) for channel in source.two]
        blocks = [_extract_patches(d, 2, 0, 0, (h, w)) for d in sigma[:2]]
        blocks += [_extract_patches(d, 2, y + 1, x + 1, size) for d in sigma[2:]]
        return _Patches(level, one, two, ReluDeviations(*blocks))

    def slice_second(self, patches: Array, start: Array, j: int, k: int, count: int = 1) -> Array:
        """Slice entry (j, k) of the lanes' patches or blocks, or `count` x `count` entries from it.

        The caller takes many such slices rather than slicing one of them again: XLA vectorises a
        loop that uses each slice once.
        """
        assert self.level.coarse is not None
        sizes = (count, count, *self.level.coarse.shape, patches.shape[-1])
        entries = lax.dynamic_slice(patches, (j, k, start[0], start[1], 0), sizes)
        return entries[0, 0] if count == 1 else entries

    def coarse_plane(self, start: Array) -> Array:
        """Compute one coarse plane, as sums of 16 pairs."""
        one, one_inverse, two, two_inverse = self.sigma
        terms = []
        for (a, b, c, d), total in self.windows(start).items():
            n = one[a, b] * self.slice_second(two, start, c, d)
            n_inverse = one_inverse[a, b] * self.slice_second(two_inverse, start, c, d)
            cos, sine, gain, _ = relu.angle((self.weight * total + self.level.bias) * n_inverse)
            terms.append((n * (sine + cos * gain), n * cos * gain))
        nngp, ntk = zip(*terms, strict=True)
        return lax.complex(_sum(nngp), _sum(ntk))

    @property
    def weight(self) -> float:
        """Weight of the window sums: W²/9, over the number of channels."""
        return self.level.weight / len(self.one)

    def windows(self, start: Array) -> dict[PixelPair, Array]:
        """Sums over the 3x3 windows of all pairs, with each product of two pixels taken once."""
        two = [
            {p: self.slice_second(channel, start, *p) for p in PATCH_PIXELS} for channel in self.two
        ]
        sums = {}
        for y, x in itertools.product((-1, 0, 1), repeat=2):
            products = {
                (j, k): _sum(a[j, k] * b[j + y, k + x] for a, b in zip(self.one, two, strict=True))
                for j, k in PATCH_PIXELS
                if (j + y, k + x) in PATCH_PIXELS
            }
            columns = {
                (a, k): _sum(products[a + i, k] for i in range(3))
                for a in (0, 1)
                for k in range(4)
                if (a, k) in products and (a + 2, k) in products
            }
            for a, b in BLOCK_PIXELS:
                if (a + y, b + x) in BLOCK_PIXELS:
                    sums[a, b, a + y, b + x] = _sum(columns[a, b + i] for i in range(3))
        return sums

    def preactivations(self, start: Array) -> Array:
        """K = T before the ReLU, (2, 2, 2, 2, h/2, w/2, lanes), for images of one channel."""
        total = _sum(
            _broadcast_to_pairs(self.one[0][j : j + 2, k : k + 2])
            * self.slice_second(self.two[0], start, j, k, 2)
            for j, k in itertools.product(range(3), repeat=2)
        )
        return self.weight * total + self.level.bias

    def scales(self, start: Array) -> tuple[Array, Array]:
        """n = σ1 σ2 and 1 / n, for all pairs."""
        one, one_inverse, two, two_inverse = self.sigma
        n = _broadcast_to_pairs(one) * self.slice_second(two, start, 0, 0, 2)
        return n, _broadcast_to_pairs(one_inverse) * self.slice_second(two_inverse, start, 0, 0, 2)

    def window_cotangent(self, before: Array, start: Array, g: Array) -> Array:
        """Cotangents of the window sums of all pairs."""
        _, n_inverse = self.scales(start)
        _, _, gain, slope = relu.angle(before * n_inverse)
        return self.weight * ((g.real + g.imag) * gain + g.imag * before * slope * n_inverse)

    def log(self, before: Array, start: Array, g: Array) -> Array:
        """Cotangents of log σ1, for all pairs."""
        n, n_inverse = self.scales(start)
        cos, sine, _, slope = relu.angle(before * n_inverse)
        return g.real * n * sine - g.imag * before * slope * cos

    def pixel_cotangent(self, pixel: tuple[int, int], pairs: Array, start: Array) -> Array:
        """Contribution of one coarse plane to the cotangent of one pixel of all image patches."""
        terms: dict[tuple[int, int], Array] = {}
        for (a, b), (c, d) in itertools.product(BLOCK_PIXELS, BLOCK_PIXELS):
            y, x = pixel[0] - a, pixel[1] - b  # within the window
            if 0 <= y < 3 and 0 <= x < 3:
                other, g = (c + y, d + x), pairs[a, b, c, d]
                terms[other] = terms[other] + g if other in terms else g
        return _sum(g * self.slice_second(self.two[0], start, *other) for other, g in terms.items())


def _sum(parts: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, parts)


def _broadcast_to_pairs(blocks: Array) -> Array:
    """Expand an array (2, 2, ...) of the image for broadcasting against one of the lanes."""
    return blocks[:, :, None, None]


def _extract_patches(x: Array, size: int, top: int, left: int, count: tuple[int, int]) -> Array:
    """Patches of (H, W, lanes), one at every second pixel, as (size, size, *count, lanes)."""

    def part(j: int, k: int) -> Array:
        row, column = top + j, left + k
        return x[row : row + 2 * count[0] - 1 : 2, column : column + 2 * count[1] - 1 : 2]

    return jnp.stack([jnp.stack([part(j, k) for k in range(size)]) for j in range(size)])


def _fold_patches(patches: list[Array]) -> Array:
    """Sum the pixels of all patches, each (h, w, lanes), into the image, (2 h, 2 w, lanes)."""
    p = dict(zip(PATCH_PIXELS, patches, strict=True))
    rows = {
        (j, k): p[j + 1, k] + _shift_to_neighbour(p[(j + 3) % 4, k], j, 0)
        for j in (0, 1)
        for k in range(4)
    }
    parts = [
        rows[j, k + 1] + _shift_to_neighbour(rows[j, (k + 3) % 4], k, 1) for j, k in BLOCK_PIXELS
    ]
    return _interleave(jnp.stack(parts).reshape(2, 2, *parts[0].shape))


def _shift_to_neighbour(x: Array, parity: int, axis: int) -> Array:
    """Move pixels to the next block if their parity is even, to the previous if odd."""
    inner = lax.slice_in_dim(x, parity, x.shape[axis] - 1 + parity, axis=axis)
    blank = jnp.zeros_like(lax.slice_in_dim(x, 0, 1, axis=axis))
    return jnp.concatenate([inner, blank] if parity else [blank, inner], axis)


def _interleave(blocks: Array) -> Array:
    """Interleave the four pixels of all blocks, (2, 2, h, w, lanes), to (2 h, 2 w, lanes)."""
    _, _, h, w, lanes = blocks.shape
    return blocks.transpose(2, 0, 3, 1, 4).reshape(2 * h, 2 * w, lanes)
