"""How a network and its images are laid out: levels with their planes, and images side by side."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from dsdistill.kernels.conv import gpu, gpu_programs
from dsdistill.kernels.conv.offsets import Grid, grids
from dsdistill.kernels.conv.stages import Level
from dsdistill.kernels.notation import Architecture, Stage

REGISTER_BYTES = 64  # bytes: an AVX-512 register is filled with images side by side
# Bytes that a plane of so many images should have: the loops cost less than it.
MAX_PLANE_BYTES = 50_000
MAX_GPU_PLANES_BYTES = (
    2**28
)  # bytes that all planes of so many images have on a GPU, which computes them at once


def build_levels(network: Architecture, shape: tuple[int, ...]) -> list[Level]:
    """The network's levels for images of a shape (c, h, w, lanes) or (n, h, w, c)."""
    poolings, everywhere = len(network.levels) - 1, network.head == "gap"
    return attach_grids(network, network.levels, grids(*shape[1:3], poolings, everywhere))


def attach_grids(
    network: Architecture, levels: tuple[tuple[Stage, ...], ...], every: tuple[Grid, ...]
) -> list[Level]:
    """Levels with the planes of each; the last is followed by the readout."""
    weight, bias = network.w_std**2 / 9, network.b_std**2
    return [
        Level(s, grid, coarse, weight, bias)
        for s, grid, coarse in zip(levels, every, [*every[1:], None], strict=True)
    ]


def choose_lanes(x: Float[Array, "n h w c"], levels: list[Level]) -> int:
    """How many images are treated side by side."""
    n, h, w, _ = x.shape
    if gpu.is_enabled():
        unit = gpu_programs.LANES_PER_PROGRAM
        planes = max(len(level.grid) * math.prod(level.grid.shape) for level in levels)
        most = unit * max(MAX_GPU_PLANES_BYTES // (x.dtype.itemsize * planes * unit), 1)
        n = -(-n // -(-n // most))  # blocks of the same size
    else:
        unit = REGISTER_BYTES // x.dtype.itemsize
        most = unit * max(MAX_PLANE_BYTES // (REGISTER_BYTES * h * w), 1)
    few = -(-n // unit) * unit if n > unit else 1 << (n - 1).bit_length()  # registers stay full
    return min(most, few)


def split_into_lanes(x: Array, lanes: int) -> Array:
    """(n, ...) to (blocks, ..., lanes), the last block filled up with the last image."""
    missing = -len(x) % lanes
    filled = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (missing, *x.shape[1:]))])
    return jnp.moveaxis(filled.reshape(-1, lanes, *x.shape[1:]), 1, -1)


def merge_lanes(x: Array, n: int) -> Array:
    """The inverse of `split_into_lanes`."""
    return jnp.moveaxis(x, -1, 1).reshape(-1, *x.shape[1:-1])[:n]
