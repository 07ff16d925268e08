"""`kd train --prune`, and what the other commands make of pruned students."""

import json
from pathlib import Path
from typing import Any

import kd_support as support
import pytest
import safetensors.torch
import torch
from kd_support import main, refused, stop_in

from kd.commands import report
from kd.models import pruning, saved_models, seals

WHOLE = ("digits", "--student", "convnet:8", "--epochs", 3, "--seed", 1)
QUICK = ("digits", "--student", "whole", "--prune", 0.5, "--epochs", 1)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained student, and what is left of it."""
    folder = tmp_path_factory.mktemp("pruned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("kd.runs.curves.draw", lambda folder: None)
        main(patch, "train", *WHOLE, "--out", "whole")
        main(patch, "train", *QUICK, "--out", "slim")
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(work)
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)
    return monkeypatch


def test_a_pruned_student_learns_from_what_it_was(work: Path) -> None:
    config = json.loads((work / "slim/config.json").read_text())
    slim, whole = support.read_report(work / "slim"), support.read_report(work / "whole")
    assert config["teacher"] == config["student"] == str(work / "whole")
    assert (slim["recipe"]["lr"], slim["recipe"]["warmup"]) == (0.005, 0)
    before, after = slim["pruning"]["before"], slim["pruning"]["after"]
    assert slim["pruning"]["share"] == 0.5
    # Of 8 channels in three layers 5 are left: 9 * 5 * 64 + 9 * 25 * (16 + 4) + 5 * 10.
    assert (before["macs"], after["macs"]) == (16208, 7430)
    assert (before["parameters"], after["parameters"]) == (1386, 600)
    assert slim["parameters"] == 600
    assert before["test_accuracy"] == whole["test_accuracy"] == slim["teacher_accuracy"]
    assert after["test_accuracy"] == slim["test_accuracy"]
    assert min(before["latency_ms_batch_1"], after["latency_ms_batch_1"]) > 0


def test_the_stored_student_loads_without_torch_pruning_and_answers_alike(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], work: Path
) -> None:
    card = json.loads((work / "slim/model.json").read_text())
    assert card["layer_channels"]["4"] == [5, 5]
    model = saved_models.load_run(work / "slim")
    assert pruning.count_macs(model.classifier, model.shape) == 7430
    inside.setitem(__import__("sys").modules, "torch_pruning", None)
    main(inside, "evaluate", "slim", "--json")
    figures = json.loads(capsys.readouterr().out)
    stored = support.read_report(work / "slim")
    assert figures["accuracy"] == stored["test_accuracy"]
    assert figures["nll"] == stored["nll"]
    assert figures["teacher_agreement"] == stored["teacher_agreement"]


def test_a_training_that_was_stopped_goes_on_to_the_same_bits(inside: pytest.MonkeyPatch) -> None:
    inside.setattr("kd.training.saving.SECONDS_TO_FIRST_CHECKPOINT", 1e9)
    stop_in(inside, 9, "train", *QUICK, "--out", "stopped")
    main(inside, "train", "--resume", "--out", "stopped")
    both = (safetensors.torch.load_file(Path(n, seals.WEIGHTS)) for n in ("slim", "stopped"))
    whole, resumed = both
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_every_command_takes_a_pruned_run(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("digits", "--steps", 2)
    main(inside, "train", *short, "--student", "mlp:8", "--teacher", "slim", "--out", "taught")
    main(inside, "train", *short, "--student", "slim", "--prune", 0.3, "--out", "slimmer")
    assert support.read_report(Path("slimmer"))["teacher"] == "slim"
    further = saved_models.load_run(Path("slimmer"))
    assert pruning.count_macs(further.classifier, further.shape) <= 0.7 * 7430
    main(inside, "train", *short, "--student", "slimmer", "--out", "further")
    again = saved_models.load_run(Path("further"))
    assert again.layer_channels == further.layer_channels
    inside.setattr("kd.exports.quantised_file.figures", lambda *parts: {})
    main(inside, "quantize", "slim", "--out", "codes", "--images", 32)
    codes = saved_models.load_run(Path("codes"))
    assert codes.bits is not None
    assert codes.layer_channels["4"] == (5, 5)
    main(inside, "export", "slim", "--format", "safetensors", "--out", "weights")
    main(inside, "export", "slim", "--format", "pt2", "--out", "slim.pt2")
    capsys.readouterr()
    main(inside, "evaluate", "weights", "digits", "--json")
    figures = json.loads(capsys.readouterr().out)
    assert figures["nll"] == support.read_report(Path("slim"))["nll"]
    assert "weights does not say what it was trained on" in refused(inside, "evaluate", "weights")
    main(inside, "train", *short, "--student", "weights", "--out", "from-weights")
    main(inside, "train", *short, "--student", "mlp:8", "--teacher", "slim.pt2", "--out", "by-pt2")


def test_the_report_shows_what_was_removed(inside: pytest.MonkeyPatch) -> None:
    page = report.render([Path("whole"), Path("slim")])
    assert "Pruned students" in page
    for value in ("16,208", "7,430", "1,386", "600"):
        assert value in page
    assert "Pruned students" not in report.render([Path("whole")])


def test_labels_alone_and_a_student_without_its_package(inside: pytest.MonkeyPatch) -> None:
    options = ("digits", "--student", "whole", "--prune", 0.5, "--steps", 2)
    main(inside, "train", *options, "--loss", "ce:1", "--out", "labels")
    assert support.read_report(Path("labels"))["teacher"] is None
    inside.setattr(pruning, "PACKAGE", "no_such_package")
    line = refused(inside, "train", *options, "--out", "missing")
    assert "--prune needs torch-pruning: pip install 'dsdistill[prune]'" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*QUICK, "--prune", 1), "--prune must be in (0, 1), got 1.0"),
        ((*QUICK, "--prune", 0), "--prune must be in (0, 1), got 0.0"),
        ((*QUICK, "--prune", 0.999), "of convnet:8 at most 0.953 can go"),
        (("digits", "--prune", 0.5), "add --student RUN, or --pretrained, got none"),
        (("digits", "--student", "convnet", "--prune", 0.5), "trained student"),
        ((*QUICK, "--quantize", "w8a8"), "quantize the pruned student afterwards"),
        ((*QUICK, "--peers", "mlp:8"), "leave --peers out"),
        ((*QUICK, "--generations", 2), "leave --generations out"),
        ((*QUICK, "--centred"), "--prune does not go with --centred"),
        ((*QUICK, "--pate", "teachers=5,sigma=4", "--public", "test:9"), "leave --pate out"),
    ],
)
def test_what_does_not_go_is_refused_and_writes_nothing(
    inside: pytest.MonkeyPatch, work: Path, arguments: tuple[Any, ...], said: str
) -> None:
    before = sorted(work.rglob("*"))
    assert said in refused(inside, "train", *arguments)
    assert sorted(work.rglob("*")) == before


def test_a_quantised_student_and_texts_are_refused(
    inside: pytest.MonkeyPatch, work: Path, tmp_path: Path
) -> None:
    inside.setattr("kd.exports.quantised_file.figures", lambda *parts: {})
    main(inside, "quantize", "whole", "--out", str(tmp_path / "codes"), "--images", 32)
    options = ("--student", tmp_path / "codes", "--prune", 0.5)
    assert "prune the run in float32" in refused(inside, "train", "digits", *options)
    texts = tmp_path / "texts.tsv"
    texts.write_text("text\tlabel\n" + "good\t1\nbad\t0\n" * 9)
    options = ("--student", "whole", "--prune", 0.5)
    assert "--prune is for images" in refused(inside, "train", texts, *options)
    assert "timm has no network" in refused(inside, "export", "slim", "--format", "timm")
