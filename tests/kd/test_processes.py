"""Two processes on loopback: the student of one process with the doubled batch, and deaths."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import kd_support as support
import language_support
import numpy as np
import pytest
import safetensors.numpy
import text_data
import text_support
import torch
from process_support import finish, start

LIBRARY = Path(__file__).parents[1] / "support" / "distill_in_processes.py"


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until a process that must not end has written a file."""
    deadline = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.05)


def weights(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "student.safetensors")


# Features, projectors, mixing, accumulation and the average of the weights included.
DOUBLED = ("train", "digits", "--student", "convnet:8", "--epochs", 2, "--lr", 0.02)
DOUBLED += ("--teacher", "teacher", "--loss", "ce:1,kd:1,fitnet:1@2", "--ema", 0.9)
DOUBLED += ("--mixup", 0.4, "--accumulate", 2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, and with the student of one process."""
    folder = tmp_path_factory.mktemp("processes")
    teacher = ("train", "digits", "--student", "convnet:8", "--epochs", 1, "--out", "teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        support.main(patch, *teacher, "--device", "cpu")
        support.main(patch, *DOUBLED, "--batch-size", 64, "--out", "one", "--device", "cpu")
    return folder


def same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    for name, value in one.items():
        # Sums in another order, through 42 steps: float32 rounding, grown a little.
        assert np.allclose(two[name], value, rtol=0, atol=2e-4), name


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs torchrun's agent")
def test_torchrun_starts_two_that_give_the_student_of_one_with_the_doubled_batch(
    alone: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "kd"]
    line = (*DOUBLED, "--batch-size", 32, "--out", tmp_path / "two", "--device", "cpu")
    environment = {**support.environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, line)], cwd=alone, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    folders = [x for x in done.stdout.splitlines() if x.startswith("folder ")]
    assert len(folders) == 1  # the first process alone prints
    same(weights(alone / "one"), weights(tmp_path / "two"))


def test_a_spread_student_is_that_of_one_process_with_the_doubled_batch(
    alone: Path, tmp_path: Path
) -> None:
    line = (*DOUBLED, "--batch-size", 32, "--out", tmp_path / "two")
    outputs = finish(start(alone, *line, spread=True))
    assert outputs[1][0] == ""  # the first process alone prints
    same(weights(alone / "one"), weights(tmp_path / "two"))


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path: Path) -> None:
    options = ("train", "digits", "--student", "mlp:8", "--batch-size", 32, "--epochs", 4000)
    processes = start(tmp_path, *options, "--out", "run")
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    wait_for(checkpoint, processes[0])
    before = checkpoint.stat().st_mtime_ns
    processes[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    assert checkpoint.stat().st_mtime_ns > before
    assert "kd: interrupted; continue with `kd train --resume --out run`" in errors[0]
    assert not any("Traceback" in error or "died" in error for error in errors)


def test_a_spread_student_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    """Moments of the optimizer, and a teacher that is the average of the student, included."""
    options = ("train", "digits", "--student", "convnet:4", "--batch-size", 32, "--epochs", 4)
    options += ("--mean-teacher", 0.9, "--loss", "ce:1,kd:1", "--optimizer", "adamw", "--clip", 1)
    finish(start(tmp_path, *options, "--out", "whole", spread=True))
    killed = start(tmp_path, *options, "--out", "killed", spread=True)
    wait_for(tmp_path / "killed" / "checkpoint.safetensors", killed[0])
    for process in killed:
        process.kill()
        process.communicate()
    finish(start(tmp_path, "train", "--out", "killed", "--resume", spread=True))
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_fsdp_on_one_device_is_refused(tmp_path: Path) -> None:
    """Accelerate would train without it and not say so."""
    line = ("train", "digits", "--device", "cpu", "--out", "run")
    done = support.kd(*line, cwd=tmp_path, ACCELERATE_USE_FSDP="true")
    assert done.returncode == 1
    assert done.stderr.startswith("kd: FSDP needs several GPUs, and this is 1 x cpu"), done.stderr


def test_the_others_stop_and_name_a_process_that_died(tmp_path: Path) -> None:
    options = ("train", "digits", "--student", "mlp:16", "--epochs", 5000, "--out", "dies")
    first, second = start(tmp_path, *options)
    wait_for(tmp_path / "dies" / "checkpoint.safetensors", first)
    second.send_signal(signal.SIGKILL)
    _, stderr = first.communicate(timeout=60)
    assert first.returncode == 1
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("kd: process 1 of 2 has died"), stderr
    assert "--resume --out dies" in last
    assert "Traceback" not in stderr


def test_several_processes_need_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = support.refused(monkeypatch, "train", "digits")
    assert "several processes of one training need --out" in line


@pytest.mark.parametrize("how", ["shared", "sampled", "prepared"])
def test_the_library_in_two_processes_trains_the_student_of_one(tmp_path: Path, how: str) -> None:
    """They share each batch, or have their own from a DistributedSampler or Accelerate's loader."""
    folders = tmp_path / "one", tmp_path / "two"
    for folder, world in zip(folders, (1, 2), strict=True):
        folder.mkdir()
        finish(start(tmp_path, folder, how, world=world, script=LIBRARY))
    (alone, rounds), (first, calls), (second, none) = (
        torch.load(path) for path in (folders[0] / "0.pt", folders[1] / "0.pt", folders[1] / "1.pt")
    )
    assert (rounds, calls, none) == (2, 2, 0)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)


# Answers of texts and of tokens, layers with their projectors, an average of the weights.
TEXTS = {
    "classify": ("one", "--loss", "ce:1,kd:1,hidden:1", "--ema", 0.9, "--accumulate", 2),
    "causal": ("prompt", "--task", "causal", "--loss", "clm:1,tokens:1:temperature=1"),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, with models of no dropout, and with the students of one process."""
    folder = tmp_path_factory.mktemp("texts")
    text_data.write_all(folder)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    names = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    for seed, name in enumerate(("student", "teacher")):
        text_support.bert_folder(
            folder / "classify" / name, "ForSequenceClassification", seed=seed, **names, **still
        )
        tokenizer = language_support.characters("abcdefghij ")
        model = language_support.causal_model(tokenizer, seed=seed, positions=48)
        model.network.save_pretrained(folder / "causal" / name)
        tokenizer.save_pretrained(folder / "causal" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for task in TEXTS:
            line = (*text_line(task), "--batch-size", 16, "--out", f"{task}-one")
            support.main(patch, *line, "--device", "cpu")
    return folder


def text_line(task: str) -> tuple[object, ...]:
    data, *options = TEXTS[task]
    models = ("--student", f"hf:{task}/student", "--teacher", f"hf:{task}/teacher")
    return ("train", data, *models, *options, "--epochs", 1, "--lr", 0.001)


@pytest.mark.parametrize(("task", "spread"), [("classify", True), ("causal", False)])
def test_a_student_of_texts_is_that_of_one_process_with_the_doubled_batch(
    texts: Path, tmp_path: Path, task: str, spread: bool
) -> None:
    line = (*text_line(task), "--batch-size", 8, "--out", tmp_path / "two")
    outputs = finish(start(texts, *line, spread=spread))
    assert outputs[1][0] == ""  # the first process alone prints
    same(weights(texts / f"{task}-one"), weights(tmp_path / "two"))
