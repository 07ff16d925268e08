"""More epochs after the end of a run, or before it."""

import json
import os
from pathlib import Path

import kd_support as support
import numpy as np
import pytest
import safetensors.numpy
from kd_support import main, read_report, refused, stop_in

from kd.runs import finished_runs

LINE = ("train", "data.npz", "--student", "mlp:8", "--batch-size", 16)
MORE = ("train", "--resume", "--out", "run")


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)
    support.write_npz(tmp_path / "data.npz")
    return monkeypatch


def rows(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def weights(folder: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(Path(folder) / "student.safetensors")


def same(one: str, other: str) -> bool:
    a, b = weights(one), weights(other)
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_a_finished_run_goes_on_and_stays_whole_until_the_end(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in ("run", "uninterrupted"):
        main(inside, *LINE, "--epochs", 2, "--out", out)
    before = {path.name: path.read_bytes() for path in Path("run").glob("*.json*")}
    step = read_report(Path("run"))["steps"]
    capsys.readouterr()
    stop_in(inside, step + 2, *MORE, "--epochs", 4)
    said = capsys.readouterr().err
    assert f"run goes on from step {step} of {2 * step}: the learning rate is from here on" in said
    for name, content in before.items():
        assert Path("run", name).read_bytes() == content
    main(inside, "evaluate", "run")
    main(inside, *MORE)
    main(inside, "train", "--resume", "--out", "uninterrupted", "--epochs", 4)
    assert same("run", "uninterrupted")
    assert not Path("run/continued").exists()
    assert read_report(Path("run"))["epochs"] == 4
    main(inside, "evaluate", "run")  # its checksums hold
    assert [row["step"] for row in rows("run")] == [step // 2 * i for i in (1, 2, 3, 4)]
    command = finished_runs.read(Path("run")).command
    first, second = command.split(" && ")
    assert " --epochs 2 " in first
    assert first.endswith(" --out run")
    assert second == f"kd train --resume --epochs 4 --out run  # at step {step}"
    assert "nothing to resume" in refused(inside, *MORE)
    assert "nothing to resume" in refused(inside, *MORE, "--epochs", 4)


def test_the_learning_rate_is_that_of_the_new_length(inside: pytest.MonkeyPatch) -> None:
    main(inside, *LINE, "--epochs", 2, "--out", "run")
    main(inside, *LINE, "--epochs", 4, "--out", "straight")
    main(inside, *MORE, "--epochs", 4)
    rates, expected = ([row["lr"] for row in rows(folder)] for folder in ("run", "straight"))
    assert rates[1] < expected[1]
    assert rates[2:] == expected[2:]


def test_an_unfinished_run_takes_another_length(inside: pytest.MonkeyPatch) -> None:
    stop_in(inside, 5, *LINE, "--epochs", 3, "--out", "run")
    stop_in(inside, 9, *MORE, "--epochs", 6)
    main(inside, *MORE)  # the new length is stored
    assert read_report(Path("run"))["epochs"] == 6
    assert "# at step 5" in finished_runs.read(Path("run")).command
    stop_in(inside, 9, *LINE, "--epochs", 6, "--out", "shorter")
    main(inside, "train", "--resume", "--out", "shorter", "--epochs", 3)
    assert read_report(Path("shorter"))["epochs"] == 3


def test_patience_that_has_ended_a_run_can_be_raised(inside: pytest.MonkeyPatch) -> None:
    main(inside, *LINE, "--epochs", 9, "--lr", 1e-9, "--patience", 2, "--out", "run")
    assert read_report(Path("run"))["epochs"] == 3
    assert "give a larger --patience" in refused(inside, *MORE, "--patience", 1)
    main(inside, *MORE, "--patience", 4)
    assert read_report(Path("run"))["epochs"] == 5
    main(inside, *MORE, "--epochs", 12)  # patience begins anew
    assert read_report(Path("run"))["epochs"] == 9


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--epochs", 1), "has taken 10 steps, 2 epochs, and --epochs 1 is not more"),
        (("--steps", 7), "and --steps 7 is not more"),
        (("--epochs", 0), "must be at least 1"),
        (("--lr", 1), "the run was started with --lr None, got 1.0"),
        (("--epochs", 3, "--steps", 30), "give one of them"),
    ],
)
def test_what_leaves_nothing_to_train_is_refused_and_changes_nothing(
    inside: pytest.MonkeyPatch, option: tuple, words: str
) -> None:
    main(inside, *LINE, "--epochs", 2, "--out", "run")
    names = sorted(path.name for path in Path("run").iterdir())
    assert words in refused(inside, *MORE, *option)
    assert sorted(path.name for path in Path("run").iterdir()) == names
    finished_runs.read(Path("run"))


def test_a_run_without_checkpoint_and_a_chain_are_refused(inside: pytest.MonkeyPatch) -> None:
    main(inside, *LINE, "--epochs", 2, "--generations", 2, "--out", "run")
    assert "last of a chain" in refused(inside, *MORE, "--epochs", 4)
    main(inside, "train", "--resume", "--out", "run-1", "--epochs", 3)
    Path("run-1/checkpoint.safetensors").unlink()
    line = refused(inside, "train", "--resume", "--out", "run-1", "--epochs", 4)
    assert "run-1 has no checkpoint.safetensors" in line


@pytest.mark.parametrize("moved", [0, 3, 7])
def test_a_kill_while_files_are_replaced_is_mended(inside: pytest.MonkeyPatch, moved: int) -> None:
    main(inside, *LINE, "--epochs", 2, "--out", "run")
    count, replace = 0, os.replace

    class Killed(Exception):
        """Stands for a kill."""

    def replace_some(source: str | Path, target: str | Path) -> None:
        nonlocal count
        if Path(source).parent.name == "continued" and Path(target).parent.name == "run":
            count += 1
            if count > moved:
                raise Killed
        replace(source, target)

    with inside.context() as patch:
        patch.setattr(os, "replace", replace_some)
        with pytest.raises(Killed):
            main(patch, *MORE, "--epochs", 3)
    assert "finish that first" in refused(inside, *MORE, "--epochs", 5)
    main(inside, *MORE)
    assert finished_runs.read(Path("run")).report["epochs"] == 3
    assert not Path("run/continued").exists()
    main(inside, *MORE, "--epochs", 5)
