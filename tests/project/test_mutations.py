"""The campaign of changed files sees every kind of fault, and finds none in distilled sets."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dsdistill.harness.errors import UserError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import mutation_edits  # noqa: E402
import mutation_kinds  # noqa: E402
import mutations  # noqa: E402

EXPECTED = {"images": np.zeros(3, np.float32), "name": "cat"}


def outcome(answer, *, legal: bool = False, seconds: float = 5) -> str:
    """What the campaign says of a reader that gives this, or raises it."""

    def read(_: Path) -> object:
        if isinstance(answer, BaseException):
            raise answer
        return answer() if callable(answer) else answer

    return mutations.judge(read, Path(), EXPECTED, legal=legal, seconds=seconds)[0]


def other(**fields):
    return {**EXPECTED, **fields}


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (UserError("a.npz is damaged"), "refused"),
        (OSError("no such file"), "refused"),
        (OSError("two\nlines"), "several lines"),
        (ValueError("bad"), "traceback"),
        (SystemExit("bad"), "traceback"),
        (MemoryError(), "memory"),
        (other(images=np.zeros(3, np.float32)), "equal"),
        (other(images=np.array([0, 0, -0.0], np.float32)), "silent difference"),
        (other(images=np.zeros(3)), "silent difference"),
        (other(name="dog"), "silent difference"),
        ({"name": "cat"}, "silent difference"),
        (lambda: time.sleep(5), "too long"),
    ],
)
def test_every_outcome_has_its_name(answer, kind):
    assert outcome(answer, seconds=0.2) == kind


def test_a_difference_is_held_only_where_it_is_legal():
    assert outcome(other(name="dog"), legal=True) == "other"
    assert {"traceback", "silent difference", "too long"}.isdisjoint(mutations.HELD)


def test_files_outside_and_programs_are_seen(tmp_path):
    """In a process of its own: what watches cannot be taken away again."""
    script = f"""
import os, subprocess, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import mutations
from pathlib import Path
inside, seen = Path({str(tmp_path / "in")!r}), []
inside.mkdir()
mutations._watch(inside, seen)
(inside / "a").write_text("x")
(inside / "a").rename(inside / "b")
open(os.devnull, "w").close()
Path("/proc/self/statm").read_text()
assert not seen, seen
Path({str(tmp_path / "out")!r}).write_text("x")
(inside / "b").rename(Path({str(tmp_path / "moved")!r}))
subprocess.run(["true"])
assert len(seen) == 3, seen
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", ["a.json", "a.safetensors", "a.npz", "a.npy", "a.png", "a.bin"])
def test_a_change_depends_on_its_number_alone(name, tmp_path):
    content = original(name, tmp_path)
    made = []
    for number in [*range(60), *range(60)]:
        rng = np.random.default_rng([0, number])
        made.append(mutation_edits.changed(rng, name, content, "marker"))
    assert made[:60] == made[60:]
    assert len({changed for changed, _ in made}) > 30
    assert sum(changed != content for changed, _ in made) > 100


def original(name: str, folder: Path) -> bytes:
    from PIL import Image
    from safetensors.numpy import save

    path, array = folder / name, np.arange(12, dtype=np.float32).reshape(3, 4)
    if path.suffix == ".json":
        path.write_text(json.dumps({"a": 1, "b": ["x", {"c": None}]}))
    elif path.suffix == ".safetensors":
        path.write_bytes(save({"a": array, "b": array}, {"meta": '{"step": 3}'}))
    elif path.suffix == ".npz":
        np.savez(path, a=array, b=array)
    elif path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".png":
        Image.fromarray(array.astype(np.uint8)).save(path)
    else:
        path.write_bytes(bytes(range(200)))
    return path.read_bytes()


def test_a_campaign_on_signed_sets_finds_nothing_and_goes_on(tmp_path):
    def campaign(count: int) -> str:
        options = ["--out", tmp_path, "--count", count, "--kinds", "set signed anew"]
        line = [sys.executable, BENCHMARKS / "mutations.py", *options]
        return subprocess.run(
            list(map(str, line)), check=True, capture_output=True, text=True
        ).stdout

    assert "| all | 60 | 60 |" in campaign(60)
    rows = (tmp_path / "results.jsonl").read_text().splitlines()
    assert "| all | 100 | 100 |" in campaign(100)
    after = (tmp_path / "results.jsonl").read_text().splitlines()
    assert after[:60] == rows
    assert len(after) == 100


def test_kinds_name_files_that_there_are(tmp_path):
    kind = mutation_kinds.KINDS["evaluation results"]
    kind.make(tmp_path)
    assert [path for pattern in kind.files for path in tmp_path.glob(pattern)]
