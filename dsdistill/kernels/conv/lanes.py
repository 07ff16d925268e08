"""Layout of a network and its images: levels with their planes, and images side by side."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from dsdistill.kernels.conv import gpu, gpu_programs
from dsdistill.kernels.conv.offsets import Grid, grids
from dsdistill.kernels.conv.stages import Level
from dsdistill.kernels.notation import Architecture, Stage
from dsdistill.parallel import devices

REGISTER_BYTES = 64  # an AVX-512 register, filled with images side by side
MAX_PLANE_BYTES = 50_000  # of a plane with all lanes; large enough to hide the cost of loops
MAX_GPU_PLANES_BYTES = 2**28  # of all planes with all lanes: a GPU computes them at once


def build_levels(network: Architecture, shape: tuple[int, ...]) -> list[Level]:
    """Build the levels of a network for images of a shape (c, h, w, lanes) or (n, h, w, c)."""
    poolings, everywhere = len(network.levels) - 1, network.head == "gap"
    return attach_grids(network, network.levels, grids(*shape[1:3], poolings, everywhere))


def attach_grids(
    network: Architecture, levels: tuple[tuple[Stage, ...], ...], planes: tuple[Grid, ...]
) -> list[Level]:
    """Combine the stages of each level with its planes; the last is followed by the readout."""
    weight, bias = network.w_std**2 / 9, network.b_std**2
    return [
        Level(stages, grid, coarse, weight, bias)
        for stages, grid, coarse in zip(levels, planes, [*planes[1:], None], strict=True)
    ]


def choose_lanes(x: Float[Array, "n h w c"], levels: list[Level]) -> int:
    """Choose how many images are processed side by side."""
    n, h, w, _ = x.shape
    if gpu.is_enabled():
        unit = gpu_programs.LANES_PER_PROGRAM
        planes = max(len(level.grid) * math.prod(level.grid.shape) for level in levels)
        most = unit * max(MAX_GPU_PLANES_BYTES // (x.dtype.itemsize * planes * unit), 1)
        n = -(-n // -(-n // most))  # blocks of the same size
    else:
        unit = REGISTER_BYTES // x.dtype.itemsize
        most = unit * max(MAX_PLANE_BYTES // (REGISTER_BYTES * h * w), 1)
    needed = -(-n // unit) * unit if n > unit else 1 << (n - 1).bit_length()  # fills registers
    return min(most, needed)


def split_into_lanes(x: Array, lanes: int) -> Array:
    """Reshape (n, ...) to (blocks, ..., lanes), the last block padded with the last image."""
    blocks = devices.pad_rows(x, lanes).reshape(-1, lanes, *x.shape[1:])
    return jnp.moveaxis(blocks, 1, -1)


def merge_lanes(x: Array, n: int) -> Array:
    """Invert `split_into_lanes`."""
    return jnp.moveaxis(x, -1, 1).reshape(-1, *x.shape[1:-1])[:n]
