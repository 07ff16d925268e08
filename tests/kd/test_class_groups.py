"""Classes joined to groups: a student learns them, and a teacher of the classes teaches them."""

import json
from pathlib import Path

import kd_support as support
import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image
from scipy.special import logsumexp, softmax

from dsdistill.harness.data import preprocess
from dsdistill.harness.errors import UserError
from kd.data import grouped_classes
from kd.models import networks, saved_models, teachers
from kd.models.saved_models import Model
from kd.models.zoo import class_groups

NAMES = ("cat", "dog", "owl", "emu")
GROUPS = class_groups.make(("mammal", "mammal", "bird", "bird"), NAMES, "a test")
SHAPE = (8, 8, 1)
QUICK = ("--epochs", 2, "--device", "cpu")


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)


def _teacher(folder: Path, classes: tuple[str, ...], groups=GROUPS) -> teachers.Teacher:
    folder.mkdir(exist_ok=True)
    data = preprocess.fit("none", lambda size: iter([np.zeros((1, *SHAPE))]), SHAPE, True)
    network = networks.build("mlp:8", SHAPE, len(classes), seed=1)
    saved_models.save_run(folder, Model(network, "mlp:8", classes, SHAPE, data))
    return teachers.load(str(folder), data, SHAPE, groups.classes, groups=groups)


def test_the_probability_of_a_group_is_the_sum_of_its_classes(tmp_path: Path) -> None:
    # In another order than the data's, so that sums of neighbours would be wrong.
    order = ("owl", "dog", "emu", "cat")
    teacher = _teacher(tmp_path, order)
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = teacher.classifier(images).double().numpy()
        got = softmax(teacher(images).double().numpy(), axis=1)
    by_class = dict(zip(order, softmax(logits, axis=1).T, strict=True))
    assert GROUPS.classes == ("bird", "mammal")
    expected = [by_class["owl"] + by_class["emu"], by_class["cat"] + by_class["dog"]]
    np.testing.assert_allclose(got.T, expected, atol=1e-6)
    assert teacher.resolved.matched == "by name, in another order, summed to groups"


def test_groups_of_one_class_keep_its_logit() -> None:
    logits = np.random.default_rng(0).standard_normal((4, 5))
    table = class_groups.member_table((1, 0, 1, 1, 2))
    got = class_groups.group_logits(torch.tensor(logits), table).numpy()
    expected = [logits[:, 1], logsumexp(logits[:, [0, 2, 3]], axis=1), logits[:, 4]]
    np.testing.assert_allclose(got.T, expected, atol=1e-12)


def test_a_teacher_of_the_groups_keeps_its_outputs(tmp_path: Path) -> None:
    teacher = _teacher(tmp_path, ("mammal", "bird"))
    assert teacher.members is None
    assert teacher.outputs is not None
    assert teacher.outputs.tolist() == [1, 0]
    with pytest.raises(UserError, match="has 3 classes, the data have 4"):
        _teacher(tmp_path / "other", ("mammal", "bird", "fish"))


def test_data_of_a_trained_student_have_its_classes_or_its_groups() -> None:
    groups = class_groups.restore(GROUPS.by_name, GROUPS.classes)
    assert groups == GROUPS
    assert groups.of(("Mammal", "Bird"), "a student") is None
    assert groups.of(("EMU", "dog"), "a student") == (0, 1)
    with pytest.raises(UserError, match="class of the data, which a student has no group for, 'ox"):
        groups.of(("ox", "dog"), "a student")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"cat": "a", "dog": "a", "owl": "a", "emu": "a"}', "joins all classes to one group"),
        (
            '{"cat": "a", "dog": "b", "owl": ["a"], "emu": "a"}',
            "'owl' the group \\['a'\\]: it must",
        ),
        ('{"cat": "a", "dog": "b", "owl": "", "emu": "a"}', "'owl' the group ''"),
        ('{"cat": "a", "dog": "b", "owl": "a"}', "leaves out 1 of the data's classes: 'emu'"),
        ("class,group\ncat,a\ncat,b\n", "has class 'cat' twice"),
        ("class,weight\ncat,a\n", "a table with the columns class and group"),
        ("class,group,note\ncat,a,x\n", "has a column 'note' beside class and group"),
    ],
)
def test_files_that_do_not_fit_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / ("g.json" if text.startswith("{") else "g.csv")
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        grouped_classes.read(path, NAMES)
    assert "\n" not in str(error.value)


def _parity(folder: Path) -> Path:
    """A file that joins the ten digits to even and odd ones."""
    path = folder / "parity.csv"
    rows = [f"{i},{'odd' if i % 2 else 'even'}\n" for i in range(10)]
    path.write_text("".join(["class,group\n", *rows]))
    return path


def test_a_student_learns_groups_from_a_teacher_of_classes_and_judges_data_of_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main = support.main
    parity = _parity(tmp_path)
    main(monkeypatch, "train", "digits", "--student", "mlp:32", *QUICK, "--out", "fine")
    grouped = ("--class-groups", parity, "--class-weights", "balanced", *QUICK)
    taught = ("--student", "mlp:32", "--teacher", "fine", *grouped, "--out", "small")
    main(monkeypatch, "train", "digits", *taught)
    report = support.read_report(tmp_path / "small")
    card = json.loads((tmp_path / "small" / "model.json").read_text())
    assert card["classes"] == ["even", "odd"]
    assert card["class_groups"] == report["class_groups"]
    assert report["class_groups"]["7"] == "odd"
    fine = support.read_report(tmp_path / "fine")
    # Joining classes forgives mistakes within a group, and makes none.
    assert report["teacher_accuracy"] >= fine["test_accuracy"]
    assert report["test_accuracy"] > 0.7
    capsys.readouterr()
    main(monkeypatch, "evaluate", "small", "--json")
    again = json.loads(capsys.readouterr().out)
    assert again["accuracy"] == report["test_accuracy"]
    assert again["teacher_accuracy"] == report["teacher_accuracy"]
    # The same test images, named by their digit and by their group.
    splits = support.digits().test
    groups = [card["class_groups"][name] for name in splits.classes]
    for kind, names in (("digit", splits.classes), ("group", groups)):
        for i, (image, label) in enumerate(zip(splits.images(), splits.labels, strict=True)):
            path = tmp_path / kind / names[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.round(image[..., 0] * 16) * 15
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    accuracies = []
    for kind in ("digit", "group"):
        main(monkeypatch, "evaluate", "small", tmp_path / kind, "--json")
        accuracies.append(json.loads(capsys.readouterr().out)["accuracy"])
    assert accuracies[0] == accuracies[1]
    assert accuracies[0] == pytest.approx(report["test_accuracy"], abs=0.01)


def test_an_interrupted_training_of_groups_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parity = _parity(tmp_path)
    common = ("digits", "--student", "mlp:8", "--class-groups", parity, *QUICK)
    support.main(monkeypatch, "train", *common, "--out", "whole")
    support.stop_in(monkeypatch, 30, "train", *common, "--out", "cut")
    parity.write_text(parity.read_text().replace("9,odd", "9,even"))
    resume = ("train", "--resume", "--out", "cut")
    assert "class groups" in support.refused(monkeypatch, *resume)
    _parity(tmp_path)
    support.main(monkeypatch, *resume)
    whole, cut = (
        safetensors.numpy.load_file(tmp_path / name / "student.safetensors")
        for name in ("whole", "cut")
    )
    assert all(np.array_equal(whole[name], cut[name]) for name in whole)


def test_streamed_files_have_the_groups_of_their_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4), ("test", 4)):
        for name, level in zip(NAMES, (40, 60, 200, 220), strict=True):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level - 20, level + 20, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "groups.json").write_text(json.dumps(GROUPS.by_name))
    arguments = ["--student", "mlp:8", "--augment", "imagenet", "--image-size", 8, "--workers", 0]
    arguments += ["--class-groups", tmp_path / "groups.json", "--epochs", 6, "--device", "cpu"]
    out = tmp_path / "run"
    support.main(monkeypatch, "train", tmp_path / "data", *arguments, "--out", out)
    assert support.read_report(out)["test_accuracy"] > 0.9  # dark mammals, bright birds


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--head", "none", "--teacher", "T"), "--class-groups needs classes, and --head none"),
        (("--pate", "teachers=5,sigma=1", "--public", "test:10"), "--pate lets teachers vote"),
    ],
)
def test_what_groups_do_not_go_with_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], message: str
) -> None:
    words = ("digits", "--class-groups", _parity(tmp_path), *more, "--out", tmp_path / "run")
    assert message in support.refused(monkeypatch, "train", *words)
