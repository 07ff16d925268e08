"""A training that was stopped: what is kept, and what it may go on with."""

import json
import shutil
import signal
import time
from pathlib import Path

import kd_support as support
import numpy as np
import pytest
import safetensors.numpy
from kd_support import main, refused, stop_in
from PIL import Image

from dsdistill.harness.data import distilled_set
from kd.parallel import engine
from kd.training import saving

QUICK = ("--student", "mlp:8", "--epochs", 12, "--batch-size", 64)


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "kd.runs.curves.draw", lambda folder: None
    )  # as long as the training itself
    return monkeypatch


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The student of a training that nothing stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        main(patch, "train", "digits", *QUICK, "--out", "whole")
        return weights("whole")


def checkpoint_step(folder: Path) -> int:
    with safetensors.safe_open(folder / "checkpoint.safetensors", framework="numpy") as file:
        return json.loads(file.metadata()["meta"])["step"]


def weights(folder: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(Path(folder) / "student.safetensors")


def pictures(folder: Path, classes: tuple[str, ...] = ("cat", "dog", "owl"), n: int = 12) -> Path:
    """Small grey pictures of classes that differ in their brightness."""
    rng = np.random.default_rng(0)
    for level, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(60 * level, 60 * level + 90, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03}.png")
    return folder


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_followed_after_the_step_and_loses_nothing(
    inside: pytest.MonkeyPatch,
    tmp_path: Path,
    whole: dict[str, np.ndarray],
    sign: signal.Signals,
) -> None:
    inside.setattr("kd.training.saving.SECONDS_TO_FIRST_CHECKPOINT", 1e9)
    said = stop_in(inside, 7, "train", "digits", *QUICK, "--out", "stopped", sign=sign)
    assert said == "kd: interrupted; continue with `kd train --resume --out stopped`"
    assert checkpoint_step(tmp_path / "stopped") == 7  # in the first epoch, of 21 steps
    main(inside, "train", "--out", "stopped", "--resume")
    resumed = weights("stopped")
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_a_training_is_saved_before_its_first_round_and_as_often_as_it_is_cheap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    decide = saving.SavePolicy(engine.make(), lambda: False)
    assert not decide.decide(round_over=False).save
    now = saving.SECONDS_TO_FIRST_CHECKPOINT
    assert decide.decide(round_over=False) == (True, False)
    decide.record_save(0.001)
    now += 0.04
    assert not decide.decide(round_over=True).save  # it would take more than a fiftieth
    now += 0.02
    assert decide.decide(round_over=True).save
    assert not decide.decide(round_over=False).save
    now += saving.MIN_SECONDS_BETWEEN_CHECKPOINTS
    assert decide.decide(round_over=False).save
    decide.record_save(100.0)  # of a network so large that saving takes minutes
    now += saving.MAX_SECONDS_BETWEEN_CHECKPOINTS - 1
    assert not decide.decide(round_over=True).save
    now += 2
    assert decide.decide(round_over=False).save


def _npz(path: str, change: str | None = None) -> None:
    """Data of which one thing is changed."""
    support.write_npz(Path(path))
    with np.load(path) as stored:
        images, labels = stored["images"].copy(), stored["labels"].copy()
    if change == "images":
        images[5] = 255 - images[5]
    elif change == "labels":
        labels[[0, 1]] = labels[[1, 0]]
    elif change == "number":
        images, labels = images[:-3], labels[:-3]
    np.savez(path, images=images, labels=labels)


@pytest.mark.parametrize("change", ["images", "labels", "number"])
def test_a_resume_onto_changed_data_is_refused(inside: pytest.MonkeyPatch, change: str) -> None:
    _npz("data.npz")
    stop_in(inside, 5, "train", "data.npz", *QUICK, "--out", "run")
    _npz("data.npz", change)
    line = refused(inside, "train", "--out", "run", "--resume")
    assert "changed since the run run was started" in line
    _npz("data.npz")  # put back, it goes on
    main(inside, "train", "--out", "run", "--resume")


def test_a_resume_with_another_teacher_is_refused(inside: pytest.MonkeyPatch) -> None:
    for seed, out in ((0, "teacher"), (1, "other")):
        main(inside, "train", "digits", *QUICK, "--epochs", 1, "--seed", seed, "--out", out)
    stop_in(inside, 5, "train", "digits", *QUICK, "--teacher", "teacher", "--out", "run")
    shutil.copytree("teacher", "kept")
    shutil.rmtree("teacher")
    shutil.copytree("other", "teacher")
    line = refused(inside, "train", "--out", "run", "--resume")
    assert "was started: the teacher " in line
    shutil.rmtree("teacher")
    shutil.copytree("kept", "teacher")
    main(inside, "train", "--out", "run", "--resume")


def test_a_resume_with_another_start_of_the_student_is_refused(
    inside: pytest.MonkeyPatch,
) -> None:
    for seed, out in ((0, "first"), (1, "other")):
        main(inside, "train", "digits", *QUICK, "--epochs", 1, "--seed", seed, "--out", out)
    shutil.copy("first/student.safetensors", "start.safetensors")
    options = ("--student", "mlp:8@start.safetensors", "--epochs", 3, "--out", "run")
    stop_in(inside, 5, "train", "digits", *options)
    shutil.copy("other/student.safetensors", "start.safetensors")
    assert "the student's first weights" in refused(inside, "train", "--out", "run", "--resume")


def test_a_resume_with_another_distilled_set_or_class_map_is_refused(
    inside: pytest.MonkeyPatch,
) -> None:
    splits = support.digits()
    found = support.distilled(splits)
    distilled_set.save(Path("set.safetensors"), found)
    options = ("--student", "mlp:8", "--epochs", 30, "--out", "run")
    stop_in(inside, 5, "train", "set.safetensors", *options)
    labels = found.labels.copy()
    labels[0] = labels[-1]  # the images are the same
    changed = distilled_set.DistilledSet(
        found.images, labels, found.preprocess, found.classes, found.provenance
    )
    distilled_set.save(Path("set.safetensors"), changed)
    assert "distilled set" in refused(inside, "train", "--out", "run", "--resume")

    main(inside, "train", "digits", *QUICK, "--epochs", 1, "--out", "teacher")
    own = {str(i): i for i in range(10)}
    Path("map.json").write_text(json.dumps(own))
    options = ("--teacher", "teacher", "--class-map", "map.json", "--out", "mapped")
    stop_in(inside, 5, "train", "digits", *QUICK, *options)
    Path("map.json").write_text(json.dumps(own | {"0": 1, "1": 0}))
    line = refused(inside, "train", "--out", "mapped", "--resume")
    assert "class map" in line or "the teacher" in line


def test_a_resume_onto_changed_files_is_refused(inside: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pictures(tmp_path / "data")
    options = ("--student", "test_resnet", "--augment", "imagenet", "--image-size", 32)
    options += ("--workers", 0, "--epochs", 2, "--batch-size", 8, "--out", "run")
    stop_in(inside, 2, "train", "data", *options)
    first = next((tmp_path / "data" / "cat").iterdir())
    shutil.copy(next((tmp_path / "data" / "owl").iterdir()), first)
    assert "images (SHA-256" in refused(inside, "train", "--out", "run", "--resume")


def test_a_chain_goes_on_from_the_same_data_and_links_alone(inside: pytest.MonkeyPatch) -> None:
    _npz("data.npz")
    line = ("train", "data.npz", *QUICK, "--epochs", 2, "--generations", 2, "--out", "run")

    class Killed(Exception):
        """Stands for a kill between two links."""

    def killed(*_: object) -> None:
        raise Killed

    with inside.context() as patch:
        patch.setattr("kd.runs.curves.draw", killed)  # the last thing that the first link does
        with pytest.raises(Killed):
            main(patch, *line)
    assert Path("run-1/report.json").exists()
    assert not Path("run/config.json").exists()
    _npz("data.npz", "images")
    assert "run-1 was trained on other test images" in refused(inside, *line)
    _npz("data.npz")
    main(inside, *line)


def test_options_that_are_damaged_are_refused(inside: pytest.MonkeyPatch) -> None:
    stop_in(inside, 5, "train", "digits", *QUICK, "--out", "run")
    path = Path("run/config.json")
    whole = path.read_text()
    for old, new in (('"epochs": 12', '"epochs": 14'), ('"epochs": 12', '"epochs": "x"')):
        assert old in whole
        path.write_text(whole.replace(old, new))
        line = refused(inside, "train", "--out", "run", "--resume")
        assert "config.json is damaged" in line
    path.write_text(whole[:40])
    assert "cannot read" in refused(inside, "train", "--out", "run", "--resume")
    path.write_text("[]")
    assert "damaged" in refused(inside, "train", "--out", "run", "--resume")


def test_the_folder_of_another_command_is_refused(inside: pytest.MonkeyPatch) -> None:
    Path("kip").mkdir()
    Path("kip/config.json").write_text('{"command": "kip", "data": "digits", "steps": 3}')
    assert "of another command" in refused(inside, "train", "--out", "kip", "--resume")


def test_a_run_of_an_earlier_version_goes_on(
    inside: pytest.MonkeyPatch, whole: dict[str, np.ndarray]
) -> None:
    """Without hashes, checksums, the recipe in the checkpoint, and the newest options."""
    stop_in(inside, 5, "train", "digits", *QUICK, "--out", "run")
    path = Path("run/config.json")
    config = json.loads(path.read_text())
    for name in ("inputs", "validate_every", "patience"):
        config.pop(name)
    path.write_text(json.dumps(config))
    state = Path("run/checkpoint.safetensors")
    with safetensors.safe_open(state, framework="numpy") as file:
        meta = json.loads(file.metadata()["meta"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in ("recipe", "stale"):
        meta.pop(name)
    safetensors.numpy.save_file(arrays, state, {"meta": json.dumps(meta)})
    main(inside, "train", "--out", "run", "--resume")
    resumed = weights("run")
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_patience_survives_a_stop(inside: pytest.MonkeyPatch, capsys) -> None:
    """A rate of nearly zero: nothing gets better, and the fourth validation is the last."""
    options = ("digits", *QUICK, "--lr", 1e-9, "--patience", 3)
    stop_in(inside, 50, "train", *options, "--out", "stopped")  # after two of them
    main(inside, "train", "--out", "stopped", "--resume")
    assert (
        "stopped at step 84 of 252: no better validation accuracy in 3" in capsys.readouterr().err
    )
    assert json.loads(Path("stopped/report.json").read_text())["epochs"] == 4
    main(inside, "train", *options, "--out", "whole")
    whole, resumed = weights("whole"), weights("stopped")
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)
