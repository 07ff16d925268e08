"""What several tests of `kd` need."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsdistill.harness.data import datasets, distilled_set, labeled_images, preprocess
from dsdistill.harness.data.datasets import Splits
from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from kd import cli
from kd.training import steps


def kd(*arguments: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The real command line, in its own process, with more variables in its environment."""
    command = [sys.executable, "-m", "kd", *map(str, arguments)]
    env = environment() | variables
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env)


def main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """The command in this process, where importing torch costs nothing more."""
    monkeypatch.setattr(sys, "argv", ["kd", *map(str, arguments)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)


def read_report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def refused(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """What the command says, in one line, to input that it refuses."""
    with pytest.raises(SystemExit) as stopped:
        main(monkeypatch, *arguments)
    line = str(stopped.value.code)
    assert line.startswith("kd: ")
    assert "\n" not in line
    return line


def stop_in(
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    *arguments: object,
    sign: signal.Signals = signal.SIGTERM,
) -> str:
    """What the command says when a signal reaches it in the middle of that step."""
    update = steps.Trainer.update

    def signalled(loop: steps.Trainer, number: int, *rest: object) -> object:
        if number + 1 == step:
            os.kill(os.getpid(), sign)
        return update(loop, number, *rest)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(steps.Trainer, "update", signalled)
        return refused(patch, *arguments)


def environment() -> dict[str, str]:
    """Lets a process in another folder import the packages, and never wait for a network."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def digits() -> Splits:
    return datasets.load("digits", root=Path("unused"))


def write_npz(path: Path, *, classes: int = 3, size: int = 8, n: int = 90) -> Path:
    """Small images that a linear model can tell apart: class i has a bright row i."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % classes
    images = rng.integers(0, 100, (n, size, size, 1), dtype=np.uint8)
    images[np.arange(n), labels] = 255
    np.savez(path, images=images, labels=labels)
    return path


def distilled(splits: Splits, **provenance: object) -> distilled_set.DistilledSet:
    """A distilled set of five real images a class, as `dsdistill` would write it."""
    fitted = preprocess.fit("standardise", splits.train.chunks, splits.train.shape)
    chosen = labeled_images.draw_per_class(splits.train, 5, np.random.default_rng(0))
    data = splits.train.select(chosen)
    came_from = {"source": splits.name, "sha256": splits.digest}
    return distilled_set.DistilledSet(
        fitted.apply(data.images()),
        labeled_images.centred_one_hot(data.labels, len(data.classes)),
        fitted,
        data.classes,
        {"data": came_from, "config": {"image_size": None, "validation_fraction": 0.1}}
        | provenance,
    )


def easy(n: int = 40, classes: int = 4, size: int = 8) -> Examples:
    """Images whose class is which row is bright, without preprocessing."""
    rng = np.random.default_rng(1)
    labels = np.arange(n) % classes
    images = rng.random((n, size, size, 1), dtype=np.float32) * 0.3
    images[np.arange(n), labels] += 0.7
    names = tuple(f"class {i}" for i in range(classes))
    return Examples(LabeledImages(images, labels, names), preprocess.identity(1))
