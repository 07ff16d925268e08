"""The planes that are kept, against the pairs of pixels that the readout depends on."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from dsdistill.kernels.conv.offsets import AxisOffsets, Grid, grids

CASES = [
    (height, width, poolings, everywhere)
    for height, width in [(4, 4), (7, 5), (9, 4), (6, 11), (8, 8)]
    for poolings in (0, 1, 2)
    for everywhere in (False, True)
]


def needed(shape: tuple[int, int], everywhere: bool, above: set | None) -> set:
    """Pairs (p, q) of pixels on which the readout or the pairs of the coarser level depend."""
    if above is None:
        pixels = list(np.ndindex(shape))
        return set(itertools.product(pixels, pixels)) if everywhere else {(p, p) for p in pixels}
    four = list(itertools.product((0, 1), repeat=2))
    return {
        ((2 * P[0] + a, 2 * P[1] + b), (2 * Q[0] + c, 2 * Q[1] + d))
        for P, Q in above
        for a, b in four
        for c, d in four
    }


def places(grid: Grid) -> dict:
    """The planes that hold each pair of pixels."""
    found: dict = {}
    offsets = itertools.product(
        zip(grid.y.offsets, grid.y.valid, strict=True),
        zip(grid.x.offsets, grid.x.valid, strict=True),
    )
    for plane, ((dy, y_valid), (dx, x_valid)) in enumerate(offsets):
        for y, x in np.ndindex(grid.shape):
            if y_valid[y] and x_valid[x]:
                q = (other(grid.y, y, dy), other(grid.x, x, dx))
                found.setdefault(((y, x), q), []).append(plane)
    return found


def other(axis: AxisOffsets, p: int, offset: int) -> int:
    return int(p + offset) % axis.period if axis.radius is None else int(p + offset)


@pytest.mark.parametrize(("height", "width", "poolings", "everywhere"), CASES)
def test_every_needed_pair_is_held_once_and_pooled_to_its_place(
    height, width, poolings, everywhere
):
    every = grids(height, width, poolings, everywhere)
    assert [g.shape for g in every] == [(height >> i, width >> i) for i in range(poolings + 1)]
    held = [places(grid) for grid in every]
    assert all(len(planes) == 1 for level in held for planes in level.values())
    above: set | None = None
    for level in reversed(range(poolings + 1)):
        pairs = needed(every[level].shape, everywhere, above)
        assert pairs <= held[level].keys()
        if above is not None:
            to = every[level].coarse_planes(every[level + 1])
            for p, q in pairs:
                parity = 2 * (p[0] % 2) + p[1] % 2
                coarse = tuple((a // 2, b // 2) for a, b in (p, q))
                assert [to[held[level][p, q][0], parity]] == held[level + 1][coarse]
        above = pairs


@pytest.mark.parametrize(("height", "width", "poolings", "everywhere"), CASES)
def test_no_other_pair_is_pooled_into_a_coarse_pair(height, width, poolings, everywhere):
    """Exactly the 16 pairs of 2x2 by 2x2 pixels are pooled; any other has its q outside."""
    for fine, coarse in itertools.pairwise(grids(height, width, poolings, everywhere)):
        to, above = fine.coarse_planes(coarse), places(coarse)
        counts: dict = {}
        for (p, q), (plane,) in places(fine).items():
            target = to[plane, 2 * (p[0] % 2) + p[1] % 2]
            pooled = tuple((a // 2, b // 2) for a, b in (p, q))
            if above.get(pooled, [-1]) == [target]:
                counts[pooled] = counts.get(pooled, 0) + 1
            elif (
                target < len(coarse)
                and max(pooled[0][0] - coarse.y.size + 1, pooled[0][1] - coarse.x.size + 1) <= 0
            ):
                y, x = divmod(target, len(coarse.x))
                P = pooled[0]
                assert not (coarse.y.valid[y, P[0]] and coarse.x.valid[x, P[1]])
        assert set(counts.values()) == {16}
        assert counts.keys() == above.keys()


def test_flatten_keeps_a_band_and_global_pooling_every_pair_once():
    assert [g.y.radius for g in grids(28, 28, 3, False)] == [7, 3, 1, 0]
    assert [len(g) for g in grids(28, 28, 3, False)] == [225, 49, 9, 1]
    assert [g.y.radius for g in grids(4, 28, 2, False)] == [3, 1, 0]
    for grid in grids(7, 6, 1, True):
        h, w = grid.shape
        assert len(places(grid)) == (h * w) ** 2
    # The period doubles with the resolution, so that a pooling halves offsets exactly.
    assert [g.y.period for g in grids(28, 28, 2, True)] == [32, 16, 8]


@pytest.mark.parametrize(
    "axis", [AxisOffsets(5, 0), AxisOffsets(5, 2), AxisOffsets(4, 3), AxisOffsets(5, None, 8)]
)
def test_extended_images_hold_q_where_starts_says(axis):
    extended = np.asarray(axis.extend(jnp.arange(1, axis.size + 1), 0))
    for start, offset, valid in zip(axis.starts, axis.offsets, axis.valid, strict=True):
        cut = extended[start : start + axis.size + 2]
        assert len(cut) == axis.size + 2
        for p in range(-1, axis.size + 1):
            q = other(axis, p, offset)
            inside = 0 <= q < axis.size
            assert cut[p + 1] == (q + 1 if inside else 0)
            if 0 <= p < axis.size:
                assert valid[p] == inside


def test_grid_cuts_both_axes():
    (grid,) = grids(3, 4, 0, True)
    pixels = jnp.arange(1, 13).reshape(3, 4, 1)
    extended = np.asarray(grid.extend(pixels))[..., 0]
    for plane, (y, x) in enumerate(grid.starts):
        dy, dx = divmod(plane, len(grid.x))
        cut = extended[y + 1 : y + 4, x + 1 : x + 5]
        for i, j in np.ndindex(3, 4):
            q = (i + dy) % grid.y.period, (j + dx) % grid.x.period
            inside = q[0] < 3 and q[1] < 4
            assert cut[i, j] == (4 * q[0] + q[1] + 1 if inside else 0)


@pytest.mark.parametrize("everywhere", [False, True])
def test_centre_is_the_offset_zero(everywhere):
    for grid in grids(9, 6, 2, everywhere):
        y, x = divmod(grid.centre, len(grid.x))
        assert (grid.y.offsets[y], grid.x.offsets[x]) == (0, 0)
