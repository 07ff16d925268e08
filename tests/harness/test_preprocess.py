"""Preprocessing against independent float64 formulas, and its invariants."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsdistill.harness import memory
from dsdistill.harness.data import preprocess
from dsdistill.harness.errors import UserError

SHAPE = (4, 5, 3)


def _images(n=200, shape=SHAPE, seed=0):
    """Correlated uint8 images: neighbours share a brightness, as in photographs."""
    rng = np.random.default_rng(seed)
    base = rng.normal(128, 40, (n, 1, 1, 1)) + rng.normal(0, 25, (n, *shape))
    return np.clip(base, 0, 255).astype(np.uint8)


def _chunks(images):
    return lambda size: (images[i : i + size] for i in range(0, len(images), size))


def _fit(kind, images):
    return preprocess.fit(kind, _chunks(images), images.shape[1:])


def _flat_directions(images):
    """The formula of the KIP notebook in float64: standardised, centred, of unit norm."""
    x = images.astype(np.float64) / 255
    x = (x - x.mean((0, 1, 2))) / x.std((0, 1, 2))
    flat = x.reshape(len(x), -1)
    flat = flat - flat.mean(1, keepdims=True)
    return flat / np.sqrt((flat**2).sum(1, keepdims=True))


def test_standardise_equals_float64_numpy():
    images = _images()
    x = images.astype(np.float64) / 255
    expected = (x - x.mean((0, 1, 2))) / x.std((0, 1, 2))
    got = _fit("standardise", images).apply(images)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=2e-6)  # a few float32 steps at |x| < 4


def test_floats_are_taken_as_they_are():
    images = _images()
    fitted = _fit("standardise", images)
    # Division in float32 may differ from this one in the last bit.
    np.testing.assert_allclose(
        fitted.apply((images / 255).astype(np.float32)), fitted.apply(images), atol=2e-6
    )


def test_none_only_scales():
    images = _images()
    np.testing.assert_array_equal(
        _fit("none", images).apply(images), images.astype(np.float32) / np.float32(255)
    )


@pytest.mark.parametrize("kind", ["none", "standardise"])
def test_invert_is_exact_without_zca(kind):
    images = _images()
    fitted = _fit(kind, images)
    np.testing.assert_allclose(fitted.invert(fitted.apply(images)), images / 255, atol=1e-6)


def test_zca_equals_the_formula_in_float64():
    images = _images()
    flat = _flat_directions(images)
    covariance = flat.T @ flat / len(flat)
    d = len(covariance)
    covariance += 0.1 * np.trace(covariance) / d * np.eye(d)
    u, s, _ = np.linalg.svd(covariance)
    expected = flat @ (u / np.sqrt(s)) @ u.T
    got = _fit("zca", images).apply(images).reshape(len(images), -1)
    # float32 directions through a matrix whose largest entries are about 1 / sqrt(0.1 / d).
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_zca_whitens():
    """The whitened second moment is C (C + r I)^-1: each eigenvalue v becomes v / (v + r)."""
    images = _images(2000)
    flat = _flat_directions(images)
    covariance = flat.T @ flat / len(flat)
    ridge = 0.1 * np.trace(covariance) / len(covariance)
    values = np.linalg.eigvalsh(covariance)
    white = _fit("zca", images).apply(images).reshape(len(images), -1).astype(np.float64)
    got = np.linalg.eigvalsh(white.T @ white / len(white))
    np.testing.assert_allclose(got, np.sort(values / (values + ridge)), atol=1e-5)


def test_zca_of_few_images_keeps_the_scale_of_what_none_has():
    """Each direction of the images is scaled by the root of its eigenvalue, all others by 1."""
    images = _images(23)
    flat = _flat_directions(images)
    covariance = flat.T @ flat / len(flat)
    d = len(covariance)
    values, vectors = np.linalg.eigh(covariance + 0.1 * np.trace(covariance) / d * np.eye(d))
    scales = np.where(np.arange(d) < d - 23, 1.0, 1 / np.sqrt(values))  # ascending eigenvalues
    fitted = _fit("zca", images)
    np.testing.assert_allclose(fitted.whiten, (vectors * scales) @ vectors.T, atol=1e-5)
    np.testing.assert_allclose(fitted.unwhiten, (vectors / scales) @ vectors.T, atol=1e-6)
    white = fitted.apply(images).reshape(23, d)
    np.testing.assert_allclose(white, flat @ (vectors * scales) @ vectors.T, atol=2e-5)


@given(
    shape=st.tuples(st.integers(2, 5), st.integers(2, 5), st.sampled_from([1, 3])),
    share=st.floats(0.05, 0.9),
    repeated=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
@example(shape=(2, 2, 1), share=0.75, repeated=0, seed=3)  # almost linearly dependent images
def test_zca_leaves_what_no_image_has(shape, share, repeated, seed):
    d = math.prod(shape)
    images = _images(max(int(share * d), 1), shape, seed)
    images = np.concatenate([images, images[:repeated]])[: d - 1]  # the same image spans nothing
    fitted = _fit("zca", images)
    x = (images.astype(np.float64) / 255 - fitted.mean) / fitted.std
    flat = x.reshape(len(x), d)
    flat = flat - flat.mean(1, keepdims=True)
    _, sizes, spanned = np.linalg.svd(flat)
    outside = spanned[(sizes > 1e-6).sum() :]
    np.testing.assert_allclose(outside @ fitted.whiten, outside, atol=1e-5)
    np.testing.assert_allclose(outside @ fitted.unwhiten, outside, atol=1e-5)
    np.testing.assert_allclose(fitted.whiten @ fitted.unwhiten, np.eye(d), atol=1e-4)


def test_zca_of_an_earlier_version_amplifies_what_no_image_has():
    images = _images(23)
    fitted = preprocess.fit("zca", _chunks(images), SHAPE, True)
    flat = _flat_directions(images)
    covariance = flat.T @ flat / len(flat)
    mean_eigenvalue = np.trace(covariance) / len(covariance)
    covariance += 0.1 * mean_eigenvalue * np.eye(len(covariance))
    u, s, _ = np.linalg.svd(covariance)
    np.testing.assert_allclose(fitted.whiten, (u / np.sqrt(s)) @ u.T, atol=1e-4)
    largest = np.linalg.eigvalsh(fitted.whiten)[-1]
    np.testing.assert_allclose(largest, (0.1 * mean_eigenvalue) ** -0.5, rtol=1e-4)


def test_zca_of_few_large_images_needs_less_memory():
    shape = (64, 64, 3)
    assert preprocess.zca_memory(2000, shape) < preprocess.zca_memory(20_000, shape) / 3
    assert preprocess.zca_memory(20_000, shape) == 6 * 8 * 12_288**2


def test_unwhiten_is_the_inverse():
    fitted = _fit("zca", _images())
    assert fitted.whiten is not None
    assert fitted.unwhiten is not None
    np.testing.assert_allclose(fitted.whiten @ fitted.unwhiten, np.eye(math.prod(SHAPE)), atol=2e-5)


def test_zca_inverts_up_to_brightness_and_contrast():
    images = _images()
    fitted = _fit("zca", images)
    back = (fitted.invert(fitted.apply(images)) - fitted.mean) / fitted.std
    flat = back.reshape(len(images), -1)
    np.testing.assert_allclose(flat / fitted.contrast, _flat_directions(images), atol=2e-5)


@pytest.mark.parametrize("kind", ["standardise", "zca"])
def test_chunk_size_does_not_matter(kind, monkeypatch):
    images = _images(50)
    whole = _fit(kind, images)
    monkeypatch.setattr(
        preprocess, "MAX_CHUNK_VALUES", 7 * math.prod(SHAPE)
    )  # the last chunk is short
    parts = _fit(kind, images)
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-6)
    np.testing.assert_allclose(parts.std, whole.std, rtol=1e-6)
    if kind == "zca":
        np.testing.assert_allclose(parts.whiten, whole.whiten, atol=1e-5)
        assert parts.contrast == pytest.approx(whole.contrast, rel=1e-6)


def test_chunks_shrink_as_images_grow(monkeypatch):
    asked = []

    def chunks(size):
        asked.append(size)
        yield np.zeros((1, 100, 100, 1), np.uint8)

    monkeypatch.setattr(preprocess, "MAX_CHUNK_VALUES", 5000)  # half an image
    preprocess.fit("standardise", chunks, (100, 100, 1))
    assert asked == [1]


@pytest.mark.parametrize("kind", ["standardise", "zca"])
def test_constant_images_stay_finite(kind):
    images = np.full((10, *SHAPE), 77, np.uint8)
    fitted = _fit(kind, images)
    assert np.abs(fitted.apply(images)).max() < 1e-6
    assert np.isfinite(fitted.invert(fitted.apply(images))).all()


@pytest.mark.parametrize("kind", ["standardise", "zca"])
def test_a_constant_channel_stays_finite(kind):
    images = _images()
    images[..., 1] = 200
    fitted = _fit(kind, images)
    assert np.isfinite(fitted.apply(images)).all()
    np.testing.assert_allclose(fitted.std[1], 1)


@pytest.mark.parametrize("value", range(0, 256, 5))
def test_one_constant_image_is_zero_under_zca(value):
    """Rounding must not become a direction: 0.3 - mean(0.3, 0.3, ...) is not 0 in float32."""
    gray = _images(shape=(7, 9, 1))
    fitted = preprocess.fit("zca", _chunks(gray), (7, 9, 1))
    assert not fitted.apply(np.full((1, 7, 9, 1), value, np.uint8)).any()


@pytest.mark.parametrize(
    ("shape", "convolutional", "free", "kind"),
    [
        ((32, 32, 3), True, 2**30, "zca"),
        ((32, 32, 3), False, 2**30, "standardise"),
        ((28, 28, 1), True, 2**30, "standardise"),
        ((32, 32, 3), True, 2**28, "standardise"),  # 432 MiB are needed
        ((224, 224, 3), True, 2**50, "standardise"),
    ],
)
def test_zca_is_the_default_for_convolutions_in_colour_where_it_fits(
    monkeypatch, capsys, shape, convolutional, free, kind
):
    monkeypatch.setattr(memory, "available", lambda: free)
    assert preprocess.default_kind(shape, 50_000, convolutional=convolutional) == kind
    said = capsys.readouterr().err
    gives_way = shape[-1] == 3 and convolutional and kind == "standardise"
    assert said.count("note: pixels are standardised, since ZCA whitening") == gives_way
    assert said.count("\n") == gives_way


def test_unknown_kind_is_refused():
    with pytest.raises(UserError, match="'pca'"):
        _fit("pca", _images())


def test_too_large_zca_is_refused_with_figures_before_it_starts(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 10 * 2**30)

    def chunks(size):
        pytest.fail("an image was read")

    with pytest.raises(UserError, match=r"224x224 .* 168\.8 GiB, 10\.0 GiB is free.*--image-size"):
        preprocess.fit("zca", chunks, (224, 224, 3))


def test_zca_that_does_not_fit_is_refused_before_its_matrix(monkeypatch):
    """Of more images than pixel values; the least that fewer would take fits."""
    monkeypatch.setattr(memory, "available", lambda: 40 * 60**2)
    monkeypatch.setattr(preprocess, "_fit_zca", lambda *_: pytest.fail("began"))
    with pytest.raises(UserError, match=r"4x5 images needs 168\.8 KiB, 140\.6 KiB is free"):
        _fit("zca", _images(60))


def test_same_as():
    images = _images()
    assert _fit("zca", images).same_as(_fit("zca", images))
    assert not _fit("zca", images).same_as(_fit("standardise", images))
    assert not _fit("zca", images).same_as(_fit("zca", _images(seed=1)))


def test_memory_is_measured():
    block = np.ones(2**24)  # 128 MiB, touched
    assert block.nbytes < memory.peak() < 2**40
    assert 0 < memory.available() < 2**50
    assert memory.format_bytes(1536) == "1.5 KiB"
    with pytest.raises(UserError, match="less data"):
        memory.require(2**60, "this", "less data")


def test_file_cache_does_not_count_as_used(monkeypatch, tmp_path):
    gib = 2**30
    (tmp_path / "memory.max").write_text(f"{2 * gib}\n")
    (tmp_path / "memory.current").write_text(f"{2 * gib}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\nactive_file {gib // 2}\ninactive_file 1\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("", (), {"available": gib}))
    assert memory.available() == gib // 2 + 1
