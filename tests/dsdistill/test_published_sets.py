"""Published sets: read as intended, and refused if they are not what the user states."""

import json
import os
import pickle
import re
import warnings
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dsdistill.commands import evaluation_parts, export
from dsdistill.harness.data import datasets, distilled_set, folder_names, preprocess
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.data.labeled_images import LabeledImages, centred_one_hot, draw_per_class
from dsdistill.harness.errors import UserError
from dsdistill.options import EvaluateOptions
from dsdistill.published_sets import evidence, pixels, reader
from dsdistill.published_sets.stated_format import StatedFormat

SHARE = 20  # real images per class that stand in for a distilled set
GOOD = 0.9  # accuracy of ridge regression on them: 0.96; chance is 0.1


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return datasets.load("digits", root=tmp_path_factory.mktemp("root"), validation_fraction=0.0)


@pytest.fixture(scope="module")
def fitted(splits):
    return preprocess.fit("standardise", splits.train.chunks, splits.train.shape)


@pytest.fixture(scope="module")
def few(splits):
    """The set's images in [0, 1] and labels, in class order."""
    rows = draw_per_class(splits.train, SHARE, np.random.default_rng(0))
    return splits.train.images(rows), splits.train.labels[rows]


@pytest.fixture
def read(splits, fitted):
    def read_set(path, *, train=splits.train, **stated):
        data = {name: stated.pop(name) for name in ("data",) if name in stated}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return reader.load(path, train, StatedFormat(**stated), preprocess=fitted, **data)

    return read_set


@pytest.fixture
def refused(read):
    def require_refusal(path, match, **stated):
        with pytest.raises(UserError, match=match) as caught:
            read(path, **stated)
        assert "\n" not in str(caught.value)

    return require_refusal


def _accuracy(distilled, test):
    """Accuracy of kernel ridge regression with a Gaussian kernel, sensitive to shift and scale."""
    x, t = (a.reshape(len(a), -1) for a in (distilled.images, _seen(distilled, test)))
    k_ss, k_ts = (np.exp(-((a[:, None] - x) ** 2).mean(-1)) for a in (x, t))
    scores = k_ts @ np.linalg.solve(k_ss + 0.01 * np.eye(len(x)), distilled.labels)
    return (scores.argmax(1) == test.labels).mean()


def _seen(distilled, test):
    return distilled.preprocess.apply(test.images())


def _nchw(images):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _plain(path, images, labels):
    torch.save({"images": torch.as_tensor(images), "labels": torch.as_tensor(labels)}, path)
    return path


def _condensed(path, sets):
    accuracies = {"ConvNet": [np.float64(0.5), np.float32(0.25)], "MLP": [np.int64(3)]}
    torch.save({"data": sets, "accs_all_exps": accuracies}, path)
    return path


def _notes(distilled):
    return " | ".join(distilled.provenance["notes"])


def test_condensation_file_gives_its_last_set_by_its_own_constants(
    tmp_path, splits, few, read, monkeypatch
):
    """The constants of the project are neither 0 and 1 nor those fitted on the data."""
    mean, std = 0.2, 0.5
    monkeypatch.setitem(pixels.CONDENSATION, "MNIST", ((mean,), (std,)))
    images, labels = few
    published = _nchw((images - np.float32(mean)) / np.float32(std))
    noise = torch.randn(published.shape, generator=torch.Generator().manual_seed(0))
    sets = [[noise, torch.from_numpy(labels)], [published, torch.from_numpy(labels)]]
    path = _condensed(tmp_path / "res_DM_MNIST_ConvNet_20ipc.pt", sets)
    got = read(path)
    np.testing.assert_allclose(got.images, (images - mean) / std, atol=1e-6)
    np.testing.assert_array_equal(got.labels, centred_one_hot(labels, 10))
    assert (got.preprocess.kind, got.preprocess.mean[0]) == ("standardise", np.float32(mean))
    assert got.preprocess.std[0] == np.float32(std)
    assert _accuracy(got, splits.test) > GOOD
    assert "the last of 2 sets" in _notes(got)
    assert "those of DC for MNIST" in _notes(got)
    assert "labels: index" in _notes(got)


def test_constants_are_the_projects():
    """The project's constants, copied from the published program once more."""
    assert pixels.CONSTANTS["DC"]["FashionMNIST"] == ((0.2861,), (0.353,))
    assert pixels.CONSTANTS["DC"]["CIFAR100"][0] == (0.5071, 0.4866, 0.4409)
    assert pixels.CONSTANTS["MTT"]["CIFAR100"][1] == (0.2023, 0.1994, 0.201)


@pytest.mark.parametrize(
    ("name", "data", "whose"),
    [
        ("res_DC_FashionMNIST_ConvNet_1ipc.pt", "", "DC for FashionMNIST"),
        ("res_DC_FashionMNIST_ConvNet_1ipc.pt", "fashion-mnist", "DC for FashionMNIST"),
        ("set.pt", "fashion-mnist", "DC for FashionMNIST"),
        ("set.pt", "digits", "this data's own"),
        ("res_DC_CIFAR10_ConvNet_1ipc.pt", "", "this data's own"),  # three channels, not one
    ],
)
def test_the_name_of_the_data_chooses_the_constants(tmp_path, few, read, name, data, whose):
    path = _condensed(tmp_path / name, [[_nchw(few[0] * 3 - 1), torch.from_numpy(few[1])]])
    got = read(path, data=data)
    assert whose in _notes(got)
    assert (got.preprocess.mean[0] == np.float32(0.2861)) == ("Fashion" in whose)


def test_a_file_named_after_other_data_is_refused(tmp_path, few, refused):
    sets = [[_nchw(few[0] * 3 - 1), torch.from_numpy(few[1])]]
    path = _condensed(tmp_path / "res_DC_FashionMNIST_ConvNet_1ipc.pt", sets)
    refused(path, "named after FashionMNIST: use --data fashion-mnist", data="mnist")


def test_pair_of_files_as_folder_and_as_file(tmp_path, splits, few, fitted, read, refused):
    images, labels = few
    folder = tmp_path / "CIFAR10" / "sweet-wood-12"
    folder.mkdir(parents=True)
    published = _nchw(fitted.apply(images)).requires_grad_()
    torch.save(published, folder / "images_500.pt")
    torch.save(torch.from_numpy(labels), folder / "labels_500.pt")
    assert reader.is_published_set(folder)
    refused(folder, r"no images_best.pt: give one of its files \(images_500.pt\)")
    torch.save(published, folder / "images_best.pt")
    refused(folder, "there is no file .*labels_best.pt")
    torch.save(torch.from_numpy(labels), folder / "labels_best.pt")
    for path in (folder, folder / "images_best.pt", folder / "images_500.pt"):
        got = read(path)
        assert _accuracy(got, splits.test) > GOOD
        assert "this data's own" in _notes(got)


def test_whitened_pairs_are_not_guessed(tmp_path, splits, few, refused):
    """MTT's colour files tell whether ZCA was used only if unwhitened images lie beside them."""
    pictures = np.repeat(splits.train.images(), 3, -1)
    colour = LabeledImages(pictures, splits.train.labels, splits.train.classes)
    data_preprocess = preprocess.fit("standardise", colour.chunks, colour.shape)
    images, labels = np.repeat(few[0], 3, -1), few[1]
    folder = tmp_path / "CIFAR100" / "run"
    folder.mkdir(parents=True)
    torch.save(_nchw(data_preprocess.apply(images)), folder / "images_best.pt")
    torch.save(torch.from_numpy(labels), folder / "labels_best.pt")
    refused(folder, "use --pixels zca-mtt or --pixels standardised", train=colour)
    got = reader.load(
        folder, colour, StatedFormat(pixels="standardised"), preprocess=data_preprocess
    )
    assert "those of MTT for CIFAR100" in _notes(got)
    torch.save(_nchw(images * np.float32(1.2) - np.float32(0.1)), folder / "images_zca_best.pt")
    whitened = "is whitened by ZCA.* use --pixels zca-mtt"
    refused(folder, whitened, train=colour, pixels="standardised")
    got = reader.load(
        folder / "images_zca_best.pt", colour, StatedFormat(), preprocess=data_preprocess
    )
    np.testing.assert_allclose(got.images, data_preprocess.apply(images * 1.2 - 0.1), atol=1e-4)
    assert "pixels: unit (the kind of file)" in _notes(got)


def test_kip_file(tmp_path, splits, few, fitted, read, refused):
    """Rows of labels learned by Adam need not sum to 0; only a file's name tells what they are."""
    images, labels = few
    rng = np.random.default_rng(0)
    learned = centred_one_hot(labels, 10) + rng.normal(0, 0.05, (len(labels), 10))
    learned = learned.astype(np.float32)
    path = tmp_path / "ConvNet_ssize200_nozca_l_noaug_ckpt1000.npz"
    np.savez(path, images=fitted.apply(images), labels=learned)
    got = read(path)
    np.testing.assert_array_equal(got.labels, learned)
    assert "labels: centred" in _notes(got)
    assert _accuracy(got, splits.test) > GOOD
    np.savez(tmp_path / "set.npz", images=fitted.apply(images), labels=learned)
    refused(tmp_path / "set.npz", "--labels logits, or --labels centred")
    np.testing.assert_array_equal(read(tmp_path / "set.npz", labels="centred").labels, learned)


def test_kip_file_that_is_whitened(tmp_path, splits, few, read, refused):
    images, labels = few
    data_preprocess = preprocess.fit("zca", splits.train.chunks, splits.train.shape)
    path = tmp_path / "ConvNet_ssize200_zca_l_noaug_ckpt1000.npz"
    np.savez(path, images=data_preprocess.apply(images), labels=centred_one_hot(labels, 10))
    got = read(path)
    assert got.preprocess.same_as(data_preprocess)
    assert _accuracy(got, splits.test) > GOOD
    assert "pixels: zca (the kind of file); ZCA as the KIP paper does" in _notes(got)
    refused(path, "is whitened by ZCA", pixels="standardised")


def test_mtt_pair_that_is_whitened(tmp_path, splits, few, read, refused):
    """Whitening by the formula of Kornia's `ZCAWhitening(eps=0.1)`, with MTT's order of pixels."""
    images, labels = few
    every = _nchw(splits.train.images()).flatten(1).double()
    centred = every - every.mean(0)
    u, s, _ = torch.linalg.svd(centred.T @ centred / (len(centred) - 1))
    transform = u @ torch.diag((s + 0.1).rsqrt()) @ u.T
    flat = _nchw(images)
    white = ((flat.flatten(1) - every.mean(0)) @ transform).view_as(flat).float()
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save(white, folder / "images_best.pt")
    torch.save(torch.from_numpy(labels), folder / "labels_best.pt")
    got = read(folder, pixels="zca-mtt")
    np.testing.assert_allclose(got.images, got.preprocess.apply(images), atol=1e-5)
    np.testing.assert_allclose(got.preprocess.invert(got.images), images, atol=1e-5)
    assert _accuracy(got, splits.test) > GOOD
    refused(folder, "for --pixels standardised", pixels="zca-mtt", mean=(0.5,), std=(0.5,))
    torch.save(flat, folder / "images_zca_best.pt")  # so the other ones are whitened
    assert read(folder).preprocess.kind == "zca-mtt"


@pytest.mark.parametrize("kind", ["npz", "torch"])
@pytest.mark.parametrize("prepared", ["standardise", "none"])
def test_own_export_comes_back_to_the_bit(tmp_path, splits, few, read, kind, prepared):
    images, labels = few
    data_preprocess = preprocess.fit(prepared, lambda size: iter([images]), images.shape[1:])
    solved = np.random.default_rng(1).normal(0, 9, (len(labels), 10)).astype(np.float32)
    exported = DistilledSet(
        data_preprocess.apply(images), solved, data_preprocess, splits.train.classes, {}
    )
    distilled_set.save(tmp_path / distilled_set.FILE_NAME, exported)
    path = export.write(tmp_path / distilled_set.FILE_NAME, kind, None)
    got = read(path)
    np.testing.assert_array_equal(got.images, exported.images)
    np.testing.assert_array_equal(got.labels, exported.labels)
    np.testing.assert_array_equal(_seen(got, splits.test), _seen(exported, splits.test))


def test_own_export_that_cannot_be_used(tmp_path, few, read, refused):
    images, labels = few
    data_preprocess = preprocess.fit("zca", lambda size: iter([images]), images.shape[1:])
    classes = tuple(str(i) for i in range(10))
    exported = DistilledSet(
        data_preprocess.apply(images), centred_one_hot(labels, 10), data_preprocess, classes, {}
    )
    distilled_set.save(tmp_path / distilled_set.FILE_NAME, exported)
    whitened = export.write(tmp_path / distilled_set.FILE_NAME, "npz", None)
    refused(whitened, "whitened set: evaluate its .safetensors")
    plain = preprocess.identity(1)
    exported = DistilledSet(images, centred_one_hot(labels, 10), plain, classes[::-1], {})
    distilled_set.save(tmp_path / distilled_set.FILE_NAME, exported)
    reversed_ = export.write(tmp_path / distilled_set.FILE_NAME, "npz", tmp_path / "reversed.npz")
    got = read(reversed_)
    np.testing.assert_array_equal(got.hard_labels, 9 - labels)  # label 9 is the class named '0'
    assert "classes: matched by name" in _notes(got)
    other = distilled_set.FILE_NAME.replace("distilled", "other")
    distilled_set.save(tmp_path / other, replace(exported, classes=("ten", *classes[1:])))
    named = export.write(tmp_path / other, "npz", tmp_path / "named.npz")
    refused(named, "has the classes ten, 1, .* the data 0, 1, .* must have the same ones")
    with np.load(reversed_) as file:
        arrays = {name: file[name] for name in file.files if name != "classes"}
    np.savez(tmp_path / "wide.npz", **(arrays | {"std": np.ones(7, np.float32)}))
    refused(tmp_path / "wide.npz", "do not go together")


def _write_folder(folder, images, labels, name, suffix=".png", size=None):
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        inside = folder / name(label)
        inside.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(np.rint(image[..., 0] * 255).astype(np.uint8))
        if size:
            picture = picture.resize((size, size), Image.Resampling.NEAREST)
        picture.save(inside / f"{index:05}{suffix}")
    return folder


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (lambda k: f"new{k:03}", "by number"),
        (lambda k: f"{k:05}", "by number"),
        (lambda k: str(k), "by name"),
    ],
    ids=["sre2l", "rded", "names"],
)
def test_class_folders(tmp_path, splits, few, fitted, read, name, how):
    folder = _write_folder(tmp_path / "syn", *few, name)
    assert reader.is_published_set(folder)
    got = read(folder)
    assert _accuracy(got, splits.test) > GOOD
    assert how in _notes(got)
    assert "resized" not in _notes(got)
    order = np.argsort(few[1], kind="stable")
    np.testing.assert_allclose(got.images, fitted.apply(few[0][order]), atol=0.01)
    np.testing.assert_array_equal(got.hard_labels, few[1][order])


@pytest.mark.parametrize("names", ["zero/nil one two.", "cafe\u0301 one: one_", "a/b a-b .hidden"])
def test_class_folders_by_name_need_no_order(names, tmp_path, splits, few, read):
    """Class names that sort unlike the classes, or that `export` must change for a folder."""
    names = (*names.split(" "), "three", "four", "five", "six", "seven", "eight", "nine")
    train = LabeledImages(splits.train.images(), splits.train.labels, names)
    folders = folder_names.from_classes(names)
    got = read(_write_folder(tmp_path / "syn", *few, lambda k: folders[k]), train=train)
    assert _accuracy(got, splits.test) > GOOD
    assert "matched by name" in _notes(got)


def test_pictures_of_other_sizes_and_channels_are_brought_to_the_data(tmp_path, splits, few, read):
    folder = _write_folder(tmp_path / "syn", *few, lambda k: f"new{k:03}", ".jpg", size=24)
    for file in sorted(folder.rglob("*.jpg"))[::2]:
        Image.open(file).convert("RGB").save(file)
    got = read(folder)
    assert got.images.shape == (200, 8, 8, 1)
    assert _accuracy(got, splits.test) > GOOD
    assert "200 images were resized to 8x8" in _notes(got)


def test_folders_that_are_refused(tmp_path, few, refused):
    one = _write_folder(tmp_path / "one", *few, lambda k: f"new{k + 1:03}")
    refused(one, r"10 \(new001, .* and 5 more\), the data has 10 \(0, 1, .*\)")
    images, labels = few
    less = _write_folder(
        tmp_path / "less", images[labels < 9], labels[labels < 9], lambda k: f"new{k:03}"
    )
    refused(less, r"it has 9 \(new000")
    mixed = _write_folder(tmp_path / "mixed", *few, lambda k: f"{'ab'[k % 2]}{k}")
    refused(mixed, "by name or numbered from 0")
    bad = _write_folder(tmp_path / "bad", *few, lambda k: f"new{k:03}")
    file = next((bad / "new003").iterdir())
    file.write_bytes(file.read_bytes()[:60])
    refused(bad, "is not a readable image")
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(file)
    refused(bad, "more than 8 bits")
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    refused(bad, "is not a readable image")
    for file in (bad / "new003").iterdir():
        file.unlink()
    refused(bad, "class folder .*new003 has no images")


def _encodings(labels):
    one_hot = np.eye(10, dtype=np.float32)[labels]
    soft = 0.9 * one_hot + np.float32(0.01)
    return {
        "index": (labels, centred_one_hot(labels, 10)),
        "one-hot": (one_hot, one_hot - 0.1),
        "probabilities": (soft, soft - 0.1),
        "centred": (one_hot - np.float32(0.1), one_hot - 0.1),
        "logits": (np.log(soft) + 2, soft - 0.1),
    }


@pytest.mark.parametrize("kind", ["index", "one-hot", "probabilities", "centred", "logits"])
@pytest.mark.parametrize("stated", [False, True])
def test_labels_come_in_one_encoding(tmp_path, few, fitted, read, refused, kind, stated):
    given, expected = _encodings(few[1])[kind]
    path = _plain(tmp_path / "set.pt", _nchw(fitted.apply(few[0])), given)
    if kind == "logits" and not stated:
        refused(path, "could be logits or learned: use --labels logits")
        return
    got = read(path, labels=kind) if stated else read(path)
    assert got.labels.dtype == np.float32
    np.testing.assert_allclose(got.labels, expected, atol=1e-6)
    assert f"labels: {kind}{' (stated)' if stated else ''}" in _notes(got)


@pytest.mark.parametrize(
    ("given", "stated", "match"),
    [
        ("index", "one-hot", "use --labels index"),
        ("one-hot", "index", "use --labels one-hot"),
        ("one-hot", "centred", "use --labels one-hot"),
        ("probabilities", "one-hot", "use --labels probabilities"),
        ("probabilities", "logits", "use --labels probabilities"),
        ("centred", "probabilities", "use --labels centred"),
        ("logits", "probabilities", "use --labels logits or --labels centred"),
        ("logits", "centred", "sum to about 0, got a mean sum of -?[0-9.]+: use --labels logits"),
    ],
)
def test_labels_that_are_not_as_stated(tmp_path, few, fitted, refused, given, stated, match):
    labels = _encodings(few[1])[given][0]
    refused(_plain(tmp_path / "set.pt", _nchw(fitted.apply(few[0])), labels), match, labels=stated)


def test_large_rows_that_sum_to_zero_may_be_logits(tmp_path, few, fitted, refused):
    labels = 60 * centred_one_hot(few[1], 10)
    refused(_plain(tmp_path / "set.pt", _nchw(fitted.apply(few[0])), labels), "could be logits")


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (lambda y: y + 1, "numbers 0 to 9.* 10 numbers from 1 to 10"),
        (lambda y: y % 5, "10 classes; got 5 numbers from 0 to 4"),
        (lambda y: y + 0.5, "numbers 0 to 9"),
        (lambda y: np.eye(100, dtype=np.float32)[y], "labels of 100 classes, the data has 10"),
        (lambda y: np.where(y == 3, np.nan, y), "finite"),
        (lambda y: np.zeros((len(y), 2, 10)), "one number or one row per image"),
        (lambda y: y[:-1], "200 images but 199 labels"),
        (lambda y: y[:0], "got labels of shape"),
    ],
)
def test_implausible_labels(tmp_path, few, fitted, refused, labels, match):
    refused(_plain(tmp_path / "set.pt", _nchw(fitted.apply(few[0])), labels(few[1])), match)


def test_unequal_classes_are_noted(tmp_path, few, fitted, read):
    keep = np.arange(len(few[1])) > 3
    path = _plain(tmp_path / "set.pt", _nchw(fitted.apply(few[0][keep])), few[1][keep])
    assert "images per class are unequal: 16 to 20" in _notes(read(path))


@pytest.mark.parametrize("stated", ["auto", "as it is"])
@pytest.mark.parametrize("kind", ["bytes", "bytes as floats", "unit", "standardised"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nhw"])
def test_pixels_in_every_range_and_layout(
    tmp_path, splits, few, fitted, read, kind, stated, layout
):
    unit = np.rint(few[0] * 255) / np.float32(255)
    images = {
        "bytes": np.rint(unit * 255).astype(np.uint8),
        "bytes as floats": np.rint(unit * 255),
        "unit": unit,
        "standardised": fitted.apply(unit),
    }[kind]
    images = {"nchw": _nchw(images), "nhwc": images, "nhw": images[..., 0]}[layout]
    path = _plain(tmp_path / "set.pt", images, few[1])
    kind = kind.split()[0]
    got = read(path, pixels=kind if stated != "auto" else "auto")
    np.testing.assert_allclose(got.images, fitted.apply(unit), atol=1e-5)
    assert got.preprocess.same_as(fitted)
    assert _accuracy(got, splits.test) > GOOD
    assert f"pixels: {kind} ({'stated; ' if stated != 'auto' else ''}from " in _notes(got)


@pytest.mark.parametrize(
    ("images", "stated", "match"),
    [
        (
            lambda x: 4 * x - 2.1,
            "unit",
            "from -2.1 to 1.9, .* unit ones .*--pixels standardised",
        ),
        (lambda x: 4 * x - 2.1, "bytes", "use --pixels standardised"),
        (lambda x: x, "standardised", "use --pixels unit"),
        (lambda x: x, "bytes", "use --pixels unit"),
        (lambda x: np.rint(255 * x), "standardised", "use --pixels bytes"),
        (lambda x: np.rint(255 * x), "unit", "use --pixels bytes"),
        (lambda x: 900 * x, "auto", "no --pixels fits"),
        (lambda x: 900 * x - 300, "auto", "no --pixels fits"),
    ],
)
def test_pixels_that_are_not_as_stated(tmp_path, few, refused, images, stated, match):
    path = _plain(tmp_path / "set.pt", _nchw(images(few[0])), few[1])
    refused(path, match, pixels=stated)


def test_pixels_that_leave_the_range_a_little_must_be_stated(
    tmp_path, splits, few, fitted, read, refused
):
    """Unclipped images may as well be standardised."""
    path = _plain(tmp_path / "set.pt", _nchw(few[0] * np.float32(1.4) - np.float32(0.2)), few[1])
    got = read(path, pixels="unit")
    np.testing.assert_allclose(got.images, fitted.apply(few[0] * 1.4 - 0.2), atol=1e-5)
    assert _accuracy(got, splits.test) > GOOD
    refused(path, "from -0.2 to 1.2, are, and they fit no range exactly: .*signed, unit, zca")


def test_constants_that_are_stated_decide(tmp_path, splits, few, read):
    """Of a set that was standardised by unusual constants only these give its accuracy."""
    path = _plain(tmp_path / "set.pt", _nchw((few[0] - np.float32(0.9)) / np.float32(0.1)), few[1])
    right = read(path, mean=(0.9,), std=(0.1,))
    wrong = read(path, pixels="standardised")
    assert _accuracy(right, splits.test) > GOOD
    assert _accuracy(wrong, splits.test) < 0.3
    assert "mean 0.9, deviation 0.1: as stated" in _notes(right)
    assert right.provenance["stated"]["mean"] == [0.9]


def test_classes_in_another_order_are_not_learned(tmp_path, splits, few, fitted, read):
    path = _plain(tmp_path / "set.pt", _nchw(fitted.apply(few[0])), (few[1] + 1) % 10)
    assert _accuracy(read(path), splits.test) < 0.1


@pytest.mark.parametrize(
    ("stated", "match"),
    [
        ({"mean": (0.3,)}, "--mean and --std go together"),
        ({"mean": (0.3,), "std": (0.3,), "pixels": "unit"}, "for --pixels standardised, not unit"),
        ({"mean": (0.3, 0.3), "std": (0.3, 0.3)}, "one value per channel, 1 each"),
        (
            {"mean": (77.0,), "std": (96.0,)},
            "mean 77, deviation 96 .* of bytes by 255",
        ),
        ({"mean": (0.3,), "std": (0.0,)}, "are not of images in"),
        ({"mean": (float("nan"),), "std": (0.3,)}, "are not of images in"),
        ({"layout": "nhwc"}, r"shape \(200, 1, 8, 8\), those of the data \(n, 1, 8, 8\) or"),
    ],
)
def test_statements_that_are_refused(tmp_path, few, fitted, refused, stated, match):
    refused(_plain(tmp_path / "set.pt", _nchw(fitted.apply(few[0])), few[1]), match, **stated)


def test_constants_for_other_pixels_are_refused(tmp_path, few, refused):
    path = _plain(tmp_path / "set.pt", _nchw(few[0]), few[1])
    refused(path, "pixels are unit", mean=(0.3,), std=(0.3,))


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda x: x[:, :, :7], "shape .200, 8, 7.* check --data"),
        (lambda x: np.repeat(x, 3, -1), "shape .200, 8, 8, 3."),
        (lambda x: x[:0], "got images of shape"),
        (lambda x: _with(x, 3, np.nan), "image 3 has NaN"),
        (lambda x: _with(x, 5, 0.5), "image 5 is constant"),
        (lambda x: x * 1e300, "image 0 has NaN or infinite"),
    ],
)
def test_images_that_are_refused(tmp_path, few, refused, spoil, match):
    np.savez(tmp_path / "set.npz", images=spoil(few[0].astype(np.float64)).squeeze(), labels=few[1])
    refused(tmp_path / "set.npz", match)


def _with(images, index, value):
    spoiled = images.copy()
    spoiled[index] = value
    return spoiled


def test_a_shape_that_fits_both_layouts_must_be_stated(tmp_path, refused):
    rng = np.random.default_rng(0)
    images = rng.random((20, 3, 3, 3), np.float32)
    train = LabeledImages(images, np.arange(20) % 10, tuple("0123456789"))
    data_preprocess = preprocess.fit("standardise", train.chunks, train.shape)
    path = _plain(tmp_path / "set.pt", images, np.arange(20) % 10)
    refused(path, "fit both layouts: add --layout", train=train)
    nhwc, nchw = (
        reader.load(path, train, StatedFormat(layout=layout), preprocess=data_preprocess).images
        for layout in ("nhwc", "nchw")
    )
    np.testing.assert_allclose(nhwc, data_preprocess.apply(images), atol=1e-6)
    np.testing.assert_allclose(nchw, data_preprocess.apply(images.transpose(0, 2, 3, 1)), atol=1e-6)


def test_the_set_can_be_saved_and_says_how_it_was_read(tmp_path, few, fitted, read):
    path = _plain(tmp_path / "set.pt", _nchw(fitted.apply(few[0])), few[1])
    got = read(path, mean=(0.3,), std=(0.4,))
    distilled_set.save(tmp_path / "again.safetensors", got)
    provenance = distilled_set.load(tmp_path / "again.safetensors").provenance
    assert provenance == json.loads(json.dumps(got.provenance)) == got.provenance
    assert provenance["method"] == "published"
    assert provenance["file"] == str(path)
    assert re.fullmatch("[0-9a-f]{64}", provenance["sha256"])
    assert (provenance["seconds"], provenance["kernel"], provenance["metrics"]) == (None, None, {})


def test_digest_follows_every_file(tmp_path, few, read):
    folder = _write_folder(tmp_path / "syn", *few, lambda k: f"new{k:03}")
    before = read(folder).provenance["sha256"]
    assert read(folder).provenance["sha256"] == before
    file = sorted((folder / "new009").iterdir())[-1]
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    assert read(folder).provenance["sha256"] != before


def test_what_is_foreign(tmp_path):
    for name in ("a.pt", "a.pth", "a.npz"):
        assert reader.is_published_set(tmp_path / name)
    assert not reader.is_published_set(tmp_path / "a.safetensors")
    assert not reader.is_published_set(tmp_path / "missing")
    assert not reader.is_published_set(tmp_path)
    (tmp_path / "new000").mkdir()
    assert not reader.is_published_set(tmp_path)
    (tmp_path / "new000" / "1.JPEG").touch()
    assert reader.is_published_set(tmp_path)
    (tmp_path / distilled_set.FILE_NAME).touch()
    assert not reader.is_published_set(tmp_path)


def test_hint():
    """Three standard errors of 10000 answers at chance 0.1 are 0.009."""
    assert reader.chance_hint(0.1091, 0.1, 10000) is None
    line = reader.chance_hint(0.1089, 0.1, 10000)
    assert line is not None
    assert all(word in line for word in ("--pixels", "--mean", "--labels", "--layout", "order"))
    assert reader.chance_hint(0.02, 0.1, 10000) is not None
    assert reader.chance_hint(0.15, 0.1, 100) is not None


class _Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_hostile_pickles_are_not_run(tmp_path, few, refused):
    target = tmp_path / "made by a pickle"
    images, labels = torch.from_numpy(few[0]), torch.from_numpy(few[1])
    torch.save({"images": images, "labels": labels, "x": _Hostile(target)}, tmp_path / "zip.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(_Hostile(target)))
    torch.save(_Hostile(target), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    array = np.array([_Hostile(target)], dtype=object)
    np.savez(tmp_path / "set.npz", images=array, labels=few[1])
    for name in ("zip.pt", "pickle.pt", "old.pt"):
        refused(tmp_path / name, "nothing in it was run|not a complete torch file")
    refused(tmp_path / "set.npz", "not a readable .npz: ValueError: Object arrays")
    assert not target.exists()


def test_scalars_of_older_numpy_are_allowed(tmp_path, few, read):
    """Published files name a function of `numpy.core`, where it was when they were written."""
    path = _condensed(tmp_path / "set.pt", [[_nchw(few[0]), torch.from_numpy(few[1])]])
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    new, old = b"cnumpy._core.multiarray\nscalar", b"cnumpy.core.multiarray\nscalar"
    assert any(new in part for part in parts.values())
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part.replace(new, old))
    assert len(read(path)) == len(few[1])


def test_numpy_scalars_are_allowed_and_other_numpy_objects_are_not(tmp_path, few, refused, read):
    images, labels = _nchw(few[0]), torch.from_numpy(few[1])
    read(_condensed(tmp_path / "set.pt", [[images, labels]]))
    torch.save({"data": [[images, labels]], "x": np.zeros(3)}, tmp_path / "array.pt")
    refused(tmp_path / "array.pt", "nothing in it was run")
    torch.save({"data": [[images, np.float64(3)]]}, tmp_path / "scalar.pt")
    refused(tmp_path / "scalar.pt", "must hold tensors")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"weights": torch.zeros(3)}, "no images with labels under a known name"),
        ({"data": []}, "list of .images, labels."),
        ({"data": [[torch.zeros(3)]]}, "list of .images, labels."),
        ({"images": torch.zeros(3), "labels": [1, 2, 3]}, "got list"),
        ({"images": torch.zeros(3) * 1j, "labels": torch.zeros(3)}, "real numbers"),
        ({"images": torch.zeros(3, device="meta"), "labels": torch.zeros(3)}, "plain tensors"),
        ({"images": torch.zeros(1).expand(10**12), "labels": torch.zeros(3)}, "needs 8.2 TiB"),
        ({"images": torch.tensor(1.0), "labels": torch.zeros(3)}, "got images of shape"),
        (torch.zeros(3), "a single tensor, but no labels"),
        (7, "no images with labels"),
    ],
)
def test_contents_that_are_refused(tmp_path, refused, content, match):
    torch.save(content, tmp_path / "set.pt")
    refused(tmp_path / "set.pt", match)


def test_archives_that_unpack_to_more_than_memory(tmp_path, refused):
    """An archive whose directory claims 64 TiB that it does not hold."""
    for name in ("set.npz", "set.pt"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("images.npy", b"0")
            archive.filelist[0].file_size = 2**46
        refused(tmp_path / name, "needs 64.0 TiB")


@pytest.mark.parametrize("name", ["missing.pt", "missing.npz", "missing.txt"])
def test_missing_files(tmp_path, refused, name):
    refused(tmp_path / name, "there is no file" if "txt" not in name else "must be a folder or")


def test_npz_without_the_arrays(tmp_path, refused):
    np.savez(tmp_path / "set.npz", x=np.zeros(3), images=np.zeros(3))
    refused(tmp_path / "set.npz", r"must hold 'images' and 'labels', has \['images', 'x'\]")
    np.savez(tmp_path / "set.npz", images=np.array(["a"]), labels=np.zeros(1))
    refused(tmp_path / "set.npz", "images must be numbers")
    np.save(tmp_path / "set.npy", np.zeros(3))
    os.replace(tmp_path / "set.npy", tmp_path / "set.npz")
    refused(tmp_path / "set.npz", "not a readable .npz")


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_damaged_files(tmp_path, few, read, suffix):
    """A file that is cut, or has a byte changed, gives one line or the same set."""
    images, labels = few[0][::SHARE], few[1][::SHARE]
    path = tmp_path / f"set{suffix}"
    if suffix == ".pt":
        _plain(path, _nchw(images), labels)
    else:
        np.savez_compressed(path, images=images, labels=labels)
    whole, content = read(path), path.read_bytes()
    rng = np.random.default_rng(0)
    spoiled = [content[:cut] for cut in (0, 1, 50, len(content) // 2, len(content) - 1)]
    for place in rng.integers(0, len(content), 60):
        spoiled.append(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
    messages = []
    for bytes_ in spoiled:
        path.write_bytes(bytes_)
        try:
            assert read(path).images.shape == whole.images.shape
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert not any("\n" in message for message in messages)


def _colour(splits, few):
    """Real and few images whose three channels differ, so that constants can be told apart."""
    gains = np.array([1.0, 0.7, 0.4], np.float32)
    every = splits.train.images() * gains
    every[..., 0] = 1 - every[..., 0]
    images = few[0] * gains
    images[..., 0] = 1 - images[..., 0]
    return LabeledImages(every, splits.train.labels, splits.train.classes), images


def _whitened_by_hand(train, kind):
    """The whitening of RFAD or FRePo by a singular value decomposition in float64."""
    x = train.images().astype(np.float64)
    mean, std = x.mean((0, 1, 2)), x.std((0, 1, 2))
    flat = ((x - mean) / std).reshape(len(x), -1)
    centre = flat.mean(0) if kind == "zca-frepo" else np.zeros(flat.shape[1])
    second = (flat - centre).T @ (flat - centre) / len(flat)
    second += 0.1 * np.trace(second) / len(second) * np.eye(len(second))
    u, s, _ = np.linalg.svd(second)
    matrix = u @ np.diag(s**-0.5) @ u.T

    def apply(images):
        z = ((images - mean) / std).reshape(len(images), -1) - centre
        return (z @ matrix).reshape(images.shape).astype(np.float32)

    return apply


def _rfad(path, images, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    k, jit = np.float32(3.7), np.float64(5e-3)
    nchw = images.transpose(0, 3, 1, 2)
    np.savez(path, images=nchw, labels=labels, valid_loss=1.0, k=k, jit=jit, best_iter=7)
    return path


def test_rfad_file_of_colour_images(tmp_path, splits, few, refused):
    train, images = _colour(splits, few)
    data_preprocess = preprocess.fit("standardise", train.chunks, train.shape)
    whiten = _whitened_by_hand(train, "zca-rfad")
    learned = centred_one_hot(few[1], 10) + np.float32(0.01)
    path = _rfad(
        tmp_path / "distilled_images_final" / "cifar10" / "10" / "best.npz", whiten(images), learned
    )
    got = reader.load(path, train, StatedFormat(), preprocess=data_preprocess)
    np.testing.assert_array_equal(got.images, whiten(images))
    test = splits.test.images(np.arange(50)) * np.array([1.0, 0.7, 0.4], np.float32)
    np.testing.assert_allclose(got.preprocess.apply(test), whiten(test), atol=1e-3)
    np.testing.assert_allclose(got.preprocess.invert(got.images), images, atol=1e-3)
    np.testing.assert_array_equal(got.labels, learned)
    assert "pixels: zca-rfad" in _notes(got)
    assert "ridge: 0.005, as in the file" in _notes(got)
    assert got.provenance["evaluation_ridge"] == 5e-3
    # If neither the data nor the folders have a name, three readings remain.
    unnamed = _rfad(tmp_path / "set.npz", whiten(images), learned)
    refused(unnamed, "use --pixels zca-rfad, --pixels zca or --pixels standard", train=train)
    svhn = reader.load(unnamed, train, StatedFormat(), preprocess=data_preprocess, data="svhn")
    assert svhn.preprocess.kind == "zca"


def test_rfad_file_of_grey_images_is_standardised(tmp_path, few, fitted, read, refused):
    path = _rfad(tmp_path / "best.npz", 1.3 * fitted.apply(few[0]), centred_one_hot(few[1], 10))
    got = read(path)
    assert got.preprocess.same_as(fitted)
    np.savez(tmp_path / "bad.npz", images=few[0], labels=few[1], k=1.0, jit=np.float64(np.nan))
    refused(tmp_path / "bad.npz", "'jit' must be one number between 0 and 1")


def test_frepo_file(tmp_path, splits, few, read):
    train, images = _colour(splits, few)
    data_preprocess = preprocess.fit("standardise", train.chunks, train.shape)
    whiten = _whitened_by_hand(train, "zca-frepo")
    path = tmp_path / "step500000.npz"
    drifted = centred_one_hot(few[1], 10) + np.float32(0.02)  # learned, so no longer summing to 0
    np.savez(path, image=whiten(images), label=drifted)
    got = reader.load(path, train, StatedFormat(), preprocess=data_preprocess)
    assert got.preprocess.kind == "zca-frepo"
    np.testing.assert_allclose(got.preprocess.apply(images), whiten(images), atol=1e-3)
    np.testing.assert_allclose(got.preprocess.invert(got.images), images, atol=1e-3)
    np.testing.assert_array_equal(got.labels, drifted)
    np.savez(path, image=3 * few[0] - 1, label=drifted)
    got = read(path, data="fashion-mnist")  # grey: standardised, by the constants of the project
    assert "mean 0.2861, deviation 0.353: those of FRePo for FashionMNIST" in _notes(got)


def test_frepo_divides_labels_by_a_root_of_the_number_of_classes(tmp_path, fitted):
    labels = np.arange(40)
    images = np.random.default_rng(0).random((40, 8, 8, 1), np.float32)
    train = LabeledImages(images, labels, tuple(map(str, range(40))))
    np.savez(tmp_path / "s.npz", image=fitted.apply(images), label=centred_one_hot(labels, 40) / 2)
    got = reader.load(tmp_path / "s.npz", train, StatedFormat(), preprocess=fitted)
    np.testing.assert_allclose(got.labels, centred_one_hot(labels, 40), atol=1e-6)


def test_directions_beyond_the_number_of_images_keep_their_scale():
    """20 images in 192 dimensions: FRePo's rank control keeps at least 172 directions."""
    images = np.random.default_rng(0).random((20, 8, 8, 3)).astype(np.float32)
    fitted = preprocess.fit_frepo(lambda size: iter([images]), (8, 8, 3))
    values = np.linalg.eigvalsh(fitted.whiten.astype(np.float64))
    assert (np.abs(values - 1) < 1e-4).sum() >= 172
    assert (values < 0.9).any()


@pytest.mark.parametrize(
    ("kind", "mean", "std"),
    [
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("signed", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
)
@pytest.mark.parametrize("stated", [False, True])
def test_other_constants_are_proven_by_the_numbers(
    tmp_path, splits, few, refused, kind, mean, std, stated
):
    train, images = _colour(splits, few)
    train.store[0, 0, 0], images[0, 0, 0] = 1.0, 1.0  # every channel has its full range somewhere
    data_preprocess = preprocess.fit("standardise", train.chunks, train.shape)
    mean, std = np.float32(mean), np.float32(std)
    path = _plain(tmp_path / "set.pt", _nchw((images - mean) / std), few[1])
    got = reader.load(
        path, train, StatedFormat(kind if stated else "auto"), preprocess=data_preprocess
    )
    np.testing.assert_allclose(got.preprocess.apply(images), got.images, atol=1e-5)
    np.testing.assert_array_equal(got.preprocess.mean, mean)
    assert f"pixels: {kind} (" in _notes(got)
    refused(path, f"are {kind} ones to the last digit", train=train, pixels="standardised")
    # Noise like an optimiser's leaves the range, and then nothing is proven.
    rng = np.random.default_rng(0)
    noisy = (images + rng.normal(0, 0.1, images.shape).astype(np.float32) - mean) / std
    refused(
        _plain(tmp_path / "noisy.pt", _nchw(noisy), few[1]),
        "imagenet, unit|imagenet, zca",
        train=train,
    )


def test_pictures_of_8_bits_are_proven_inside_the_range(tmp_path, few, fitted, read):
    """Pixels that reach neither end of the range but lie on multiples of 1/255."""
    levels = np.rint(few[0] * 100 + 60) / np.float32(255)
    got = read(_plain(tmp_path / "set.pt", _nchw(levels * 2 - 1), few[1]))
    assert "pixels: signed (from -0.529 to 0.255)" in _notes(got)


@pytest.mark.parametrize(
    ("images", "stated", "match"),
    [
        (lambda x: np.rint(16 * x), {}, "as bytes ones they have 0.063 times the contrast"),
        (lambda x: x / 255, {}, "as unit ones they have 0.0039 times the contrast"),
        (lambda x: 1.2 * x + 0.01, {}, "use --pixels unit or bytes"),
        (lambda x: x - 0.5, {"pixels": "imagenet"}, "imagenet is for colour images: use --mean"),
        (lambda x: x, {"tiles": 0}, "--tiles must be from 1 to 8, got 0"),
        (lambda x: x, {"tiles": 3}, "8x8 pixels cannot be split into 3x3 tiles"),
    ],
)
def test_pixels_that_are_asked_for(tmp_path, few, refused, images, stated, match):
    refused(_plain(tmp_path / "set.pt", _nchw(images(few[0])), few[1]), match, **stated)


def test_bytes_that_are_no_whole_numbers(tmp_path, splits, few, fitted, read):
    images = few[0] * np.float32(254.5) + np.float32(0.25)
    got = read(_plain(tmp_path / "set.pt", _nchw(images), few[1]))
    np.testing.assert_allclose(got.images, fitted.apply(images / 255), atol=1e-5)


def _tiled(images):
    """Images that hold four smaller ones each, as IDC stores them."""
    small = images.reshape(len(images), 4, 2, 4, 2, 1).mean((2, 4))
    rows = small.reshape(-1, 2, 2, 4, 4, 1).transpose(0, 1, 3, 2, 4, 5)
    return rows.reshape(-1, 8, 8, 1), small


def test_idc_file_is_taken_out_of_its_tiles(tmp_path, splits, few, fitted, read, refused):
    tiles, small = _tiled(few[0])
    small = small.reshape(-1, 4, 4, 4, 1).transpose(1, 0, 2, 3, 4).reshape(-1, 4, 4, 1)
    large = torch.nn.functional.interpolate(_nchw(small), size=8, mode="bilinear")
    expected = fitted.apply(large.numpy().transpose(0, 2, 3, 1))
    path = tmp_path / "data_best.pt"
    torch.save([_nchw(tiles), torch.from_numpy(few[1][::4])], path)
    got = read(path)
    assert got.images.shape == (200, 8, 8, 1)
    np.testing.assert_allclose(got.images, expected, atol=1e-5)
    np.testing.assert_array_equal(got.hard_labels, np.tile(few[1][::4], 4))
    assert _accuracy(got, splits.test) > 0.8  # 0.86: half the resolution
    assert "tiles: 2x2 images in one, now 200 images (IDC's; " in _notes(got)
    assert len(read(path, tiles=1)) == 50
    plain = _plain(tmp_path / "set.pt", _nchw(tiles), few[1][::4])
    refused(plain, "images look like 2x2 tiles: .*use --tiles 2 to split them, or --tiles 1")
    assert len(read(plain, tiles=2)) == 200
    torch.save([_nchw(few[0]), torch.from_numpy(few[1])], path)  # of a run with factor 1
    refused(path, "IDC may keep 2x2 tiles")


def test_steps_across_the_middle_show_tiles():
    """Smooth images of unequal brightness, whose mean image shows no tiles."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 16, dtype=np.float32)[:, None, None] * np.ones((16, 16, 1), np.float32)
    smooth = ramp + ramp.transpose(1, 0, 2)
    whole = np.stack([smooth * gain for gain in rng.random(40, np.float32)])
    train = LabeledImages(whole, np.arange(40) % 2, ("a", "b"))
    assert evidence.find_tiles(whole, train) is None
    half = whole[:, ::2, ::2]
    corners = half.reshape(10, 2, 2, 8, 8, 1).transpose(0, 1, 3, 2, 4, 5).reshape(10, 16, 16, 1)
    assert "the step across the middle is" in evidence.find_tiles(corners, train)


@pytest.mark.parametrize(
    ("image", "label"),
    [("image", "label"), ("x", "y"), ("data", "targets"), ("X_train", "y_train")],
)
@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_other_names_of_the_arrays(tmp_path, few, fitted, read, image, label, suffix):
    path = tmp_path / f"set{suffix}"
    if suffix == ".npz":
        np.savez(path, **{image: fitted.apply(few[0]), label: few[1], "epochs": 3})
    else:
        torch.save({image: torch.from_numpy(few[0]), label: torch.from_numpy(few[1])}, path)
    got = read(path)
    np.testing.assert_array_equal(got.hard_labels, few[1])
    assert f"images are its {image!r}, labels its {label!r}" in _notes(got)


def test_names_that_could_be_either_are_refused(tmp_path, few, refused):
    np.savez(tmp_path / "set.npz", x=few[0], data=few[0], y=few[1])
    refused(tmp_path / "set.npz", "several arrays that could be its images or labels .data, x, y.")


def test_two_npy_files(tmp_path, few, fitted, read, refused):
    folder = tmp_path / "set"
    folder.mkdir()
    np.save(folder / "images.npy", fitted.apply(few[0]))
    refused(folder, "a single array, but no labels: add labels.npy")
    np.save(folder / "labels.npy", few[1])
    assert reader.is_published_set(folder)
    for path in (folder, folder / "images.npy"):
        np.testing.assert_array_equal(read(path).hard_labels, few[1])
    os.replace(folder / "images.npy", tmp_path / "x_train.npy")
    os.replace(folder / "labels.npy", tmp_path / "y_train.npy")
    assert len(read(tmp_path / "x_train.npy")) == len(few[1])
    refused(tmp_path / "y_train.npy", "a single array, but no labels")
    (tmp_path / "x_train.npy").write_bytes(b"\x93NUMPY\x01\x00")
    refused(tmp_path / "x_train.npy", "is not a readable .npy")


def test_arrays_that_claim_more_than_they_hold(tmp_path, few, refused):
    """The claimed size of 4 TiB is never allocated."""
    np.save(tmp_path / "images.npy", few[0])
    content = (tmp_path / "images.npy").read_bytes()
    claim = content.replace(b"(200, 8, 8, 1), }   ", b"(999999999999, 1), }")
    assert claim != content
    (tmp_path / "images.npy").write_bytes(claim)
    np.save(tmp_path / "labels.npy", few[1])
    refused(tmp_path / "images.npy", r"claims the shape \(999999999999, 1\)")
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        for name in ("images.npy", "labels.npy"):
            archive.write(tmp_path / name, name)
    refused(tmp_path / "set.npz", r"claims the shape \(999999999999, 1\)")


@pytest.mark.parametrize("name", ["set.pkl", "set.pickle", "set.p"])
def test_pickles_are_refused_unread(tmp_path, refused, name):
    target = tmp_path / "made by a pickle"
    (tmp_path / name).write_bytes(pickle.dumps(_Hostile(target)))
    assert reader.is_published_set(tmp_path / name)
    refused(tmp_path / name, "is a pickle, which can run any program .*numpy.savez")
    assert not target.exists()


def test_numbered_folders_of_numbered_classes_go_by_number(tmp_path, splits, few, fitted, read):
    """Classes are sorted as text, so the third is '10'; folder 00002 is still class '2'."""
    names = ("0", "1", "10", *"2345678")  # digit 2 stands in for '10', digit 9 for '8'
    train = LabeledImages(splits.train.images(), splits.train.labels, names)
    images, labels = few
    numbers = [int(name) for name in names]
    folder = _write_folder(tmp_path / "syn", images, labels, lambda k: f"{numbers[k]:05}")
    got = read(folder, train=train)
    order = np.argsort([numbers[label] for label in labels], kind="stable")
    np.testing.assert_array_equal(got.hard_labels, labels[order])
    assert _accuracy(got, splits.test) > GOOD
    assert "matched by number" in _notes(got)
    assert "another order" not in _notes(got)


def test_another_order_of_classes_is_told(tmp_path, splits, few, fitted, read):
    """Images under permuted labels are reported, those of a set with few images are not."""
    order = np.array([2, 1, 0, *range(3, 10)])
    path = _plain(tmp_path / "set.pt", _nchw(few[0]), order[few[1]])
    assert "another order" not in _notes(read(path)), "most images fit as they are"
    turned = (few[1] + 3) % 10
    got = _notes(read(_plain(tmp_path / "turned.pt", _nchw(few[0]), turned)))
    assert "another order than the data's: images labelled '0' like '7', '1' like '8'" in got
    one = np.arange(0, 200, SHARE)
    small = _plain(tmp_path / "small.pt", _nchw(few[0][one]), turned[one])
    assert "another order" not in _notes(read(small))
    whitened = preprocess.fit("zca", splits.train.chunks, splits.train.shape).apply(few[0])
    path = _plain(tmp_path / "zca.pt", _nchw(whitened), turned)
    assert "another order" in _notes(read(path, pixels="zca"))
    assert "another order" not in _notes(read(_plain(path, _nchw(whitened), few[1]), pixels="zca"))


def test_the_data_of_a_set_are_read_with_its_channels(tmp_path):
    """`--channels 1` makes colour images of a folder gray, as in the other commands."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            image = rng.integers(0, 128, (8, 8, 3)) + 127 * label
            Image.fromarray(image.astype(np.uint8)).save(
                tmp_path / "photos" / name / f"{number}.png"
            )
    options = EvaluateOptions(
        tmp_path / "set.npz",
        data=str(tmp_path / "photos"),
        learners="ridge",
        controls="random",
        data_root=tmp_path,
    )
    gray = datasets.load(options.data or "", root=tmp_path, channels=1).train
    rows = draw_per_class(gray, 2, np.random.default_rng(0))
    np.savez(options.run, images=gray.images(rows), labels=gray.labels[rows])
    parts = evaluation_parts.assemble(replace(options, channels=1))
    assert parts.splits.train.shape == parts.distilled.images.shape[1:] == (8, 8, 1)
    assert parts.splits.digest == datasets.digest(
        datasets.load(options.data or "", root=tmp_path, channels=1, validation_fraction=0).train
    )
    with pytest.raises(UserError, match="its --image-size and --channels"):
        evaluation_parts.assemble(options)
    evaluation_parts.assemble(replace(options, channels=1, image_size=8))


@pytest.mark.parametrize("stated", [{"channels": 1}, {"image_size": 8}])
def test_how_the_data_of_our_own_sets_are_read_is_theirs_to_say(tmp_path, splits, fitted, stated):
    rows = draw_per_class(splits.train, 1, np.random.default_rng(0))
    one_each = (
        fitted.apply(splits.train.images(rows)),
        centred_one_hot(splits.train.labels[rows], 10),
    )
    distilled_set.save(
        tmp_path / "set.safetensors", DistilledSet(*one_each, fitted, splits.train.classes, {})
    )
    options = EvaluateOptions(
        tmp_path / "set.safetensors", data="digits", learners="ridge", **stated
    )
    with pytest.raises(UserError, match=r"-(channels|image-size) is for sets from elsewhere"):
        evaluation_parts.assemble(options)
