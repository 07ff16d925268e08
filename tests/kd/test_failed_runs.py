"""A training that an error ends: its folder is gone, or goes on as the message says."""

import json
import os
import shutil
from pathlib import Path

import kd_support as support
import numpy as np
import pytest
from PIL import Image

STREAMED = ("--augment", "imagenet", "--student", "test_resnet", "--image-size", 32)
STREAMED = (*STREAMED, "--epochs", 1, "--device", "cpu", "--workers", 0, "--out", "run")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 photos of two classes, in a folder of parts; it lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part, count in (("train", 15), ("test", 5)):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
                image.save(folder / f"{i}.jpg")
    return Path("photos")


def _truncate(image: Path) -> None:
    image.write_bytes(image.read_bytes()[:500])


def test_a_damaged_image_leaves_nothing_and_the_command_can_be_given_again(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = photos / "train" / "cat" / "3.jpg"
    _truncate(image)
    line = support.refused(monkeypatch, "train", "photos", *STREAMED)
    assert f"image {image} cannot be read" in line
    assert not Path("run").exists()
    image.unlink()
    support.main(monkeypatch, "train", "photos", *STREAMED)
    assert support.read_report(Path("run"))["train_images"] > 0


def test_the_recipe_records_the_student_that_was_trained(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    support.main(monkeypatch, "train", "photos", *STREAMED[:-1], "teacher")
    options = ("--recipe", "deit", "--warmup", 0, "--cooldown", 0, "--repeats", 1)
    options = (*options, "--batch-size", 8, "--teacher", "teacher", *STREAMED)
    support.main(monkeypatch, "train", "photos", *options)
    recipe = json.loads(Path("run/recipe.json").read_text())
    assert (recipe["student"], recipe["teacher"]) == ("test_resnet", "teacher")
    assert support.read_report(Path("run"))["recipe"]["student"] == "test_resnet"


def test_after_a_checkpoint_the_message_says_what_works(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = photos / "test" / "cat" / "3.jpg"
    shutil.copy2(image, "kept.jpg")
    times = image.stat()
    _truncate(image)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    line = support.refused(monkeypatch, "train", "photos", *STREAMED)
    assert f"image {image} cannot be read" in line
    assert "run keeps the last checkpoint: --resume goes on from it with the data" in line
    again = support.refused(monkeypatch, "train", "--out", "run", "--resume")
    assert "run keeps the last checkpoint: --resume" in again
    shutil.copy2("kept.jpg", image)  # other data than at the start
    changed = support.refused(monkeypatch, "train", "--out", "run", "--resume")
    assert "changed since the run run was started" in changed


def test_a_loss_that_is_not_finite_at_once_leaves_nothing(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging = ("--optimizer", "sgd", "--lr", 1e30, "--warmup", 0, "--batch-size", 4)
    line = support.refused(monkeypatch, "train", "photos", *STREAMED, *diverging)
    assert "is nan" in line or "is inf" in line
    assert not Path("run").exists()
