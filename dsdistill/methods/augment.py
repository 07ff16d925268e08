"""Random changes of the target images that keep their class: flips, shifts and small rotations.

Each transform is a pure function of the images and of one number an image; `augment_images` draws the
numbers. They act on preprocessed images, and pixels that come in from outside repeat the edge.

Source: Nguyen, Novak, Xiao and Lee (2021), arXiv:2107.13034, who augment targets; the reach of
each transform is ours.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dsdistill.harness import lists
from dsdistill.harness.errors import unknown_name

SHIFT_DIVISOR = 8  # a shift moves by up to an eighth of the height and of the width
MAX_ROTATION_DEGREES = 15  # a rotation turns by up to so many, both ways


def parse(text: str | None) -> tuple[str, ...]:
    """The transforms of an `--augment` such as `flip,shift` or `all`, in the order of the table.

    Raises:
        UserError: For an unknown name, or one that comes twice.
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
    """Each image changed on its own, by every transform named.

    Args:
        images: Preprocessed.
        key: Of all draws. Those of one transform do not depend on which others are named.
        names: As `parse` returns them.
    """
    for i, (name, draw) in enumerate(_TRANSFORMS.items()):
        if name in names:
            images = draw(images, jax.random.fold_in(key, i))
    return images


def flip(images: Float[Array, "m h w c"], mirrored: Bool[Array, " m"]) -> Float[Array, "m h w c"]:
    """The images marked are flipped left to right."""
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def shift(
    images: Float[Array, "m h w c"], down: Int[Array, " m"], right: Int[Array, " m"]
) -> Float[Array, "m h w c"]:
    """Every image moved by so many pixels down and to the right; negative: up, to the left."""
    m, h, w, _ = images.shape
    rows = jnp.clip(jnp.arange(h) - down[:, None], 0, h - 1)  # (m, h)
    columns = jnp.clip(jnp.arange(w) - right[:, None], 0, w - 1)  # (m, w)
    each = jnp.arange(m)[:, None, None]
    return images[each, rows[:, :, None], columns[:, None, :]]


def rotate(images: Float[Array, "m h w c"], angles: Float[Array, " m"]) -> Float[Array, "m h w c"]:
    """Every image turned about its centre, bilinear.

    Args:
        angles: In radians; positive is counter-clockwise as the image is seen.
    """
    h, w = images.shape[1:3]
    y = jnp.arange(h, dtype=images.dtype)[:, None] - (h - 1) / 2
    x = jnp.arange(w, dtype=images.dtype)[None, :] - (w - 1) / 2

    def turn(image: Float[Array, "h w c"], angle: Float[Array, ""]) -> Float[Array, "h w c"]:
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        source = [cos * y + sin * x + (h - 1) / 2, cos * x - sin * y + (w - 1) / 2]  # of each pixel

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
    most = jnp.deg2rad(MAX_ROTATION_DEGREES)
    return rotate(images, jax.random.uniform(key, (len(images),), jnp.float32, -most, most))


_TRANSFORMS = {"flip": _random_flip, "shift": _random_shift, "rotate": _random_rotation}
