"""Data sets: the split, the sampling, the digest, and the refusals of arrays."""

import os
import urllib.error
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from dsdistill.harness.data import datasets, labeled_images, npz
from dsdistill.harness.data.labeled_images import DataError, Examples, LabeledImages
from dsdistill.harness.data.preprocess import identity
from dsdistill.harness.errors import UserError

FASHION = Path(os.environ.get("DSDISTILL_DATA", "no such folder"))


def _labeled(counts, seed=0):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    store = np.random.default_rng(1).integers(0, 256, (len(labels), 3, 4, 1), dtype=np.uint8)
    return LabeledImages(store, labels, tuple(f"class {i}" for i in range(len(counts))))


def _arrays(n=20, k=4):
    images = np.random.default_rng(0).integers(0, 256, (n, 6, 6), dtype=np.uint8)
    return {"images": images, "labels": np.arange(n) % k}


def _load(path, tmp_path, **options):
    return datasets.load(str(path), root=tmp_path, **options)


def _refused(path, tmp_path, match, **options):
    with pytest.raises(DataError, match=match) as caught:
        _load(path, tmp_path, **options)
    assert "\n" not in str(caught.value)


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 5),
)
def test_stratified_is_exact_disjoint_and_repeatable(counts, fraction, seed):
    labels = _labeled(counts, seed).labels
    kept, held = labeled_images.split_by_class(labels, fraction)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    assert (np.diff(kept) > 0).all()
    assert (np.diff(held) > 0).all()
    for label, count in enumerate(counts):
        assert (labels[held] == label).sum() == round(fraction * count)
    again = labeled_images.split_by_class(labels, fraction)
    np.testing.assert_array_equal(again[0], kept)
    np.testing.assert_array_equal(again[1], held)


def test_stratified_is_a_random_choice():
    labels = np.repeat([0, 1], 100)
    _, held = labeled_images.split_by_class(labels, 0.2)
    assert held[labels[held] == 0].max() > 30  # not simply the first 20


@given(counts=st.lists(st.integers(1, 12), min_size=1, max_size=5), count=st.integers(0, 80))
def test_balanced_gives_every_class_its_share(counts, count):
    labels = _labeled(counts).labels
    chosen = labeled_images.draw_balanced(labels, count, np.random.default_rng(0))
    assert len(set(chosen.tolist())) == len(chosen)
    share = max(count // len(counts), 1)
    assert np.bincount(labels[chosen]).tolist() == [min(share, n) for n in counts]
    assert (np.diff(labels[chosen]) >= 0).all()


def test_balanced_follows_its_generator():
    labels = np.repeat([0, 1], 50)
    draw = [
        labeled_images.draw_balanced(labels, 10, np.random.default_rng(s)).tolist()
        for s in (0, 0, 1)
    ]
    assert draw[0] == draw[1] != draw[2]


def test_per_class_is_exact_or_refused():
    data = _labeled([5, 3, 9])
    chosen = labeled_images.draw_per_class(data, 3, np.random.default_rng(0))
    assert data.labels[chosen].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    with pytest.raises(DataError, match=r"'class 1' has 3 .* fewer than the 4"):
        labeled_images.draw_per_class(data, 4, np.random.default_rng(0))
    with pytest.raises(UserError, match="at least 1, got 0"):
        labeled_images.draw_per_class(data, 0, np.random.default_rng(0))


def test_centred_one_hot_rows_sum_to_zero():
    labels = np.array([2, 0, 1])
    rows = labeled_images.centred_one_hot(labels, 4)
    np.testing.assert_allclose(rows.sum(1), 0, atol=1e-7)
    np.testing.assert_allclose(rows, np.eye(4)[labels] - 0.25)


def test_select_is_a_view_in_the_order_given():
    data = _labeled([4, 4])
    twice = data.select(np.array([6, 1, 3])).select(np.array([2, 0]))
    assert twice.store is data.store
    np.testing.assert_array_equal(twice.images(), data.store[[3, 6]])
    np.testing.assert_array_equal(twice.labels, data.labels[[3, 6]])
    np.testing.assert_array_equal(np.concatenate([*twice.chunks(1)]), twice.images())


def test_examples_give_centred_or_stored_labels():
    data, some = _labeled([2, 3]), np.array([4, 0])
    plain = Examples(data, identity(1))
    np.testing.assert_array_equal(plain.images(some), data.store[some] / np.float32(255))
    np.testing.assert_array_equal(
        plain.labels(some), labeled_images.centred_one_hot(data.labels[some], 2)
    )
    stored = np.arange(10, dtype=np.float32).reshape(5, 2)
    ready = Examples(data, identity(1), targets=stored, is_preprocessed=True)
    np.testing.assert_array_equal(ready.images(some), data.store[some])
    np.testing.assert_array_equal(ready.labels(some), stored[some])


def test_digits_are_those_of_scikit_learn_to_the_bit():
    flat, labels = load_digits(return_X_y=True)
    digits = datasets._load_digits()
    expected = np.asarray(flat, np.float32).reshape(-1, 8, 8, 1) / 16
    np.testing.assert_array_equal(digits.store, expected, strict=True)
    np.testing.assert_array_equal(digits.labels, np.asarray(labels, np.int64), strict=True)


def test_digits_are_whole_and_split_once(tmp_path):
    splits = _load("digits", tmp_path)
    parts = splits.train, splits.validation, splits.test
    assert sum(map(len, parts)) == 1797
    rows = np.concatenate([part.rows for part in parts])
    assert len(np.unique(rows)) == 1797
    assert splits.train.shape == (8, 8, 1)
    assert splits.train.store.min() == 0
    assert splits.train.store.max() == 1
    assert splits.train.store.dtype == np.float32
    again = _load("digits", tmp_path)
    np.testing.assert_array_equal(again.train.rows, splits.train.rows)
    assert again.digest == splits.digest


def test_digest_does_not_depend_on_the_validation_split(tmp_path):
    digests = {_load("digits", tmp_path, validation_fraction=f).digest for f in (0.0, 0.1, 0.5)}
    assert len(digests) == 1


def test_digest_changes_with_any_pixel_label_name_or_shape(tmp_path):
    data = _labeled([3, 4])
    digest = datasets.digest(data)
    changed = {digest}
    for pixel in np.ndindex(data.store.shape[1:]):
        store = data.store.copy()
        store[(5, *pixel)] ^= 1
        changed.add(datasets.digest(replace(data, store=store)))
    changed.add(datasets.digest(replace(data, labels=data.labels[::-1].copy())))
    changed.add(datasets.digest(replace(data, classes=("a", "b"))))
    changed.add(datasets.digest(replace(data, store=data.store.reshape(-1, 4, 3, 1))))
    assert len(changed) == 1 + 12 + 3


def test_npz_loads_with_and_without_names(tmp_path):
    arrays = _arrays()
    np.savez(tmp_path / "a.npz", **arrays)
    splits = _load(tmp_path / "a.npz", tmp_path)
    assert splits.name == "a"
    assert splits.train.classes == ("0", "1", "2", "3")
    np.testing.assert_array_equal(
        splits.train.images()[..., 0], arrays["images"][splits.train.rows]
    )
    np.savez(tmp_path / "b.npz", **arrays, classes=["w", "x", "y", "z"])
    assert _load(tmp_path / "b.npz", tmp_path).test.classes == ("w", "x", "y", "z")
    np.savez(tmp_path / "c.npz", **arrays, classes=np.array([b"w", b"x", b"y", b"z"]))
    assert _load(tmp_path / "c.npz", tmp_path).test.classes == ("w", "x", "y", "z")


KINDS = {  # an array that means these images, and the pixels that are read
    "uint16": (lambda a: a.astype(np.uint16) * 257, lambda a: a / 255),
    "uint16, not to its end": (lambda a: a.astype(np.uint16) * 16, lambda a: a * 16 / 65535),
    "big-endian uint16": (lambda a: a.astype(">u2") * 257, lambda a: a / 255),
    "bool": (lambda a: a > 127, lambda a: a > 127),
    "int64 of 0 and 1": (lambda a: (a > 127).astype(np.int64), lambda a: a > 127),
    "float16": (lambda a: (a > 127).astype(np.float16) / 4, lambda a: (a > 127) / 4),
    "float64": (lambda a: a / 255, lambda a: a / 255),
}


@pytest.mark.parametrize("kind", KINDS)
def test_npz_of_other_numbers_has_the_pixels_that_they_mean(kind, tmp_path, capsys):
    store, meant = KINDS[kind]
    arrays = _arrays()
    np.savez(tmp_path / "a.npz", **arrays | {"images": store(arrays["images"])})
    train = _load(tmp_path / "a.npz", tmp_path).train
    assert train.store.dtype == np.float32
    expected = meant(arrays["images"].astype(float))[train.rows]
    np.testing.assert_allclose(train.images()[..., 0], expected, rtol=1e-6, atol=1e-7)
    assert ("divided by 65535" in capsys.readouterr().err) == ("uint16" in kind)


def _with(name, change):
    def make():
        arrays = _arrays()
        return arrays | {name: change(arrays[name])}

    return make


def _nan(images):
    images = images / 255
    images[7, 2, 2] = np.nan
    return images


REFUSED = {
    "NaN": (_with("images", _nan), "image 7 has NaN"),
    "infinite": (_with("images", lambda a: np.where(a > 0, np.inf, 0.0)), "infinite"),
    "float above 1": (_with("images", lambda a: a.astype(np.float32)), r"in \[0, 1\]"),
    "negative": (_with("images", lambda a: a / 255 - 0.5), r"in \[0, 1\]"),
    "int64 pixels": (_with("images", lambda a: a.astype(np.int64)), r"in \[0, 1\]"),
    "bytes in int64": (_with("images", lambda a: a.astype(np.int64)), r"astype\(numpy.uint8\)"),
    "bytes in uint16": (_with("images", lambda a: a.astype(np.uint16)), r"astype\(numpy.uint8\)"),
    "int16": (_with("images", lambda a: a.astype(np.int16) * 99), "int16 from .* as uint16"),
    "uint32": (_with("images", lambda a: a.astype(np.uint32) << 24), "uint32 from"),
    "below 0": (_with("images", lambda a: a.astype(np.int16) - 128), "int16 from -128"),
    "just above 1": (_with("images", lambda a: a / 255 + 1e-8), "from .* to 1.00000001"),
    # float32 has no such number; NumPy would warn.
    "huge": (_with("images", lambda a: a * 1e300), "float64 from .*e\\+302"),
    "text": (_with("images", lambda a: a.astype(str)), "<U3"),
    "complex": (_with("images", lambda a: a * 1j), "complex"),
    "flat": (_with("images", lambda a: a.reshape(20, -1)), r"\(20, 36\)"),
    "two channels": (_with("images", lambda a: np.stack([a, a], -1)), r"\(20, 6, 6, 2\)"),
    "no height": (_with("images", lambda a: a[:, :0]), r"\(20, 0, 6, 1\)"),
    "no images": (lambda: {k: v[:0] for k, v in _arrays().items()}, r"\(0, 6, 6, 1\)"),
    "fewer labels": (_with("labels", lambda a: a[:-1]), "20 integers"),
    "float labels": (_with("labels", lambda a: a.astype(float)), "float64"),
    "one-hot labels": (_with("labels", lambda a: np.eye(4, dtype=int)[a]), r"\(20, 4\)"),
    "negative label": (_with("labels", lambda a: a - 1), "-1 to 2"),
    # A list of names for each of 2**60 classes would fill the memory.
    "huge label": (_with("labels", lambda a: a + 2**60), "for 20 images"),
    "class without images": (_with("labels", lambda a: a * 2), "no training image"),
    "one class": (_with("labels", lambda a: a * 0), "at least two classes"),
    "too few names": (lambda: _arrays() | {"classes": ["a", "b"]}, "only 2 class names"),
    "same name twice": (lambda: _arrays() | {"classes": list("aabc")}, "distinct"),
    "numbers as names": (lambda: _arrays() | {"classes": np.arange(4)}, "list of distinct names"),
    "no labels": (lambda: {"images": _arrays()["images"]}, r"has \['images'\]"),
    "no arrays": (dict, r"has \[\]"),
    "objects": (_with("labels", lambda a: a.astype(object)), "not a readable .npz"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_npz_refusals(case, tmp_path):
    make, match = REFUSED[case]
    np.savez(tmp_path / "bad.npz", **make())
    _refused(tmp_path / "bad.npz", tmp_path, match)


@pytest.mark.parametrize("kept", [0, 1, 30, 0.5, 0.99])
def test_truncated_npz_is_refused(kept, tmp_path):
    path = tmp_path / "cut.npz"
    np.savez_compressed(path, **_arrays())
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    _refused(path, tmp_path, "not a readable .npz")


def test_pickle_and_npy_under_the_name_of_an_npz_are_refused(tmp_path):
    import pickle

    path = tmp_path / "a.npz"
    path.write_bytes(pickle.dumps(_arrays()))
    _refused(path, tmp_path, "not a readable .npz")
    with path.open("wb") as file:
        np.save(file, _arrays()["images"])
    _refused(path, tmp_path, "not a readable .npz")


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_are_resized(dtype, tmp_path):
    images = np.zeros((8, 6, 9, 3), np.uint8)
    images[:, :, :, 1] = 255
    images = images if dtype is np.uint8 else (images / 255).astype(dtype)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(8) % 2)
    train = _load(tmp_path / "a.npz", tmp_path, image_size=4, validation_fraction=0).train
    assert train.shape == (4, 4, 3)
    assert train.store.dtype == dtype
    top = 255 if dtype is np.uint8 else 1
    np.testing.assert_allclose(train.images()[:, :, :, 1], top)
    assert not train.images()[..., [0, 2]].any()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ("digit", "did you mean 'digits'"),
        ("fashion_mnist", "did you mean 'fashion-mnist'"),
        ("./nowhere", "no such file or folder"),
        ("nowhere.npz", "no such file or folder"),
    ],
)
def test_unknown_data_set(data, match, tmp_path):
    with pytest.raises(UserError, match=match):
        _load(data, tmp_path)


def test_a_file_of_another_kind_is_not_called_missing(tmp_path):
    path = tmp_path / "images.csv"
    path.write_text("1,2,3")
    _refused(path, tmp_path, "neither a folder of class folders nor an .npz")


@pytest.mark.parametrize(
    "options", [{"validation_fraction": 1.0}, {"validation_fraction": -0.1}, {"image_size": 0}]
)
def test_option_values_out_of_range(options, tmp_path):
    with pytest.raises(UserError, match="must be"):
        _load("digits", tmp_path, **options)


def _no_network(*_, **__):
    raise urllib.error.URLError("no network\nin this test")


def test_missing_torchvision_data_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", _no_network)
    _refused("mnist", tmp_path, "--data-root or DSDISTILL_DATA")


def test_damaged_torchvision_data_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", _no_network)
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(b"not what it should be")
    _refused("fashion-mnist", tmp_path, "missing or incomplete under")


@pytest.mark.fashion
@pytest.mark.skipif(not (FASHION / "FashionMNIST").is_dir(), reason="no data in DSDISTILL_DATA")
def test_fashion_mnist_loads():
    splits = datasets.load("fashion-mnist", root=FASHION)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [
        54000,
        6000,
        10000,
    ]
    assert splits.train.shape == (28, 28, 1)
    assert splits.train.store.dtype == np.uint8
    assert np.bincount(splits.validation.labels).tolist() == [600] * 10
    assert np.bincount(splits.test.labels).tolist() == [1000] * 10
    assert splits.train.classes[9] == "Ankle boot"


def test_npz_class_names_of_any_bytes(tmp_path):
    images, labels = np.zeros((8, 2, 2), np.uint8), np.arange(8) % 2
    names = np.array(["é".encode(), b"\xff"])
    np.savez(tmp_path / "a.npz", images=images, labels=labels, classes=names)
    assert npz.read(tmp_path / "a.npz").classes == ("é", "\udcff")
    beyond = np.array([[0x110000], [0x61]], "<u4").view("<U1")[:, 0]
    np.savez(tmp_path / "b.npz", images=images, labels=labels, classes=beyond)
    with pytest.raises(DataError, match="distinct names"):
        npz.read(tmp_path / "b.npz")


def test_npz_member_that_is_no_array_is_refused(tmp_path):
    """NumPy gives such a member as its bytes."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", b"no array")
        archive.writestr("labels.npy", b"no array")
    with pytest.raises(DataError, match="must hold arrays 'images' and 'labels'"):
        npz.read(tmp_path / "a.npz")


@pytest.mark.parametrize("size", [1, 3, 4, 7, 100])
def test_parts_are_read_across_their_borders(size):
    images = np.arange(11, dtype=np.uint8).reshape(-1, 1, 1, 1)
    every = LabeledImages(images, np.zeros(11, np.int64), ("a", "b"))
    parts = [
        every.select(np.arange(5)),
        every.select(np.empty(0, np.int64)),
        every.select(np.arange(5, 11)),
    ]
    chunks = list(labeled_images.iterate_chunks(parts, size))
    np.testing.assert_array_equal(np.concatenate(chunks), images)
    assert [len(chunk) for chunk in chunks] == [len(c) for c in every.chunks(size)]
