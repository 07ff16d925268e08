"""The campaign of kills: what it counts as wrong, where it goes on, and a handful of its kills."""

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kills.py"


@pytest.fixture(scope="module")
def kills() -> ModuleType:
    specification = importlib.util.spec_from_file_location("kills", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["kills"] = module
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("code", "error", "killed", "number", "fine"),
    [
        (0, "", False, 0, True),
        (-9, "", True, signal.SIGKILL, True),
        (1, "dsdistill: stopped", True, signal.SIGTERM, True),
        (-15, "", True, signal.SIGTERM, True),  # before the command handles it
        (1, "dsdistill: run is damaged", False, 0, False),
        (1, "dsdistill: run is damaged", True, signal.SIGKILL, False),
        (1, "Traceback (most recent call last):", True, signal.SIGINT, False),
        (0, "Exception ignored in: <function callback>", True, signal.SIGTERM, False),
        (98, "did not end", True, signal.SIGTERM, False),
    ],
)
def test_what_counts_as_wrong(kills, code, error, killed, number, fine):
    assert (kills.complaint(kills.End(code, error, killed), number) is None) == fine


def test_the_table_counts_kills_by_configuration_and_signal(kills, tmp_path, capsys):
    two = [["SIGKILL", 1.0], ["SIGINT", 2.0]]
    rows = [
        {"configuration": "a", "trial": 0, "kills": two, "held": True},
        {"configuration": "b", "trial": 0, "kills": [["SIGKILL", 1.0]], "held": False},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "results.jsonl").write_text(text + '{"configuration": "a", "tri')  # killed here
    assert kills.stored(tmp_path / "results.jsonl") == rows
    kills.table(rows)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [
        ["a", "1", "2", "2"],
        ["b", "1", "1", "0"],
        ["SIGKILL", "2", "2", "1"],
        ["SIGTERM", "0", "0", "0"],
        ["SIGINT", "1", "1", "1"],
        ["all", "2", "3", "2"],
    ]


@pytest.mark.slow
def test_a_handful_of_kills_holds(tmp_path):
    names = ["kip-fc", "ls-fc", "kd-mlp"]
    command = [sys.executable, SCRIPT, "--root", tmp_path, "--kills", "8", *names]
    subprocess.run(command, check=True, timeout=900)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sum(len(row["kills"]) for row in rows) >= 8
    assert [row["wrong"] for row in rows if not row["held"]] == []
