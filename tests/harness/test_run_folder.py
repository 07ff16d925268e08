"""Run folders: start and resume, metrics that survive a kill, TensorBoard without TensorFlow."""

import json
import os
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from dsdistill.harness import checksums, files
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import run_folder
from dsdistill.harness.runs.metrics_file import Metrics
from dsdistill.harness.runs.run_folder import RunError

DEFAULTS = {"steps": 1000, "ridge": 1e-6, "data_root": None, "sizes": (1, 2)}


def _start(folder, *, resume=False, **options):
    return run_folder.start(
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
    assert files.read_json(tmp_path / "a" / "b" / "config.json") == run.config
    assert run.load_state() is None


def test_a_run_withdrawn_before_its_first_checkpoint_frees_its_folder(tmp_path):
    run = _start(tmp_path / "a")
    with Metrics(run.folder) as metrics:
        metrics.write(1, loss=0.5)
    files.write_json(run.folder / "recipe.json", {})
    run.withdraw()
    assert not run.folder.exists()


def test_withdrawing_takes_nothing_else(tmp_path):
    (tmp_path / ".mine").write_text("mine")
    _start(tmp_path).withdraw()
    assert [path.name for path in tmp_path.iterdir()] == [".mine"]


@pytest.mark.parametrize("begun", ["state", "resumed", "another host"])
def test_a_run_that_began_is_not_withdrawn(tmp_path, begun):
    run = _start(tmp_path)
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


def test_a_full_disk_before_the_first_checkpoint_leaves_the_start(tmp_path):
    with (
        pytest.raises(OSError, match="no space left"),
        _start(tmp_path / "a") as run,
        run.clean_up_on_error(),
    ):
        raise OSError("no space left")
    with _start(tmp_path / "a", resume=True) as run:
        assert run.load_state() is None


def test_an_error_before_the_first_checkpoint_leaves_nothing(tmp_path):
    error = UserError("image 1.jpg is damaged")
    with (
        pytest.raises(type(error)) as caught,
        _start(tmp_path / "a") as run,
        run.clean_up_on_error(),
    ):
        raise error
    assert caught.value is error
    assert not (tmp_path / "a").exists()


def test_an_error_after_a_checkpoint_says_what_works(tmp_path):
    message = r"1\.jpg is damaged; .*keeps the last checkpoint: --resume"
    run = _start(tmp_path)
    run.save_state({"a": np.zeros(1)}, {})
    with pytest.raises(RunError, match=message), run, run.clean_up_on_error():
        raise UserError("image 1.jpg is damaged")
    with _start(tmp_path, resume=True) as run:
        assert run.load_state() is not None


def test_an_error_about_the_folder_itself_stands_as_it_is(tmp_path):
    run = _start(tmp_path)
    run.save_state({"a": np.zeros(1)}, {})
    with pytest.raises(RunError, match=r"^changed since$"), run, run.clean_up_on_error():
        raise RunError("changed since")


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
    run_folder.check_free(tmp_path / "new", "distilled.safetensors")
    assert not (tmp_path / "new").exists()
    _start(tmp_path / "run")
    with pytest.raises(RunError, match="already holds a run"):
        run_folder.check_free(tmp_path / "run", "distilled.safetensors")


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


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b'{"steps": ',
        b"[1]",
        b"\0\0",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"chosen": 3, "steps": 5}',
    ],
)
def test_a_damaged_config_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(RunError, match=r"config\.json") as caught:
        _start(tmp_path, resume=True)
    assert "\n" not in str(caught.value)


def test_a_choice_is_made_once_and_stands_in_the_config(tmp_path):
    with _start(tmp_path, steps=5) as run:
        assert run.choose_once("batch", lambda: 480) == 480
        assert run.choose_once("batch", lambda: pytest.fail("chosen twice")) == 480
    again = _start(tmp_path, resume=True)
    assert again.choose_once("batch", lambda: pytest.fail("chosen twice")) == 480
    assert again.choose_once("other", lambda: [1]) == [1]
    stored = files.read_json(tmp_path / "config.json")
    assert stored["chosen"] == {"batch": 480, "other": [1]}
    assert stored["steps"] == 5


def test_next_free(tmp_path):
    assert run_folder.next_free("kip-digits", tmp_path) == tmp_path / "kip-digits-1"
    (tmp_path / "kip-digits-1").mkdir()
    assert run_folder.next_free("kip-digits", tmp_path) == tmp_path / "kip-digits-2"


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


DATA, OTHER = "ab" * 32, "cd" * 32


def test_a_run_goes_on_with_the_same_inputs_alone(tmp_path):
    with _start(tmp_path) as run:
        run.require_same({"training images": DATA})
        run.require_same({"set of --init": OTHER})
        run.save_state({"a": np.zeros(1)}, {})
    assert files.read_json(tmp_path / "config.json")["inputs"] == {
        "training images": DATA,
        "set of --init": OTHER,
    }
    with _start(tmp_path, resume=True) as run:
        run.require_same({"training images": DATA, "set of --init": OTHER})
        message = (
            f"changed since the run {tmp_path} was started: set of --init (SHA-256 was "
            "cdcdcdcdcdcd, is abababababab): put back what it was, or start anew in another --out"
        )
        with pytest.raises(RunError, match=f"^{re.escape(message)}$"):
            run.require_same({"training images": DATA, "set of --init": DATA})
    assert files.read_json(tmp_path / "config.json")["inputs"]["set of --init"] == OTHER


@pytest.mark.parametrize("begun", [True, False])
def test_a_run_of_an_earlier_version_says_that_its_inputs_cannot_be_checked(
    tmp_path, capsys, begun
):
    with _start(tmp_path) as run:
        if begun:
            run.save_state({"a": np.zeros(1)}, {})
    with _start(tmp_path, resume=True) as run:
        run.require_same({"test images": DATA})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == begun
    assert not begun or re.search("no hash of: test images; .* cannot be checked", lines[0])
    with _start(tmp_path, resume=True) as run, pytest.raises(RunError, match="test images"):
        run.require_same({"test images": OTHER})


@pytest.mark.parametrize(
    "name",
    [
        ".config.json.x1y2z3a_",
        ".metrics.jsonl.abcdefgh",
        ".checkpoint.safetensors.01234567",
        ".distilled.png.abcdefgh",
        "results/.0a1b.json.abcdefgh",
    ],
)
@pytest.mark.parametrize("resume", [True, False])
def test_what_a_kill_left_is_removed(tmp_path, name, resume):
    if resume:
        _start(tmp_path)
    elif "/" in name:
        return  # a folder with something in it is not free
    kept = [tmp_path / ".mine", tmp_path / ".model.json.swp"]
    for path in (tmp_path / name, *kept):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{")
    _start(tmp_path, resume=resume)
    assert not (tmp_path / name).exists()
    assert all(path.exists() for path in kept)


def test_a_run_of_another_command_is_not_resumed(tmp_path):
    run_folder.start(tmp_path, {"command": "kip", "steps": 5}, result="a")
    for config in ({"command": "ls", "steps": 5}, {"steps": 5}):
        with pytest.raises(RunError, match="holds a run of another command"):
            run_folder.start(tmp_path, config, result="b", resume=True, defaults=config)


def _flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]


def test_no_bit_of_a_checkpoint_changes_unnoticed(tmp_path):
    run = _start(tmp_path)
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(3, np.int32)}
    run.save_state(arrays, {"done": 7, "seconds": 0.25})
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(_flipped(whole, at))
        with pytest.raises(RunError, match="checkpoint") as caught:
            run.load_state()
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    assert run.load_state() is not None


def test_a_checkpoint_without_a_checksum_is_accepted_and_said(tmp_path, capsys):
    run = _start(tmp_path)
    content = safetensors.numpy.save({"a": np.zeros(3)}, {"meta": json.dumps({"step": 4})})
    (tmp_path / "checkpoint.safetensors").write_bytes(content)
    state = run.load_state()
    assert state is not None
    assert state[1] == {"step": 4}
    assert "has no checksum" in capsys.readouterr().err


@pytest.mark.parametrize("meta", ["", "{", "[" * 100_000, "[1]", "7"])
def test_a_checkpoint_whose_figures_are_none_is_one_line(tmp_path, meta):
    run = _start(tmp_path)
    tensors = {"a": np.zeros(3)}
    content = safetensors.numpy.save(tensors, checksums.metadata("meta", meta, tensors))
    (tmp_path / "checkpoint.safetensors").write_bytes(content)
    with pytest.raises(RunError, match="is damaged") as caught:
        run.load_state()
    assert "\n" not in str(caught.value)


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
    files.write_json(tmp_path / "a", {"x": [float("nan"), (1.5, float("inf"))], "y": "é"})
    assert files.read_json(tmp_path / "a") == {"x": [None, [1.5, None]], "y": "é"}


def test_a_list_of_numbers_takes_one_line(tmp_path):
    value = {"matrix": [[1, 0], [float("nan"), -2e-9]], "names": ["[\n1\n]"], "none": []}
    files.write_json(tmp_path / "a", value, compact_numbers=True)
    text = (tmp_path / "a").read_text()
    assert "[1,0]" in text
    assert "[null,-2e-09]" in text
    expected = value | {"matrix": [[1, 0], [None, -2e-9]]}
    assert files.read_json(tmp_path / "a") == expected


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


def test_damaged_lines_are_dropped_and_said(tmp_path, capsys):
    lines = [
        b'{"step": 1}',
        b"\xff\xfe",
        b"[1]",
        b"{}",
        b'{"step": "2"}',
        b"[" * 99999,
        b'{"step": 2}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines, b'{"step": 3, "l']))
    Metrics(tmp_path, resume_from=2).close()
    assert _lines(tmp_path) == [{"step": 1}, {"step": 2}]
    assert "5 of 7 lines damaged, dropped" in capsys.readouterr().err


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


def test_a_run_that_begins_meanwhile_is_no_foreign_content(tmp_path, monkeypatch):
    """Another process writes `config.json` between any two looks at the folder."""
    (tmp_path / ".config.json.abcd1234").touch()
    exists = Path.exists

    def looked_at(path: Path, **options: bool) -> bool:
        answer = exists(path, **options)
        if path.name == "config.json":
            path.touch()
        return answer

    monkeypatch.setattr(Path, "exists", looked_at)
    run_folder.check_free(tmp_path, "result")  # which is refused later, under the lock
