"""Transforms of the targets: exact where possible, seeded, and of unchanged shape and dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsdistill.harness.errors import UserError
from dsdistill.methods import augment


@pytest.fixture
def images() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).random((6, 9, 12, 2)), jnp.float32)


def test_a_flip_is_its_own_inverse_and_takes_the_images_marked(images):
    mirrored = jnp.array([True, False, True, True, False, False])
    once = augment.flip(images, mirrored)
    np.testing.assert_array_equal(once[0], images[0, :, ::-1])
    np.testing.assert_array_equal(once[1], images[1])
    np.testing.assert_array_equal(augment.flip(once, mirrored), images)


def test_a_shift_moves_exactly_and_repeats_the_edge(images):
    down, right = jnp.array([2, -1, 0, 0, 8, 0]), jnp.array([3, 0, -2, 0, 0, 0])
    moved = augment.shift(images, down, right)
    np.testing.assert_array_equal(moved[0, 2:, 3:], images[0, :-2, :-3])
    np.testing.assert_array_equal(moved[0, :2, 3:], jnp.broadcast_to(images[0, 0, :-3], (2, 9, 2)))
    np.testing.assert_array_equal(moved[1, :-1], images[1, 1:])
    np.testing.assert_array_equal(moved[2, :, :-2], images[2, :, 2:])
    np.testing.assert_array_equal(moved[3], images[3])
    np.testing.assert_array_equal(moved[4], jnp.broadcast_to(images[4, 0], (9, 12, 2)))


def test_a_rotation_by_nothing_changes_nothing(images):
    np.testing.assert_array_equal(augment.rotate(images, jnp.zeros(6)), images)


def test_a_quarter_turn_is_counter_clockwise(images):
    square = images[:, :, :9]
    turned = augment.rotate(square, jnp.full(6, jnp.pi / 2))
    np.testing.assert_allclose(turned, np.rot90(square, axes=(1, 2)), atol=1e-5)


def test_a_rotation_agrees_with_scipy(images):
    """Both are bilinear with the nearest pixel outside; scipy counts angles the other way."""
    from scipy import ndimage

    angles = np.deg2rad([15, -15, 5, 0, 1, -7])
    turned = augment.rotate(images, jnp.asarray(angles, jnp.float32))
    for image, angle, got in zip(np.asarray(images), angles, turned, strict=True):
        expected = ndimage.rotate(image, np.rad2deg(angle), order=1, mode="nearest", reshape=False)
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.heavy
def test_all_together_keep_shape_and_dtype_and_follow_the_key(images):
    names = augment.parse("all")
    with jax.enable_x64(True):  # as in a step
        out = augment.augment_images(images, jax.random.key(1), names)
        again = augment.augment_images(images, jax.random.key(1), names)
        other = augment.augment_images(images, jax.random.key(2), names)
    assert out.shape == images.shape
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, again)
    assert not np.array_equal(out, other)
    assert jnp.isfinite(out).all()


def test_none_is_the_identity(images):
    np.testing.assert_array_equal(augment.augment_images(images, jax.random.key(0), ()), images)


@pytest.mark.heavy
def test_flips_and_shifts_are_drawn_evenly():
    rows = jnp.arange(16.0)[:, None] * 16 + jnp.arange(16.0)
    images = jnp.broadcast_to(rows[None, :, :, None], (200, 16, 16, 1))
    out = np.asarray(augment.augment_images(images, jax.random.key(0), ("flip", "shift")))[..., 0]
    inner = out[:, 4:12, 4:12]
    down, right = np.diff(inner, axis=1), np.diff(inner, axis=2)
    assert (down == 16).all()  # rows keep their order and spacing
    flips = right[:, 0, 0] == -1
    assert (right == np.where(flips, -1, 1)[:, None, None]).all()
    assert 60 < flips.sum() < 140
    shift = (inner[:, 0, 0] // 16 - 4).astype(int)
    assert set(shift) == {-2, -1, 0, 1, 2}  # an eighth of 16, both ways


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (None, ()),
        ("", ()),
        ("shift, flip", ("flip", "shift")),
        ("rotate", ("rotate",)),
        ("all", ("flip", "shift", "rotate")),
        ("all,flip", ("flip", "shift", "rotate")),
    ],
)
def test_parse(text, names):
    assert augment.parse(text) == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flip,rotat", r"unknown augmentation 'rotat'; did you mean 'rotate'\? .*flip.*shift"),
        ("flip,flip", "--augment names one twice"),
    ],
)
def test_parse_refuses(text, message):
    with pytest.raises(UserError, match=message):
        augment.parse(text)
