"""Folders as people have them: which images are for what, what is left out, what is refused."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsdistill.harness.data import class_names, datasets
from dsdistill.harness.data.labeled_images import DataError
from dsdistill.harness.data.layout import FolderLayout, list_folder

COLOURS = {"cat": (200, 30, 30), "dog": (30, 200, 30), "owl": (30, 30, 200)}


def _picture(file: Path, colour: tuple[int, int, int] = (9, 9, 9), kind: str = "PNG") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(file, kind)


def _fill(folder: Path, count: int, names: tuple[str, ...] = tuple(COLOURS)) -> Path:
    for name in names:
        for number in range(count):
            _picture(folder / name / f"{number}.png", COLOURS.get(name, (9, 9, 9)))
    return folder


def _counts(layout: FolderLayout) -> tuple[int, int, int]:
    return tuple(
        len(part.files) if part else 0 for part in (layout.train, layout.validation, layout.test)
    )  # pyright: ignore[reportReturnType]


def _refused(path: Path, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        list_folder(path)
    assert "\n" not in str(caught.value)


# Parts


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"),
        ("training", "testing"),
        ("Training", "Testing"),
        ("TRAIN", "VAL"),
        ("train", "dev"),
        ("train", "Evaluation"),
        ("training_set", "test_set"),
        ("seg_train", "seg_test"),
        ("train2017", "val2017"),
        ("ILSVRC2012_img_train", "ILSVRC2012_img_val"),
        ("trainset", "testset"),
    ],
)
def test_two_parts_are_known_by_the_names_that_people_use(train, test, tmp_path):
    _fill(tmp_path / train, 4)
    _fill(tmp_path / test, 1)
    found = list_folder(tmp_path)
    assert found.train.classes == ("cat", "dog", "owl")
    assert _counts(found) == (12, 0, 3)
    assert f"training images of 3 classes from {train}/" in found.summary(10, 2, 3)
    assert f"2 for validation, held out of {train}/" in found.summary(10, 2, 3)
    assert f"3 for the test, from {test}/" in found.summary(10, 2, 3)
    assert "; none for validation; " in found.summary(10, 0, 3)


@pytest.mark.parametrize("val", ["val", "valid", "Validation", "dev"])
def test_val_chooses_and_test_is_tested_on_where_there_are_both(val, tmp_path):
    _fill(tmp_path / "three" / "train", 5)
    for name in COLOURS:
        _picture(tmp_path / "three" / val / name / "0.png", (128, 128, 128))
        _picture(tmp_path / "three" / "test" / name / "0.png", COLOURS[name])
    splits = datasets.load(str(tmp_path / "three"), root=tmp_path, cache=tmp_path / "cache")
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [15, 3, 3]
    assert (splits.validation.images() == 128).all()
    for image, label in zip(splits.test.images(), splits.test.labels, strict=True):
        assert tuple(image[0, 0]) == tuple(COLOURS.values())[label]
    # A share to hold out is of no account, for nothing is held out.
    again = datasets.load(
        str(tmp_path / "three"), root=tmp_path, cache=tmp_path / "cache", validation_fraction=0.5
    )
    assert len(again.train) == 15
    assert again.digest == splits.digest


def test_one_line_says_what_was_taken_for_what(tmp_path, capsys):
    data = _fill(tmp_path / "photos" / "training", 10).parent
    _fill(data / "Testing", 2)
    _fill(data / "unlabelled", 1, ("",))
    (data / "training" / "cat" / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (data / "training" / "cat" / "b.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (data / "training" / "dog" / "boxes.txt").write_text("0 0 1 1")
    (data / "training" / "dog" / ".DS_Store").write_text("")
    (data / "Testing" / "owl" / "gone.png").symlink_to("nowhere.png")
    datasets.load(str(data), root=tmp_path, cache=tmp_path / "cache")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "training images" in line]
    assert line == (
        f"{data}: 27 training images of 3 classes from training/; 3 for validation, held out of "
        "training/; 6 for the test, from Testing/; left out: 2 .heic, 1 .txt, 1 broken link, "
        "unlabelled/ (no part)"
    )


def test_a_test_part_without_classes_is_left_out(tmp_path):
    _fill(tmp_path / "train", 4)
    for number in range(3):
        _picture(tmp_path / "test" / f"{number}.png")
    found = list_folder(tmp_path)
    assert _counts(found) == (12, 0, 0)
    assert found.skipped == "test/ (images without classes)"
    _fill(tmp_path / "val", 2)
    assert _counts(list_folder(tmp_path)) == (12, 0, 6)


def test_tiny_imagenet_is_read_as_it_ships(tmp_path):
    names = ("n01443537", "n01629819", "n01641577")
    for index, name in enumerate(names):
        for number in range(3):
            file = tmp_path / "train" / name / "images" / f"{name}_{number}.JPEG"
            _picture(file, (index * 80, 0, 0), "JPEG")
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("a\t0\t0\t1\t1\n")
    lines = []
    for number in range(6):
        _picture(tmp_path / "val" / "images" / f"val_{number}.JPEG", kind="JPEG")
        lines.append(f"val_{number}.JPEG\t{names[(5 - number) % 3]}\t0\t32\t44\t62\n")
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    _picture(tmp_path / "test" / "images" / "test_0.JPEG", kind="JPEG")
    (tmp_path / "wnids.txt").write_text("\n".join(names))
    found = list_folder(tmp_path)
    assert found.train.classes == names
    assert _counts(found) == (9, 0, 6)
    assert found.test is not None
    by_file = {f.name: names[k] for f, k in zip(found.test.files, found.test.labels, strict=True)}
    assert by_file == {f"val_{i}.JPEG": names[(5 - i) % 3] for i in range(6)}
    assert "test/ (images without classes)" in found.skipped
    (tmp_path / "val" / "val_annotations.txt").write_text("../../x.JPEG\tn01443537\n")
    _refused(tmp_path, r"line 1 must be the name of a file in .*, a tab and a class, got '\.\.")


def test_a_folder_in_a_folder_is_followed(tmp_path):
    _fill(tmp_path / "zipped" / "zipped" / "zipped", 2)
    assert list_folder(tmp_path / "zipped").root == tmp_path / "zipped" / "zipped" / "zipped"
    _fill(tmp_path / "x" / "archive" / "train" / "train", 2)
    _fill(tmp_path / "x" / "archive" / "test" / "test", 1)
    _fill(tmp_path / "x" / "__MACOSX" / "archive", 1)
    found = list_folder(tmp_path / "x")
    assert found.train.classes == tuple(COLOURS)
    assert _counts(found) == (6, 0, 3)
    assert "from train/train/" in found.summary(1, 1, 1)


def test_classes_that_are_called_as_parts_are(tmp_path):
    names = ("bus", "car", "train")
    assert list_folder(_fill(tmp_path / "vehicles", 2, names)).train.classes == names
    _fill(tmp_path / "trips" / "train", 2, names)
    _fill(tmp_path / "trips" / "val", 1, names)
    found = list_folder(tmp_path / "trips")
    assert (found.train.classes, _counts(found)) == (names, (6, 0, 3))


def test_what_could_be_two_things_is_refused(tmp_path):
    _fill(tmp_path / "none" / "val", 2)
    _fill(tmp_path / "none" / "test", 2)
    _refused(tmp_path / "none", r"has test/, val/ and no train folder: name the one to train on")
    _fill(tmp_path / "twice" / "train", 2)
    _fill(tmp_path / "twice" / "val", 1)
    _fill(tmp_path / "twice" / "validation", 1)
    _refused(tmp_path / "twice", "has val/, validation/, which mean the same part")
    _fill(tmp_path / "case" / "train", 2)
    _fill(tmp_path / "case" / "Train", 2)
    _refused(tmp_path / "case", "has Train/, train/, which mean the same part")
    _fill(tmp_path / "mixed", 2, ("train", "val", "cat"))
    _refused(tmp_path / "mixed", r"has train/, val/ beside cat/: if they are parts, .* rename them")
    _fill(tmp_path / "beside" / "train", 2)
    _fill(tmp_path / "beside", 2, ("cat", "dog"))
    _refused(tmp_path / "beside", r"has train/ beside cat/, dog/")
    _fill(tmp_path / "flat", 2, ("train", "test"))
    _refused(tmp_path / "flat", "flat/train has images and no class folders")
    _fill(tmp_path / "twins", 2, ("dogs_train", "dogs_test"))
    _refused(tmp_path / "twins", r"dogs_train has images and no class folders.*rename it")
    _fill(tmp_path / "kaggle", 2, ("train", "test1"))
    _refused(tmp_path / "kaggle", "has train/ beside test1/: if they are parts")


def test_parts_of_other_classes_are_refused_and_paddings_are_not_others(tmp_path):
    _fill(tmp_path / "other" / "train", 2)
    _fill(tmp_path / "other" / "val", 1, ("cat", "dog"))
    _refused(tmp_path / "other", "must have the same classes, but .*other/val lacks owl: add")
    _fill(tmp_path / "padded" / "train", 2, ("007", "010", "1"))
    _fill(tmp_path / "padded" / "val", 1, ("7", "10", "01"))
    found = list_folder(tmp_path / "padded")
    assert found.train.classes == ("1", "007", "010")
    assert found.test is not None
    assert [f.parent.name for f in found.test.files] == ["01", "7", "10"]


# Links and leftovers


def test_links_are_followed_once_and_never_in_circles(tmp_path):
    data, pool = _fill(tmp_path / "data", 2, ("cat", "dog")), _fill(tmp_path / "pool", 3, ("more",))
    (data / "cat" / "2024").symlink_to(pool / "more")
    (data / "cat" / "again").symlink_to(pool / "more")
    (data / "dog" / "up").symlink_to("..")
    (data / "dog" / "self").symlink_to(".")
    (data / "owl").symlink_to(pool / "more")
    (data / "gone").symlink_to("nowhere")
    (data / "circle").symlink_to("circle")
    (data / "cat" / "circle.png").symlink_to("circle.png")
    os.mkfifo(data / "cat" / "pipe.png")
    os.mkfifo(data / "cat" / "pipe")
    found = list_folder(data)
    assert found.train.classes == ("cat", "dog", "owl")
    assert np.bincount(found.train.labels).tolist() == [5, 2, 3]
    assert found.skipped == "2 special, 3 broken links"


def test_leftovers_of_other_programs_are_no_classes_and_no_images(tmp_path):
    data = _fill(tmp_path / "data", 2)
    (data / ".ipynb_checkpoints").mkdir()
    _picture(data / "__MACOSX" / "cat" / "0.png")
    _picture(data / "cat" / "@eaDir" / "0.png" / "THUMB.jpg", kind="JPEG")
    _picture(data / "cat" / "._0.png")
    (data / "cat" / "Thumbs.db").write_bytes(b"x")
    found = list_folder(data)
    assert found.train.classes == tuple(COLOURS)
    assert _counts(found) == (6, 0, 0)
    assert found.skipped == "1 hidden"


def test_images_are_known_by_content_where_they_have_no_extension(tmp_path):
    data = _fill(tmp_path / "data", 2, ("cat", "dog"))
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"):
        _picture(data / "cat" / kind.lower(), kind=kind)
    (data / "cat" / "README").write_text("cats")
    (data / "cat" / "clip.mpg").write_bytes(b"\0\0\1\xba")
    _picture(data / "cat" / "photo.2021", kind="JPEG")
    _picture(data / "dog" / "really_a_png.jpg")
    found = list_folder(data)
    assert np.bincount(found.train.labels).tolist() == [9, 3]
    assert found.skipped == "1 .mpg, 1 without extension"


def test_a_class_without_images_says_what_it_has(tmp_path):
    data = _fill(tmp_path / "data", 2)
    (data / "elk").mkdir()
    _refused(data, "class folder .*elk has no images: remove it")
    (data / "elk" / "0.heic").write_bytes(b"x")
    _refused(data, r"class folder .*elk has no images \(1 \.heic\): convert them to JPEG")


# Names and their order


def test_one_name_in_two_normal_forms_is_one_class(tmp_path):
    _fill(tmp_path / "train", 2, (unicodedata.normalize("NFC", "café"), "dog"))
    _fill(tmp_path / "val", 2, (unicodedata.normalize("NFD", "café"), "dog"))
    found = list_folder(tmp_path)
    assert found.train.classes == ("café", "dog")
    assert found.test is not None
    assert all(file.is_file() for file in found.files)
    _fill(tmp_path / "train", 2, (unicodedata.normalize("NFD", "café"),))
    _refused(tmp_path, "train has two folders of the same name, 'café'")


def test_names_that_are_no_utf8_become_printable(tmp_path):
    data = _fill(tmp_path / "data", 10, ("dog",))
    bad = os.fsencode(data) + b"/caf\xe9"
    os.mkdir(bad)
    for number in range(10):
        Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
        os.rename(tmp_path / "x.png", bad + b"/%d\xff.png" % number)
    _fill(data, 10, ("two\nlines",))
    splits = datasets.load(str(data), root=tmp_path, cache=tmp_path / "cache")
    assert splits.train.classes == ("caf\\xe9", "dog", "two\\nlines")
    assert len(splits.train) == 21
    os.truncate(bad + b"/1\xff.png", 0)
    os.truncate(bad + b"/2\xff.png", 0)
    os.truncate(bad + b"/3\xff.png", 0)
    os.truncate(bad + b"/4\xff.png", 0)
    with pytest.raises(DataError, match=r"4 of 30 .*caf\\xe9/1\\xff\.png: an empty file") as caught:
        datasets.load(str(data), root=tmp_path, cache=tmp_path / "cache")
    str(caught.value).encode()


def test_numbers_stand_by_value_and_other_names_as_text(tmp_path):
    numbers = tuple(str(number) for number in range(12))
    assert list_folder(_fill(tmp_path / "numbers", 1, numbers)).train.classes == numbers
    names = ("Zebra", "ant", "b10", "b2")
    assert list_folder(_fill(tmp_path / "names", 1, names)).train.classes == names
    # 1 and 01 are one number, and so names.
    assert class_names.sort(("2", "10", "1", "01")) == ("01", "1", "10", "2")


def test_the_order_is_said_where_programs_differ():
    assert class_names.order_note(("ant", "bee", "cow")) is None
    assert class_names.order_note([str(i) for i in range(10)]) is None
    assert class_names.order_note([f"{i:03}" for i in range(200)]) is None
    numbers = class_names.order_note([str(i) for i in range(12)])
    assert numbers is not None
    assert "order of their numbers, as in timm" in numbers
    assert "as text (0, 1, 10, 11, 2, ...)" in numbers
    # A set that was made when numbers stood as text keeps its order.
    earlier = class_names.order_note(sorted(str(i) for i in range(12)))
    assert earlier is not None
    assert "order of their text (0, 1, 10, 11, 2, ...)" in earlier
    assert "timm has 0, 1, 2, 3, 4, ..." in earlier
    given = class_names.order_note(("dog", "cat"))
    assert given == "classes are in the order of the classes they are matched with (dog, cat)"
    text = class_names.order_note(("b10", "b2"))
    assert text is not None
    assert "order of their text (b10, b2)" in text
    assert "timm has b2, b10" in text


def test_classes_are_matched_by_name_or_by_the_value_of_numbers():
    assert class_names.match(("b", "a"), ("a", "b")) == (1, 0)
    assert class_names.match(("00001", "00010", "00002"), ("1", "2", "10")) == (0, 2, 1)
    assert class_names.match(("caf\u00e9", "x"), ("x", "cafe\u0301")) == (1, 0)
    assert class_names.match(("a", "b"), ("a", "c")) is None
    assert class_names.match(("a", "b"), ("a", "b", "c")) is None
    assert class_names.match(("1", "2"), ("2", "3")) is None


def test_a_known_order_is_kept_and_so_are_the_split_and_the_digest(tmp_path):
    """A distilled set stores its class names: made in another order, it is not refused."""
    numbers = tuple(str(number) for number in range(12))
    for index, name in enumerate(numbers):
        for number in range(10):
            _picture(tmp_path / "data" / name / f"{number}.png", (index, number, 0))
    stored = tuple(sorted(numbers))  # 0, 1, 10, 11, 2, ...: as text
    options = {"root": tmp_path, "cache": tmp_path / "cache"}
    splits = datasets.load(str(tmp_path / "data"), classes=stored, **options)
    assert splits.train.classes == stored
    for part in (splits.train, splits.validation, splits.test):
        for image, label in zip(part.images(), part.labels, strict=True):
            assert stored[label] == str(image[0, 0, 0])
    # Images in the order of the classes, as they were listed when sets were made so.
    kept = [(int(i[0, 0, 0]), int(i[0, 0, 1])) for i in splits.train.images()]
    assert kept == sorted(kept, key=lambda pair: (str(pair[0]), pair[1]))
    padded = tuple(f"{int(name):05}" for name in stored)
    again = datasets.load(str(tmp_path / "data"), classes=padded, **options)
    assert again.train.classes == padded
    assert np.array_equal(again.train.labels, splits.train.labels)
    other = datasets.load(str(tmp_path / "data"), classes=("a", "b"), **options)
    assert other.train.classes == numbers
    assert other.digest != splits.digest


def test_arrays_take_a_known_order_too(tmp_path):
    images = np.arange(12, dtype=np.uint8).repeat(10)[:, None, None].repeat(4, 1).repeat(4, 2)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(12).repeat(10))
    stored = tuple(sorted(str(number) for number in range(12)))
    splits = datasets.load(str(tmp_path / "set.npz"), root=tmp_path, classes=stored)
    assert splits.train.classes == stored
    for image, label in zip(splits.train.images(), splits.train.labels, strict=True):
        assert stored[label] == str(image[0, 0, 0])
