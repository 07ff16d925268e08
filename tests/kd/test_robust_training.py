"""Robust students through the commands: what is trained, measured, kept and refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from kd_support import main, read_report, refused, stop_in
from process_support import finish, start

QUICK = ("--student", "mlp:32", "--epochs", 6, "--lr", 0.2, "--device", "cpu")
ADVERSARY = ("--adversary", "pgd:eps=0.1:steps=3")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a robust teacher of digits and a natural one."""
    folder = tmp_path_factory.mktemp("robust")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("kd.runs.curves.draw", lambda folder: None)
        main(patch, "train", "digits", *QUICK, *ADVERSARY, "--out", "robust")
        main(patch, "train", "digits", *QUICK, "--robust", "pgd:eps=0.1", "--out", "natural")
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(work)
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)
    return monkeypatch


def _weights(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "student.safetensors")


def _same(a: Path, b: Path) -> bool:
    first, second = _weights(a), _weights(b)
    return all(np.array_equal(first[name], second[name]) for name in first)


def test_training_against_an_attack_helps_under_it(work: Path) -> None:
    robust, natural = read_report(work / "robust"), read_report(work / "natural")
    assert robust["recipe"]["loss"] == "adv-ce:1"  # where no other one is named
    assert list(robust["attacks"]) == ["pgd:eps=0.1:steps=20:step=0.025"]
    assert robust["attacks"] == {"pgd:eps=0.1:steps=20:step=0.025": robust["test_robust_accuracy"]}
    assert robust["attacked_images"] == 359
    assert robust["test_robust_accuracy"] > natural["test_robust_accuracy"] + 0.05
    for report in (robust, natural):
        assert report["test_robust_accuracy"] < report["test_accuracy"]


def test_a_teacher_of_robust_answers_and_its_cache(inside, work: Path) -> None:
    line = ("train", "digits", *QUICK, *ADVERSARY, "--teacher", "robust", "--epochs", 1)
    main(inside, *line, "--augment", "crop-flip", "--out", "plain")
    main(inside, *line, "--augment", "crop-flip", "--cache", "answers", "--out", "kept")
    main(inside, *line, "--augment", "crop-flip", "--cache", "answers", "--out", "again")
    assert read_report(work / "plain")["recipe"]["loss"] == "rslad:5/6,kd:1/6:temperature=1"
    assert _same(work / "plain", work / "kept")
    assert _same(work / "plain", work / "again")
    line = refused(inside, *line, "--loss", "adaad", "--cache", "answers", "--out", "none")
    assert "these are of images that change with the student" in line


@pytest.mark.parametrize(
    "loss", ["ard:1:temperature=4", "adaad:1,srd:0.01", "ce:1,trades:6,kd:0.1"]
)
def test_a_robust_training_is_resumed_to_the_bit(inside, work: Path, loss: str) -> None:
    """In the middle of an epoch, with the metric that is measured under the attack."""
    line = ("train", "digits", *QUICK, *ADVERSARY, "--teacher", "robust", "--loss", loss)
    line += ("--metric", "robust_accuracy", "--epochs", 2)
    for name in ("whole", "stopped"):
        shutil.rmtree(work / name, ignore_errors=True)
    main(inside, *line, "--out", "whole")
    stop_in(inside, 30, *line, "--out", "stopped")
    main(inside, "train", "--resume", "--out", "stopped")
    assert _same(work / "whole", work / "stopped")
    rows = [json.loads(x) for x in (work / "whole" / "metrics.jsonl").read_text().splitlines()]
    best = max(row["validation_robust_accuracy"] for row in rows)
    chosen = [row for row in rows if row["epoch"] == read_report(work / "whole")["best_epoch"]]
    assert chosen[0]["validation_robust_accuracy"] == best


def test_a_moving_average_teaches_and_is_attacked(inside, work: Path) -> None:
    line = ("train", "digits", *QUICK, *ADVERSARY, "--mean-teacher", 0.9, "--loss", "ce:1,rslad:1")
    main(inside, *line, "--epochs", 2, "--out", "averaged")
    assert read_report(work / "averaged")["test_robust_accuracy"] is not None


def test_evaluation_under_attacks(inside, work: Path, capsys) -> None:
    attacks = "pgd,pgd:eps=1:images=50"
    main(inside, "evaluate", "robust", "--robust", attacks, "--device", "cpu", "--json")
    figures = json.loads(capsys.readouterr().out)
    first, second = figures["attacks"]
    assert first == "pgd:eps=0.1:steps=20:step=0.025"  # the eps of the training
    assert figures["attacks"][second] == 0
    assert figures["attacked_images"] == 50
    assert figures["robust_accuracy"] == 0
    assert figures["attacks"][first] <= figures["attacked_images_accuracy"]
    main(inside, "evaluate", "natural", "--robust", "pgd:images=20", "--device", "cpu")
    printed = capsys.readouterr().out
    assert "pgd:eps=0.03137:steps=20:step=0.007843" in printed
    main(inside, "evaluate", "robust", "--device", "cpu", "--json")
    assert "attacks" not in json.loads(capsys.readouterr().out)


def test_a_report_compares_accuracies_under_attack(inside, work: Path) -> None:
    main(inside, "report", "robust", "natural", "--out", "page.html")
    page = (work / "page.html").read_text()
    assert "accuracy under attack, %" in page
    assert "of 359 test images and pgd:eps=0.1:steps=20:step=0.025" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--adversary", "pgd:eps=9"), "eps is of pixels in [0, 1]"),
        (("--robust", "pgd:eps=x"), "eps must be a number such as 0.03 or 8/255"),
        (("--loss", "ce:1,trades"), "is of images that an attack has changed: add --adversary"),
        ((*ADVERSARY, "--loss", "ce:1"), "has no effect on --loss ce: add adv-ce"),
        ((*ADVERSARY, "--loss", "rslad"), "--loss rslad needs a teacher"),
        ((*ADVERSARY, "--mixup", 0.2), "--loss adv-ce needs whole labels"),
        ((*ADVERSARY, "--preprocess", "zca"), "the preprocessing zca mixes them"),
        (("--robust", "pgd", "--preprocess", "zca"), "the preprocessing zca mixes them"),
        ((*ADVERSARY, "--peers", "mlp:8"), "--adversary does not work with --peers"),
        (("--metric", "robust_accuracy"), "--metric has no effect without --adversary"),
    ],
)
def test_what_does_not_fit_is_one_line(inside, work: Path, options: tuple, message: str) -> None:
    line = refused(inside, "train", "digits", *QUICK, *options, "--out", "unfit")
    assert message in line
    assert not (work / "unfit").exists()


def test_robust_terms_are_not_of_texts(inside, work: Path) -> None:
    (work / "texts.tsv").write_text("text\tlabel\n" + "good\ta\nbad\tb\n" * 20)
    line = ("train", "texts.tsv", "--student", "bilstm:8", "--tokenizer", "words", "--out", "unfit")
    assert "--adversary" in refused(inside, *line, "--adversary", "pgd")
    assert "--loss adv-ce is of images" in refused(inside, *line, "--loss", "adv-ce")


def test_two_processes_attack_the_bare_network(work: Path, tmp_path: Path) -> None:
    """The attack waits for no other process, and both take the same steps."""
    line = ("train", "digits", *QUICK, *ADVERSARY, "--batch-size", 32, "--epochs", 1)
    finish(start(work, *line, "--out", tmp_path / "two"))
    report = read_report(tmp_path / "two")
    assert report["processes"] == 2
    assert 0 < report["test_robust_accuracy"] < report["test_accuracy"]
