"""Which infinitely wide network: a name from the command line becomes a kernel function.

NTK parameterisation, ReLU, weight deviation sqrt(2), bias deviation 0.1, 3x3 SAME convolutions,
2x2 average pooling of stride 2, as in the KIP papers (arXiv:2011.00050, arXiv:2107.13034).
"""

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsdistill.harness.errors import UserError, unknown
from dsdistill.kernels import tangents
from dsdistill.kernels.dense import fc_ntk

Kernel = Callable[[Float[Array, "n h w c"], Float[Array, "m h w c"]], Float[Array, "n m"]]
Diagonal = Callable[[Float[Array, "n h w c"]], Float[Array, " n"]]

W_STD, B_STD = math.sqrt(2), 0.1
MYRTLE = {5: (1, 1, 1), 7: (1, 2, 2), 10: (2, 3, 3)}  # (Conv, ReLU) pairs in each block


@dataclass(frozen=True)
class Network:
    """An infinitely wide network, as its neural tangent kernel.

    Attributes:
        name: As a user would write it, with the depth.
        engine: What computes it: `closed form` or `neural-tangents`.
        kernel: Of two sets of images, in their dtype, differentiable in both.
        diagonal: Of each image with itself, for float64 images; None if `kernel` is as exact there
            in float64 as elsewhere.
    """

    name: str
    engine: str
    kernel: Kernel
    diagonal: Diagonal | None = None


def parse(name: str, depth: int | None = None) -> Network:
    """The network of a name.

    Args:
        name: `fc`, `conv`, `convnet`, `convnet3`, `myrtle`, or `module:attribute` for a
            neural-tangents network: a `stax` triple or a kernel function.
        depth: Hidden layers of `fc` and `conv` (default 1), pooled blocks of `convnet` (3),
            or the variant of `myrtle` (5, 7 or 10; default 5).

    Raises:
        UserError: For an unknown name, a module that cannot be imported, or an impossible depth.
    """
    if ":" in name:
        return _from_module(name, depth)
    if name not in _BUILDERS:
        raise unknown("kernel", name, [*_BUILDERS, "module:attribute"])
    build, default = _BUILDERS[name]
    if depth is not None and (default is None or depth < 1):
        rule = "has no --depth" if default is None else f"needs a depth of at least 1, got {depth}"
        raise UserError(f"the kernel {name} {rule}")
    return build(depth or default)


def _fc(depth: int) -> Network:
    kernel = functools.partial(fc_ntk, depth=depth, w_std=W_STD, b_std=B_STD)
    return Network(f"fc({depth})", "closed form", kernel)


def _conv(depth: int) -> Network:
    return _serial(f"conv({depth})", lambda stax: [*_convs(stax, depth), stax.Flatten()])


def _convnet(depth: int) -> Network:
    def layers(stax: Any) -> list:
        return [*_convs(stax, 1), *_pooled(stax, (1,) * depth), stax.Flatten()]

    return _serial(f"convnet({depth})", layers)


def _convnet3(_: int) -> Network:
    return _serial("convnet3", lambda stax: [*_pooled(stax, (1, 1, 1)), stax.Flatten()])


def _myrtle(variant: int) -> Network:
    if variant not in MYRTLE:
        raise UserError(f"myrtle has the depths {', '.join(map(str, MYRTLE))}, got {variant}")
    first, second, third = MYRTLE[variant]

    def layers(stax: Any) -> list:
        blocks = [*_pooled(stax, (first, second)), *_convs(stax, third)]
        return [*_convs(stax, 1), *blocks, stax.GlobalAvgPool()]

    return _serial(f"myrtle({variant})", layers)


_BUILDERS: dict[str, tuple[Callable[[Any], Network], int | None]] = {
    "fc": (_fc, 1),
    "conv": (_conv, 1),
    "convnet": (_convnet, 3),
    "convnet3": (_convnet3, None),
    "myrtle": (_myrtle, 5),
}


def _convs(stax: Any, count: int) -> list:
    """`count` pairs of a 3x3 convolution and a ReLU. The width plays no part in the kernel."""
    pair = [stax.Conv(1, (3, 3), padding="SAME", W_std=W_STD, b_std=B_STD), stax.Relu()]
    return pair * count


def _pooled(stax: Any, blocks: tuple[int, ...]) -> list:
    """Blocks of so many convolutions each, every block ending in a 2x2 average pooling."""
    pool = stax.AvgPool((2, 2), strides=(2, 2))
    return [layer for count in blocks for layer in [*_convs(stax, count), pool]]


def _serial(name: str, layers: Callable[[Any], list]) -> Network:
    """A network of `stax` layers with a dense readout, through neural-tangents."""
    stax = tangents.load().stax
    readout = stax.Dense(1, W_std=W_STD, b_std=B_STD)
    return _from_kernel(name, stax.serial(*layers(stax), readout)[2])


def _from_module(name: str, depth: int | None) -> Network:
    module, _, attribute = name.partition(":")
    tangents.load()  # a user's module imports neural_tangents itself
    if depth is not None:
        raise UserError(f"the kernel {name} has no --depth: its module fixes the network")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"kernel {name!r} cannot be imported: {error}") from error
    kernel = found[2] if isinstance(found, tuple) and len(found) == 3 else found
    if not callable(kernel):
        raise UserError(f"kernel {name!r} is neither a stax network nor a kernel function")
    return _from_kernel(name, kernel)


def _from_kernel(name: str, kernel: Callable[..., Any]) -> Network:
    return Network(name, "neural-tangents", _in_float32(kernel), _diagonal(kernel))


def _in_float32(kernel: Callable[..., Any]) -> Kernel:
    """neural-tangents' kernel of float32 images in float32, whatever mode JAX is in.

    In x64 mode its float64 constants would promote everything, and XLA's CPU compiler (jaxlib
    0.10.2) crashes on its float64 average pooling.
    """

    def plain(x1: Array, x2: Array) -> Array:
        with jax.enable_x64(x1.dtype == jnp.float64):
            return kernel(x1, x2, "ntk")

    def backward(images: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
        with jax.enable_x64(images[0].dtype == jnp.float64):
            return jax.vjp(plain, *images)[1](cotangent)

    single = jax.custom_vjp(plain)
    single.defvjp(lambda x1, x2: (plain(x1, x2), (x1, x2)), backward)
    return single


def _diagonal(kernel: Callable[..., Any]) -> Diagonal:
    """Each image with itself, in float64, where neural-tangents is exact on identical images."""
    return lambda x: jax.lax.map(lambda image: kernel(image[None], None, "ntk")[0, 0], x)
