"""Which images `kd evaluate` judges, and how many it says they are."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import kd_support as support
import numpy as np
import pytest
import safetensors.numpy
import torch
from kd_support import main
from PIL import Image

import dsdistill.options
from dsdistill.commands import evaluation_parts
from dsdistill.harness.data import distilled_set
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from kd.data import batching
from kd.models import saved_models, seals
from kd.options import EvaluateOptions

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
    model = saved_models.load_run(Path(run))
    fitted = model.preprocess.apply(images[..., None])
    with torch.no_grad():
        scores = model.classifier.eval()(batching.to_nchw(fitted))
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


def test_a_training_on_images_measures_the_latency_of_one(inside: pytest.MonkeyPatch) -> None:
    assert json.loads(Path("of-parts/report.json").read_text())["latency_ms_batch_1"] > 0
    line = support.refused(inside, "evaluate", "of-parts", "--label", "class")
    assert "--label is for texts, and of-parts is a student of images" in line


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


def advised(line: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]*", line))


def options_of(options: type) -> set[str]:
    return {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(options)}


def test_a_foreign_teacher_is_mapped_by_its_own_option(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its classes are called otherwise, and sort the other way round."""
    names = {"cat": "z", "dog": "y", "elk": "x", "owl": "w"}
    for old, new in names.items():
        shutil.copytree(Path("parts/train") / old, Path("foreign-names") / new)
    main(inside, "train", "foreign-names", "--student", "mlp:8", "--epochs", 3, "--out", "foreign")
    Path("foreign.json").write_text(json.dumps(names))
    line = support.refused(inside, "evaluate", "of-parts", "--teacher", "foreign")
    assert "has no class 'cat' of the data" in line
    assert advised(line) == {"--teacher-class-map"}
    assert advised(line) <= options_of(EvaluateOptions)
    options = ("--teacher", "foreign", "--teacher-class-map", "foreign.json")
    found = judged(inside, capsys, "of-parts", *options)
    files = [sorted((Path("parts/val") / name).iterdir()) for name in CLASSES]
    images = np.stack([np.asarray(Image.open(file)) for each in files for file in each])
    labels = np.repeat(np.arange(4), 13)
    assert found["teacher_accuracy"] == by_hand("foreign", images, 3 - labels)
    # Of several one map each, nothing for one that needs none.
    options = ("--teacher", "of-plain,foreign", "--teacher-class-map", ",foreign.json")
    each = judged(inside, capsys, "of-parts", *options)["teachers"]
    assert each["foreign"]["accuracy"] == found["teacher_accuracy"]
    line = support.refused(inside, "evaluate", "of-parts", "--teacher-class-map", "foreign.json")
    assert "--teacher-class-map needs --teacher" in line
    # A student that is trained further has no map at all.
    line = support.refused(inside, "train", "parts", "--student", "foreign", "--out", "further")
    assert "has no class 'cat' of the data" in line
    assert not advised(line)


def test_the_teacher_of_a_distilled_sets_evaluation_has_a_map(
    inside: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    main(inside, "train", "digits", "--student", "mlp:8", "--epochs", 1, "--out", "of-digits")
    renamed = tmp_path / "renamed"
    shutil.copytree("of-digits", renamed)
    (renamed / "report.json").unlink()
    card = seals.read(renamed, seals.CARD)
    other = [str(10 + i) for i in range(10)]  # of words the digits would be taken by position
    seals.write(renamed, seals.CARD, card | {"classes": other}, [seals.WEIGHTS])
    distilled_set.save(tmp_path / "set.safetensors", support.distilled(support.digits()))
    mapping = tmp_path / "map.json"
    mapping.write_text(json.dumps({str(i): other[i] for i in range(10)}))
    options = dsdistill.options.EvaluateOptions(
        tmp_path / "set.safetensors", learners="mlp:8", controls="", teacher=str(renamed)
    )
    with pytest.raises(UserError) as caught:
        evaluation_parts.assemble(options)
    assert advised(str(caught.value)) == {"--teacher-class-map"}
    assert advised(str(caught.value)) <= options_of(type(options))
    teacher = evaluation_parts.assemble(dataclasses.replace(options, teacher_class_map=mapping))
    plain = evaluation_parts.assemble(dataclasses.replace(options, teacher="of-digits"))
    images = plain.held_out.test.images(slice(50))
    assert teacher.held_out.teacher is not None
    assert plain.held_out.teacher is not None
    np.testing.assert_array_equal(teacher.held_out.teacher(images), plain.held_out.teacher(images))
    with pytest.raises(UserError, match="--teacher-class-map needs --teacher"):
        evaluation_parts.assemble(
            dataclasses.replace(options, teacher=None, teacher_class_map=mapping)
        )


def test_the_share_of_a_class_and_a_constant_answer_are_said(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Nine of ten images are cats, and a student whose last layer is zero answers cat alone."""
    for name, count in zip(CLASSES, (27, 1, 1, 1), strict=True):
        draw(Path("uneven"), (name,), count, 5)
    weights = safetensors.numpy.load_file(Path("of-parts") / seals.WEIGHTS)
    *_, head = sorted(name for name in weights if name.endswith("weight"))
    weights[head] *= 0
    weights[head.replace("weight", "bias")][:] = (1, 0, 0, 0)
    constant = tmp_path / "constant"
    shutil.copytree("of-parts", constant)
    (constant / "report.json").unlink()
    safetensors.numpy.save_file(weights, constant / seals.WEIGHTS)
    seals.write(constant, seals.CARD, seals.read(Path("of-parts"), seals.CARD), [seals.WEIGHTS])
    found = judged(inside, capsys, str(constant), "uneven")
    share, answer = found["notes"]
    assert share.startswith("90.0% of the test images are of class 'cat'")
    assert answer.startswith("the student answers 'cat' to every test image: its accuracy of 90.0%")
    main(inside, "evaluate", str(constant), "uneven")
    printed = capsys.readouterr()
    assert " ".join(printed.err.split()).count(share) == 1
    assert "notes" not in printed.out
    assert judged(inside, capsys, "of-parts")["notes"] == []


def test_the_line_of_a_folder_speaks_of_what_is_judged(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(Path("line"), CLASSES, 7, 6)
    for run, folder, expected in (
        ("of-parts", ("line",), "line: 28 images of 4 classes are evaluated, all of them"),
        ("of-parts", (), "parts: 52 images of 4 classes are evaluated, from val/"),
        ("of-plain", (), "plain: 16 images of 4 classes are evaluated, the share that is held out"),
        ("of-plain", ("parts",), "parts: 52 images of 4 classes are evaluated, from val/"),
    ):
        progress._say_once.cache_clear()
        main(inside, "evaluate", run, *folder)
        said = " ".join(capsys.readouterr().err.split())
        assert expected in said
        assert "training images" not in said
        assert "validation" not in said
