"""Networks as kernels: the kernel function of a name on the command line.

NTK parameterisation, ReLU, weight deviation sqrt(2), bias deviation 0.1, 3x3 SAME convolutions,
2x2 average pooling of stride 2, as in the KIP papers (arXiv:2011.00050, arXiv:2107.13034). Kernels
of finite networks are in `features`.
"""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsdistill.harness import imports
from dsdistill.harness.errors import UserError, one_line, unknown_name
from dsdistill.kernels import features, neural_tangents, notation
from dsdistill.kernels.conv import conv_kernel, variances
from dsdistill.kernels.dense import fc_ntk
from dsdistill.kernels.features import FeatureNetwork
from dsdistill.kernels.linear import linear_map, linear_ntk
from dsdistill.kernels.notation import Architecture
from dsdistill.parallel import devices

Kernel = Callable[[Float[Array, "n h w c"], Float[Array, "m h w c"]], Float[Array, "n m"]]
KernelDiagonal = Callable[[Float[Array, "n h w c"]], Float[Array, " n"]]
SymmetricKernel = Callable[[Float[Array, "n h w c"]], Float[Array, "n n"]]
Slopes = Callable[
    [Float[Array, "n h w c"], Float[Array, "m h w c"]],
    tuple[Float[Array, "n m"], Float[Array, "n m h w c"]],
]

OBJECT_PREFIX = "python:"  # of the name of a network that a caller from Python has given
W_STD, B_STD = math.sqrt(2), 0.1
MYRTLE_BLOCKS = {5: (1, 1, 1), 7: (1, 2, 2), 10: (2, 3, 3)}  # (Conv, ReLU) pairs in each block


class Engine(StrEnum):
    """How a kernel is computed."""

    CLOSED_FORM = "closed form"
    EXACT_PLANES = "exact planes"
    NEURAL_TANGENTS = "neural-tangents"
    FEATURES = "features"


@dataclass(frozen=True)
class InfiniteNetwork:
    """An infinitely wide network, as its neural tangent kernel; or the features of a finite one.

    Attributes:
        name: Name as a user writes it, with the depth.
        engine: How its kernel is computed.
        kernel: Kernel between two sets of images, in their dtype, differentiable in both.
        diagonal: Kernel of each image with itself, for float64 images; None if `kernel` is as exact
            there in float64 as elsewhere.
        symmetric: Kernel of a set of images with itself, where that costs less than `kernel`.
        slopes: Kernel between two sets of images, and the gradient of every entry with respect to
            the first of its two images.
        feature_map: Map of images to vectors whose inner products are the kernel, where there is an
            explicit one; sums over any number of images then need no kernel matrix.
        deviations: Deviations of each image before each ReLU, (n, h, w) each; to explain a value
            that is not finite.
        min_size: Smallest height and width of images, in pixels.
        module_sha256: SHA-256 of the file of the user's module, if any; not of what that imports.
        features: The finite network whose features make the kernel; None for an infinitely wide
            one. `kernel` is that of a few random networks, always the same ones.
    """

    name: str
    engine: Engine
    kernel: Kernel
    diagonal: KernelDiagonal | None = None
    symmetric: SymmetricKernel | None = None
    slopes: Slopes | None = None
    feature_map: Callable[[Float[Array, "n h w c"]], Float[Array, "n p"]] | None = None
    deviations: Callable[[Float[Array, "n h w c"]], list[Array]] | None = None
    min_size: int = 1
    module_sha256: str | None = None
    features: FeatureNetwork | None = None


def parse(
    name: str, depth: int | None = None, *, w_std: float = W_STD, b_std: float = B_STD
) -> InfiniteNetwork:
    """Build the network that a name means.

    Args:
        name: `fc`, `linear`, `conv`, `convnet`, `convnet3` or `myrtle`, optionally with a depth, as
            in `convnet(2)`; a sequence such as `CR-3xCRP-flatten` (see `notation`);
            `features:convnet` or `features:convnet:WIDTH` (see `features`); or `module:attribute`
            for a neural-tangents network: a `stax` triple or a kernel function. The module is
            imported, also from the current folder: never pass a name from a file.
        depth: Hidden layers of `fc` and `conv` (default 1), pooled blocks of `convnet` (3),
            or the variant of `myrtle` (5, 7 or 10; default 5).
        w_std, b_std: Deviations of weights and biases; modules and finite networks set their own.

    Raises:
        UserError: For an unknown name, a module that cannot be imported, or an impossible depth.
    """
    if notation.is_finite(name):
        return _finite(name, depth)
    if notation.is_code(name):
        return _from_module(name, depth)
    if notation.is_notation(name):
        if depth is not None:
            raise UserError(f"the kernel {name} takes no --depth: its sequence sets the depth")
        return _convolutional(name, notation.parse(name, w_std=w_std, b_std=b_std))
    match = re.fullmatch(r"([a-z0-9]+)\(([0-9]+)\)", name)
    if match:
        if depth is not None:
            raise UserError(f"the kernel {name} has its depth in its name; leave out --depth")
        name, depth = match[1], int(match[2])
    if name not in _BUILDERS:
        others = ["CR-3xCRP-flatten", f"{notation.FEATURES}convnet", "module:attribute"]
        raise unknown_name("kernel", name, [*_BUILDERS, *others])
    build, default = _BUILDERS[name]
    if depth is not None and (default is None or depth < 1):
        rule = "has no depth" if default is None else f"needs a depth of at least 1, got {depth}"
        raise UserError(f"the kernel {name} {rule}")
    return build(depth or default, w_std, b_std)


def check(network: InfiniteNetwork, shape: tuple[int, int, int]) -> None:
    """Refuse images that a network cannot take, and an invalid user's kernel; nothing is computed.

    Args:
        network: Network from `parse`.
        shape: Height, width and channels of an image.

    Raises:
        UserError: If the images are too small for its poolings; if a user's kernel fails, or does
            not return one number per pair of images, as for a network without a readout.
    """
    if min(shape[:2]) < network.min_size:
        raise UserError(
            f"the kernel {network.name} needs images of at least {network.min_size}x"
            f"{network.min_size} pixels for its poolings, got {shape[0]}x{shape[1]}: choose "
            f"--image-size {network.min_size} or more, or another --kernel"
        )
    if network.diagonal is None or network.engine is not Engine.NEURAL_TANGENTS:
        return
    two, three = (jax.ShapeDtypeStruct((n, *shape), jnp.float32) for n in (2, 3))
    try:
        pairs = jax.eval_shape(network.kernel, two, three)
        diagonal = jax.eval_shape(network.diagonal, two)
    except Exception as error:  # whatever the user's code and neural-tangents raise
        raise UserError(
            f"the kernel {network.name} cannot be evaluated for images of "
            f"{'x'.join(map(str, shape))} ({one_line(error, kind=True)[:300]}): it must be a "
            "neural-tangents network that ends in a readout, such as stax.Flatten() and "
            "stax.Dense(1)"
        ) from error
    if getattr(pairs, "shape", None) != (2, 3) or getattr(diagonal, "shape", None) != (2,):
        raise UserError(
            f"the kernel {network.name} must give one number for each pair of images, 2x3 for 2 "
            f"and 3 of them, got {getattr(pairs, 'shape', type(pairs).__name__)}: end the network "
            "in a readout, such as stax.Flatten() and stax.Dense(1)"
        )


def _fc(depth: int, w_std: float, b_std: float) -> InfiniteNetwork:
    kernel = functools.partial(fc_ntk, depth=depth, w_std=w_std, b_std=b_std)
    return InfiniteNetwork(f"fc({depth})", Engine.CLOSED_FORM, kernel, slopes=_slopes(kernel))


def _linear(_: int | None, w_std: float, b_std: float) -> InfiniteNetwork:
    if (w_std, b_std) != (W_STD, B_STD):
        raise UserError(
            "the kernel linear has fixed weights, 1 for the images and 1 for the constant: leave "
            f"--w-std and --b-std out, got {w_std:g} and {b_std:g}"
        )
    return InfiniteNetwork(
        "linear",
        Engine.CLOSED_FORM,
        linear_ntk,
        slopes=_slopes(linear_ntk),
        feature_map=linear_map,
    )


def _slopes(kernel: Kernel) -> Slopes:
    """Slopes of a kernel that is cheap for a single pair."""

    def entry(image: Array, other: Array) -> Array:
        return kernel(image[None], other[None])[0, 0]

    rows = jax.vmap(jax.value_and_grad(entry), in_axes=(None, 0))
    return jax.vmap(rows, in_axes=(0, None))


def _conv(depth: int, *std: float) -> InfiniteNetwork:
    return _convolutional(f"conv({depth})", Architecture("CR" * depth, "flatten", *std))


def _convnet(depth: int, *std: float) -> InfiniteNetwork:
    return _convolutional(f"convnet({depth})", Architecture("CR" + "CRP" * depth, "flatten", *std))


def _convnet3(_: int | None, *std: float) -> InfiniteNetwork:
    return _convolutional("convnet3", Architecture("CRP" * 3, "flatten", *std))


def _myrtle(variant: int, *std: float) -> InfiniteNetwork:
    if variant not in MYRTLE_BLOCKS:
        raise UserError(
            f"myrtle has the depths {', '.join(map(str, MYRTLE_BLOCKS))}, got {variant}"
        )
    first, second, third = ("CR" * count for count in MYRTLE_BLOCKS[variant])
    return _convolutional(
        f"myrtle({variant})", Architecture(f"CR{first}P{second}P{third}", "gap", *std)
    )


_BUILDERS: dict[str, tuple[Callable[..., InfiniteNetwork], int | None]] = {
    "fc": (_fc, 1),
    "linear": (_linear, None),
    "conv": (_conv, 1),
    "convnet": (_convnet, 3),
    "convnet3": (_convnet3, None),
    "myrtle": (_myrtle, 5),
}


def _convolutional(name: str, layers: Architecture) -> InfiniteNetwork:
    """Build a network of convolutions, ReLUs and poolings; targets are sharded over devices."""
    kernel = devices.shard_kernel(functools.partial(conv_kernel.ntk, network=layers))
    half = functools.partial(conv_kernel.ntk_symmetric, network=layers)
    symmetric = devices.shard_symmetric_kernel(
        functools.partial(conv_kernel.ntk, network=layers), half
    )
    deviations = functools.partial(variances.deviations, network=layers)
    return InfiniteNetwork(
        name,
        Engine.EXACT_PLANES,
        kernel,
        symmetric=symmetric,
        slopes=functools.partial(conv_kernel.slopes, network=layers),
        deviations=deviations,
        min_size=layers.min_size,
    )


def _finite(name: str, depth: int | None) -> InfiniteNetwork:
    """Build the kernel of a finite network's features."""
    if depth is not None:
        raise UserError(f"the kernel {name} takes no --depth: its network has three blocks")
    network = features.parse(name)
    return InfiniteNetwork(
        f"{notation.FEATURES}convnet:{network.width}",
        Engine.FEATURES,
        functools.partial(features.kernel, network=network),
        symmetric=functools.partial(features.symmetric_kernel, network=network),
        min_size=features.MIN_SIZE,
        features=network,
    )


def _from_module(name: str, depth: int | None) -> InfiniteNetwork:
    neural_tangents.load()  # a user's module imports neural_tangents itself
    if depth is not None:
        raise UserError(f"the kernel {name} takes no --depth: its module fixes the network")
    imported = imports.load("kernel", name)
    return from_neural_tangents(imported.value, name, imported.sha256)


def from_neural_tangents(
    value: object, name: str, module_sha256: str | None = None
) -> InfiniteNetwork:
    """Wrap a network of neural-tangents.

    Args:
        value: A `stax` triple (init_fn, apply_fn, kernel_fn), or a kernel function alone.
        name: Its name, for records and messages.
        module_sha256: SHA-256 of the file that it comes from, if any.

    Raises:
        UserError: If the value is neither.
    """
    kernel = value[2] if isinstance(value, tuple) and len(value) == 3 else value
    if not callable(kernel):
        raise UserError(f"kernel {name!r} is neither a stax network nor a kernel function")
    return InfiniteNetwork(
        name,
        Engine.NEURAL_TANGENTS,
        _in_image_dtype(kernel),
        _diagonal(kernel),
        module_sha256=module_sha256,
    )


def _in_image_dtype(kernel: Callable[..., Any]) -> Kernel:
    """Evaluate a neural-tangents kernel in the dtype of the images, whatever mode JAX is in.

    In x64 mode its float64 constants would promote everything, and XLA's CPU compiler (jaxlib
    0.10.2) crashes on its float64 average pooling. A GPU's default for products and convolutions
    is TF32.
    """

    def plain(x1: Array, x2: Array) -> Array:
        exact = jax.default_matmul_precision("highest")
        with jax.enable_x64(x1.dtype == jnp.float64), exact:
            return kernel(x1, x2, "ntk")

    def backward(images: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
        exact = jax.default_matmul_precision("highest")
        with jax.enable_x64(images[0].dtype == jnp.float64), exact:
            return jax.vjp(plain, *images)[1](cotangent)

    single = jax.custom_vjp(plain)
    single.defvjp(lambda x1, x2: (plain(x1, x2), (x1, x2)), backward)
    return single


def _diagonal(kernel: Callable[..., Any]) -> KernelDiagonal:
    """Kernel of each image with itself in float64, where neural-tangents is exact."""
    return lambda x: jax.lax.map(lambda image: kernel(image[None], None, "ntk")[0, 0], x)
