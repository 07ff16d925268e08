"""The command `dsdistill`: files, wrong input, stops and kills.

What only a process shows is looked at in a process: speed, kills, a full disk.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsdistill.harness.data import distilled_set

SHORT = ("--images-per-class", 2, "--steps", 12)


def one_line(done: subprocess.CompletedProcess[str], *words: str, code: int = 1) -> None:
    """Require a failure of one readable line, without traceback, with exit code 1 or 2."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("dsdistill: ")
    for word in words:
        assert word in lines[0]


def test_kip_writes_all_it_promises(kip_run):
    names = {path.name.split(".tfevents")[0] for path in kip_run.iterdir()}
    expected = {"distilled.safetensors", "distilled.png", "metrics.jsonl", "events.out"}
    assert names == expected | {"config.json", "checkpoint.safetensors"}
    lines = [json.loads(line) for line in (kip_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert Image.open(kip_run / "distilled.png").size[0] > 300
    distilled = distilled_set.load(kip_run / "distilled.safetensors")
    metrics = distilled.provenance["metrics"]
    assert distilled.images.shape == (20, 8, 8, 1)
    assert metrics["test_accuracy"] > 0.9 > metrics["initial_test_accuracy"]


def test_kip_reaches_the_published_accuracy_on_digits(dsdistill_process, tmp_path):
    began = time.monotonic()
    done = dsdistill_process("kip", "digits", "--outer", "mse", "--out", "run")
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    distilled = distilled_set.load(tmp_path / "run" / "distilled.safetensors")
    assert distilled.provenance["metrics"]["test_accuracy"] >= 0.985
    assert seconds < 60


@pytest.mark.fashion
def test_label_solve_on_fashion_mnist(dsdistill, tmp_path):
    """The reference has 84.5 % at fifty images per class, with a deviation of 0.2 between draws."""
    done = dsdistill("ls", "fashion-mnist", "--images-per-class", 50, "--out", "run")
    assert done.returncode == 0, done.stderr
    distilled = distilled_set.load(tmp_path / "run" / "distilled.safetensors")
    assert distilled.provenance["data"]["train"] == 60_000
    assert distilled.provenance["metrics"]["test_accuracy"] == pytest.approx(0.845, abs=0.008)


@pytest.mark.fashion
def test_kip_learns_fashion_mnist(dsdistill, tmp_path):
    done = dsdistill("kip", "fashion-mnist", "--steps", 60, "--out", "run")
    assert done.returncode == 0, done.stderr
    metrics = distilled_set.load(tmp_path / "run" / "distilled.safetensors").provenance["metrics"]
    # The reference run has 70.1 % before and 82.9 % after 50 steps.
    assert metrics["initial_test_accuracy"] == pytest.approx(0.70, abs=0.04)
    assert metrics["test_accuracy"] > 0.815


def test_folder_of_jpegs_in_colour(dsdistill, tmp_path):
    """Class folders with ZCA, the default, and a convolutional kernel."""
    rng = np.random.default_rng(0)
    for label, colour in {"warm": (200, 90, 40), "cold": (40, 90, 200)}.items():
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(12):
            noise = rng.integers(-40, 40, (20, 24, 3))
            image = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / "photos" / label / f"{i}.jpg")
    options = ("--image-size", 8, "--kernel", "conv", "--data-root", tmp_path / "cache")
    done = dsdistill("kip", "photos", *SHORT, *options, "--out", "run")
    assert done.returncode == 0, done.stderr
    distilled = distilled_set.load(tmp_path / "run" / "distilled.safetensors")
    assert distilled.preprocess.kind == "zca"
    assert distilled.classes == ("cold", "warm")
    assert distilled.provenance["engine"] == "exact planes"
    assert distilled.provenance["metrics"]["test_accuracy"] > 0.9


POOLED_NETWORK = """
from neural_tangents import stax

net = stax.serial(
    stax.Conv(1, (3, 3), padding="SAME"), stax.Relu(), stax.AvgPool((2, 2), strides=(2, 2)),
    stax.Flatten(), stax.Dense(1),
)
"""


@pytest.mark.parametrize("method", [("kip", "--steps", 2, "--target-batch", 10), ("ls",)])
@pytest.mark.parametrize(
    ("kernel", "engine"),
    [("CRP-gap", "exact planes"), ("my_pooled_network:net", "neural-tangents")],
)
def test_pooled_kernels(dsdistill, tmp_path, monkeypatch, method, kernel, engine):
    """Pooling of neural-tangents in float64, which crashes XLA's CPU compiler, is avoided."""
    (tmp_path / "my_pooled_network.py").write_text(POOLED_NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    labels = np.arange(60) % 2
    rng = np.random.default_rng(0)
    images = np.clip(rng.normal(0.3 + 0.4 * labels[:, None, None], 0.1, (60, 8, 8)), 0, 1)
    np.savez(tmp_path / "mine.npz", images=images.astype(np.float32), labels=labels)
    name, *options = method
    options = ("mine.npz", "--kernel", kernel, "--images-per-class", 1, *options)
    done = dsdistill(name, *options, "--out", "run")
    assert done.returncode == 0, done.stderr
    provenance = distilled_set.load(tmp_path / "run" / distilled_set.FILE_NAME).provenance
    assert provenance["engine"] == engine
    assert provenance["metrics"]["test_accuracy"] == 1  # brightness alone tells the classes


def test_npz_with_every_option(dsdistill, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.random((60, 9, 7, 1), np.float32)
    np.savez(tmp_path / "mine.npz", images=images, labels=np.arange(60) % 2)
    options = [
        "--learn-labels",
        "--augment",
        "flip,shift",
        "--preprocess",
        "none",
        "--init",
        "noise",
    ]
    options += ["--corruption", "0.2", "--depth", "2", "--target-batch", "10", "--seed", "3"]
    options += ["--ridge", "1e-3", "--learning-rate", "0.01", "--validation-fraction", "0"]
    done = dsdistill("kip", "mine.npz", *SHORT, *options)
    assert done.returncode == 0, done.stderr
    distilled = distilled_set.load(tmp_path / "runs" / "kip-mine-1" / "distilled.safetensors")
    assert distilled.provenance["kernel"] == "fc(2)"
    metrics = distilled.provenance["metrics"]
    assert metrics["validation_accuracy"] is metrics["validation_loss"] is None
    assert metrics["best_step"] == 12  # no validation images: the last step
    again = dsdistill("kip", "mine.npz", *SHORT)
    assert "kip-mine-2" in again.stdout


def test_a_run_with_every_way_to_save_time(dsdistill, tmp_path):
    """A run from a Label Solve set, with warm-up, schedule, timed target batch and patience."""
    assert dsdistill("ls", "digits", "--images-per-class", 2, "--out", "ls").returncode == 0
    options = ["--init", "ls", "--warm-up", "fc:6", "--schedule", "cosine", "--learn-labels"]
    options += ["--label-learning-rate", "0.001", "--target-batch", "5ms", "--augment", "shift"]
    options += ["--steps", "400", "--patience", "1", "--validation-images", "50"]
    done = dsdistill("kip", "digits", *options, "--learning-rate", "0.4", "--out", "run")
    assert done.returncode == 0, done.stderr
    solved, learned = (
        distilled_set.load(tmp_path / n / distilled_set.FILE_NAME) for n in ("ls", "run")
    )
    provenance = learned.provenance
    assert len(learned) == len(solved) == 20
    assert provenance["metrics"]["initial_test_accuracy"] == pytest.approx(
        solved.provenance["metrics"]["test_accuracy"], abs=0.05
    )  # not the same training images: Label Solve held none out
    last = provenance["metrics"]["last_step"]
    assert last < 406
    assert (
        provenance["stopped"] == f"at step {last} of 406: no lower validation loss in 1 validation"
    )
    assert f"stopped early, {provenance['stopped']}" in done.stdout
    chosen = provenance["config"]["chosen"]
    assert chosen["target_batch"] % 10 == 0
    assert len(provenance["inputs"]["set of --init"]) == 64
    note, *said = done.stderr.splitlines()
    assert note.startswith("note: the set of --init was made with images that this run validates")
    assert said[0] == f"target batch: {chosen['target_batch']} images, for steps of 5 ms"
    assert re.match(r"expected: .* \(.* per warm-up step, .* pairs of images per second\)", said[1])
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == [1] * 6 + [2] * (last - 6)


def test_a_resumed_run_measures_no_batch_again_and_starts_from_the_same_set(dsdistill, tmp_path):
    assert dsdistill("ls", "digits", "--images-per-class", 1, "--out", "ls").returncode == 0
    options = ["kip", "digits", "--steps", 20, "--init", "ls", "--out", "run"]
    assert dsdistill(*options, "--target-batch", "5ms").returncode == 0
    (
        tmp_path / "run" / distilled_set.FILE_NAME
    ).unlink()  # stopped before the last file was written
    config = tmp_path / "run" / "config.json"
    stored = json.loads(config.read_text())
    stored["chosen"]["target_batch"] = 70
    config.write_text(json.dumps(stored))
    done = dsdistill("kip", "--out", "run", "--resume")
    assert done.returncode == 0, done.stderr
    assert "target batch" not in done.stderr
    provenance = distilled_set.load(tmp_path / "run" / distilled_set.FILE_NAME).provenance
    assert provenance["config"]["chosen"]["target_batch"] == 70
    (tmp_path / "run" / distilled_set.FILE_NAME).unlink()
    shutil.rmtree(tmp_path / "ls")
    again = dsdistill("ls", "digits", "--images-per-class", 1, "--seed", 1, "--out", "ls")
    assert again.returncode == 0
    one_line(dsdistill("kip", "--out", "run", "--resume"), "changed since", "set of --init")


def test_an_init_that_does_not_fit_leaves_nothing(dsdistill, kip_run, tmp_path):
    """Twenty images of ten classes, 8x8."""
    asked = ("kip", "digits", "--init", kip_run, "--images-per-class", 3)
    one_line(dsdistill(*asked), "2 images per class, --images-per-class asks for 3")
    one_line(dsdistill("kip", "--init", kip_run, "--image-size", 9), "8x8x1, the data's 9x9x1")
    np.savez(tmp_path / "two.npz", images=np.zeros((60, 8, 8)), labels=np.arange(60) % 2)
    one_line(
        dsdistill("kip", "two.npz", "--init", kip_run),
        "same classes in the same order, got 10 classes and 2",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["two.npz"]


def test_of_several_kernels_the_first_one_is_stored_and_evaluates(dsdistill, tmp_path):
    options = ("--kernel", "fc,conv", "--target-batch", 20, "--validation-images", 20)
    short = ("--images-per-class", 1, "--steps", 6)
    done = dsdistill("kip", "digits", *options, *short, "--out", "run")
    assert done.returncode == 0, done.stderr
    provenance = distilled_set.load(tmp_path / "run" / distilled_set.FILE_NAME).provenance
    assert (provenance["kernel"], provenance["config"]["kernel"]) == ("fc(1)", "fc,conv")
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["network"] for line in lines} == {0, 1}
    evaluated = ("--learners", "ridge", "--controls", "", "--seeds", 1, "--out", "report")
    evaluated += ("--cache", "cache")
    done = dsdistill("evaluate", "run", *evaluated)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    first = report["results"][0]
    assert first["accuracy"] == pytest.approx(provenance["metrics"]["test_accuracy"])
    assert "--kernel fc,conv" in report["commands"][0]


def test_a_diverging_run_says_what_to_change(dsdistill, tmp_path):
    rates = ("--learn-labels", "--label-learning-rate", 100)
    done = dsdistill("kip", "digits", "--outer", "mse", *rates, "--steps", 300, "--out", "run")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("dsdistill: the loss ")
    assert "--learning-rate (now 0.04) or --label-learning-rate (now 100)" in last
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_killed_run_resumes_to_the_same_bits(dsdistill_process, tmp_path):
    """A run that SIGKILL stops and that is resumed gives the support of an uninterrupted run."""
    options = ["kip", "digits", "--images-per-class", "2", "--steps", "400", "--learn-labels"]
    assert dsdistill_process(*options, "--out", "whole").returncode == 0
    command = [Path(sys.executable).with_name("dsdistill"), *options, "--out", "killed"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    checkpoint = tmp_path / "killed" / "checkpoint.safetensors"
    lines = tmp_path / "killed" / "metrics.jsonl"
    while not (lines.exists() and lines.read_text().count("\n") > 150):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "distilled.safetensors").exists()
    done = dsdistill_process("kip", "--out", "killed", "--resume")
    assert done.returncode == 0, done.stderr
    whole, killed = (
        distilled_set.load(tmp_path / name / "distilled.safetensors")
        for name in ("whole", "killed")
    )
    np.testing.assert_array_equal(whole.images, killed.images)
    np.testing.assert_array_equal(whole.labels, killed.labels)
    assert whole.provenance["metrics"] == killed.provenance["metrics"]
    figures = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert figures[0] == figures[1]
    assert checkpoint.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_hand_leaves_a_checkpoint(dsdistill, tmp_path, number):
    command = [Path(sys.executable).with_name("dsdistill"), "kip", "digits", "--steps", "100000"]
    process = subprocess.Popen(
        [*command, "--out", "run"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    lines = tmp_path / "run" / "metrics.jsonl"
    while not (lines.exists() and lines.read_text().count("\n") > 20):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in error
    assert error.strip().endswith("stopped; continue with `dsdistill kip --resume --out run`")
    assert not (tmp_path / "run" / ".lock").exists()
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kip", "fashion-mist"], ["unknown data set", "did you mean 'fashion-mnist'"]),
        (["kip", "--kernel", "convnett"], ["unknown kernel", "did you mean 'convnet'"]),
        (["kip", "no/such/folder"], ["no such file or folder"]),
        (["kip", "empty"], ["empty"]),
        (["kip", "--images-per-class", "500"], ["has", "fewer than the 500 asked for"]),
        (["kip", "--images-per-class", "0"], ["--images-per-class", "at least 1"]),
        (["kip", "--steps", "0"], ["--steps"]),
        (["kip", "--target-batch", "0"], ["--target-batch"]),
        (["kip", "--learning-rate", "-1"], ["--learning-rate"]),
        (["kip", "--learning-rate", "nan"], ["--learning-rate"]),
        (["kip", "--ridge", "0"], ["--ridge"]),
        (["kip", "--corruption", "1.5"], ["--corruption", "[0, 1]"]),
        (["kip", "--target-batch", "soon"], ["--target-batch", "2s", "'soon'"]),
        (["kip", "--label-learning-rate", "0.1"], ["needs --learn-labels"]),
        (["kip", "--learn-labels", "--label-learning-rate", "0"], ["--label-learning-rate", "0.0"]),
        (["kip", "--patience", "0"], ["--patience", "at least 1"]),
        (["kip", "--patience", "2", "--validation-fraction", "0"], ["--patience", "(now 0)"]),
        (["kip", "--validation-images", "0"], ["--validation-images", "at least 1"]),
        (["kip", "--augment", "flip,spin"], ["unknown augmentation 'spin'", "rotate"]),
        (["kip", "--init", "nois"], ["--init", "did you mean 'noise'"]),
        (["kip", "--init", "empty"], ["no distilled set at empty/"]),
        (["kip", "--init", "foreign.safetensors"], ["not a whole .safetensors file"]),
        (["kip", "--warm-up", "fcc"], ["unknown kernel", "did you mean 'fc'"]),
        (["kip", "--warm-up", "fc:0"], ["--warm-up", "at least 1 step"]),
        (["kip", "--kernel", "fc,fc"], ["--kernel names one twice"]),
        (["kip", "--kernel", "fc,convnett"], ["did you mean 'convnet'"]),
        (
            ["kip", "--kernel", "fc,conv", "--depth", "2"],
            ["--depth applies to one kernel", "fc(3)"],
        ),
        (["ls", "--kernel", "fc,conv"], ["Label Solve takes one --kernel"]),
        (["kip", "--validation-fraction", "1"], ["validation fraction"]),
        (["kip", "--seed", "-1"], ["--seed"]),
        (["kip", "--image-size", "0"], ["image size"]),
        (["kip", "--resume"], ["--resume needs --out"]),
        (["kip", "--resume", "--out", "nothing"], ["holds no run to resume"]),
        (["kip", "--kernel", "myrtle", "--image-size", "512"], ["needs", "GiB", "can be used"]),
        (["ls", "bad.npz"], ["NaN"]),
        (["inspect", "nothing.safetensors"], ["no distilled set"]),
        (["inspect", "foreign.safetensors"], ["not a"]),
        (["evaluate", "nothing"], ["no distilled set"]),
        (["evaluate", "nothing", "--pixels", "unit"], ["no distilled set"]),
        (["report", "nothing"], ["holds no evaluation"]),
    ],
    ids=lambda value: " ".join(value)[:50],
)
def test_wrong_input_is_one_line_and_leaves_nothing(dsdistill, tmp_path, arguments, words):
    (tmp_path / "empty").mkdir()
    bad = np.full((4, 5, 5), np.nan, np.float32)
    np.savez(tmp_path / "bad.npz", images=bad, labels=np.array([0, 1, 0, 1]))
    (tmp_path / "foreign.safetensors").write_bytes(b"not a tensor file")
    one_line(dsdistill(*arguments), *words)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"empty", "bad.npz", "foreign.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("kip --sseed 1", ["--sseed", "did you mean --seed?"]),
        ("kip --steps many", ["--steps", "many"]),
        ("kip --schedule cosin", ["cosin", "did you mean cosine?"]),
        ("kip --preprocess standardize", ["standardize", "did you mean standardise?"]),
        ("kipp", ["kipp", "did you mean kip?"]),
        ("evaluate", ["Folder of a run"]),
        ("", ["Expected one of", "kip"]),
    ],
)
def test_a_line_that_cannot_be_read_is_one_line_with_code_2(dsdistill, arguments, words):
    one_line(dsdistill(*arguments.split()), *words, code=2)


def test_label_solve_larger_than_the_data(dsdistill, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "few.npz", images=rng.random((10, 4, 4)), labels=np.arange(10) % 2)
    one_line(dsdistill("ls", "few.npz", "--images-per-class", 5), "fewer than the 5")


def test_a_used_folder_is_never_overwritten(dsdistill, kip_run, tmp_path):
    before = (kip_run / "distilled.safetensors").read_bytes()
    one_line(dsdistill("kip", "digits", "--out", kip_run), "already holds a finished run")
    one_line(dsdistill("kip", "--out", kip_run, "--resume"), "nothing to resume")
    assert (kip_run / "distilled.safetensors").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    one_line(dsdistill("kip", "digits", "--out", "mine"), "not empty")


def test_resume_refuses_other_options(dsdistill, tmp_path):
    unfinished = {"command": "kip", "data": "digits", "seed": 0, "steps": 10}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(unfinished))
    one_line(dsdistill("kip", "--out", "run", "--steps", 20, "--resume"), "--steps 10, got 20")
    one_line(dsdistill("ls", "--out", "run", "--resume"), "kip, got ls")


def test_damaged_sets_are_refused(dsdistill, kip_run, tmp_path):
    whole = (kip_run / "distilled.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-100])
    one_line(dsdistill("inspect", "short.safetensors"), "short.safetensors")
    one_line(dsdistill("evaluate", "short.safetensors"), "short.safetensors")
    flipped = bytearray(whole)
    flipped[-50] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(flipped)
    one_line(dsdistill("export", "flipped.safetensors", "--format", "npz"), "damaged")


def test_full_disk_keeps_the_last_checkpoint(dsdistill, tmp_path):
    """A limit on file sizes, which the checkpoint exceeds, stands in for a full disk."""
    command = Path(sys.executable).with_name("dsdistill")
    limited = f"ulimit -f 40; exec {command} kip digits --steps 20 --out run"
    done = subprocess.run(["bash", "-c", limited], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    assert not (tmp_path / "run" / "distilled.safetensors").exists()
    resumed = dsdistill("kip", "--out", "run", "--resume")
    assert resumed.returncode == 0, resumed.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_unwritable_folder(dsdistill, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    one_line(dsdistill("kip", "digits", "--out", "locked/run"), "Permission denied")


def test_a_folder_that_cannot_be_made(dsdistill, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    one_line(dsdistill("kip", "digits", "--out", "file/run"), "Not a directory")


def test_a_reader_that_has_seen_enough_is_no_error(kip_run):
    """A reader such as `head` closes the pipe early."""
    command = [Path(sys.executable).with_name("dsdistill"), "inspect", str(kip_run), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait() == 1


def test_inspect_in_words_and_as_json(dsdistill, kip_run):
    words = dsdistill("inspect", kip_run).stdout
    assert "test_accuracy" in words
    assert "one-hot minus 1/k" in words
    described = json.loads(dsdistill("inspect", kip_run, "--json").stdout)
    assert 0.9 < described["metrics"]["test_accuracy"] <= 1
    assert described["images"] == [20, 8, 8, 1]
    assert described["method"] == "kip"


def test_export_in_every_format(dsdistill, kip_run, tmp_path):
    import torch

    distilled = distilled_set.load(kip_run / "distilled.safetensors")
    for form, out in (("folder", "png"), ("npz", "set.npz"), ("torch", "set.pt")):
        done = dsdistill("export", kip_run, "--format", form, "--out", out)
        assert done.returncode == 0, done.stderr
    names = list("0123456789")
    assert sorted(path.name for path in (tmp_path / "png").iterdir()) == [*names, "classes.json"]
    beside = json.loads((tmp_path / "png" / "classes.json").read_text())
    assert beside == dict(zip(names, names, strict=True))
    pictures = sorted((tmp_path / "png").rglob("*.png"))
    assert len(pictures) == 20
    pixels = np.clip(distilled.preprocess.invert(distilled.images), 0, 1)
    shown = np.asarray(Image.open(pictures[0]), np.float32) / 255
    np.testing.assert_allclose(shown, pixels[0, ..., 0], atol=0.5 / 255 + 1e-6)
    with np.load(tmp_path / "set.npz") as arrays:
        np.testing.assert_array_equal(arrays["images"], distilled.images)
        assert arrays["classes"].tolist() == list(distilled.classes)
    tensors = torch.load(tmp_path / "set.pt", weights_only=True)
    np.testing.assert_array_equal(tensors["labels"].numpy(), distilled.labels)
    one_line(dsdistill("export", kip_run, "--format", "npz", "--out", "set.npz"), "exists already")


def test_help_is_quick(dsdistill_process):
    times = []
    for _ in range(5):
        began = os.times()
        assert dsdistill_process("--help").returncode == 0
        ended = os.times()
        # Processor time: other work on the machine does not count.
        times.append(sum(ended[2:4]) - sum(began[2:4]))
    assert 0 < min(times) < 0.5
