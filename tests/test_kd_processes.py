"""Two processes on loopback: the student of one process with the doubled batch, and deaths."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import kd_support as support
import numpy as np
import pytest
import safetensors.numpy


def start(cwd: Path, *arguments: object, world: int = 2) -> list[subprocess.Popen]:
    """The command in several processes, as torchrun would start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**support.environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kd", *map(str, arguments), "--device", "cpu"]
    return [
        subprocess.Popen(
            command,
            cwd=cwd,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def weights(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "student.safetensors")


def test_two_processes_give_the_student_of_one_with_the_doubled_batch(tmp_path: Path) -> None:
    """Features, projectors, mixing, accumulation and the average of the weights included."""
    common = ("train", "digits", "--student", "convnet:8", "--epochs", 2, "--lr", 0.02)
    done = support.kd(
        *("train", "digits", "--student", "convnet:8", "--epochs", 1, "--out", "teacher"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    common += ("--teacher", "teacher", "--loss", "ce:1,kd:1,fitnet:1@2", "--ema", 0.9)
    common += ("--mixup", 0.4, "--accumulate", 2)
    alone = support.kd(*common, "--batch-size", 64, "--out", "one", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    processes = start(tmp_path, *common, "--batch-size", 32, "--out", "two")
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[1][0] == ""  # the first process alone prints
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        # Sums in another order, through 42 steps: float32 rounding, grown a little.
        assert np.allclose(two[name], value, rtol=0, atol=2e-4), name


def test_the_others_stop_and_name_a_process_that_died(tmp_path: Path) -> None:
    options = ("train", "digits", "--student", "mlp:16", "--epochs", 5000, "--out", "dies")
    first, second = start(tmp_path, *options)
    deadline = time.monotonic() + 200
    while not (tmp_path / "dies" / "checkpoint.safetensors").exists():
        assert time.monotonic() < deadline
        assert first.poll() is None, first.stderr and first.stderr.read()
        time.sleep(0.05)
    second.send_signal(signal.SIGKILL)
    _, stderr = first.communicate(timeout=60)
    assert first.returncode == 1
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("kd: process 1 of 2 has died"), stderr
    assert "--resume --out dies" in last
    assert "Traceback" not in stderr


def test_several_processes_need_a_folder(tmp_path: Path) -> None:
    environment = {**support.environment(), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "kd", "train", "digits"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "several processes of one training need --out" in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs torchrun's agent")
def test_torchrun_starts_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "kd", "train", "digits", "--student", "mlp:8", "--epochs", "1"]
    command += ["--device", "cpu", "--out", "run"]
    environment = {**support.environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.json").exists()
