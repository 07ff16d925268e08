"""`kd synthesize`: only the run is read, sets train students, stopped sets end in the same bits."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from kd_support import environment, main, read_report, refused, write_npz
from PIL import Image

from dsdistill.harness.data import distilled_set
from kd.models import saved_models
from kd.synthesis.inversion import Inversion

QUICK = ("--images", 12, "--batch-size", 6, "--steps", 4, "--device", "cpu", "--seed", 1)
# A process that lists what it opens, and may kill itself in the middle of a step.
CHILD = """
import json, os, signal, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(os.path.abspath(args[0]))
    if event in ("open", "os.scandir", "os.listdir") and isinstance(args[0], str) else None)
from kd import cli
from kd.models import saved_models
from kd.synthesis.inversion import Inversion
step = Inversion.step
last = int(sys.argv.pop(1))
def killed(self, number):
    if number == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number)
Inversion.step = killed
from kd.commands import synthesize
synthesize.SECONDS_BETWEEN_SAVES = 0
try:
    cli.main()
finally:
    json.dump(opened, open("opened.json", "w"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data under a data root, teachers with and without batch norm, and a set of the first."""
    root = tmp_path_factory.mktemp("synthesis")
    (root / "data").mkdir()
    write_npz(root / "data" / "rows.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("kd.runs.curves.draw", lambda folder: None)
        line = ("train", "data/rows.npz", "--epochs", 2, "--batch-size", 30, "--device", "cpu")
        main(patch, *line, "--student", "small-vgg11:2", "--out", "teacher")
        main(patch, *line, "--student", "mlp:4", "--out", "plain")
        taught = ("--student", "mlp:4", "--teacher", "plain", "--head", "none")
        main(patch, *line, *taught, "--loss", "rkd-distance", "--out", "headless")
        main(patch, "synthesize", "teacher", *QUICK, "--out", "set")
    return root


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)
    return monkeypatch


def _images(run: Path) -> np.ndarray:
    return safetensors.numpy.load_file(run / "distilled.safetensors")["images"]


def test_the_set_says_how_it_was_made(folder: Path) -> None:
    made = distilled_set.load(folder / "set" / "distilled.safetensors")
    pixels = made.preprocess.invert(made.images)
    assert pixels.shape == (12, 8, 8, 1)
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    np.testing.assert_allclose(made.labels.sum(1), 0, atol=1e-6)  # probabilities minus 1/k
    record = made.provenance
    assert record["method"] == "inversion"
    assert record["made_from"] == "the weights of a network alone"
    assert "data" not in record
    assert record["settings"]["bn_weight"] == 10
    assert record["network"]["name"] == "small-vgg11:2"
    entropy = record["metrics"]["mean_answer_entropy"]
    assert 0 <= entropy <= math.log(3)
    assert record["metrics"]["mean_answer_entropy_share"] == pytest.approx(entropy / math.log(3))
    mean = (made.labels.astype(np.float64) + 1 / 3).mean(0)
    assert entropy == pytest.approx(-mean @ np.log(mean), rel=1e-4)
    with Image.open(folder / "set" / "images.png") as picture:
        assert min(picture.size) > 100


def test_a_set_alone_trains_a_student_on_the_teachers_answers(inside) -> None:
    main(inside, "train", "set", "--teacher", "teacher", "--student", "mlp:4", "--steps", 4,
         "--device", "cpu", "--out", "student")  # fmt: skip
    assert json.loads(Path("student/recipe.json").read_text())["loss"] == "kd:1:temperature=4"
    report = read_report(Path("student"))
    assert report["train_images"] == 12
    assert report["test_accuracy"] is None
    assert report["note"].endswith("was made without data: no validation and no test")
    assert sum(report["transfer"]["answered_classes"].values()) == 12
    main(inside, "evaluate", "student", "data/rows.npz", "--device", "cpu")


def test_without_a_teacher_students_learn_from_the_sets_labels_too(inside) -> None:
    main(inside, "train", "set", "--peers", "mlp:4", "--student", "mlp:4", "--steps", 2,
         "--device", "cpu", "--out", "peers")  # fmt: skip
    loss = json.loads(Path("peers/recipe.json").read_text())["loss"]
    assert loss == "ce:1,kd:1:temperature=1"


def test_data_that_give_figures_alone_stand_beside_the_set(inside) -> None:
    main(inside, "train", "data/rows.npz", "--transfer", "set", "--teacher", "teacher",
         "--student", "mlp:4", "--epochs", 1, "--device", "cpu", "--out", "judged")  # fmt: skip
    report = read_report(Path("judged"))
    assert report["train_images"] == 12
    assert report["validation_accuracy"] is not None


@pytest.mark.parametrize(
    "smaller", [("--prune", 0.5), ("--quantize", "w4a4")], ids=["pruned", "quantised"]
)
def test_smaller_copies_of_a_network_make_images_of_their_own(inside, tmp_path, smaller) -> None:
    inside.setattr("kd.exports.quantised_file.figures", lambda *parts: {})  # exported and measured
    line = ("train", "data/rows.npz", "--steps", 3, "--batch-size", 30, "--device", "cpu")
    main(inside, *line, "--student", "teacher", *smaller, "--out", tmp_path / "run")
    main(inside, "synthesize", tmp_path / "run", *QUICK, "--out", tmp_path / "set")
    made = distilled_set.load(tmp_path / "set" / "distilled.safetensors")
    # The labels are the answers of the smaller network, in the batches that were made together.
    network = saved_models.load_run(tmp_path / "run").classifier.eval()
    images = torch.from_numpy(made.images).permute(0, 3, 1, 2)
    with torch.no_grad():
        answers = torch.cat([network(half) for half in images.split(6)]).double().softmax(1)
    np.testing.assert_allclose(made.labels + 1 / 3, answers, atol=1e-6)
    assert not np.allclose(made.images, _images(Path("set")), atol=0.01)


@pytest.mark.parametrize("stop", [2, 4, 7])
def test_a_set_that_is_stopped_ends_as_the_same(inside, folder: Path, stop: int) -> None:
    step = Inversion.step

    def signalled(self: Inversion, number: int) -> float:
        if number + 1 == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    out = f"stopped-{stop}"
    with inside.context() as patch:
        patch.setattr(Inversion, "step", signalled)
        line = refused(patch, "synthesize", "teacher", *QUICK, "--out", out)
    assert f"kd synthesize --resume --out {out}" in line
    assert not Path(out, "distilled.safetensors").exists()
    main(inside, "synthesize", "--resume", "--out", out)
    assert np.array_equal(_images(folder / "set"), _images(folder / out))
    assert "finished" in refused(inside, "synthesize", "--resume", "--out", out)


@pytest.mark.heavy  # two processes that import torch
def test_killed_and_resumed_it_reads_nothing_but_the_run(folder: Path) -> None:
    environ = environment() | {"DSDISTILL_DATA": str(folder / "data")}

    def child(last: int, *words: object) -> int:
        command = [sys.executable, "-c", CHILD, str(last), *map(str, words)]
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True)
        return done.returncode

    assert child(5, "synthesize", "teacher", *QUICK, "--out", "killed") == -signal.SIGKILL
    assert not (folder / "killed" / "distilled.safetensors").exists()
    assert child(-1, "synthesize", "--resume", "--out", "killed") == 0
    assert np.array_equal(_images(folder / "set"), _images(folder / "killed"))
    opened = [Path(name) for name in json.loads((folder / "opened.json").read_text())]
    inner = [name.relative_to(folder) for name in opened if name.is_relative_to(folder)]
    here = {name.parts[0] for name in inner if name.parts}
    assert "teacher" in here  # what is opened is seen
    assert "data" not in here


def test_another_network_is_refused_on_resume(inside) -> None:
    shutil.copytree("teacher", "changing")

    def stopped(self: Inversion, number: int) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    step = Inversion.step
    with inside.context() as patch:
        patch.setattr(Inversion, "step", stopped)
        refused(patch, "synthesize", "changing", *QUICK, "--out", "other")
    shutil.rmtree("changing")
    shutil.copytree("plain", "changing")
    line = refused(inside, "synthesize", "--resume", "--out", "other")
    assert "batch norm" in line
    assert "--seed" in refused(inside, "synthesize", "--resume", "--out", "other", "--seed", 5)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("plain",), "plain (mlp:4) has no batch norm layers, whose statistics"),
        (("plain", "--method", "generator", "--bn-weight", 1), "has no batch norm layers"),
        (("teacher", "--images", 2), "--images must be at least 3, one for each class of teacher"),
        (("teacher", "--method", "generator", "--tv-weight", 1), "--tv-weight is for --method"),
        (("headless",), "headless is a student without a head, and images are made for classes"),
        (("nowhere",), "nowhere holds no finished student"),
        (("set",), "set holds no finished student"),
        ((), "RUN, the folder of a finished run, is missing"),
        (("teacher", "--resume"), "--resume needs --out"),
        (("teacher", "--seed", -1), "--seed must be 0 or more, got -1"),
        (("teacher", "--bn-weight", "1e39"), "the loss is not finite at step"),
    ],
)
def test_what_gives_no_images_is_refused(inside, words: tuple, line: str) -> None:
    out = () if "--resume" in words else ("--out", "refused")
    assert line in refused(inside, "synthesize", *words, "--device", "cpu", *out)
    assert not Path("refused").exists()


def test_without_batch_norm_there_are_two_ways(inside, capsys) -> None:
    quick = (*QUICK[:4], "--device", "cpu")
    main(inside, "synthesize", "plain", *quick, "--steps", 4, "--bn-weight", 0, "--out", "bare")
    assert "without the statistics of batch norm layers" in capsys.readouterr().err
    line = ("synthesize", "plain", "--method", "generator", "--width", 2, *quick)
    main(inside, *line, "--steps", 8, "--out", "made")
    record = distilled_set.load(Path("made/distilled.safetensors")).provenance
    assert record["settings"]["bn_weight"] == 0
    assert "statistics_distance" not in record["metrics"]
