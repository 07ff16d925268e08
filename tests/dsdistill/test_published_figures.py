"""Rows of docs/results.md, as far as they can be had in minutes: `pytest -n 0 -m slow`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsdistill.harness.data import distilled_set

pytestmark = [pytest.mark.slow, pytest.mark.fashion]


def accuracy(run: Path) -> float:
    return distilled_set.load(run / distilled_set.FILE_NAME).provenance["metrics"]["test_accuracy"]


def test_kip_on_fashion_mnist(dsdistill_process, tmp_path):
    """The reference run has 84.6 %; its accuracy varies by half a point between steps."""
    done = dsdistill_process("kip", "fashion-mnist", "--steps", 300, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert accuracy(tmp_path / "run") >= 0.84


@pytest.mark.parametrize(("images_per_class", "published"), [(10, 0.797), (50, 0.845)])
def test_label_solve_on_fashion_mnist(dsdistill_process, tmp_path, images_per_class, published):
    """Means of three draws. At one a class a draw deviates by two points: see docs/results.md."""
    for seed in range(3):
        options = ("--images-per-class", images_per_class, "--seed", seed, "--out", str(seed))
        assert dsdistill_process("ls", "fashion-mnist", *options).returncode == 0
    mean = np.mean([accuracy(tmp_path / str(seed)) for seed in range(3)])
    assert mean == pytest.approx(published, abs=0.01)


def test_kip_by_gauss_newton_on_fashion_mnist(dsdistill_process, tmp_path):
    """One image per class with the kernel of `convnet`: 76.7 % published with augmentation."""
    options = ("--kernel", "convnet", "--images-per-class", 1, "--learn-labels")
    options = (*options, "--optimizer", "gauss-newton", "--out", "run")
    done = dsdistill_process("kip", "fashion-mnist", *options, timeout=3600)
    assert done.returncode == 0, done.stderr
    assert accuracy(tmp_path / "run") >= 0.767


def test_a_step_takes_at_most_half_of_the_reference():
    script = Path(__file__).parents[2] / "benchmarks" / "kip_step.py"
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, timeout=300
    )
    assert float(done.stdout.split()[-1]) <= 0.5
