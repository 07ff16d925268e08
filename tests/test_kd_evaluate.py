"""Which images `kd evaluate` judges, and how many it says they are."""

import json
import shutil
from pathlib import Path

import kd_support as support
import numpy as np
import pytest
import torch
from kd_support import main
from PIL import Image

from kd import data, models

CLASSES = ("cat", "dog", "elk", "owl")


def draw(folder: Path, names: tuple[str, ...], n: int, seed: int) -> np.ndarray:
    """Noisy pictures by class, hard to tell apart; their pixels in the order of the classes."""
    rng, found = np.random.default_rng(seed), []
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            level = 30 * CLASSES.index(name)
            pixels = rng.integers(level, level + 160, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03}.png")
            found.append(pixels)
    return np.stack(found)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two parts, one without parts, and a student of each."""
    folder = tmp_path_factory.mktemp("evaluate")
    draw(folder / "parts" / "train", CLASSES, 20, 0)
    draw(folder / "parts" / "val", CLASSES, 13, 1)
    draw(folder / "plain", CLASSES, 20, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("parts", "plain"):
            options = ("--student", "mlp:8", "--epochs", 3, "--out", f"of-{name}")
            main(patch, "train", name, *options)
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(work)
    return monkeypatch


def judged(inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    capsys.readouterr()
    main(inside, "evaluate", *arguments, "--json")
    return json.loads(capsys.readouterr().out)


def by_hand(run: str, images: np.ndarray, labels: np.ndarray) -> float:
    model = models.load_run(Path(run))
    fitted = model.preprocess.apply(images[..., None])
    with torch.no_grad():
        scores = model.classifier.eval()(data.to_nchw(fitted))
    return float((scores.argmax(1).numpy() == labels).mean())


def test_all_of_a_folder_without_a_test_part_is_judged(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = draw(Path("other"), CLASSES, 17, 3)
    found = judged(inside, capsys, "of-parts", "other")
    assert (found["images"], found["judged_on"]) == (68, "all images of other")
    assert found["accuracy"] == by_hand("of-parts", images, np.repeat(np.arange(4), 17))
    main(inside, "evaluate", "of-parts", "other")
    assert "images                                68\n" in capsys.readouterr().out


def test_the_test_part_of_a_folder_is_judged_and_named(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = judged(inside, capsys, "of-parts")
    assert own["images"] == 52
    assert Path(own["judged_on"].removeprefix("test images, ")).name == "val"
    for run in ("of-parts", "of-plain"):
        found = judged(inside, capsys, run, "parts")
        assert (found["images"], found["judged_on"]) == (52, "test images, parts/val")
    assert judged(inside, capsys, "of-parts", "parts/val")["accuracy"] == own["accuracy"]


def test_of_the_data_trained_on_only_the_held_out_share_is_judged(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = judged(inside, capsys, "of-plain")
    assert own["images"] == 16  # a fifth of 80
    shutil.copytree("plain", "moved")
    for name in ("plain", "moved"):  # under another name they are known by their hash
        found = judged(inside, capsys, "of-plain", name)
        assert (found["images"], found["accuracy"]) == (16, own["accuracy"])
        assert "held out" in found["judged_on"]


def test_all_of_a_file_of_other_images_is_judged(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    support.write_npz(Path("three.npz"))
    main(inside, "train", "three.npz", "--student", "mlp:8", "--epochs", 1, "--out", "of-three")
    own = judged(inside, capsys, "of-three")
    assert own["images"] == 18
    assert judged(inside, capsys, "of-three", "three.npz")["images"] == 18
    support.write_npz(Path("other.npz"), n=33)
    assert judged(inside, capsys, "of-three", "other.npz")["images"] == 33


def test_streamed_files_are_judged_alike(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--student", "test_resnet", "--augment", "imagenet", "--image-size", 32)
    main(inside, "train", "parts", *options, "--workers", 0, "--epochs", 1, "--out", "streamed")
    assert judged(inside, capsys, "streamed")["images"] == 52
    assert judged(inside, capsys, "streamed", "parts")["images"] == 52
    found = judged(inside, capsys, "streamed", "plain")
    assert (found["images"], found["judged_on"]) == (80, "all images of plain")


def test_classes_are_matched_by_name_or_by_a_map(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders that are called otherwise, and sort otherwise."""
    names = {"cat": "zebra-cat", "dog": "b", "elk": "c", "owl": "a"}
    images = draw(Path("straight"), CLASSES, 15, 4)
    draw(Path("source"), CLASSES, 15, 4)
    for old, new in names.items():
        shutil.copytree(Path("source") / old, Path("renamed") / new)
    Path("map.json").write_text(json.dumps({new: old for old, new in names.items()}))
    found = judged(inside, capsys, "of-parts", "renamed", "--class-map", "map.json")
    assert found["accuracy"] == by_hand("of-parts", images, np.repeat(np.arange(4), 15))
    assert found["classes_matched"] == "by the class map"
    assert found["nll"] == pytest.approx(judged(inside, capsys, "of-parts", "straight")["nll"])


@pytest.mark.parametrize(("parts", "chosen"), [(("val",), "val"), (("val", "test"), "test")])
def test_a_folder_without_a_part_to_train_on_is_judged(
    inside: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    parts: tuple[str, ...],
    chosen: str,
) -> None:
    folder = f"only-{'-'.join(parts)}"
    images = {part: draw(Path(folder) / part, CLASSES, 9, len(part)) for part in parts}
    found = judged(inside, capsys, "of-parts", folder)
    assert (found["images"], found["judged_on"]) == (36, f"all images of {folder}/{chosen}")
    assert found["accuracy"] == by_hand("of-parts", images[chosen], np.repeat(np.arange(4), 9))


def test_the_own_teachers_keep_their_class_maps_where_they_are_named(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"cat": "m", "dog": "l", "elk": "k", "owl": "j"}
    for part in ("train", "val"):
        for old, new in names.items():
            shutil.copytree(Path("parts") / part / old, Path("other-names") / part / new)
    Path("names.json").write_text(json.dumps(names))
    main(inside, "train", "other-names", "--student", "mlp:8", "--epochs", 3, "--out", "second")
    options = ("--class-map", ",names.json", "--epochs", 1, "--out", "of-two")
    teachers = "of-parts,second"
    main(inside, "train", "parts", "--student", "mlp:8", "--teacher", teachers, *options)
    own = judged(inside, capsys, "of-two")
    assert set(own["teachers"]) == {str(Path(name).resolve()) for name in teachers.split(",")}
    named = judged(inside, capsys, "of-two", "--teacher", teachers)
    assert [*named["teachers"].values()] == [*own["teachers"].values()]
