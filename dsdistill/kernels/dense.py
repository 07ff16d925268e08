"""The neural tangent kernel of a fully connected ReLU network, in closed form.

With d the number of pixels and for every layer the variances v1, v2 and the covariance K:

    first layer    K = W² <x1, x2> / d + b²,  T = K
    each further   K', T' = relu(K, T),  K = W² K' + b²,  T = W² T' + K

NTK parameterisation: weights N(0, 1) scaled by W / sqrt(fan-in), biases by b.

Source: Jacot et al. (2018), arXiv:1806.07572; Lee et al. (2018), arXiv:1711.00165.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from dsdistill.kernels.relu import relu


def fc_ntk(
    x1: Float[Array, "n h w c"],
    x2: Float[Array, "m h w c"],
    *,
    depth: int = 1,
    w_std: float = math.sqrt(2),
    b_std: float = 0.1,
) -> Float[Array, "n m"]:
    """NTK of Flatten, `depth` x (Dense, ReLU), Dense, in the dtype of the images.

    Args:
        x1, x2: Images as the network sees them, at any scale; zero and repeated images are
            allowed.
        depth: Number of hidden layers; 0 gives a linear model.
        w_std, b_std: Deviations W and b; the defaults are those of the KIP paper.
    """
    flat1, flat2 = x1.reshape(len(x1), -1), x2.reshape(len(x2), -1)
    weight, bias = w_std**2, b_std**2
    d = flat1.shape[1]
    v1 = weight * jnp.sum(flat1 * flat1, 1) / d + bias
    v2 = weight * jnp.sum(flat2 * flat2, 1) / d + bias
    # A GPU would take float32 products in TF32, with three digits.
    products = jnp.matmul(flat1, flat2.T, precision="highest")
    nngp = ntk = weight * products / d + bias
    for _ in range(depth):
        scale = _deviation(v1)[:, None] * _deviation(v2)
        nngp, ntk = relu(nngp, ntk, scale)
        nngp = weight * nngp + bias
        ntk = weight * ntk + nngp
        v1, v2 = weight * v1 / 2 + bias, weight * v2 / 2 + bias  # E relu(u)² = v / 2
    return ntk


def _deviation(variance: Float[Array, " n"]) -> Float[Array, " n"]:
    """Square root with a finite slope at 0, the variance of a zero image without bias."""
    return jnp.sqrt(jnp.maximum(variance, jnp.finfo(variance.dtype).tiny))
