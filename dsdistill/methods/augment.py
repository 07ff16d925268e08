"""Transforms that keep an image's class: random flips, shifts and small rotations of the targets.

Each transform is a pure function of the images and of its random numbers; `augment_images` draws
them. Images are raw, as published, and preprocessed afterwards: for ZCA a shifted image that is
whitened is another one than a whitened image that is shifted. Pixels from beyond the edge repeat
it. `add_flips` adds the mirror images of a support.

Source: Nguyen, Novak, Xiao and Lee (2021), arXiv:2107.13034, who augment targets; the range of
each transform is this project's choice.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dsdistill.harness import lists
from dsdistill.harness.errors import unknown_name

SHIFT_DIVISOR = 8  # a shift is at most an eighth of the height and of the width
MAX_ROTATION_DEGREES = 15  # in either direction


def parse(text: str | None) -> tuple[str, ...]:
    """The transforms that `--augment` names, such as `flip,shift` or `all`, in a fixed order.

    Raises:
        UserError: If a name is unknown or comes twice.
    """
    names = lists.parse_names("--augment", text or "", empty=True)
    known = [*_TRANSFORMS, "all"]
    for name in names:
        if name not in known:
            raise unknown_name("augmentation", name, known)
    return tuple(name for name in _TRANSFORMS if name in names or "all" in names)


def augment_images(
    images: Float[Array, "m h w c"], key: PRNGKeyArray, names: tuple[str, ...]
) -> Float[Array, "m h w c"]:
    """Apply every named transform to each image, with random numbers of its own.

    Args:
        images: Images of any range.
        key: JAX key of all draws; those of a transform do not depend on which others are named.
        names: Transforms, as `parse` returns them.
    """
    for i, (name, draw) in enumerate(_TRANSFORMS.items()):
        if name in names:
            images = draw(images, jax.random.fold_in(key, i))
    return images


def add_flips(
    images: Float[Array, "n h w c"], labels: Float[Array, "n k"]
) -> tuple[Float[Array, "2n h w c"], Float[Array, "2n k"]]:
    """Images and their mirror images, with the labels of both."""
    return jnp.concatenate([images, images[:, :, ::-1]]), jnp.concatenate([labels, labels])


def flip(images: Float[Array, "m h w c"], mirrored: Bool[Array, " m"]) -> Float[Array, "m h w c"]:
    """Flip the images marked in `mirrored` left to right."""
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def shift(
    images: Float[Array, "m h w c"], down: Int[Array, " m"], right: Int[Array, " m"]
) -> Float[Array, "m h w c"]:
    """Shift each image by whole pixels down and to the right; negative values: up, to the left."""
    m, h, w, _ = images.shape
    rows = jnp.clip(jnp.arange(h) - down[:, None], 0, h - 1)  # (m, h)
    columns = jnp.clip(jnp.arange(w) - right[:, None], 0, w - 1)  # (m, w)
    image = jnp.arange(m)[:, None, None]
    return images[image, rows[:, :, None], columns[:, None, :]]


def rotate(images: Float[Array, "m h w c"], angles: Float[Array, " m"]) -> Float[Array, "m h w c"]:
    """Rotate each image about its centre, with bilinear interpolation.

    Args:
        images: Images of any range.
        angles: Radians; positive is counter-clockwise as the image is seen.
    """
    h, w = images.shape[1:3]
    y = jnp.arange(h, dtype=images.dtype)[:, None] - (h - 1) / 2
    x = jnp.arange(w, dtype=images.dtype)[None, :] - (w - 1) / 2

    def turn(image: Float[Array, "h w c"], angle: Float[Array, ""]) -> Float[Array, "h w c"]:
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        # Where each pixel comes from.
        source = [cos * y + sin * x + (h - 1) / 2, cos * x - sin * y + (w - 1) / 2]

        def sample(plane: Float[Array, "h w"]) -> Float[Array, "h w"]:
            return jax.scipy.ndimage.map_coordinates(plane, source, order=1, mode="nearest")

        return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)

    return jax.vmap(turn)(images, angles.astype(images.dtype))


def _random_flip(images: Array, key: PRNGKeyArray) -> Array:
    return flip(images, jax.random.bernoulli(key, 0.5, (len(images),)))


def _random_shift(images: Array, key: PRNGKeyArray) -> Array:
    m, h, w, _ = images.shape
    keys = jax.random.split(key)
    moves = (
        jax.random.randint(k, (m,), -(size // SHIFT_DIVISOR), size // SHIFT_DIVISOR + 1)
        for k, size in zip(keys, (h, w), strict=True)
    )
    return shift(images, *moves)


def _random_rotation(images: Array, key: PRNGKeyArray) -> Array:
    limit = jnp.deg2rad(MAX_ROTATION_DEGREES)
    return rotate(images, jax.random.uniform(key, (len(images),), jnp.float32, -limit, limit))


_TRANSFORMS = {"flip": _random_flip, "shift": _random_shift, "rotate": _random_rotation}
