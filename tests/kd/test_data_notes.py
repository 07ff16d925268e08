"""What a command says of its data: gray images, classes that nothing is known of, idle options."""

from pathlib import Path

import numpy as np
import pytest
from kd_support import main, refused
from PIL import Image

STREAMED = ("--augment", "imagenet", "--image-size", 16, "--workers", 0)
QUICK = ("--student", "mlp:8", "--epochs", 1, "--batch-size", 16, "--device", "cpu")


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The working directory is a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def _write_photos(root: Path, parts: tuple[str, ...] = (".",), gray: int = 0) -> None:
    for part in parts:
        for name, colour in (("red", (200, 30, 30)), ("sea", (30, 60, 200))):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(15):
                image = Image.new("RGB", (16, 16), colour)
                image = image.convert("L") if i < gray else image
                image.save(folder / f"{i}.png")


def _write_uneven(path: Path) -> None:
    """An archive with 20 images of two classes, and 2 of each of two more."""
    labels = np.repeat(np.arange(4), [20, 20, 2, 2])
    images = np.random.default_rng(0).integers(0, 256, (44, 8, 8, 1), dtype=np.uint8)
    np.savez(path, images=images, labels=labels)


@pytest.mark.parametrize("gray", [0, 1])
def test_streamed_gray_images_are_said_once(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gray: int
) -> None:
    _write_photos(Path("photos"), gray=gray)
    main(inside, "train", "photos", *QUICK, *STREAMED, "--out", "run")
    said = capsys.readouterr().err
    line = "photos: 2 of 30 images are grayscale and are read as colour; --channels 1 makes all"
    assert said.count(line) == gray
    assert said.count("are grayscale") == gray
    main(inside, "train", "photos", *QUICK, *STREAMED, "--channels", 1, "--out", "other")
    assert "grayscale" not in capsys.readouterr().err


def test_of_many_images_a_share_is_looked_at(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inside.setattr("kd.data.files.image_files.MAX_PROBED_HEADERS", 10)
    _write_photos(Path("photos"), gray=15)
    main(inside, "train", "photos", *QUICK, *STREAMED, "--out", "run")
    assert "10 of 10 images looked at are grayscale" in capsys.readouterr().err


def test_classes_without_test_and_validation_images_are_named(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_uneven(Path("uneven.npz"))
    main(inside, "train", "uneven.npz", *QUICK, "--out", "run")
    said = capsys.readouterr().err
    for part in ("test", "validation"):
        line = f"note: 2 of 4 classes have no {part} images (2, 3): the {part} accuracy says"
        assert said.count(line) == 1
    main(inside, "evaluate", "run", "--device", "cpu")
    said = capsys.readouterr().err
    assert "2 of 4 classes have no test images (2, 3)" in said
    assert "validation" not in said


def test_streamed_classes_without_validation_images_are_named(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_photos(Path("photos"))
    for i in range(2, 15):
        Path(f"photos/sea/{i}.png").unlink()
    main(inside, "train", "photos", *QUICK, *STREAMED, "--out", "run")
    said = capsys.readouterr().err
    assert "1 of 2 classes have no validation images (sea): the validation accuracy" in said
    assert "1 of 2 classes have no test images (sea): the test accuracy says nothing" in said


@pytest.mark.parametrize("how", [(), STREAMED])
def test_a_share_for_validation_beside_a_validation_part_is_refused(
    inside: pytest.MonkeyPatch, how: tuple[object, ...]
) -> None:
    _write_photos(Path("photos"), ("train", "val", "test"))
    options = ("--validation-fraction", 0.3, "--out", "run", *how)
    line = refused(inside, "train", "photos", *QUICK, *options)
    assert "--validation-fraction has no effect on photos, which has a validation part" in line
    assert not Path("run").exists()
    _write_photos(Path("two"), ("train", "val"))  # here val is the test part
    main(inside, "train", "two", *QUICK, *options)
