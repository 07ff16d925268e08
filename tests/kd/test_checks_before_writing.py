"""What `kd train` finds out before it makes a folder, and what it says of teachers."""

import json
from pathlib import Path

import kd_support as support
import numpy as np
import pytest
import safetensors.numpy
from kd_support import main, read_report

from dsdistill.harness.data import distilled_set
from dsdistill.harness.errors import UserError
from kd.models import seals

FAST = ("--student", "mlp:8", "--epochs", 1, "--device", "cpu")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data of two and of three classes, teachers, class maps and a distilled set."""
    folder = tmp_path_factory.mktemp("checked")
    support.write_npz(folder / "two.npz", classes=2)
    support.write_npz(folder / "three.npz", classes=3)
    support.write_npz(folder / "few.npz", classes=3, n=15)
    gone = {"data": {"source": "gone/away.npz"}}
    distilled_set.save(folder / "orphan.safetensors", support.distilled(support.digits(), **gone))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("kd.runs.curves.draw", lambda folder: None)  # as long as the training itself
        for name, data in (("teacher-2", "two.npz"), ("one", "three.npz"), ("other", "three.npz")):
            seed = 1 if name == "other" else 0
            main(patch, "train", data, *FAST, "--epochs", 20, "--seed", seed, "--out", name)
        main(patch, "train", "digits", *FAST, "--out", "digits")
    # The same network, whose outputs 0 and 2 have changed places and names.
    swapped = folder / "swapped"
    swapped.mkdir()
    weights = safetensors.numpy.load_file(folder / "one" / seals.WEIGHTS)
    *_, head = sorted(name for name in weights if name.endswith("weight"))
    for name in (head, head.replace("weight", "bias")):
        weights[name] = np.ascontiguousarray(weights[name][[2, 1, 0]])
    safetensors.numpy.save_file(weights, swapped / seals.WEIGHTS)
    card = seals.read(folder / "one", seals.CARD) | {"classes": ["zoe", "yan", "xia"]}
    seals.write(swapped, seals.CARD, card, [seals.WEIGHTS])
    classes = json.loads((folder / "one" / "model.json").read_text())["classes"]
    right = dict(zip(classes, ("xia", "yan", "zoe"), strict=True))
    (folder / "right.json").write_text(json.dumps(right))
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(work)
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)
    return monkeypatch


TAUGHT = ("--teacher", "one")
BOTH = ("--teacher", "one,other")


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("two.npz", ("--teacher", "teacher-2", "--loss", "ce,dkd"), "dkd needs 3 classes or more"),
        ("three.npz", (*TAUGHT, "--loss", "ce,dist", "--batch-size", 1), "at least 2, got 1"),
        ("three.npz", (*TAUGHT, "--loss", "srd:1"), "sends no gradient to 2 of the 6 weights"),
        ("three.npz", (*TAUGHT, "--loss", "ce:0,kd:0"), "a term of weight 0 has no effect"),
        ("three.npz", (*TAUGHT, "--generations", 2, "--loss", "ce,kd:1:temperature=0"),
         "temperature must be in"),
        ("three.npz", ("--peers", "mlp:8", "--loss", "ce,kd,heads@3"), "leave --peers out"),
        ("three.npz", ("--loss", "mse,heads@3"), "with mse the student has none: use ce"),
        ("three.npz", ("--peers", "mlp:8", "--loss", "kd"), "nothing else teaches them: add ce:1"),
        ("three.npz", ("--mean-teacher", 0.9, "--loss", "dkd"),
         "nothing else teaches them: add ce:1"),
        ("three.npz", (*TAUGHT, "--loss", "ce,crd", "--mixup", 0.2), "crd needs whole labels"),
        ("three.npz", ("--label-smoothing", 0.1, "--loss", "ce:1:smoothing=0.1"),
         "set the same value: give one of them"),
        ("three.npz", (*BOTH, "--loss", "ce,srd:1", "--teacher-weights", "by-label"),
         "--teacher-weights has no effect on --loss ce,srd:1"),
        ("three.npz", (*BOTH, "--class-map", "right.json,right.json,right.json"),
         "--class-map has 3 files for 2 teachers"),
        ("three.npz", (*TAUGHT, "--min-teacher-accuracy", 0.999, "--validation-fraction", 0,
                       "--teacher", "swapped", "--class-map", "wrong.json"), "below --min-teacher"),
        ("three.npz", ("--metric", "nll", "--validation-fraction", 0),
         "--metric has no effect without validation images"),
        ("few.npz", ("--average-best", 2), "--average-best has no effect without validation"),
        ("orphan.safetensors", ("--teacher", "digits", "--min-teacher-accuracy", 0.5),
         "needs real images to check the teacher on, and there are none"),
        ("three.npz", ("--student", "test_resnet", "--batch-size", 1, "--image-size", 32),
         "batch of 1 image (Expected more than 1 value per channel"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line_and_leaves_nothing(
    inside, work: Path, data: str, options: tuple, message: str
) -> None:
    wrong = {"0": "zoe", "1": "xia", "2": "yan"}
    classes = json.loads((work / "one" / "model.json").read_text())["classes"]
    wrong = dict(zip(classes, wrong.values(), strict=True))
    (work / "wrong.json").write_text(json.dumps(wrong))
    with pytest.raises(SystemExit) as error:
        main(inside, "train", data, *FAST, *options, "--out", "refused")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(work.glob("refused*"))


def test_a_last_batch_too_small_for_the_loss_joins_the_one_before(
    inside, work: Path, capsys
) -> None:
    """Of 66 images by 16 the last two are too few for angles, and enough for all else."""
    size = 16
    assert read_report(work / "one")["train_images"] == 4 * size + 2
    options = (*TAUGHT, "--loss", "ce,rkd-angle", "--batch-size", size)
    main(inside, "train", "three.npz", *FAST, *options, "--out", "angles")
    said = capsys.readouterr().err
    assert (
        f"the last batch of an epoch holds {size + 2} images, not {size}: the remaining 2 are"
        in said
    )
    assert read_report(work / "angles")["steps"] == 4
    main(inside, "train", "three.npz", *FAST, "--batch-size", size, "--out", "plain")
    assert read_report(work / "plain")["steps"] == 5
    assert "the remaining" not in capsys.readouterr().err


def test_smoothing_in_the_loss_is_the_recipes(inside, work: Path) -> None:
    options = ("--recipe", "distilled_set", "--loss", "ce:1:smoothing=0.2", "--mixup", 0.2)
    main(inside, "train", "three.npz", "--student", "mlp:8", *options, "--steps", 3,
          "--device", "cpu", "--out", "smooth")  # fmt: skip
    assert json.loads((work / "smooth" / "recipe.json").read_text())["label_smoothing"] == 0.2


def test_mse_of_real_images_is_stored_as_what_it_is(inside, work: Path) -> None:
    """Its outputs are near one-hot rows: as logits they would be no probabilities at all."""
    main(inside, "train", "three.npz", *FAST, "--epochs", 20, "--loss", "mse", "--out", "mse")
    card = json.loads((work / "mse" / "model.json").read_text())
    assert card["outputs"] == "centred labels"
    assert card["output_temperature"] < 0.5
    assert read_report(work / "mse")["nll"] < 0.5


def test_without_validation_images_it_is_said_and_the_teacher_is_judged_all_the_same(
    inside, work: Path, capsys
) -> None:
    options = (*TAUGHT, "--validation-fraction", 0, "--min-teacher-accuracy", 0.5)
    main(inside, "train", "three.npz", *FAST, *options, "--out", "unheld")
    said = " ".join(capsys.readouterr().err.split())
    assert "no validation images (none are held out): the weights of the last epoch are" in said
    count = read_report(work / "unheld")["train_images"]
    assert f"on {count} training images" in said
    main(inside, "train", "few.npz", *FAST, "--out", "few")
    said = " ".join(capsys.readouterr().err.split())
    assert "no validation images (a share of 0.1 of so few images of each class is none)" in said
    main(inside, "train", "orphan.safetensors", "--student", "mlp:8", "--steps", 2,
          "--teacher", "digits", "--device", "cpu", "--out", "orphan")  # fmt: skip
    said = " ".join(capsys.readouterr().err.split())
    assert "the teachers are not checked: there are no real images" in said


def test_each_teacher_has_its_own_class_map_and_figures(inside, work: Path, capsys) -> None:
    """`swapped` is `one` with other names in another order: mapped, it answers the same."""
    options = ("--teacher", "one,swapped", "--class-map", ",right.json")
    main(inside, "train", "three.npz", *FAST, *options, "--out", "mapped")
    said = " ".join(capsys.readouterr().err.split())
    assert "teacher one: accuracy" in said
    assert "teacher swapped: accuracy" in said
    assert "classes matched by the class map" in said
    report = read_report(work / "mapped")
    each = report["teachers"]
    assert each["one"] == each["swapped"]
    assert report["teacher_accuracy"] == each["one"]["accuracy"]
    assert each["one"]["accuracy"] == read_report(work / "one")["test_accuracy"]
    config = json.loads((work / "mapped" / "config.json").read_text())
    assert config["class_map"] == f",{(work / 'right.json').resolve()}"
    capsys.readouterr()
    main(inside, "evaluate", "mapped", "--json", "--device", "cpu")
    found = json.loads(capsys.readouterr().out)["teachers"]
    assert list(found.values()) == list(each.values())
    main(inside, "train", "three.npz", *FAST, "--teacher", "one,other", "--out", "several")
    report = read_report(work / "several")
    for name in ("one", "other"):
        known = read_report(work / name)["test_accuracy"]
        assert report["teachers"][name]["accuracy"] == known


def test_terms_of_features_learn_from_every_teacher(inside, work: Path) -> None:
    students = []
    for name, several in (("first", "one"), ("second", "other"), ("both", "one,other")):
        options = ("--teacher", several, "--loss", "ce,srd:1")
        main(inside, "train", "three.npz", *FAST, *options, "--out", f"featured-{name}")
        students.append((work / f"featured-{name}" / "student.safetensors").read_bytes())
    assert len(set(students)) == 3


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        ("ce,crd", "crd compares each image with 65 others, as many as there are, and not with "
         "negatives=16384"),
        ("ce,crd:1:negatives=66", "others, as many as there are, and not with negatives=66"),
        ("ce,crd:1:negatives=65", None),
        ("ce,srd", None),
    ],
)  # fmt: skip
def test_fewer_negatives_than_asked_for_are_said_first(
    inside, work: Path, capsys, loss: str, line: str | None
) -> None:
    assert read_report(work / "one")["train_images"] == 66

    def stop(*_: object) -> None:
        raise UserError("stopped before the folder is made")

    inside.setattr("kd.commands.train._open_run", stop)
    with pytest.raises(SystemExit, match="stopped before the folder is made"):
        main(inside, "train", "three.npz", *FAST, *TAUGHT, "--loss", loss, "--out", "capped")
    said = " ".join(capsys.readouterr().err.split())
    assert (line in said) if line else ("as many as there are" not in said)
