"""Folders of images with any number of labels, by a table beside them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsdistill.harness.data import datasets
from dsdistill.harness.data.labeled_images import (
    DataError,
    describe_missing_classes,
    split_by_class,
    strata,
)

LABELS = {"a.png": ("owl", "cat"), "b.png": ("cat",), "c.png": (), "d.png": ("dog", "owl", "cat")}
MATRIX = [[1, 0, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]]  # cat, dog, owl


def _write(folder: Path, names: Sequence[str]) -> None:
    """Images whose gray level is the letter of their name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), ord(path.name[0]), np.uint8)).save(path)


def _text(kind: str, labels: Mapping[str, Sequence[str]]) -> str:
    """The table of some images in a format."""
    if kind == "jsonl":
        rows = ({"file_name": name, "labels": list(own)} for name, own in labels.items())
        return "".join(f"{json.dumps(row)}\n" for row in rows)
    if kind == "columns":
        lines = (
            f"{name},{','.join(str(+(c in own)) for c in ('owl', 'cat', 'dog'))}\n"
            for name, own in labels.items()
        )
        return "file_name,owl,cat,dog\n" + "".join(lines)
    column = "tags" if kind == " " else "Finding Labels"
    lines = (f"{name},{kind.join(own)}\n" for name, own in labels.items())
    return f"file_name,{column}\n" + "".join(lines)


def _load(folder: Path, **options) -> datasets.Splits:
    return datasets.load(str(folder), root=folder, several_labels=True, announce=False, **options)


def _by_letter(*parts) -> dict[str, list[int]]:
    """The labels of each image, which its pixels name."""
    return {
        chr(int(image[0, 0, 0])): labels.tolist()
        for part in parts
        for image, labels in zip(part.images(), part.labels, strict=True)
    }


@pytest.mark.parametrize("kind", ["jsonl", "columns", "|", ";", " "])
def test_labels_of_every_format_are_the_same(tmp_path: Path, kind: str) -> None:
    for part in ("train", "test"):
        _write(tmp_path / part, list(LABELS))
        suffix = "jsonl" if kind == "jsonl" else "csv"
        (tmp_path / part / f"metadata.{suffix}").write_text(_text(kind, LABELS))
    splits = _load(tmp_path, validation_fraction=0)
    assert splits.train.classes == ("cat", "dog", "owl")
    expected = dict(zip("abcd", MATRIX, strict=True))
    assert _by_letter(splits.train) == expected
    assert _by_letter(splits.test) == expected
    assert splits.train.has_several_labels


def test_one_table_above_the_parts_and_an_order_of_the_labels(tmp_path: Path) -> None:
    names = {f"{part}/{name}": own for part in ("train", "val") for name, own in LABELS.items()}
    _write(tmp_path, [*names, "train/unnamed.png"])
    (tmp_path / "metadata.csv").write_text(_text("|", names))
    splits = _load(tmp_path, validation_fraction=0, classes=("owl", "dog", "cat"))
    expected = {letter: row[::-1] for letter, row in zip("abcd", MATRIX, strict=True)}
    assert _by_letter(splits.train) == expected  # without the unnamed one
    assert _by_letter(splits.test) == expected  # the only other part tests


@pytest.mark.parametrize("kind", ["columns", "|", " "])
def test_a_part_without_several_labels_is_read_as_the_training_part(
    tmp_path: Path, kind: str
) -> None:
    alone = {"a.png": ("owl",), "b.png": ("cat",), "c.png": ()}
    for part, labels in (("train", LABELS), ("test", alone)):
        _write(tmp_path / part, list(labels))
        (tmp_path / part / "metadata.csv").write_text(_text(kind, labels))
    splits = _load(tmp_path, validation_fraction=0)
    expected = {"a": [0, 0, 1], "b": [1, 0, 0], "c": [0, 0, 0]}
    assert _by_letter(splits.test) == expected
    (tmp_path / "test" / "metadata.csv").write_text("file_name,note\na.png,x\n")
    with pytest.raises(DataError, match=r"test.metadata\.csv must give labels as the table of the"):
        _load(tmp_path, validation_fraction=0)


def test_rare_labels_are_in_every_part() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((400, 3)) < [0.6, 0.3, 0.05]).astype(np.int64)
    assert strata(np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]])).tolist() == [1, 0, 3]
    groups = strata(labels)
    assert (labels[groups == 2, 2] == 1).all()
    kept, held = split_by_class(groups, 0.25)
    assert sorted([*kept, *held]) == list(range(400))
    shares = labels[held].sum(0) / labels.sum(0)
    np.testing.assert_allclose(shares, 0.25, atol=0.06)
    line = describe_missing_classes("test", labels[:, :2].repeat(2, 1) * [1, 0, 1, 0], "abcd")
    assert line is not None
    assert "2 of 4 classes have no test images (b, d)" in line


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "file_name,labels\na.png,x|y;z\nb.png,x|z\n", "by both '\\|' and ';'"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "labels": ["x"]}\n{"file_name": "b.png", "labels": "x"}\n',
            "line 2 must have a list of labels",
        ),
        ("metadata.csv", "file_name,labels\na.png,x|y\na.png,x\n", "gives 'a.png' other labels"),
        ("metadata.csv", "file_name,labels\nz.png,x|y\n", "'z.png', which is not a file"),
        ("metadata.jsonl", '{"file_name": "a.png", "labels": [["x"]]}\n', "must have one class"),
        ("metadata.csv", "file_name,labels\na.png,x|\nb.png,x\n", "at least two classes, has 1"),
    ],
)
def test_tables_that_do_not_fit_are_one_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    _write(tmp_path, ["a.png", "b.png"])
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as error:
        _load(tmp_path, validation_fraction=0)
    assert "\n" not in str(error.value)


def test_a_label_of_the_test_alone_is_refused(tmp_path: Path) -> None:
    for part, extra in (("train", ()), ("test", ("emu",))):
        _write(tmp_path / part, list(LABELS))
        text = _text("jsonl", {name: (*own, *extra) for name, own in LABELS.items()})
        (tmp_path / part / "metadata.jsonl").write_text(text)
    with pytest.raises(DataError, match="test has the label 'emu', which no training image has"):
        _load(tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "columns", "|"])
def test_where_one_class_is_needed_several_labels_are_refused(tmp_path: Path, kind: str) -> None:
    _write(tmp_path, list(LABELS))
    name = "metadata.jsonl" if kind == "jsonl" else "metadata.csv"
    (tmp_path / name).write_text(_text(kind, LABELS))
    with pytest.raises(DataError, match=r"several labels .*: kd train learns several"):
        datasets.load(str(tmp_path), root=tmp_path)


def test_class_folders_with_marks_beside_them_have_one_class(tmp_path: Path) -> None:
    files = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(10)]
    _write(tmp_path, files)
    rows = (f"{file},{i % 2},{i % 3 % 2}\n" for i, file in enumerate(files))
    (tmp_path / "metadata.csv").write_text("file_name,tame,small\n" + "".join(rows))
    tags = (f"{file},indoors young\n" for file in files)
    for text in ((tmp_path / "metadata.csv").read_text(), "file_name,tags\n" + "".join(tags)):
        (tmp_path / "metadata.csv").write_text(text)
        splits = _load(tmp_path)
        assert splits.train.classes == ("cat", "dog")
        assert not splits.train.has_several_labels
