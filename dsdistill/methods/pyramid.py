"""Images as pyramids: the sum of images of 1x1, 2x2, 4x4 and so on up to their own size.

    pixels = sigmoid(2 * C * sum over levels of  resize(level))

A step of Adam moves every value by about the same amount. In a pyramid it so moves large areas as
well as single pixels, and an image made through a network does not drown in the fine patterns that
networks answer to and nobody sees. The matrix C gives the three colours of a value the correlation
that they have in photographs.

Source: Olah, Mordvintsev and Schubert (2017), "Feature visualization", doi:10.23915/distill.00007,
for decorrelated colours, whose matrix is that of ImageNet; Cazenavette, Torralba and Sitzmann
(2025), arXiv:2511.16674, for the pyramid of linear gradient matching.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

# A square root of the covariance of ImageNet's colours; each column is one decorrelated colour.
COLOURS = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]], np.float32)
DARKEST = 0.02  # of a pixel that a pyramid is made of; its counterpart is 1 - DARKEST
Levels = tuple[Float[Array, "n s s c"], ...]


def sizes(size: int) -> tuple[int, ...]:
    """Heights of the levels of square images: powers of 2, and the size itself."""
    return (*(2**i for i in range(math.ceil(math.log2(size)))), size)


def render(levels: Levels) -> Float[Array, "n h w c"]:
    """The images of a pyramid, in (0, 1)."""
    size, c = levels[-1].shape[-2:]
    total = sum(_resize(level, size) for level in levels)
    return jax.nn.sigmoid(2 * jnp.einsum("nhwc,dc->nhwd", total, _colours(c), precision="highest"))


def noise(key: PRNGKeyArray, shape: tuple[int, int, int, int]) -> Levels:
    """Normal noise, its variance shared equally by the levels.

    Args:
        key: JAX key of the draw.
        shape: Number, height, width and channels of the images; they are square.
    """
    n, size, _, c = shape
    heights = sizes(size)
    keys = jax.random.split(key, len(heights))
    return tuple(
        jax.random.normal(key, (n, s, s, c), jnp.float32) / math.sqrt(len(heights))
        for key, s in zip(keys, heights, strict=True)
    )


def of_images(images: Float[Array, "n h w c"]) -> Levels:
    """The pyramid of images in [0, 1], whose coarse levels hold as much as they can.

    `render` gives the images back, but for values nearer to 0 or 1 than `DARKEST`.
    """
    size, c = images.shape[1], images.shape[-1]
    values = jax.scipy.special.logit(jnp.clip(images, DARKEST, 1 - DARKEST)) / 2
    left = jnp.einsum("nhwc,dc->nhwd", values, jnp.linalg.inv(_colours(c)), precision="highest")
    levels = []
    for s in sizes(size):
        levels.append(left if s == size else _resize(left, s))
        left = left - _resize(levels[-1], size)
    return tuple(levels)


def _colours(channels: int) -> Float[Array, "c c"]:
    """The matrix C, its columns of norm 1 at most; the identity but for three colours."""
    if channels != 3:
        return jnp.eye(channels)
    return jnp.asarray(COLOURS / np.linalg.norm(COLOURS, axis=0).max())


def _resize(images: Float[Array, "n h w c"], size: int) -> Float[Array, "n s s c"]:
    n, h, _, c = images.shape
    if h == size:
        return images
    return jax.image.resize(
        images, (n, size, size, c), "linear", precision=jax.lax.Precision.HIGHEST
    )
