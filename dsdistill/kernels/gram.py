"""A Gram matrix in tiles that fit into free memory, chosen before anything is compiled.

A convolutional kernel can need megabytes for one pair of images, and a compiler takes minutes to
find out that they do not fit. So the memory of a tile is estimated from the traced, uncompiled
computation, and the tile size follows from it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsdistill.harness import memory
from dsdistill.harness.errors import UserError
from dsdistill.kernels.networks import InfiniteNetwork, Kernel
from dsdistill.parallel import devices

MAX_MEMORY_FRACTION = 0.5  # share of free memory for one tile, as `peak_bytes` estimates it
MAX_TILE_BYTES = 2**31  # a larger tile is not faster, and leaves less memory to others


@dataclass(frozen=True)
class Tile:
    """Number of images of each side that are evaluated at a time."""

    rows: int
    columns: int


def plan_tile(
    network: InfiniteNetwork,
    n: int,
    m: int,
    shape: tuple[int, int, int],
    *,
    gradient: bool,
    dtype: Any = jnp.float32,
) -> Tile:
    """The largest useful tile of an n x m Gram matrix, for one device; the same on all hosts.

    Args:
        network: Network of the kernel.
        n, m: Number of images on each side.
        shape: Height, width and channels of an image.
        gradient: Whether the gradient in the first side is needed as well.
        dtype: Dtype of the images. float64 needs `jax.enable_x64(True)` around this call.

    Raises:
        UserError: If not even one pair fits; the message states both sizes.
    """
    usable = MAX_MEMORY_FRACTION * free_bytes()
    budget = min(usable, MAX_TILE_BYTES)

    def cost(tile: Tile) -> int:
        return _traced_bytes(network.kernel, tile, shape, gradient, dtype)

    whole, pair = Tile(n, m), Tile(1, 1)
    if cost(whole) <= budget:
        return whole
    if cost(pair) > usable:
        raise UserError(
            f"the kernel {network.name} needs {memory.format_bytes(cost(pair))} for one pair of "
            f"{shape[0]}x{shape[1]} images, and only {memory.format_bytes(usable)} can be used: "
            "choose a smaller --image-size or another --kernel"
        )
    return _grow(pair, whole, cost, budget)


def _grow(tile: Tile, whole: Tile, cost: Callable[[Tile], int], budget: float) -> Tile:
    """Scale a tile up to the budget, as square as the matrix allows.

    A tile's cost is a sum of terms proportional to 1, r, c and r c, so scaling a side by f scales
    the cost by at most f: no step can overshoot. The tile is square because the variances of every
    image are computed again in each tile.
    """
    for _ in range(3):
        scale = math.sqrt(budget / cost(tile))
        tile = Tile(
            min(max(int(tile.rows * scale), 1), whole.rows),
            min(max(int(tile.columns * scale), 1), whole.columns),
        )
    columns = max(int(tile.columns * budget / cost(tile)), 1)
    return Tile(tile.rows, min(columns, whole.columns))


def gram(
    kernel: Kernel, x1: Float[Array, "n h w c"], x2: Float[Array, "m h w c"], tile: Tile
) -> Float[Array, "n m"]:
    """Evaluate the kernel between two sets of images, one tile at a time.

    Differentiable: the backward pass evaluates each tile again instead of storing all of them.
    Both sides are padded to whole tiles, so that only one tile shape is compiled.
    """
    n, m = len(x1), len(x2)
    if n <= tile.rows and m <= tile.columns:
        return kernel(x1, x2)
    rows, columns = _blocks(x1, tile.rows), _blocks(x2, tile.columns)
    tile_kernel = jax.checkpoint(kernel)
    tiles = jax.lax.map(
        lambda b: jax.lax.map(lambda a: tile_kernel(a, b), rows), columns
    )  # (B, A, r, c)
    full = tiles.transpose(1, 2, 0, 3).reshape(rows.shape[0] * tile.rows, -1)
    return full[:n, :m]


def _blocks(x: Array, size: int) -> Array:
    """Images in blocks of `size`, the last block padded with copies of the last image."""
    return devices.pad_rows(x, size).reshape(-1, size, *x.shape[1:])


def _traced_bytes(
    kernel: Kernel, tile: Tile, shape: tuple[int, int, int], gradient: bool, dtype: Any
) -> int:
    x1 = jax.ShapeDtypeStruct((tile.rows, *shape), dtype)
    x2 = jax.ShapeDtypeStruct((tile.columns, *shape), dtype)

    def with_gradient(a: Array, b: Array) -> Any:
        value, pullback = jax.vjp(lambda a: kernel(a, b), a)
        return pullback(value)

    work = devices.on_one_device(with_gradient if gradient else kernel)
    traced = jax.make_jaxpr(work)(x1, x2)
    return peak_bytes(traced.jaxpr)


def peak_bytes(jaxpr: jex.Jaxpr) -> int:
    """Peak of live bytes while a traced computation runs step by step.

    An estimate: the compiler fuses steps and does not store values between them, but copies some
    of what loops carry. Measured use is up to 1.1 times the estimate for a large tile, and 1.5
    times for a tiny one.
    """
    last_use = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in _variables(eqn.invars)}
    last_use |= dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
    live = peak = sum(map(_count_bytes, [*jaxpr.invars, *jaxpr.constvars]))
    for i, eqn in enumerate(jaxpr.eqns):
        inner = max((peak_bytes(j) for j in _inner_jaxprs(eqn)), default=0)
        arguments = sum(map(_count_bytes, _variables(eqn.invars))) if inner else 0
        outputs = sum(map(_count_bytes, eqn.outvars))
        peak = max(peak, live + max(outputs, inner - arguments))
        live += outputs
        dead = {v for v in [*_variables(eqn.invars), *eqn.outvars] if last_use.get(v, -1) <= i}
        live -= sum(map(_count_bytes, dead - {*jaxpr.invars, *jaxpr.constvars}))
    return peak


def _inner_jaxprs(eqn: jex.JaxprEqn) -> list[jex.Jaxpr]:
    """Computations inside a call, a loop or a branch."""
    values = [v for p in eqn.params.values() for v in (p if isinstance(p, tuple | list) else [p])]
    closed = [v.jaxpr for v in values if isinstance(v, jex.ClosedJaxpr)]
    return closed + [v for v in values if isinstance(v, jex.Jaxpr)]


def _variables(atoms: Any) -> list[jex.Var]:
    return [atom for atom in atoms if not isinstance(atom, jex.Literal)]


def _count_bytes(var: jex.Var) -> int:
    aval: Any = var.aval
    if not hasattr(aval, "shape"):
        return 0
    return math.prod(aval.shape) * aval.dtype.itemsize


def free_bytes() -> float:
    """Free bytes per device, on the host that has the least."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":  # all devices of a host share its memory
        return devices.minimum(memory.available() / jax.local_device_count())
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit", memory.available())
    return devices.minimum(limit - stats.get("bytes_in_use", 0))
