"""Preprocessing in JAX, and targets that are augmented before it."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsdistill.harness.data import preprocess as pre
from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from dsdistill.kernels import networks
from dsdistill.methods import augment, kip, preprocessing
from dsdistill.methods.initial_support import draw_support

SHAPE = (8, 8, 3)


def _images(n: int = 60, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, *shape), np.uint8)


def _fit(kind: str, images: np.ndarray) -> pre.Preprocess:
    chunks = lambda size: iter([images])  # noqa: E731
    shape = images.shape[1:]
    other = {"zca-mtt": pre.fit_mtt, "zca-rfad": pre.fit_rfad, "zca-frepo": pre.fit_frepo}
    return other[kind](chunks, shape) if kind in other else pre.fit(kind, chunks, shape)


def _train(kind: str) -> Examples:
    labels = np.arange(60) % 3
    return Examples(LabeledImages(_images(), labels, ("a", "b", "c")), _fit(kind, _images()))


@pytest.mark.parametrize("kind", [*pre.KINDS, "zca-mtt", "zca-rfad", "zca-frepo"])
@pytest.mark.parametrize("as_float", [False, True])
def test_jax_gives_the_numbers_of_numpy(kind, as_float):
    images = _images()
    fitted = _fit(kind, images)
    images = (images / 255).astype(np.float32) if as_float else images
    with jax.enable_x64(True):
        values = preprocessing.from_fitted(fitted)
        got = preprocessing.preprocess(preprocessing.unit_range(jnp.asarray(images)), values)
    expected = fitted.apply(images)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("value", range(0, 256, 17))
def test_a_constant_image_is_zero_under_zca(value):
    """Also rotated, and as XLA compiles it: rounding must not become a direction."""
    gray = _images(shape=(7, 9, 1))
    values = preprocessing.from_fitted(_fit("zca", gray))

    @jax.jit
    def apply(images):
        turned = augment.rotate(preprocessing.unit_range(images), jnp.full(1, 0.1))
        return preprocessing.preprocess(turned, values)

    with jax.enable_x64(True):
        assert not np.asarray(apply(jnp.full((1, 7, 9, 1), value, jnp.uint8))).any()


@pytest.mark.parametrize("kind", pre.KINDS)
def test_a_step_preprocesses_what_it_has_augmented(kind):
    """Its loss is that of a step on targets that were shifted raw and preprocessed before."""
    train, names = _train(kind), ("flip", "shift")
    objective = kip.KipObjective((networks.parse("fc"),), augment=names)
    support = draw_support(train, 2, noise=False, corruption=0, seed=0)
    step = next(iter(kip.distill(objective, support, train, steps=1, target_batch=60, seed=5)))
    with kip.Stepper(objective, support, train, 60, seed=5) as stepper:
        raw, labels = stepper.draw(0)
    assert raw.dtype == np.uint8
    with jax.enable_x64(True):
        key = jax.random.fold_in(jax.random.key(5), 0)
        shifted = augment.augment_images(preprocessing.unit_range(jnp.asarray(raw)), key, names)
    seen = train.preprocess.apply(np.asarray(shifted))
    plain = replace(objective, augment=())
    state = plain.initial_state(support)
    with kip.Stepper(plain, support, train, 60, seed=5) as stepper:
        expected = stepper.step(state, (seen, labels), 0)
    np.testing.assert_allclose(step.loss, expected.loss, rtol=1e-5)
    np.testing.assert_allclose(step.state.images, expected.state.images, atol=1e-4)


def test_whitening_a_shifted_image_is_not_shifting_a_whitened_one():
    """A run of an earlier version augments preprocessed images, and is continued so."""
    losses = {}
    for raw, kind in itertools.product((True, False), ("standardise", "zca")):
        train = _train(kind)
        objective = kip.KipObjective((networks.parse("fc"),), augment=("shift",), augment_raw=raw)
        support = draw_support(train, 2, noise=False, corruption=0, seed=0)
        stream = kip.distill(objective, support, train, steps=1, target_batch=60, seed=0)
        losses[raw, kind] = next(iter(stream)).loss
    # Standardisation and shifts can change places.
    assert losses[True, "standardise"] == pytest.approx(losses[False, "standardise"], rel=1e-5)
    assert losses[True, "zca"] != pytest.approx(losses[False, "zca"], rel=1e-3)
