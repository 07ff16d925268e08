"""Divide targets among all devices of all hosts; each device computes with its share.

A program made with `shard_targets` runs on every device with the same values except for the
targets, and returns values that agree on all devices: a `total` over the shares, or all shares
joined by `gather_rows`. With several hosts (see `hosts`) every host must run the same programs in
the same order.
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

# XLA's default of 256 bits leaves half of each AVX-512 register empty, 1.5 times slower.
_FLAGS = "--xla_cpu_prefer_vector_width=512"
_AXIS = "targets"
_REPLICATED, _SHARDED = PartitionSpec(), PartitionSpec(_AXIS)


def use_all() -> None:
    """Give JAX one device per core; to be called before JAX computes anything.

    XLA runs a loop on one core, so each core needs a device of its own. JAX takes GPU memory as it
    needs it instead of most of it at the start, since torch evaluates on the same card.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["XLA_FLAGS"] = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def replicate(values: T) -> T:
    """Put host 0's values on every device, as the results of `shard_targets` are placed.

    Args:
        values: Pytree of arrays, of the same shapes and dtypes on every host.
    """
    if jax.process_count() == 1:
        return jax.device_put(values, NamedSharding(_mesh(), _REPLICATED))
    return jax.tree.map(functools.partial(_reduce_hosts, _first), values)


def minimum(value: float) -> float:
    """The smallest of the hosts' values, such as of their free memory."""
    return value if jax.process_count() == 1 else float(_reduce_hosts(jnp.min, value))


def gather_hosts(value: Any) -> list[np.ndarray]:
    """The values of all hosts, in the order of the hosts, on every host.

    Args:
        value: This host's array or number, of the same shape and dtype on every host.
    """
    hosts = [device.process_index for device in _mesh().devices]
    rows = np.asarray(_reduce_hosts(_all, value))
    return [rows[hosts.index(host)] for host in range(jax.process_count())]


def share(count: int) -> int:
    """Number of targets per device when `count` targets are divided among all devices."""
    return -(-count // jax.device_count())


def shard_targets(work: Callable[..., T]) -> Callable[..., T]:
    """Run `work(whole, real, *rows)` on every device with its share of the rows.

    Shares are padded to the same size with copies of the last row, which `real` marks as False.
    Taking a share needs no communication, since every host holds all rows.

    Args:
        work: Function that JAX can trace. Its results must agree on all devices, so it ends with
            `total` or `gather_rows`. Its gradients are those of its own share.

    Returns:
        A function of `whole`, of the number of rows that are real, and of the rows.
    """

    def across(whole: Any, count: int | Array, *rows: Shaped[Array, "m ..."]) -> T:
        size = share(len(rows[0]))

        def on_share(whole: Any, count: Array, *rows: Array) -> T:
            start = jax.lax.axis_index(_AXIS) * size
            # Slices, since XLA gathers rows by index as slowly as it evaluates a kernel.
            shares = [
                jax.lax.dynamic_slice_in_dim(pad_rows(r, jax.device_count()), start, size)
                for r in rows
            ]
            return work(whole, start + jnp.arange(size) < count, *shares)

        return everywhere(on_share)(whole, jnp.asarray(count), *rows)

    return across


def everywhere(work: Callable[..., T]) -> Callable[..., T]:
    """Run `work` on every device with the same values; its results must agree on all devices."""
    # check_vma fails on custom derivatives; a test checks that all devices agree.
    return jax.shard_map(
        work, mesh=_mesh(), in_specs=_REPLICATED, out_specs=_REPLICATED, check_vma=False
    )


def total(values: T) -> T:
    """Sum values over all devices, inside `shard_targets`; all arrays are sent as one."""
    flat, unravel = jax.flatten_util.ravel_pytree(values)
    return unravel(jax.lax.psum(flat, _AXIS))


def gather_rows(rows: Shaped[Array, "m ..."]) -> Shaped[Array, "n ..."]:
    """Join the rows of all devices in their original order, inside `shard_targets`."""
    return jax.lax.all_gather(rows, _AXIS, tiled=True)


def local_rows(rows: Shaped[Array, "n ..."]) -> Shaped[Array, "s ..."]:
    """This device's padded share of rows that all devices hold, inside `shard_targets`."""
    size = share(len(rows))
    start = jax.lax.axis_index(_AXIS) * size
    return jax.lax.dynamic_slice_in_dim(pad_rows(rows, jax.device_count()), start, size)


def local_mask(count: int) -> Shaped[Array, " s"]:
    """Which rows of `local_rows` of `count` rows are real, and not padding."""
    size = share(count)
    return jax.lax.axis_index(_AXIS) * size + jnp.arange(size) < count


def pad_rows(rows: Shaped[Array, "n ..."], multiple: int) -> Shaped[Array, "m ..."]:
    """Append copies of the last row up to a multiple of a number of rows."""
    missing = -len(rows) % multiple
    return jnp.concatenate([rows, jnp.broadcast_to(rows[-1:], (missing, *rows.shape[1:]))])


def on_one_device(work: Callable[..., T]) -> Callable[..., T]:
    """Run a function as one device of `shard_targets` does: nothing in it is divided again."""
    mesh = Mesh(np.array(jax.local_devices()[:1]), _AXIS, axis_types=(AxisType.Auto,))
    return jax.shard_map(
        work, mesh=mesh, in_specs=_REPLICATED, out_specs=_REPLICATED, check_vma=False
    )


def shard_kernel(kernel: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """Divide the second set of images of a kernel among the devices of this host.

    The result is differentiable: the gradient with respect to the first set is summed over the
    devices. Inside `shard_targets` the kernel is called directly, since the targets there are
    already one device's share.
    """

    def across(x1: Array, x2: Array) -> Array:
        count = min(jax.local_device_count(), len(x2))
        if count == 1 or jax.sharding.get_abstract_mesh().manual_axes:
            return kernel(x1, x2)
        devices = np.array(jax.local_devices()[:count])
        mesh = Mesh(devices, _AXIS, axis_types=(AxisType.Auto,))
        columns = PartitionSpec(None, _AXIS)
        # check_vma fails on custom derivatives; a test checks the sum over the devices.
        run = jax.shard_map(
            kernel, mesh=mesh, in_specs=(_REPLICATED, _SHARDED), out_specs=columns, check_vma=False
        )
        return run(x1, pad_rows(x2, count))[:, : len(x2)]

    return across


def shard_symmetric_kernel(
    kernel: Callable[[Array, Array], Array], undivided: Callable[[Array], Array]
) -> Callable[[Array], Array]:
    """Divide the rows of the kernel of a set of images with itself among the devices.

    The result is differentiable inside `shard_targets`: the gradient is this device's part of the
    gradient of the sum over all devices. Outside, and on one device, `undivided` is called.

    Args:
        kernel: Kernel of two sets, differentiable in its first argument.
        undivided: Cheaper function of one set with the same values as `kernel(x, x)`.
    """

    def value(x: Array) -> Array:
        return gather_rows(kernel(local_rows(x), x))[: len(x)]

    def gradient(x: Array, cotangent: Array) -> tuple[Array]:
        whole = jax.lax.psum(cotangent, _AXIS)
        pullback = jax.vjp(lambda rows: kernel(rows, x), local_rows(x))[1]
        # An image is the first argument in its row and the second in its column.
        part = pullback(local_rows(whole + whole.T))[0]
        size, start = len(part), jax.lax.axis_index(_AXIS) * len(part)
        full = jnp.zeros((jax.device_count() * size, *part.shape[1:]), part.dtype)
        return (jax.lax.dynamic_update_slice_in_dim(full, part, start, 0)[: len(x)],)

    shared = jax.custom_vjp(value)
    shared.defvjp(lambda x: (value(x), x), gradient)

    def across(x: Array) -> Array:
        inside = _AXIS in jax.sharding.get_abstract_mesh().manual_axes
        return shared(x) if inside and jax.device_count() > 1 else undivided(x)

    return across


def _mesh() -> Mesh:
    """The mesh of all devices of all hosts, those of host 0 first."""
    ordered = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered), _AXIS, axis_types=(AxisType.Auto,))


def _first(rows: Array) -> Array:
    return rows[0]


def _all(rows: Array) -> Array:
    return rows


def _reduce_hosts(reduction: Callable[[Array], Array], value: Any) -> Array:
    """Reduce the hosts' values to one that every device holds.

    Args:
        reduction: Function of an array with one row per device, which holds its host's value.
        value: This host's value.
    """
    row = np.asarray(value)[None]
    shape = (jax.device_count(), *row.shape[1:])
    rows = jax.make_array_from_callback(shape, NamedSharding(_mesh(), _SHARDED), lambda _: row)
    return _program(reduction)(rows)


@functools.cache
def _program(reduction: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return jax.jit(reduction, out_shardings=NamedSharding(_mesh(), _REPLICATED))
