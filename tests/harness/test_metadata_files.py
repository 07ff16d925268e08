"""Classes that stand in `metadata.csv` and its like, as Hugging Face's imagefolder has them."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dsdistill.harness.data import datasets, origin
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.data.labeled_images import DataError
from dsdistill.harness.data.layout import list_folder
from dsdistill.harness.data.preprocess import identity
from kd.data.files.image_files import open_folder

NAMES = ("cat", "dog", "owl")
Rows = Sequence[Mapping[str, Any]]


def _picture(file: Path, label: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (50 * label, 9, 9)).save(file)


def _rows(folder: Path, count: int, inside: str = "", names: Sequence[Any] = NAMES) -> Rows:
    """Pictures in one folder, a third of each class, in turn; the rows that say so."""
    rows = []
    for number in range(count):
        name = f"{inside}{number:03}.png"
        _picture(folder / name, number % len(names))
        rows.append({"file_name": name, "label": names[number % len(names)]})
    return rows


def _write(path: Path, rows: Rows) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        path.write_text("".join(",".join(map(str, line)) + "\n" for line in lines))


def _classes(root: Path) -> dict[str, str]:
    """The class of each image, by its path, whatever the part."""
    layout = list_folder(root)
    return {
        str(file.relative_to(root)): layout.train.classes[label]
        for file, label in zip(layout.files, layout.labels, strict=True)
    }


def _refused(root: Path, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        list_folder(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_in_each_part(tmp_path, kind, capsys):
    root = tmp_path / "photos"
    for part, count in (("train", 30), ("validation", 6), ("test", 9)):
        _write(root / part / f"metadata.{kind}", _rows(root / part, count))
    splits = datasets.load(str(root), root=tmp_path, cache=tmp_path / "cache")
    assert splits.train.classes == NAMES
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [30, 6, 9]
    for part in (splits.train, splits.validation, splits.test):
        assert np.array_equal(part.images()[:, 0, 0, 0], 50 * part.labels)
    assert f"metadata.{kind}: classes are read from this table" in capsys.readouterr().err
    parts = open_folder(root, 0.1)
    for streamed, decoded in ((parts.train, splits.train), (parts.test, splits.test)):
        assert streamed.labels is not None
        assert np.array_equal(streamed.labels, decoded.labels)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_one_table_above_the_parts(tmp_path, kind):
    rows = [*_rows(tmp_path, 12, "train/"), *_rows(tmp_path, 6, "test/deep/")]
    _write(tmp_path / f"metadata.{kind}", rows)
    layout = list_folder(tmp_path)
    assert layout.test is not None
    assert (len(layout.train.files), len(layout.test.files)) == (12, 6)
    assert _classes(tmp_path) == {row["file_name"]: row["label"] for row in rows}


@pytest.mark.parametrize("inside", ["", "images/", "a/b/"])
def test_a_table_without_parts(tmp_path, inside):
    rows = _rows(tmp_path, 30, inside)
    _write(tmp_path / "metadata.csv", rows)
    assert _classes(tmp_path) == {row["file_name"]: row["label"] for row in rows}
    splits = datasets.load(str(tmp_path), root=tmp_path, cache=tmp_path / "cache")
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [21, 3, 6]


def test_a_table_in_a_folder_further_in(tmp_path):
    _write(tmp_path / "zipped" / "metadata.csv", _rows(tmp_path / "zipped", 6))
    assert sorted({*_classes(tmp_path).values()}) == [*NAMES]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_numbers_are_classes_in_their_order(tmp_path, kind):
    _write(tmp_path / f"metadata.{kind}", _rows(tmp_path, 24, names=tuple(range(12))))
    layout = list_folder(tmp_path)
    assert layout.train.classes == tuple(map(str, range(12)))
    for file, label in zip(layout.files, layout.labels, strict=True):
        assert int(file.stem) % 12 == label


def test_what_csv_files_have_of_their_own(tmp_path):
    """A byte order mark, quotes, line ends of Windows, blank lines, composed and other letters."""
    for name in ("a,b.png", "c.png", "d.png"):
        _picture(tmp_path / name)
    text = (
        'file_name,label\r\n"a,b.png",cafe\u0301\r\n\r\nc.png, caf\u00e9\r\nd.png,"say ""hi"""\r\n'
    )
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    expected = {"a,b.png": "caf\u00e9", "c.png": "caf\u00e9", "d.png": 'say "hi"'}
    assert _classes(tmp_path) == expected


def test_class_folders_count_where_a_table_has_no_classes(tmp_path, capsys):
    rows = [row for name in NAMES for row in _rows(tmp_path, 4, f"{name}/")]
    _write(tmp_path / "metadata.csv", [{"file_name": row["file_name"], "text": 1} for row in rows])
    assert {Path(path).parent.name for path in _classes(tmp_path)} == {*NAMES}
    assert all(Path(path).parent.name == name for path, name in _classes(tmp_path).items())
    assert "metadata.csv has no column of classes" in capsys.readouterr().err
    # About something else: nothing is said.
    (tmp_path / "metadata.csv").write_text("id;breed\n1;2;3\n")
    assert all(Path(path).parent.name == name for path, name in _classes(tmp_path).items())
    assert "metadata" not in capsys.readouterr().err


def test_a_table_with_classes_counts_beside_folders(tmp_path, capsys):
    """Folders are batches as often as classes; Hugging Face takes the table too."""
    rows = [row for name in ("batch1", "batch2") for row in _rows(tmp_path, 6, f"{name}/")]
    _write(tmp_path / "metadata.csv", rows[1:])
    assert _classes(tmp_path) == {row["file_name"]: row["label"] for row in rows[1:]}
    assert "classes are read from this table" in capsys.readouterr().err
    assert "1 images that metadata.csv does not name" in list_folder(tmp_path).skipped


def test_a_test_part_without_classes_is_left_out(tmp_path):
    _write(tmp_path / "train" / "metadata.csv", _rows(tmp_path / "train", 12))
    rows = [{**row, "label": ""} for row in _rows(tmp_path / "test", 6)]
    _write(tmp_path / "test" / "metadata.csv", rows)
    layout = list_folder(tmp_path)
    assert layout.test is None
    assert "test/ (images without classes)" in layout.skipped


@pytest.mark.parametrize(
    ("columns", "taken", "words"),
    [
        (("label", "class"), "label", "the classes are those of 'label'"),
        (("text", "Category"), "Category", "the classes are those of the column 'Category'"),
    ],
)
def test_the_column_that_is_taken_is_said(tmp_path, capsys, columns, taken, words):
    rows = _rows(tmp_path, 6)
    wide = [
        {"file_name": row["file_name"]}
        | {column: row["label"] if column == taken else number for column in columns}
        for number, row in enumerate(rows)
    ]
    _write(tmp_path / "metadata.jsonl", wide)
    assert _classes(tmp_path) == {row["file_name"]: row["label"] for row in rows}
    assert words in capsys.readouterr().err


def test_a_column_of_parts_is_said_not_to_be_read(tmp_path, capsys):
    _write(tmp_path / "metadata.csv", [{**row, "split": "test"} for row in _rows(tmp_path, 6)])
    list_folder(tmp_path)
    assert "the column 'split' is ignored" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "../outside.png",
        "/etc/hostname",
        "a/../../outside.png",
        "..",
        "..\\outside.png",
        "file:///etc/hostname",
        "a\0.png",
    ],
)
def test_a_name_outside_the_folder_is_refused(tmp_path, name):
    root = tmp_path / "photos"
    rows = _rows(root, 6)
    _picture(tmp_path / "outside.png")
    _write(root / "metadata.jsonl", [*rows, {"file_name": name, "label": "cat"}])
    _refused(root, "line 7 names .* must be a path inside")


HEAD = "file_name,label\n"
CONTENTS = {
    "no such file": (f"{HEAD}000.png,cat\nnone.png,dog\n", "line 3 names 'none.png', which is no"),
    "no file": (f"{HEAD}000.png,cat\n,dog\n", "line 3 must have a file_name"),
    "no class": (f"{HEAD}000.png,cat\n001.png,\n", "line 3 must have one class"),
    "two classes of one": (f"{HEAD}000.png,cat\n./000.png,dog\n", "line 3 .* an earlier one 'cat'"),
    "one class": (f"{HEAD}000.png,cat\n", "names 1 classes"),
    "a value too many": (f"{HEAD}000.png,cat,x\n", "line 2 has 3 fields"),
    "an open quote": (f'{HEAD}"000.png,cat\n', "line 2 is no CSV"),
    "other letters": (f"{HEAD}000.png,caf\udce9\n", "line 2 is not UTF-8"),
    "a column twice": ("file_name,label,label\n000.png,a,b\n", "two columns 'label'"),
    "several candidates": ("file_name,class,target\n000.png,a,b\n", "rename one of them to label"),
    "no class at all": ("file_name,text\n000.png,a\n", "no class folders"),
    "no image": ("id,label\n0,a\n", "no class folders.* metadata.csv with the columns file_name"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_csv_refusals(tmp_path, case):
    content, match = CONTENTS[case]
    _rows(tmp_path, 3)
    (tmp_path / "metadata.csv").write_bytes(content.encode(errors="surrogateescape"))
    _refused(tmp_path, match)


LINES = {
    "a list": ('["file_name"]', "line 1 must be an object"),
    "a list for a class": ('{"file_name": "000.png", "label": [1]}', "several labels .lists in"),
    "half a number": ('{"file_name": "000.png", "label": 0.5}', "line 1 must have one class"),
    "a number for a file": ('{"file_name": 7, "label": 1}', "line 1 must have a file_name, got 7"),
    "cut off": ('{"file_name": "000.png", "lab', "line 1 is no JSON"),
    "brackets": ("[" * 100_000, "line 1 is no JSON"),
}


@pytest.mark.parametrize("case", LINES)
def test_json_lines_refusals(tmp_path, case):
    content, match = LINES[case]
    _rows(tmp_path, 3)
    (tmp_path / "metadata.jsonl").write_text(content)
    _refused(tmp_path, match)


def test_parquet_refusals(tmp_path, monkeypatch):
    rows = _rows(tmp_path, 3)
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 and no more")
    _refused(tmp_path, "is no Parquet file")
    _write(tmp_path / "metadata.parquet", [{"image": row["file_name"]} for row in rows])
    _refused(tmp_path, "must have a column file_name")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    _refused(tmp_path, "needs pyarrow to be read: pip install pyarrow")


def test_two_tables_are_refused(tmp_path):
    rows = _rows(tmp_path, 3)
    _write(tmp_path / "metadata.csv", rows)
    _write(tmp_path / "metadata.jsonl", rows)
    _refused(tmp_path, "metadata.csv, metadata.jsonl: keep one")


def test_a_set_finds_its_data_again(tmp_path):
    """`dsdistill evaluate` looks for the classes of a set before it reads what the set names."""
    root = tmp_path / "photos"
    _write(root / "metadata.csv", _rows(root, 30))
    images, labels = np.zeros((3, 4, 4, 3), np.float32), np.eye(3, dtype=np.float32) - 1 / 3
    said = {"data": {"source": str(root)}, "config": {"data": str(root)}}
    distilled = DistilledSet(images, labels.astype(np.float32), identity(3), NAMES, said)
    splits = origin.load(tmp_path / "set", distilled, str(root), root=tmp_path)
    assert splits.train.classes == NAMES
    other = DistilledSet(images, labels, identity(3), ("ant", "bee", "cow"), said)
    with pytest.raises(ValueError, match="no folder of its class 'ant'"):
        origin.load(tmp_path / "set", other, str(root), root=tmp_path)


def _pets(root: Path, *, masks: bool) -> None:
    for name in ("Abyssinian", "american_bulldog"):
        for number in range(3):
            _picture(root / "images" / f"{name}_{number}.png")
            if masks:
                _picture(root / "annotations" / "trimaps" / f"{name}_{number}.png")
    (root / "annotations").mkdir(exist_ok=True)
    for list_ in ("list", "trainval", "test"):
        (root / "annotations" / f"{list_}.txt").write_text("Abyssinian_0 1 1 1\n")


@pytest.mark.parametrize("masks", [True, False])
def test_oxford_pets_are_refused_with_the_way_to_arrange_them(tmp_path, masks):
    _pets(tmp_path, masks=masks)
    _refused(tmp_path, r"Oxford-IIIT Pet .*trainval.txt names into .*train/CLASS")


@pytest.mark.parametrize(("classes", "remedy"), [(True, "give the path .*images"), (False, "put")])
def test_masks_beside_images_are_no_class(tmp_path, classes, remedy):
    for number in range(6):
        _picture(tmp_path / "images" / ("ab"[number % 2] if classes else "") / f"{number}.png")
        _picture(tmp_path / "masks" / f"{number}.png")
    _refused(tmp_path, f"images/ beside masks/, which are not classes: {remedy}")
