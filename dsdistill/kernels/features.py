"""Kernels of finite networks: inner products of the features before the readout.

    k(x, x') = mean over networks of  f(x) f(x')^T / d  +  BIAS²

where f(x) are the d values that the last pooling leaves. It is the kernel of training the readout
alone, and its cost grows with the number of images instead of pairs of them.

Images go through in chunks: activations stay in the cache, and memory stays bounded.

Source: Loo, Hasani, Amini and Rus (2022), arXiv:2210.12067 (RFAD), for random networks; Zhou,
Nezhadarya and Ba (2022), arXiv:2206.00719 (FRePo), for trained ones. The network is that of Gidaris
and Komodakis (2018), arXiv:1804.09458: InstanceNorm, with a scale and a shift.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dsdistill.harness.errors import UserError, unknown_name
from dsdistill.kernels.notation import FEATURES
from dsdistill.parallel import devices

BIAS = 0.1  # deviation of the readout's bias, as in the infinitely wide networks
NETWORKS = 4  # random networks in the mean of a kernel
BLOCKS, MIN_SIZE = 3, 8  # poolings, and the smallest image that can be halved so often
NORM_EPSILON = 1e-5  # torch's
CHUNK = 64  # images at a time: of 16, 64, 256 and all the quickest on a CPU, for any width
# Above this the backward pass evaluates each chunk again instead of storing what it needs.
MAX_STORED_BYTES = 2**30
STORED_VALUES = 7  # of the first block's output before pooling, per image, where they are stored

Parameters = Any  # pytree of float32 arrays


@dataclass(frozen=True)
class FeatureNetwork:
    """A convolutional network without its readout: three blocks of Conv, InstanceNorm, ReLU, pool.

    Attributes:
        width: Channels of every convolution.
    """

    width: int = 128

    def initial_parameters(self, key: PRNGKeyArray, channels: int) -> Parameters:
        """Draw the parameters: weights N(0, 2 / fan-in), scales 1, shifts 0.

        Convolutions have no bias, since the normalisation would take it away.

        Args:
            key: JAX key of the draw.
            channels: Channels of an image.
        """
        blocks = []
        for i, block_key in enumerate(jax.random.split(key, BLOCKS)):
            fan_in = 9 * (self.width if i else channels)
            shape = (3, 3, fan_in // 9, self.width)
            weights = jax.random.normal(block_key, shape, jnp.float32) * math.sqrt(2 / fan_in)
            scale, shift = jnp.ones(self.width, jnp.float32), jnp.zeros(self.width, jnp.float32)
            blocks.append({"weights": weights, "scale": scale, "shift": shift})
        return tuple(blocks)

    def dimension(self, shape: tuple[int, ...]) -> int:
        """Number d of features of an image of this height and width."""
        return self.width * (shape[0] // 2**BLOCKS) * (shape[1] // 2**BLOCKS)

    def features(
        self, parameters: Parameters, images: Float[Array, "n h w c"]
    ) -> Float[Array, "n d"]:
        """Features of images, float32, chunk by chunk; differentiable in both arguments."""
        n, h, w, _ = images.shape
        images = images.astype(jnp.float32)
        if n <= CHUNK:
            return _features(parameters, images)
        stored = STORED_VALUES * n * h * w * self.width * 4
        work = _features if stored <= MAX_STORED_BYTES else jax.checkpoint(_features)
        # As even as can be: 100 images are two chunks of 50, not two of 64 with padding.
        size = -(-n // -(-n // CHUNK))
        chunks = devices.pad_rows(images, size).reshape(-1, size, *images.shape[1:])
        rows = jax.lax.map(lambda chunk: work(parameters, chunk), chunks)
        return rows.reshape(-1, rows.shape[-1])[:n]

    def kernel_features(
        self, networks: Parameters, images: Float[Array, "n h w c"]
    ) -> Float[Array, "n p"]:
        """Vectors whose inner products are the kernel.

        Args:
            networks: Parameters of any number of networks, stacked along a first axis.
            images: Images of any dtype; the vectors are float32.
        """
        each = jax.lax.map(lambda parameters: self.features(parameters, images), networks)
        count, n, d = each.shape
        scaled = each.swapaxes(0, 1).reshape(n, count * d) / math.sqrt(count * d)
        return jnp.concatenate([scaled, jnp.full((n, 1), BIAS, jnp.float32)], axis=1)

    def draw_networks(self, key: PRNGKeyArray, count: int, channels: int) -> Parameters:
        """Draw the parameters of several networks, stacked along a first axis."""
        keys = jax.random.split(key, count)
        return jax.vmap(lambda key: self.initial_parameters(key, channels))(keys)


def parse(name: str) -> FeatureNetwork:
    """The network that the name of a kernel means: `features:convnet`, or with a width.

    Raises:
        UserError: If it is another network, or the width is no positive whole number.
    """
    base, colon, width = name.removeprefix(FEATURES).partition(":")
    if base != "convnet":
        raise unknown_name("network of features", base, ["convnet"])
    if colon and not re.fullmatch(r"0*[1-9][0-9]*", width):
        raise UserError(
            f"a width is a positive whole number, as in {FEATURES}convnet:64, got {name!r}"
        )
    return FeatureNetwork(int(width)) if colon else FeatureNetwork()


def fixed_networks(network: FeatureNetwork, channels: int) -> Parameters:
    """The networks that the name of a kernel stands for in predictions: always the same ones."""
    return network.draw_networks(jax.random.key(0), NETWORKS, channels)


def kernel(
    x1: Float[Array, "n h w c"], x2: Float[Array, "m h w c"], network: FeatureNetwork
) -> Float[Array, "n m"]:
    """Kernel of the fixed networks between two sets of images."""
    networks = fixed_networks(network, x1.shape[-1])
    rows, columns = (network.kernel_features(networks, x) for x in (x1, x2))
    return inner_products(rows, columns)


def symmetric_kernel(x: Float[Array, "n h w c"], network: FeatureNetwork) -> Float[Array, "n n"]:
    """Kernel of the fixed networks of a set of images with itself, in their dtype."""
    rows = network.kernel_features(fixed_networks(network, x.shape[-1]), x).astype(x.dtype)
    return inner_products(rows, rows)


def support_and_target_kernels(
    network: FeatureNetwork,
    networks: Parameters,
    x_s: Float[Array, "n h w c"],
    x_t: Float[Array, "m h w c"],
) -> tuple[Float[Array, "n n"], Float[Array, "n m"]]:
    """Kernel of the support with itself and with this device's targets, by these networks.

    Inside `devices.shard_targets`: each device evaluates its share of the support, once for both.

    Args:
        network: The architecture.
        networks: Parameters of networks, stacked along a first axis.
        x_s, x_t: Support, the same on all devices, and this device's targets.

    Returns:
        k_ss in float64, and so positive definite in spite of float32 features; k_st in float32.
    """
    shares = network.kernel_features(networks, devices.local_rows(x_s))
    rows = devices.gather_rows(shares)[: len(x_s)]
    exact = rows.astype(jnp.float64)
    return inner_products(exact, exact), inner_products(
        rows, network.kernel_features(networks, x_t)
    )


def inner_products(rows: Float[Array, "n p"], columns: Float[Array, "m p"]) -> Float[Array, "n m"]:
    """All inner products of two sets of vectors, without the reduced precision of a GPU."""
    return jnp.matmul(rows, columns.T, precision="highest")


def _features(parameters: Parameters, x: Float[Array, "n h w c"]) -> Float[Array, "n d"]:
    for block in parameters:
        x = _normalise(convolve(x, block["weights"])) * block["scale"] + block["shift"]
        x = _halve(jax.nn.relu(x))
    return x.reshape(len(x), -1)


@jax.custom_vjp
def convolve(
    x: Float[Array, "n h w c"], weights: Float[Array, "3 3 c o"]
) -> Float[Array, "n h w o"]:
    """3x3 convolution, SAME, with a gradient that is fast on a CPU too.

    XLA's own gradient leaves its fast convolutions for a naive loop wherever it is in a loop
    itself: 5 to 10 times slower there (jaxlib 0.10.2).
    """
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, weights, (1, 1), "SAME", dimension_numbers=layout, precision="highest"
    )


def _convolve_forward(x: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    return convolve(x, weights), (x, weights)


def _convolve_backward(saved: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    x, weights = saved
    # The gradient in the images is a convolution with the weights turned by 180 degrees.
    images = convolve(slope, weights[::-1, ::-1].swapaxes(2, 3))
    _, h, w, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    flat = slope.reshape(-1, slope.shape[-1])
    shifted = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    taps = [inner_products(pixels.reshape(-1, channels).T, flat.T) for pixels in shifted]
    return images, jnp.stack(taps).reshape(weights.shape)


convolve.defvjp(_convolve_forward, _convolve_backward)


def _normalise(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """InstanceNorm: mean 0 and variance 1 of every channel of every image."""
    centred = x - jnp.mean(x, axis=(1, 2), keepdims=True)
    variance = jnp.mean(centred**2, axis=(1, 2), keepdims=True)
    return centred * jax.lax.rsqrt(variance + NORM_EPSILON)


def _halve(x: Float[Array, "n h w c"]) -> Float[Array, "n h/2 w/2 c"]:
    """2x2 average pooling; a last odd row or column is left out, as by torch."""
    n, h, w, c = x.shape
    whole = x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
    return jnp.mean(whole, axis=(2, 4))
