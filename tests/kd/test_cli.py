"""The command `kd` as a user meets it: real processes, files, wrong inputs, kills."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import in_process
import kd_support as support
import numpy as np
import pytest
import safetensors.numpy
from kd_support import main, read_report

from dsdistill.harness import files
from dsdistill.harness.data import distilled_set
from kd import cli

FAST = ("--student", "mlp:16", "--epochs", "4", "--batch-size", "64")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished teacher, data of other classes, and distilled sets."""
    folder = tmp_path_factory.mktemp("kd")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(patch, "train", "digits", *FAST, "--epochs", 12, "--out", "teacher")
    splits = support.digits()
    distilled_set.save(folder / "set.safetensors", support.distilled(splits))
    other = {"data": {"source": "digits", "sha256": "0" * 64}}
    distilled_set.save(folder / "other.safetensors", support.distilled(splits, **other))
    gone = {"data": {"source": "gone/away.npz"}}
    distilled_set.save(folder / "orphan.safetensors", support.distilled(splits, **gone))
    bare = support.distilled(splits)
    distilled_set.save(
        folder / "bare.safetensors",
        distilled_set.DistilledSet(bare.images, bare.labels, bare.preprocess, bare.classes, {}),
    )
    (folder / "cut.safetensors").write_bytes((folder / "set.safetensors").read_bytes()[:5000])
    (folder / "run").mkdir()
    shutil.copy(folder / "set.safetensors", folder / "run" / "distilled.safetensors")
    support.write_npz(folder / "three.npz")
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(work)
    return monkeypatch


@pytest.mark.parametrize(("command", "word"), [((), "train"), (("export",), "--format")])
def test_help_is_quick(command: tuple[str, ...], word: str, tmp_path: Path) -> None:
    """In processor time, relative to the parser's own import in turn: a busy machine slows both."""
    tyro = [sys.executable, "-c", "import tyro"]
    least = {"help": float("inf"), "tyro": float("inf")}

    def measure(what: str, run: Callable[[], Any]) -> Any:
        began = os.times()
        done = run()
        ended = os.times()
        least[what] = min(least[what], sum(ended[2:4]) - sum(began[2:4]))
        return done

    for _ in range(5):
        done = measure("help", lambda: support.kd(*command, "--help", cwd=tmp_path))
        measure("tyro", lambda: subprocess.run(tyro, check=True))
        assert done.returncode == 0
        assert word in done.stdout
    assert least["help"] < 2.5 * least["tyro"]


@pytest.mark.parametrize("command", [(), ("export",)])
def test_help_loads_no_framework(command: tuple[str, ...]) -> None:
    script = (
        "import sys; from kd.cli import main; sys.argv = ['kd', *sys.argv[1:], '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'sklearn', 'jax'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script, *command], check=True, capture_output=True)


def test_a_finished_folder_holds_all_that_was_promised(work: Path) -> None:
    folder = work / "teacher"
    names = {p.name for p in folder.iterdir()}
    assert {"student.safetensors", "model.json", "config.json", "metrics.jsonl"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    report = read_report(folder)
    assert report["test_accuracy"] > 0.8
    assert report["train_images"] == len(support.digits().train)
    assert report["recipe"]["epochs"] == 12
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(line["validation_accuracy"] for line in lines) == report["validation_accuracy"]
    card = json.loads((folder / "model.json").read_text())
    assert card["classes"] == [str(i) for i in range(10)]
    assert card["output_temperature"] == 1.0


def test_train_from_a_teacher_and_evaluate(inside, work: Path, capsys) -> None:
    main(inside, "train", *FAST, "--teacher", "teacher", "--out", "taught")
    assert read_report(work / "taught")["teacher_agreement"] > 0.5
    capsys.readouterr()
    main(inside, "evaluate", "taught", "--json")
    found = json.loads(capsys.readouterr().out)
    report = read_report(work / "taught")
    for name in ("nll", "calibration_error", "teacher_agreement", "teacher_accuracy"):
        assert found[name] == pytest.approx(report[name])
    assert found["accuracy"] == report["test_accuracy"]
    assert found["parameters"] == report["parameters"] > 0
    assert found["latency_ms_batch_1"] > 0
    assert found["latency_ms_batch_64"] > 0
    main(inside, "evaluate", "taught", "digits")
    assert "expected calibration error (15 bins)" in capsys.readouterr().out


@pytest.mark.parametrize("data", ["set.safetensors", "run"])
def test_a_distilled_set_is_trained_on_its_stored_labels(inside, work: Path, data: str) -> None:
    out = f"alone-{data}"
    main(inside, "train", data, "--student", "mlp:16", "--epochs", 100, "--out", out)
    report, card = read_report(work / out), json.loads((work / out / "model.json").read_text())
    assert report["test_accuracy"] > 0.5
    assert report["train_images"] == 50
    assert card["outputs"] == "centred labels"
    assert card["output_temperature"] < 0.5
    assert report["nll"] < 2.0  # with a plain softmax it would be nearly log 10


def test_a_teacher_relabels_a_distilled_set(inside, work: Path) -> None:
    options = ("--student", "mlp:64", "--epochs", 200, "--teacher", "teacher", "--out", "relabel")
    main(inside, "train", "set.safetensors", *options)
    report = read_report(work / "relabel")
    assert report["test_accuracy"] > 0.5
    assert report["output_temperature"] == 1.0
    first = json.loads((work / "relabel" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"kd", "ce"} <= first.keys()


@pytest.mark.parametrize("data", ["orphan.safetensors", "bare.safetensors"])
def test_a_set_whose_data_are_gone_is_trained_on_without_evaluation(
    inside, work: Path, data: str, capsys
) -> None:
    main(inside, "train", data, "--student", "mlp:8", "--epochs", 2, "--out", f"from-{data}")
    assert "no validation and no test" in capsys.readouterr().err
    assert read_report(work / f"from-{data}")["test_accuracy"] is None


def test_an_earlier_student_is_trained_further(inside, work: Path) -> None:
    options = ("--student", "teacher", "--epochs", 1, "--lr", 1e-4, "--out", "further")
    main(inside, "train", "digits", *options)
    before, after = (read_report(work / name) for name in ("teacher", "further"))
    assert after["student"] == "mlp:16"
    assert abs(after["test_accuracy"] - before["test_accuracy"]) < 0.05


def test_pretrained_students_get_their_own_normalisation(inside, work: Path) -> None:
    import timm

    make = timm.create_model
    inside.setattr(timm, "create_model", lambda name, pretrained, **kw: make(name, **kw))
    options = ("--student", "test_resnet", "--pretrained", "--epochs", 1, "--out", "own")
    main(inside, "train", "three.npz", *options)
    card = json.loads((work / "own" / "model.json").read_text())
    assert card["preprocess"]["mean"] == [pytest.approx(timm_mean())]


def timm_mean() -> float:
    import timm

    config = timm.get_pretrained_cfg("test_resnet")
    assert config is not None
    return sum(config.mean) / 3


UNVALIDATED = ("--validation-fraction", "0")
WRONG = [
    (("train", "--loss", "kdd:1"), "unknown loss 'kdd'; did you mean 'kd'"),
    (("train", "--loss", "kd:1"), "--loss kd needs a teacher"),
    (("train", "--teacher", "teacher", "--loss", "ce:1"), "no term that uses the teacher"),
    (
        ("train", "--teacher", "teacher", "--loss", "kd:1:temperature=0"),
        "temperature must be in [0.01, 1000], got 0",
    ),
    (("train", "--teacher", "teacher", "--loss", "at:1"), "a loss of maps needs layers"),
    (("train", "--teacher", "teacher", "--loss", "at@nine"), "unknown layer 'nine'"),
    (("train", "--teacher", "teacher", "--mixup", "0.2", "--loss", "dkd"), "needs whole labels"),
    (("train", "--peers", "mlp:8", "--teacher", "teacher"), "leave --teacher out"),
    (("train", "--peers", "mlp:8", "--loss", "ce:1,sp"), "uses layers of a teacher"),
    (("train", "--peers", "mlp:8", "--generations", "2"), "only one scheme at a time"),
    (("train", "--mean-teacher", "1"), "--mean-teacher must be in [0, 1), got 1"),
    (("train", "--assistants", "mlp:8"), "--assistants needs --teacher"),
    (("train", "--cache", "answers"), "--cache needs --teacher"),
    (("train", "--teacher-weights", "alike", "--teacher", "teacher"), "is for several teachers"),
    (("train", "--recipe", "hintn"), "did you mean 'hinton'"),
    (("train", "--recipe", "deit"), "recipe deit is made for a GPU and there is none"),
    (("train", "--augment", "imagenet"), "cuts images to one size: give --image-size"),
    (("train", "--augment", "imagenet", "--image-size", "8"), "digits is no folder of class"),
    (("train", "--mixup", "0.2", "--batch-size", "33"), "--batch-size must be even, got 33"),
    (("train", "--momentum", "0.5", "--optimizer", "adamw"), "--momentum has no effect"),
    (("train", "--crop-padding", "2"), "--crop-padding has no effect without"),
    (("train", "--decay-all", "True", "--weight-decay", "0"), "--decay-all has no effect without"),
    (("train", "--workers", "0"), "--workers has no effect without --augment imagenet"),
    (("train", "--patience", "0"), "--patience must be at least 1, got 0"),
    (("train", "--validate-every", "0"), "--validate-every must be at least 1, got 0"),
    (("train", *UNVALIDATED, "--patience", "3"), "--patience has no effect without validation"),
    (("train", *UNVALIDATED, "--validate-every", "3"), "--validate-every has no effect without"),
    (
        ("train", *UNVALIDATED, "--average-best", "3"),
        "--average-best has no effect without",
    ),
    (("train", *UNVALIDATED, "--metric", "nll"), "--metric has no effect without validation"),
    (("train", "orphan.safetensors", "--patience", "3"), "has no effect without"),
    (("train", "--precision", "fp16"), "--precision fp16 needs a GPU"),
    (("train", "--checkpoint-gradients"), "has no such switch"),
    (("train", "--teacher", "teacher", "--min-teacher-accuracy", "0.99"), "below --min-teacher"),
    (("train", "set.safetensors", "--metric", "nll"), "--metric nll needs logits"),
    (("train", "--epochs", "0"), "--epochs must be at least 1, got 0"),
    (("train", "--batch-size", "0"), "--batch-size must be at least 1"),
    (("train", "--lr", "-1"), "--lr must be positive"),
    (("train", "--resume"), "--resume needs --out"),
    (("train", "--device", "cuda:99"), "device 'cuda:99' is not available"),
    (("train", "--device", "toaster"), "device 'toaster' is not available"),
    (("train", "digitz"), "did you mean 'digits'"),
    (("train", "no/such/folder"), "no such file or folder: no/such/folder"),
    (("train", "--student", "convnett"), "did you mean 'convnet'"),
    (("train", "--student", "resnet81"), "did you mean 'resnet"),
    (("train", "--student", "no/run"), "there is no folder no/run"),
    (("train", "--student", "convnet", "--pretrained"), "convnet has no published weights"),
    (("train", "--image-size", "4"), "at least 8x8 pixels, got 4x4"),
    (("train", "--validation-fraction", "2"), "validation fraction must be in [0, 1)"),
    (("train", "--teacher", "mlp"), "mlp has no published weights"),
    (("train", "--teacher", "resnet18"), "has 1000 classes, the data have 10"),
    (("train", "--teacher", "unfinished"), "holds no finished student"),
    (("train", "three.npz", "--teacher", "teacher"), "has 10 classes, the data have 3"),
    (("train", "three.npz", "--student", "teacher"), "has 10 classes, the data have 3"),
    (("train", "--student", "teacher", "--preprocess", "zca"), "leave --pretrained and"),
    (("train", "cut.safetensors"), "is not a whole .safetensors file"),
    (("train", "teacher/student.safetensors"), "not a distilled set"),
    (("train", "missing.safetensors"), "no distilled set at missing.safetensors"),
    (("train", "unfinished"), "without a finished distilled set"),
    (("train", "other.safetensors"), "was distilled from other images than digits holds now"),
    (("train", "set.safetensors", "--preprocess", "zca"), "leave --preprocess out"),
    (("train", "set.safetensors", "--image-size", "16"), "leave --image-size"),
    (("train", "--out", "teacher"), "already holds a finished run"),
    (("train", "--out", "teacher", "--resume"), "nothing to resume"),
    (("train", "--out", "nowhere", "--resume"), "nowhere holds no run to resume"),
    (("evaluate", "nowhere"), "nowhere holds no finished student"),
    (("evaluate", "teacher", "three.npz"), "has 10 classes, the data have 3"),
    (("evaluate", "teacher", "orphan.safetensors"), "nothing to test on"),
    (("evaluate", "teacher", "--teacher", "convnet"), "convnet has no published weights"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(
    inside, work: Path, arguments: tuple[str, ...], message: str
) -> None:
    before = sorted(work.iterdir())
    with pytest.raises(SystemExit) as stopped:
        main(inside, *arguments)
    line = str(stopped.value.code)  # what the interpreter prints on stderr, with exit code 1
    assert line.startswith("kd: ")
    assert message in line
    assert "\n" not in line
    assert sorted(work.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--loss", "kd:much"), "a weight must be a number, got 'much'"),
        (("train", "--epochs", "many"), "--epochs"),
        (("train", "--speed", "9"), "--speed"),
        (("train", "--preprocess", "pca"), "--preprocess"),
        (("distil",), "distil"),
        (("train", "digitz", *FAST), "did you mean 'digits'"),
        (("train", "--teacher", "nowhere/run"), "there is no folder"),
        (("evaluate", "nowhere"), "holds no finished student"),
    ],
)
def test_wrong_input_is_told_on_standard_error_with_a_code(
    work: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = in_process.run(cli.main, "kd", arguments, work)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_wrong_input_through_the_real_command(work: Path) -> None:
    done = support.kd("train", "--teacher", "nowhere/run", cwd=work)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "kd: there is no folder nowhere/run\n"


def test_half_precision_and_another_memory_format_through_the_real_command(work: Path) -> None:
    """In a process of its own: Accelerate keeps the precision of the first training."""
    options = ("--precision", "bf16", "--channels-last", "--device", "cpu", "--out", "half")
    done = support.kd(
        "train", "digits", "--student", "convnet:8", "--epochs", 1, *options, cwd=work
    )
    assert done.returncode == 0, done.stderr
    assert read_report(work / "half")["recipe"]["precision"] == "bf16"
    stored = safetensors.numpy.load_file(work / "half" / "student.safetensors")
    assert {value.dtype for value in stored.values()} == {np.dtype(np.float32)}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_an_unwritable_folder_is_one_line(inside, work: Path) -> None:
    (work / "locked").mkdir(mode=0o500)
    with pytest.raises(SystemExit, match=r"kd: .*Permission denied"):
        main(inside, "train", *FAST, "--out", "locked/run")


def test_a_full_disk_leaves_the_last_checkpoint(inside, work: Path) -> None:

    write, calls = files.write_bytes, []

    def full(path: Path, content: bytes) -> None:
        calls.append(path.name)
        if calls.count("checkpoint.safetensors") == 3:
            raise OSError(28, "No space left on device")
        write(path, content)

    inside.setattr(files, "write_bytes", full)
    inside.setattr(
        "kd.training.saving.MAX_SECONDS_BETWEEN_CHECKPOINTS", 0.0
    )  # saved after every step
    with pytest.raises(SystemExit, match="No space left on device"):
        main(inside, "train", *FAST, "--out", "full")
    inside.setattr(files, "write_bytes", write)
    assert not list((work / "full").glob(".checkpoint*"))
    main(inside, "train", "--out", "full", "--resume")
    assert read_report(work / "full")["epochs"] == 4


def test_a_checkpoint_of_another_network_is_refused(inside, work: Path) -> None:
    for name, student in (("small", "mlp:8"), ("large", "mlp:16")):
        main(inside, "train", "digits", "--student", student, "--epochs", 1, "--out", name)
    (work / "large" / "report.json").unlink()
    shutil.copy(work / "small" / "checkpoint.safetensors", work / "large")
    with pytest.raises(SystemExit, match="the checkpoint is of another network, loss or recipe"):
        main(inside, "train", "--out", "large", "--resume")


def test_options_that_contradict_the_stored_ones_are_refused(inside, work: Path) -> None:
    folder = work / "contradict"
    shutil.copytree(work / "teacher", folder)
    (folder / "report.json").unlink()
    with pytest.raises(SystemExit, match=r"was started with --lr .*, got 3"):
        main(inside, "train", "--out", folder, "--resume", "--lr", 3)


LONG = ("--student", "mlp:64", "--epochs", "30", "--batch-size", "64", "--seed", "5")


def _kill_after_a_checkpoint(work: Path, out: str, sign: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "kd", "train", "digits", *LONG, "--out", out]
    process = subprocess.Popen(
        command, cwd=work, env=support.environment(), stderr=subprocess.PIPE, text=True
    )
    checkpoint = work / out / "checkpoint.safetensors"
    while not checkpoint.exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.005)
    process.send_signal(sign)
    process.wait()
    return process


def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(inside, work: Path) -> None:
    process = _kill_after_a_checkpoint(work, "killed", signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (work / "killed" / "report.json").exists()
    main(inside, "train", "--out", "killed", "--resume")
    main(inside, "train", "digits", *LONG, "--out", "whole")
    a, b = (
        safetensors.numpy.load_file(work / name / "student.safetensors")
        for name in ("killed", "whole")
    )
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert _figures(work / "killed") == _figures(work / "whole")


def _figures(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k != "images_per_second"} for x in lines]


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_is_one_line_and_resumable(work: Path, sign: int) -> None:
    out = f"stopped-{int(sign)}"
    process = _kill_after_a_checkpoint(work, out, sign)
    assert process.returncode == 1
    assert process.stderr is not None
    stderr = process.stderr.read()
    assert "Traceback" not in stderr
    last = stderr.strip().splitlines()[-1]
    assert last == f"kd: interrupted; continue with `kd train --resume --out {out}`"
    assert (work / out / "checkpoint.safetensors").exists()


def test_the_default_folder_is_the_next_free_one(inside, work: Path, capsys) -> None:
    for n in (1, 2):
        main(inside, "train", "three.npz", "--student", "mlp:8", "--epochs", 1)
        assert (work / "runs" / f"kd-mlp-8-three-{n}" / "report.json").exists()
    assert re.search(r"folder +runs/kd-mlp-8-three-2", capsys.readouterr().out)


@pytest.mark.fashion
def test_fashion_mnist(inside, work: Path) -> None:
    root = os.environ.get("DSDISTILL_DATA")
    if not root or not (Path(root) / "FashionMNIST").is_dir():
        pytest.skip("Fashion-MNIST is not under DSDISTILL_DATA")
    options = ("--student", "mlp:32", "--epochs", 1, "--data-root", root, "--out", "fashion")
    main(inside, "train", "fashion-mnist", *options)
    assert read_report(work / "fashion")["test_accuracy"] > 0.75
