"""The fitted preprocessing of `harness.data.preprocess` as a function of JAX.

Targets that are augmented at random are raw images: a step changes them first and preprocesses
them then. The numbers are those of `Preprocess.apply` up to float32 rounding.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from dsdistill.harness.data.preprocess import Kind, Preprocess

# Contrast beside brightness below which an image is constant but for rounding: a rotation rounds
# too, and a compiled step the difference of equal numbers. One pixel of 224x224x3, by 1/255: 2e-5.
CONSTANT = np.float32(1e-6)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class ArrayPreprocess:
    """Arrays of a fitted preprocessing, an argument of a compiled step.

    Attributes:
        mean, std, whiten, kind: As in `Preprocess`.
    """

    mean: Float[Array | np.ndarray, "*h_w c"]
    std: Float[Array | np.ndarray, " c"]
    whiten: Float[Array | np.ndarray, "d d"] | None
    kind: Kind = field(metadata={"static": True})


def from_fitted(fitted: Preprocess) -> ArrayPreprocess:
    """The arrays of a fitted preprocessing."""
    return ArrayPreprocess(fitted.mean, fitted.std, fitted.whiten, fitted.kind)


def unit_range(images: Num[Array, "m h w c"]) -> Float[Array, "m h w c"]:
    """Convert images to float32; uint8 is divided by 255, floats keep their values."""
    x = images.astype(jnp.float32)
    return x / jnp.float32(255) if images.dtype == jnp.uint8 else x


def preprocess(images: Float[Array, "m h w c"], values: ArrayPreprocess) -> Float[Array, "m h w c"]:
    """Preprocess float32 images in [0, 1]; in JAX's x64 mode, for the mean of each image."""
    x = (images - values.mean) / values.std
    if values.whiten is None:
        return x
    flat = x.reshape(len(x), -1)
    if values.kind == "zca":
        # float64, as in `Preprocess.apply`.
        centred = flat - flat.mean(1, keepdims=True, dtype=jnp.float64).astype(jnp.float32)
        norm, whole = (jnp.linalg.norm(x, axis=1, keepdims=True) for x in (centred, flat))
        flat = jnp.where(norm > CONSTANT * whole, centred / norm, 0)
    # A GPU's default for products is TF32.
    white = jnp.matmul(flat, values.whiten, precision=jax.lax.Precision.HIGHEST)
    return white.reshape(x.shape)
