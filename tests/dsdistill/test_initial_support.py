"""Initial supports of KIP: draws, noise, and earlier distilled sets."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsdistill.harness.data import distilled_set, preprocess
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.data.labeled_images import LabeledImages, centred_one_hot
from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError
from dsdistill.methods import initial_support


@pytest.fixture
def data() -> LabeledImages:
    rng = np.random.default_rng(0)
    return LabeledImages(rng.random((60, 6, 6, 3), np.float32), np.arange(60) % 3, ("a", "b", "c"))


def fitted(kind: str, data: LabeledImages) -> Preprocess:
    return preprocess.fit(kind, data.chunks, data.shape)


@pytest.fixture
def distilled(data: LabeledImages) -> DistilledSet:
    """Two images per class with labels that were learned."""
    images = fitted("standardise", data).apply(data.images(slice(0, 6)))
    labels = centred_one_hot(np.repeat([0, 1, 2], 2), 3) * np.float32(1.3)
    return DistilledSet(images, labels, fitted("standardise", data), data.classes, {})


def test_load_takes_a_file_or_a_folder(distilled, tmp_path):
    distilled_set.save(tmp_path / distilled_set.FILE_NAME, distilled)
    for path in (tmp_path, tmp_path / distilled_set.FILE_NAME):
        loaded, sha256 = initial_support.load(str(path))
        np.testing.assert_array_equal(loaded.images, distilled.images)
        file = tmp_path / distilled_set.FILE_NAME
        assert sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_load_refuses_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="unknown --init 'reel'; did you mean 'real'"):
        initial_support.load("reel")
    with pytest.raises(UserError, match="no distilled set"):
        initial_support.load(str(tmp_path))
    (tmp_path / "foreign.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="not a whole"):
        initial_support.load(str(tmp_path / "foreign.safetensors"))


def test_the_set_decides_how_many_images(distilled, data):
    assert (
        initial_support.check(distilled, data, None)
        == initial_support.check(distilled, data, 2)
        == 2
    )
    with pytest.raises(UserError, match="2 images per class, --images-per-class asks for 5"):
        initial_support.check(distilled, data, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ("a", "c", "b")}, "same classes in the same order"),
        ({"classes": ("a", "b")}, "got 2 classes and 3: choose"),
        ({"images": np.zeros((6, 6, 6, 1), np.float32)}, "images are 6x6x1, the data's 6x6x3"),
        ({"images": np.zeros((6, 8, 6, 3), np.float32)}, "images are 8x6x3, the data's 6x6x3"),
        ({"encoding": "one-hot"}, "labels are 'one-hot', expected 'one-hot minus 1/k'"),
        ({"images": np.zeros((7, 6, 6, 3), np.float32)}, "got 7 images of 3 classes"),
    ],
)
def test_a_set_that_does_not_fit_is_refused(distilled, data, changes, message):
    with pytest.raises(UserError, match=message):
        initial_support.check(replace(distilled, **changes), data, None)


@pytest.mark.parametrize(
    ("provenance", "saw"),
    [
        ({}, False),
        ({"data": "digits", "config": []}, False),
        ({"data": {"sha256": "x"}, "config": {"validation_fraction": 0.0}}, True),
        ({"data": {"sha256": "x"}, "config": {"validation_fraction": 0.1}}, False),
        ({"data": {"sha256": "x"}, "config": {"validation_fraction": "0"}}, False),
        ({"data": {"sha256": "y"}, "config": {"validation_fraction": 0.0}}, False),
    ],
)
def test_a_set_that_has_seen_the_validation_images(distilled, provenance, saw):
    assert (
        initial_support.overlaps_validation(replace(distilled, provenance=provenance), "x", 0.1)
        is saw
    )


def test_the_same_preprocessing_keeps_every_bit(distilled, data):
    support = initial_support.from_set(distilled, fitted("standardise", data), corruption=0, seed=0)
    np.testing.assert_array_equal(support.images, distilled.images)
    np.testing.assert_array_equal(support.labels, distilled.labels)
    assert not support.frozen.any()


@pytest.mark.parametrize("kind", ["none", "zca"])
def test_another_preprocessing_is_undone_and_this_one_applied(distilled, data, kind):
    target = fitted(kind, data)
    support = initial_support.from_set(distilled, target, corruption=0, seed=0)
    np.testing.assert_allclose(support.images, target.apply(data.images(slice(0, 6))), atol=1e-5)


def test_a_whitened_set_comes_back_up_to_brightness_and_contrast(data):
    """A preprocessing that ignores brightness and contrast, such as ZCA, loses nothing."""
    raw = data.images(slice(0, 6))
    old = preprocess.fit("zca", data.select(np.arange(40)).chunks, data.shape)
    distilled = DistilledSet(
        old.apply(raw), centred_one_hot(np.arange(6) % 3, 3), old, data.classes, {}
    )
    new = fitted("zca", data)
    assert not old.same_as(new)
    got = initial_support.from_set(distilled, new, corruption=0, seed=0).images
    expected = new.apply(raw)
    cosine = (got * expected).sum((1, 2, 3)) / np.sqrt(
        (got**2).sum((1, 2, 3)) * (expected**2).sum((1, 2, 3))
    )
    assert (cosine > 0.98).all()  # the two are standardised by different means and deviations


def test_corruption_reaches_a_set_too(distilled, data):
    support = initial_support.from_set(distilled, distilled.preprocess, corruption=0.5, seed=0)
    frozen = np.broadcast_to(support.frozen, distilled.images.shape)
    np.testing.assert_array_equal(support.images[~frozen], distilled.images[~frozen])
    assert (support.images[frozen] != distilled.images[frozen]).all()
    assert 0.3 < support.frozen.mean() < 0.7


def test_a_home_folder_is_expanded(distilled, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    distilled_set.save(Path(tmp_path) / "mine.safetensors", distilled)
    assert initial_support.load("~/mine.safetensors") is not None
