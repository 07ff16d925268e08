"""The kernel of a linear model, and of its last layer on features: K = x1 x2^T / d + 1.

With features that are centred and have a mean norm of sqrt(d), as `harness.data.preprocess` makes
them, this is Z Z^T of features Z of mean norm 1 with a constant 1 appended: the bias weighs as much
as all features together. It is the neural tangent kernel of f(x) = <w, x> / sqrt(d) + b.

A kernel with an explicit map of p = d + 1 values needs no matrix between all images: every sum over
the targets is one of p x p, whatever their number (`dsdistill.methods.linear_sums`).
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

BIAS = 1.0


def linear_map(x: Float[Array, "n h w c"]) -> Float[Array, "n p"]:
    """The map whose inner products are the kernel: x / sqrt(d), and a constant 1.

    Args:
        x: Images or features, in any scale.
    """
    flat = x.reshape(len(x), -1)
    constant = jnp.full((len(x), 1), math.sqrt(BIAS), flat.dtype)
    return jnp.concatenate([flat / math.sqrt(flat.shape[1]), constant], axis=1)


def linear_ntk(x1: Float[Array, "n h w c"], x2: Float[Array, "m h w c"]) -> Float[Array, "n m"]:
    """Kernel between two sets of images or features, in their dtype.

    Args:
        x1, x2: Images or features as the model sees them.
    """
    flat1, flat2 = x1.reshape(len(x1), -1), x2.reshape(len(x2), -1)
    # A GPU would take float32 products in TF32, with three digits.
    return jnp.matmul(flat1, flat2.T, precision="highest") / flat1.shape[1] + BIAS
