"""Run folders: start and resume, metrics that survive a kill, TensorBoard without TensorFlow."""

import json
import os
import sys
import types
from dataclasses import replace

import numpy as np
import pytest

from dsdistill.harness import runs
from dsdistill.harness.runs import Metrics, RunError

DEFAULTS = {"steps": 1000, "ridge": 1e-6, "data_root": None, "sizes": (1, 2)}


def _start(folder, *, resume=False, **options):
    return runs.start(
        folder,
        DEFAULTS | options,
        result="distilled.safetensors",
        resume=resume,
        defaults=DEFAULTS,
        free=("data_root",),
    )


def test_start_creates_the_folder_and_stores_the_options(tmp_path):
    run = _start(tmp_path / "a" / "b", steps=5)
    assert not run.resumed
    assert run.config["steps"] == 5
    assert runs.read_json(tmp_path / "a" / "b" / "config.json") == run.config
    assert run.load_state() is None


def test_a_run_withdrawn_before_it_began_frees_its_folder(tmp_path):
    run = _start(tmp_path / "a")
    Metrics(run.folder).close()
    run.withdraw()
    assert not run.folder.exists()


def test_withdrawing_takes_nothing_else(tmp_path):
    (tmp_path / ".mine").write_text("mine")
    _start(tmp_path).withdraw()
    assert [path.name for path in tmp_path.iterdir()] == [".mine"]


@pytest.mark.parametrize("begun", ["figures", "state", "resumed", "another host"])
def test_a_run_that_began_is_not_withdrawn(tmp_path, begun):
    run = _start(tmp_path)
    if begun == "figures":
        with Metrics(tmp_path) as metrics:
            metrics.write(1, loss=0.5)
    if begun == "state":
        run.save_state({"a": np.zeros(1)}, {})
    if begun == "resumed":
        run.close()
        run = _start(tmp_path, resume=True)
    if begun == "another host":
        run = replace(run, writes=False)
    before = sorted(tmp_path.iterdir())
    run.withdraw()
    assert sorted(tmp_path.iterdir()) == before


def test_start_accepts_an_empty_folder_and_what_a_killed_start_left(tmp_path):
    (tmp_path / ".config.json.x1y2").write_text("{")
    assert not _start(tmp_path).resumed


def test_start_refuses_a_run_a_finished_run_a_file_and_a_foreign_folder(tmp_path):
    _start(tmp_path / "run")
    with pytest.raises(RunError, match="already holds a run: add --resume"):
        _start(tmp_path / "run")
    (tmp_path / "run" / "distilled.safetensors").touch()
    with pytest.raises(RunError, match="already holds a finished run"):
        _start(tmp_path / "run")
    with pytest.raises(RunError, match="nothing to resume"):
        _start(tmp_path / "run", resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is a file"):
        _start(tmp_path / "file")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    for resume in (False, True):
        with pytest.raises(RunError, match="holds no run"):
            _start(tmp_path / "photos", resume=resume)
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_check_free_creates_nothing(tmp_path):
    runs.check_free(tmp_path / "new", "distilled.safetensors")
    assert not (tmp_path / "new").exists()
    _start(tmp_path / "run")
    with pytest.raises(RunError, match="already holds a run"):
        runs.check_free(tmp_path / "run", "distilled.safetensors")


def test_resume_refuses_a_folder_without_a_run(tmp_path):
    with pytest.raises(RunError, match="holds no run to resume"):
        _start(tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()


def test_resume_keeps_the_stored_options(tmp_path):
    with _start(tmp_path, steps=5, sizes=(3, 4)) as first:
        pass
    with _start(tmp_path, resume=True, data_root="/elsewhere") as run:
        pass
    assert run.resumed
    assert run.config == first.config | {"data_root": "/elsewhere"}
    # A tuple comes back from JSON as a list; saying it again is no contradiction.
    assert _start(tmp_path, resume=True, sizes=(3, 4)).config["sizes"] == [3, 4]
    with pytest.raises(RunError, match="started with --steps 5, got 7"):
        _start(tmp_path, resume=True, steps=7)


@pytest.mark.parametrize("text", ["", '{"steps": ', "[1]", "\0\0"])
def test_a_damaged_config_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError, match=r"config\.json") as caught:
        _start(tmp_path, resume=True)
    assert "\n" not in str(caught.value)


def test_a_choice_is_made_once_and_stands_in_the_config(tmp_path):
    with _start(tmp_path, steps=5) as run:
        assert run.recorded("batch", lambda: 480) == 480
        assert run.recorded("batch", lambda: pytest.fail("chosen twice")) == 480
    again = _start(tmp_path, resume=True)
    assert again.recorded("batch", lambda: pytest.fail("chosen twice")) == 480
    assert again.recorded("other", lambda: [1]) == [1]
    stored = runs.read_json(tmp_path / "config.json")
    assert stored["chosen"] == {"batch": 480, "other": [1]}
    assert stored["steps"] == 5


def test_next_free(tmp_path):
    assert runs.next_free("kip-digits", tmp_path) == tmp_path / "kip-digits-1"
    (tmp_path / "kip-digits-1").mkdir()
    assert runs.next_free("kip-digits", tmp_path) == tmp_path / "kip-digits-2"


def test_state_comes_back_to_the_bit(tmp_path):
    run = _start(tmp_path)
    arrays = {
        "support": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)[:, ::2],
        "count": np.array(7, np.int32),  # optax counts steps in a scalar
        "key": np.array([1, 2**32 - 1], np.uint32),
        "mask": np.array([True, False]),
        "none": np.empty((0, 3)),
    }
    run.save_state(arrays, {"step": 7, "best": 0.1 + 0.2})
    state = run.load_state()
    assert state is not None
    got, meta = state
    assert meta == {"step": 7, "best": 0.1 + 0.2}
    assert got.keys() == arrays.keys()
    for name, array in arrays.items():
        assert got[name].dtype == array.dtype
        assert got[name].shape == array.shape
        np.testing.assert_array_equal(got[name], array)


@pytest.mark.parametrize("kept", [0, 5, 20, -1])
def test_a_damaged_checkpoint_is_one_line(tmp_path, kept):
    run = _start(tmp_path)
    run.save_state({"a": np.zeros(3)}, {})
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(RunError, match="damaged"):
        run.load_state()


def test_a_failed_checkpoint_leaves_the_last_one(tmp_path, monkeypatch):
    run = _start(tmp_path)
    run.save_state({"a": np.zeros(3)}, {"step": 1})
    before = sorted(p.name for p in tmp_path.iterdir())

    def fail(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        run.save_state({"a": np.ones(3)}, {"step": 2})
    state = run.load_state()
    assert state is not None
    assert state[1] == {"step": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_json_has_null_for_nan(tmp_path):
    runs.write_json(tmp_path / "a", {"x": [float("nan"), (1.5, float("inf"))], "y": "é"})
    assert runs.read_json(tmp_path / "a") == {"x": [None, [1.5, None]], "y": "é"}


def _lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_can_be_followed_while_they_are_written(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.write(1, loss=0.5, epoch=1)
        metrics.write(2, loss=float("nan"))
        assert _lines(tmp_path) == [{"step": 1, "loss": 0.5, "epoch": 1}, {"step": 2, "loss": None}]


def test_resumed_metrics_equal_uninterrupted_ones(tmp_path):
    for name, stop in (("whole", 6), ("cut", 5)):
        (tmp_path / name).mkdir()
        with Metrics(tmp_path / name) as metrics:
            for step in range(stop):
                metrics.write(step, loss=1 / (step + 1))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed here; the checkpoint is that of step 2
    with Metrics(tmp_path / "cut", resume_from=2) as metrics:
        for step in range(3, 6):
            metrics.write(step, loss=1 / (step + 1))
    files = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("cut", "whole")]
    assert files[0] == files[1]


def test_resume_before_the_first_line(tmp_path):
    with Metrics(tmp_path, resume_from=0) as metrics:
        metrics.write(1, loss=1.0)
    assert _lines(tmp_path) == [{"step": 1, "loss": 1.0}]


@pytest.fixture
def without_tensorflow(monkeypatch):
    """TensorBoard asks for this module, and if it is there, uses its own stub of TensorFlow."""
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("notf"))


def test_tensorboard_reads_the_events(tmp_path, without_tensorflow):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(tmp_path) as metrics:
        for step in range(5):
            metrics.write(step, loss=0.5**step, accuracy=step)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["loss", "accuracy"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(s, 0.5**s) for s in range(5)]
    assert [e.value for e in events.Scalars("accuracy")] == [0, 1, 2, 3, 4]


def test_tensorboard_forgets_the_steps_after_the_checkpoint(tmp_path, without_tensorflow):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(tmp_path) as metrics:
        for step in range(5):
            metrics.write(step, loss=step)
    with Metrics(tmp_path, resume_from=2) as metrics:
        metrics.write(3, loss=30)
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0), (1, 1), (2, 2), (3, 30)]
