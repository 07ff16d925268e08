"""All devices of all hosts: targets are shared out, and each device computes with its share.

A program made with `shard_targets` runs on every device alike, on the same values but for the targets,
and ends in values that all devices hold: a `total` over the shares, or the shares `gather_rows`. With
several hosts (see `hosts`) every host must run the same programs in the same order.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

T = TypeVar("T")

# XLA's default of 256 bits leaves half of an AVX-512 register empty: 1.5 times slower.
_FLAGS = "--xla_cpu_prefer_vector_width=512"
_AXIS = "targets"
_WHOLE, _PART = PartitionSpec(), PartitionSpec(_AXIS)


def use_all() -> None:
    """One JAX device for each core; before JAX computes anything, for it cannot be changed later.

    XLA runs a loop on one core. Two devices of one host run two. Of a GPU's memory JAX takes what
    it needs: torch, which evaluates on the same card, needs some too.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["XLA_FLAGS"] = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def replicate(values: T) -> T:
    """Host 0's values on every device, as the results of a computation with `shard_targets` are.

    Args:
        values: Arrays in any structure, on every host of the same shapes and dtypes.
    """
    if jax.process_count() == 1:
        return jax.device_put(values, NamedSharding(_mesh(), _WHOLE))
    return jax.tree.map(functools.partial(_reduce_hosts, _first), values)


def minimum(value: float) -> float:
    """The least of the hosts' values, such as their free memory."""
    return value if jax.process_count() == 1 else float(_reduce_hosts(jnp.min, value))


def gather_hosts(value: Any) -> list[np.ndarray]:
    """Every host's value, in the order of the hosts; of one shape and dtype."""
    hosts = [device.process_index for device in _mesh().devices]
    rows = np.asarray(_reduce_hosts(_all, value))
    return [rows[hosts.index(host)] for host in range(jax.process_count())]


def share(count: int) -> int:
    """How many of so many targets one device has to take."""
    return -(-count // jax.device_count())


def shard_targets(work: Callable[..., T]) -> Callable[..., T]:
    """`work(whole, real, *rows)` on every device, with its share of the rows.

    Shares are filled up to the same size with copies of the last row, which are not `real`. Taking
    one is no communication, for every host holds all rows.

    Args:
        work: Traced; what it returns must be the same on all devices, so it ends with `total` or
            with `gather_rows`. Its gradients are those of its own share.

    Returns:
        A function of `whole`, of how many rows from the first on are real, and of the rows.
    """

    def across(whole: Any, count: int | Array, *rows: Shaped[Array, "m ..."]) -> T:
        size = share(len(rows[0]))

        def mine(whole: Any, count: Array, *rows: Array) -> T:
            start = jax.lax.axis_index(_AXIS) * size
            # Slices: XLA gathers rows by number as slowly as it evaluates a kernel.
            taken = [
                jax.lax.dynamic_slice_in_dim(_pad_rows(r, jax.device_count()), start, size)
                for r in rows
            ]
            return work(whole, start + jnp.arange(size) < count, *taken)

        return everywhere(mine)(whole, jnp.asarray(count), *rows)

    return across


def everywhere(work: Callable[..., T]) -> Callable[..., T]:
    """`work` on every device, on the same values; what it returns must be the same on all."""
    # check_vma knows no custom derivative; that all devices hold the same is tested.
    return jax.shard_map(work, mesh=_mesh(), in_specs=_WHOLE, out_specs=_WHOLE, check_vma=False)


def total(values: T) -> T:
    """Inside `shard_targets`: the sum of all devices' values. All arrays travel as one."""
    flat, restored = jax.flatten_util.ravel_pytree(values)
    return restored(jax.lax.psum(flat, _AXIS))


def gather_rows(rows: Shaped[Array, "m ..."]) -> Shaped[Array, "n ..."]:
    """Inside `shard_targets`: the rows of all devices, in the order in which they were shared out."""
    return jax.lax.all_gather(rows, _AXIS, tiled=True)


def local_rows(rows: Shaped[Array, "n ..."]) -> Shaped[Array, "s ..."]:
    """Inside `shard_targets`: this device's share of rows that all devices hold, filled up."""
    size = share(len(rows))
    start = jax.lax.axis_index(_AXIS) * size
    return jax.lax.dynamic_slice_in_dim(_pad_rows(rows, jax.device_count()), start, size)


def on_one_device(work: Callable[..., T]) -> Callable[..., T]:
    """A function as one device of `shard_targets` computes it: nothing in it is shared out again."""
    mesh = Mesh(np.array(jax.local_devices()[:1]), _AXIS, axis_types=(AxisType.Auto,))
    return jax.shard_map(work, mesh=mesh, in_specs=_WHOLE, out_specs=_WHOLE, check_vma=False)


def shard_kernel(kernel: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """The same kernel, the second set of images divided among the devices of this host.

    Differentiable: the gradient with respect to the first set is summed over the devices. Inside
    `shard_targets` it is the kernel itself, since the targets there are one device's share already.
    """

    def across(x1: Array, x2: Array) -> Array:
        count = min(jax.local_device_count(), len(x2))
        if count == 1 or jax.sharding.get_abstract_mesh().manual_axes:
            return kernel(x1, x2)
        devices = np.array(jax.local_devices()[:count])
        mesh = Mesh(devices, _AXIS, axis_types=(AxisType.Auto,))
        columns = PartitionSpec(None, _AXIS)
        # check_vma knows no custom derivative; the sum over devices is tested.
        run = jax.shard_map(
            kernel, mesh=mesh, in_specs=(_WHOLE, _PART), out_specs=columns, check_vma=False
        )
        return run(x1, _pad_rows(x2, count))[:, : len(x2)]

    return across


def shard_symmetric_kernel(
    kernel: Callable[[Array, Array], Array], undivided: Callable[[Array], Array]
) -> Callable[[Array], Array]:
    """The kernel of a set of images with itself, its rows divided among the devices.

    Differentiable inside `shard_targets`: the gradient is this device's part of that of all devices'
    sum. On one device, and outside, it is `undivided`.

    Args:
        kernel: Differentiable in its first argument.
        undivided: What `kernel` gives for a set with itself, in a cheaper way.
    """

    def value(x: Array) -> Array:
        return gather_rows(kernel(local_rows(x), x))[: len(x)]

    def gradient(x: Array, cotangent: Array) -> tuple[Array]:
        whole = jax.lax.psum(cotangent, _AXIS)
        pullback = jax.vjp(lambda rows: kernel(rows, x), local_rows(x))[1]
        # A row is the first argument in its own row and the second one in its column.
        part = pullback(local_rows(whole + whole.T))[0]
        size, start = len(part), jax.lax.axis_index(_AXIS) * len(part)
        every = jnp.zeros((jax.device_count() * size, *part.shape[1:]), part.dtype)
        return (jax.lax.dynamic_update_slice_in_dim(every, part, start, 0)[: len(x)],)

    shared = jax.custom_vjp(value)
    shared.defvjp(lambda x: (value(x), x), gradient)

    def across(x: Array) -> Array:
        inside = _AXIS in jax.sharding.get_abstract_mesh().manual_axes
        return shared(x) if inside and jax.device_count() > 1 else undivided(x)

    return across


def _pad_rows(rows: Array, count: int) -> Array:
    """The rows, and copies of the last one up to a multiple of `count`."""
    missing = -len(rows) % count
    return jnp.concatenate([rows, jnp.broadcast_to(rows[-1:], (missing, *rows.shape[1:]))])


def _mesh() -> Mesh:
    """Of all devices of all hosts, those of host 0 first."""
    ordered = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered), _AXIS, axis_types=(AxisType.Auto,))


def _first(rows: Array) -> Array:
    return rows[0]


def _all(rows: Array) -> Array:
    return rows


def _reduce_hosts(reduction: Callable[[Array], Array], value: Any) -> Array:
    """One of the hosts' values, or something between them, on every device.

    Args:
        reduction: Of rows, one for each device, which hold its host's value.
        value: This host's.
    """
    row = np.asarray(value)[None]
    shape = (jax.device_count(), *row.shape[1:])
    rows = jax.make_array_from_callback(shape, NamedSharding(_mesh(), _PART), lambda _: row)
    return _program(reduction)(rows)


@functools.cache
def _program(reduction: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return jax.jit(reduction, out_shardings=NamedSharding(_mesh(), _WHOLE))
