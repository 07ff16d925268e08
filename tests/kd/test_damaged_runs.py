"""Damaged files of a run's folder: one line wherever they are read, and never another result."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from kd_support import main, refused, stop_in

from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import run_folder
from kd.models import saved_models, seals
from kd.runs import finished_runs

QUICK = ("--student", "mlp:8", "--epochs", 2, "--batch-size", 64)
FLIPS = 60  # of each file


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, of another seed, two of them quantised, and one that was stopped."""
    folder = tmp_path_factory.mktemp("damage")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("kd.runs.curves.draw", lambda folder: None)  # as long as the training itself
        for seed, out in ((0, "whole"), (1, "other")):
            options = ("--preprocess", "zca", "--centred", "--seed", seed, "--out", out)
            main(patch, "train", "digits", *QUICK, *options)
            main(patch, "train", "digits", *QUICK, "--seed", seed, "--out", f"{out}-float")
            main(patch, "quantize", f"{out}-float", "--bits", "w8a8", "--out", f"{out}-quantised")
        stop_in(patch, 30, "train", "digits", *QUICK, "--preprocess", "zca", "--out", "stopped")
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(work)
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)
    shutil.rmtree("run", ignore_errors=True)
    return monkeypatch


def runs_with(name: str) -> tuple[str, str]:
    """Folders of two finished runs that have a file of this name."""
    ending = "-quantised" if name == seals.QUANTISERS else ""
    return f"whole{ending}", f"other{ending}"


def flipped(content: bytes, count: int, seed: int) -> list[bytes]:
    """The content with one bit turned over, at places all over it."""
    rng, found = np.random.default_rng(seed), []
    for place in np.linspace(0, len(content) - 1, count).astype(int):
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        found.append(bytes(changed))
    return found


def read_all(folder: Path) -> None:
    """All that `kd` reads of a finished run."""
    saved_models.load_run(folder)
    finished_runs.read(folder)
    seals.read(folder, "recipe.json")


@pytest.mark.parametrize("name", [*seals.SEALED_FILES, seals.REPORT])
def test_a_bit_that_flips_in_a_finished_run_is_one_line(
    inside: pytest.MonkeyPatch, name: str
) -> None:
    path = Path("run") / name
    shutil.copytree(runs_with(name)[0], "run")
    read_all(path.parent)
    content, plain = path.read_bytes(), name in (seals.CARD, seals.REPORT)
    for changed in (*flipped(content, FLIPS, 0), content[: len(content) // 2], b""):
        path.write_bytes(changed)
        if plain and _same_json(changed, content):
            continue  # a blank has become another, which changes nothing
        with pytest.raises(UserError) as refusal:
            read_all(path.parent)
        assert name in str(refusal.value)
        assert "\n" not in str(refusal.value)
    path.unlink()
    with pytest.raises(UserError):
        read_all(path.parent)


def _same_json(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


@pytest.mark.parametrize("name", [*seals.SEALED_FILES, seals.REPORT])
def test_a_file_of_another_run_is_refused(inside: pytest.MonkeyPatch, name: str) -> None:
    whole, other = map(Path, runs_with(name))
    shutil.copytree(whole, "run")
    if (other / name).read_bytes() == (whole / name).read_bytes():
        return  # the recipe is the same
    shutil.copy(other / name, Path("run") / name)
    with pytest.raises(UserError, match="damaged or of another run"):
        read_all(Path("run"))


def test_weights_and_their_description_are_checked_without_the_rest(
    inside: pytest.MonkeyPatch,
) -> None:
    Path("run").mkdir()
    for name in (seals.CARD, *seals.ARRAY_FILES):
        if name != seals.QUANTISERS:
            shutil.copy(Path("whole") / name, "run")
    saved_models.load_run(Path("run"))
    shutil.copy(Path("other") / seals.WEIGHTS, "run")
    with pytest.raises(UserError, match=r"student\.safetensors is damaged or of another run"):
        saved_models.load_run(Path("run"))


def test_every_command_says_so_in_one_line(inside: pytest.MonkeyPatch) -> None:
    shutil.copytree("whole", "run")
    path = Path("run/student.safetensors")
    path.write_bytes(flipped(path.read_bytes(), 3, 1)[1])
    for arguments in (
        ("evaluate", "run"),
        ("export", "run", "--format", "safetensors", "--out", "out"),
        ("train", "digits", *QUICK, "--teacher", "run", "--out", "never"),
        ("train", "digits", "--student", "run", "--epochs", 1, "--out", "never"),
        ("train", "digits", "--student", "mlp:8@run/student.safetensors", "--out", "never"),
    ):
        assert "student.safetensors is damaged" in refused(inside, *arguments)
    assert not Path("never").exists()
    (Path("run") / "metrics.jsonl").write_text("{}\n")
    assert "metrics.jsonl is damaged" in refused(inside, "report", "run")


def test_a_damaged_checkpoint_is_one_line_and_never_another_student(
    inside: pytest.MonkeyPatch,
) -> None:
    path = Path("run/checkpoint.safetensors")
    content = Path("stopped/checkpoint.safetensors").read_bytes()
    for changed in (*flipped(content, 12, 2), content[:100], content[:-1], b""):
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree("stopped", "run")
        path.write_bytes(changed)
        assert "checkpoint.safetensors is damaged" in refused(
            inside, "train", "--out", "run", "--resume"
        )


def test_a_checkpoint_of_something_else_is_one_line(inside: pytest.MonkeyPatch) -> None:
    shutil.copytree("stopped", "run")
    with safetensors.safe_open("run/checkpoint.safetensors", framework="numpy") as file:
        meta = json.loads(file.metadata()["meta"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    run = run_folder.Run(Path("run"), {}, True)
    for change, message in (
        ({"step": None}, "not of `kd train`"),
        ({"meter": {"ce": "x"}}, "not of `kd train`"),
        ({"recipe": {**meta["recipe"], "lr": 9.0}}, "made with lr 9.0"),
        ({"optimizer": 3}, "of another network, loss or recipe"),
        ({"kept": [3]}, "of another network, loss or recipe"),
    ):
        run.save_state(arrays, {**meta, **change})
        assert message in refused(inside, "train", "--out", "run", "--resume")
    run.save_state(arrays, {"done": 3})  # of KIP
    assert "not of `kd train`" in refused(inside, "train", "--out", "run", "--resume")


def test_a_run_of_an_earlier_version_is_read(inside: pytest.MonkeyPatch) -> None:
    shutil.copytree("whole", "run")
    for name in (seals.CARD, seals.REPORT):
        path = Path("run") / name
        content = json.loads(path.read_text())
        del content[seals.CHECKSUMS_KEY]
        path.write_text(json.dumps(content))
    read_all(Path("run"))
    # But not a new one that has lost them.
    shutil.copy(Path("whole") / seals.CARD, "run")
    with pytest.raises(UserError, match="has lost its checksums"):
        read_all(Path("run"))


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3},
        {"name": "mlp:-1"},
        {"classes": 7},
        {"input": {"shape": [8, 8]}},
        {"input": {"shape": "x"}},
        {"preprocess": {"kind": "standardise", "mean": "x", "std": [1], "contrast": 0}},
        {"output_temperature": "warm"},
        {"config": 3, "name": "timm:test_resnet"},
    ],
)
def test_a_description_that_is_odd_but_signed_is_one_line(
    inside: pytest.MonkeyPatch, change: dict
) -> None:
    shutil.copytree("whole", "run", ignore=shutil.ignore_patterns("report.json"))
    content = json.loads(Path("run/model.json").read_text())
    seals.write(Path("run"), seals.CARD, content | change, (seals.WEIGHTS, seals.WHITENING))
    with pytest.raises(UserError) as refusal:
        saved_models.load_run(Path("run"))
    assert "\n" not in str(refusal.value)
