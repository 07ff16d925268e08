"""Finished runs: reading them from their folders, and grouping those that differ only by seed."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsdistill.harness import shell
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import statistics
from dsdistill.harness.evaluation.statistics import Summary
from dsdistill.harness.reports import schema
from dsdistill.harness.runs import run_folder
from dsdistill.harness.runs.options import Storage
from kd.commands import continuation
from kd.models import seals
from kd.models.seals import REPORT
from kd.options import DEFAULT_WORKERS, TrainOptions

CURVE_METRIC = "validation_accuracy"  # key of metrics.jsonl
REQUIRED_TYPES = {
    "student": str,
    "data": str,
    "seed": int,
    "test_accuracy": float | None,
    "seconds": float,
    "parameters": int,
}
OPTIONAL_TYPES = {
    "teacher": str | None,
    "validation_accuracy": float | None,
    "nll": float | None,
    "calibration_error": float | None,
    "teacher_agreement": float | None,
    "teacher_accuracy": float | None,
    "peak_memory": float | None,
    "train_images": int | None,
    "steps": int | None,
    "best_epoch": int | None,
    "device": str | None,
    "note": str | None,
}


@dataclass(frozen=True)
class FinishedRun:
    """One finished run.

    Attributes:
        folder: Folder of the run.
        config: Options of the run, as in `config.json`.
        report: Figures of the run, as in `report.json`.
        curve: Pairs of a step and the validation accuracy after it, a fraction.
    """

    folder: Path
    config: Mapping[str, Any]
    report: Mapping[str, Any]
    curve: Sequence[tuple[int, float]]

    @property
    def command(self) -> str:
        """Command line that reproduces the run."""
        return train_command(self.config, self.folder)


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ only in their seed.

    Attributes:
        label: Name of the group, unique on a page.
        runs: The runs, in the order in which they were given.
    """

    label: str
    runs: Sequence[FinishedRun]

    @property
    def data(self) -> str:
        """Name of the data set."""
        return self.runs[0].report["data"]

    def summary(self, name: str) -> Summary | None:
        """Summary of a figure over all runs; None if one of them lacks it."""
        values = [run.report.get(name) for run in self.runs]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        fraction = all(0 <= value <= 1 for value in known) and "accuracy" in name
        return statistics.summary(known, bounds=(0.0, 1.0) if fraction else (-math.inf, math.inf))


def read(folder: Path) -> FinishedRun:
    """Read a finished run.

    Raises:
        UserError: If the folder holds none, or a file in it is damaged.
    """
    if not (folder / REPORT).exists():
        started = (folder / "config.json").exists()
        resume = f"continue it with `{shell.resume_line('kd train', folder)}`"
        remedy = resume if started else "leave it out"
        kind = "an unfinished run" if started else "no run of `kd train`"
        raise UserError(f"{folder} holds {kind}: {remedy}")
    config, report = (seals.read(folder, name) for name in ("config.json", REPORT))
    seals.verify(folder, "metrics.jsonl")
    try:
        _check(config, report)
        return FinishedRun(folder, config, report, _read_curve(folder / "metrics.jsonl"))
    except (ValueError, KeyError, RecursionError) as error:
        raise UserError(f"{folder} holds a damaged run ({error}): leave it out") from error


def group_by_options(runs: Sequence[FinishedRun]) -> list[RunGroup]:
    """Group runs whose options are the same except for the seed."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        options = {
            name: v for name, v in run.config.items() if name not in ("seed", run_folder.INPUTS_KEY)
        }
        groups.setdefault(json.dumps(options, sort_keys=True), []).append(run)
    labels = _labels([members[0] for members in groups.values()])
    return [RunGroup(*pair) for pair in zip(labels, groups.values(), strict=True)]


def train_command(config: Mapping[str, Any], folder: Path) -> str:
    """The line that repeats a run, with one `kd train` more for each change of its length.

    Args:
        config: The stored options; those that have their default are left out.
        folder: Folder of the run.
    """
    earlier = config.get(continuation.EARLIER_KEY, [])
    if not earlier:
        return _first_command(config)
    lengths = [{name: row[name] for name in continuation.LENGTHS} for row in earlier]
    commands = [_first_command({**config, **lengths[0]}, out=folder)]
    for before, after in itertools.pairwise([*lengths, config]):
        changed = {k: after[k] for k in continuation.LENGTHS if after[k] not in (None, before[k])}
        options = {"resume": True, **changed, "out": folder}
        commands.append(shell.line("kd train", options, {"resume": False}))
    steps = ", ".join(str(row["until_step"]) for row in earlier)
    return f"{' && '.join(commands)}  # at step {steps}"


def _first_command(config: Mapping[str, Any], **more: Any) -> str:
    options = _non_default(config) | more
    return shell.line("kd train", options, _DEFAULTS, str(config["data"]))


_DEFAULTS = Storage(unstored=("data", "out", "resume"), free=()).to_json(TrainOptions())


def _non_default(config: Mapping[str, Any]) -> dict[str, Any]:
    """The stored options that differ from the defaults."""
    former = {"workers": DEFAULT_WORKERS}  # defaults that earlier versions stored
    return {
        name: value
        for name, value in config.items()
        if name in _DEFAULTS and value not in (_DEFAULTS[name], former.get(name, _DEFAULTS[name]))
    }


def _check(config: Any, report: Any) -> None:
    schema.check("config.json", config, {"data": str, "seed": int})
    schema.check(REPORT, report, REQUIRED_TYPES | OPTIONAL_TYPES)
    if missing := REQUIRED_TYPES.keys() - report.keys():
        raise ValueError(f"{REPORT} lacks {', '.join(sorted(missing))}")
    for row in config.get(continuation.EARLIER_KEY, []):
        if not isinstance(row, dict) or {"until_step", *continuation.LENGTHS} - row.keys():
            raise ValueError("config.json has an earlier length that is not whole")
    if missing := {"data", "seed"} - config.keys():
        raise ValueError(f"config.json lacks {', '.join(sorted(missing))}")


def _read_curve(path: Path) -> list[tuple[int, float]]:
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    for row in rows:
        schema.check(path.name, row, {"step": int, CURVE_METRIC: float | None})
    return [(row["step"], row[CURVE_METRIC]) for row in rows if row.get(CURVE_METRIC) is not None]


def _labels(firsts: Sequence[FinishedRun]) -> list[str]:
    """A short label for each: student and teacher, then the options in which they differ."""
    options = [_non_default(run.config) for run in firsts]
    excluded = {"student", "teacher", "seed", "data_root"}
    varied = {
        name
        for config in options
        for name in config
        if name not in excluded and any(other.get(name) != config[name] for other in options)
    }
    labels: list[str] = []
    for run, config in zip(firsts, options, strict=True):
        teacher = run.report.get("teacher")
        parts = [run.report["student"] + (f" from {_base_names(teacher)}" if teacher else "")]
        parts += [
            f"{n.replace('_', ' ')} {_format_value(v)}" for n, v in config.items() if n in varied
        ]
        label = ", ".join(parts)
        same = sum(other.split(" #")[0] == label for other in labels)
        labels.append(f"{label} #{same + 1}" if same else label)
    return labels


def _base_names(teachers: str) -> str:
    """Names of teachers without their folders."""
    return ",".join(Path(name).name for name in teachers.split(","))


def _format_value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
