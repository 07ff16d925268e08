"""Random crops and flips of images, differentiable in the images."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

RATIOS = (3 / 4, 4 / 3)  # width over height of a crop, as torchvision's RandomResizedCrop has it


def draw(
    key: PRNGKeyArray,
    images: Float[Array, "n h w c"],
    count: int,
    size: tuple[int, int],
    *,
    min_scale: float,
    hflip: float,
) -> Float[Array, "m H W c"]:
    """Several views of each image: all first views, then all second ones, and so on.

    A view is a crop of a random part of the area, with a random ratio of its sides, resized with
    antialiasing; and, with some probability, mirrored.

    Args:
        key: JAX key of the draws.
        images: Images (n, h, w, c).
        count: Views of each, v; m = n v.
        size: Height and width of a view.
        min_scale: Smallest part of the area in a crop.
        hflip: Probability that a view is mirrored.
    """
    n, height, width, c = images.shape
    keys = jax.random.split(key, count * n)

    def view(key: PRNGKeyArray, image: Float[Array, "h w c"]) -> Float[Array, "H W c"]:
        area, ratio, top, left, flip = jax.random.split(key, 5)
        share = jax.random.uniform(area, (), jnp.float32, min_scale, 1.0)
        low, high = jnp.log(jnp.array(RATIOS, jnp.float32))
        root = jnp.exp(jax.random.uniform(ratio, (), jnp.float32, low, high) / 2)
        # Of a crop that would leave the image on one side, that side is the whole one.
        sides = jnp.minimum(jnp.sqrt(share) * jnp.array([1 / root, root]), 1.0)
        sides = sides * jnp.array([height, width], jnp.float32)
        spare = jnp.array([height, width]) - sides
        corner = spare * jnp.stack([jax.random.uniform(k, (), jnp.float32) for k in (top, left)])
        scale = jnp.array(size, jnp.float32) / sides
        cut = jax.image.scale_and_translate(
            image,
            (*size, c),
            (0, 1),
            scale,
            -corner * scale,
            "linear",
            antialias=True,
            precision=jax.lax.Precision.HIGHEST,
        )
        return jnp.where(jax.random.uniform(flip, (), jnp.float32) < hflip, cut[:, ::-1], cut)

    return jax.vmap(view)(keys, jnp.tile(images, (count, 1, 1, 1)))
