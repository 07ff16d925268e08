"""Finished runs: reading them from their folders, and grouping those that differ only by seed."""

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dsdistill.harness import shell
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import statistics
from dsdistill.harness.evaluation.statistics import Summary
from dsdistill.harness.reports import schema
from dsdistill.harness.runs import run_folder
from dsdistill.harness.runs.options import Storage
from kd.models import seals
from kd.models.seals import REPORT
from kd.options import DEFAULT_WORKERS, QuantizeOptions, TrainOptions
from kd.recipe import METRICS
from kd.runs import continuation
from kd.runs.run_figures import FIGURES, FRACTION, Figure

REQUIRED_TYPES = {
    "student": str,
    "data": str,
    "seed": int,
    "test_accuracy": float | None,
    "seconds": float,
    "parameters": int,
}
# In `config.json`: what runs of one group may differ in, and options that may name a run.
_OF_ONE_RUN = ("seed", run_folder.INPUTS_KEY, run_folder.CHOSEN_KEY)
_NAMING_RUNS = ("student", "teacher", "peers", "assistants", "run")
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
    "epsilon": float | None,
    "delta": float | None,
    "answers": int | None,
    "queries": int | None,
    "task": str | None,
    "metric": str | None,
    "judged_on": str | None,
    "head": str | None,
    "languages": Mapping[str, Mapping[str, float | None]],
    "latency_ms_batch_1": float | None,
    "latency_tokens": int | None,
    "attacked_images": int | None,
    "attacks": Mapping[str, float | None],
    "quantized": Mapping[str, Any],
    "file": Mapping[str, float | None],
    "float_file": Mapping[str, float | None],
    "pruning": Mapping[str, Any],
    **{
        f"{owner}_{name}": float | None
        for name in FIGURES
        for owner in ("test", "validation", "teacher")
    },
}


@dataclass(frozen=True)
class FinishedRun:
    """One finished run.

    Attributes:
        folder: Folder of the run.
        config: Options of the run, as in `config.json`.
        report: Figures of the run, as in `report.json`.
        curves: For each figure, pairs of a step and its value on validation data after it.
    """

    folder: Path
    config: Mapping[str, Any]
    report: Mapping[str, Any]
    curves: Mapping[str, Sequence[tuple[int, float]]]

    @property
    def is_text(self) -> bool:
        """Whether the student is one of texts."""
        return self.report.get("task") is not None

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

    @property
    def report(self) -> Mapping[str, Any]:
        """The report of the first run."""
        return self.runs[0].report

    def summary(self, name: str, bounds: tuple[float, float] | None = None) -> Summary | None:
        """Summary of a figure over all runs; None if one of them lacks it.

        Args:
            name: Name in `report.json`.
            bounds: Smallest and largest possible value; by default fractions for accuracies.
        """
        if bounds is None:
            bounds = FRACTION if "accuracy" in name else (-math.inf, math.inf)
        return summarise([run.report.get(name) for run in self.runs], bounds)

    def language(self, language: str, figure: Figure) -> Summary | None:
        """Summary of a figure of the texts of one language; None if a run lacks it."""
        rows = [run.report.get("languages", {}).get(language, {}) for run in self.runs]
        return summarise([row.get(figure.name) for row in rows], figure.bounds)


def summarise(values: Sequence[float | None], bounds: tuple[float, float]) -> Summary | None:
    """Summary of figures of several runs; None if one of them is missing.

    Args:
        values: The figures.
        bounds: Smallest and largest possible value, which cut the interval off where all values
            keep them.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    keep = all(bounds[0] <= value <= bounds[1] for value in known)
    return statistics.summary(known, bounds=bounds if keep else (-math.inf, math.inf))


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
        return FinishedRun(folder, config, report, _read_curves(folder / "metrics.jsonl"))
    except (ValueError, KeyError, RecursionError) as error:
        raise UserError(f"{folder} holds a damaged run ({error}): leave it out") from error


def group_by_options(runs: Sequence[FinishedRun]) -> list[RunGroup]:
    """Group runs whose options are the same except for the seed.

    A run that they start or learn from counts by its own options: three students, each from a
    teacher of its own seed, belong together.
    """
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_training(run.config), sort_keys=True), []).append(run)
    labels = _labels([members[0] for members in groups.values()])
    return [RunGroup(*pair) for pair in zip(labels, groups.values(), strict=True)]


def _training(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is the same in all runs of one training, whatever their seeds and folders."""
    options = {name: value for name, value in config.items() if name not in _OF_ONE_RUN}
    for name in _NAMING_RUNS:
        if isinstance(named := options.get(name), str):
            options[name] = [_named_training(each) for each in named.split(",")]
    return options


def _named_training(name: str) -> Any:
    """The training of a finished run that is there; any other name as it is."""
    if not is_finished(name) or not os.path.isfile(Path(name, "config.json")):
        return name
    return _training(seals.read(Path(name), "config.json"))


def is_finished(name: str | Path) -> bool:
    """Whether a name is the folder of a finished run; it may be too long for a path."""
    return os.path.isfile(Path(name, REPORT))  # unlike Path.is_file false of names that are no path


def train_command(config: Mapping[str, Any], folder: Path) -> str:
    """The line that repeats a run, with one `kd train` more for each change of its length.

    Args:
        config: The stored options; those that have their default are left out.
        folder: Folder of the run.
    """
    if config.get("command") == QUANTIZE:
        options = {name: config[name] for name in _QUANTIZE_DEFAULTS if name in config}
        return shell.line("kd quantize", options, _QUANTIZE_DEFAULTS, str(config["run"]))
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


QUANTIZE = "quantize"  # command in config.json, where a training has none
_QUANTIZE_DEFAULTS = {
    f.name: f.default
    for f in fields(QuantizeOptions)
    if f.name in ("bits", "full_range", "range", "images")
}
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
    if report.get("metric") not in (None, *METRICS):
        raise ValueError(f"{REPORT}.metric is {report['metric']!r}")
    for row in config.get(continuation.EARLIER_KEY, []):
        if not isinstance(row, dict) or {"until_step", *continuation.LENGTHS} - row.keys():
            raise ValueError("config.json has an earlier length that is not whole")
    if missing := {"data", "seed"} - config.keys():
        raise ValueError(f"config.json lacks {', '.join(sorted(missing))}")


def _read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    keys = {f"validation_{name}": name for name in FIGURES}
    for row in rows:
        schema.check(path.name, row, {"step": int, **dict.fromkeys(keys, float | None)})
    return {
        name: [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        for key, name in keys.items()
    }


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
        parts = [_student_name(run) + (f" from {_base_names(teacher)}" if teacher else "")]
        if run.config.get("command") == QUANTIZE:
            parts.append(f"calibrated {run.config['bits']}")
        parts += [
            f"{n.replace('_', ' ')} {_format_value(v)}" for n, v in config.items() if n in varied
        ]
        label = ", ".join(parts)
        same = sum(other.split(" #")[0] == label for other in labels)
        labels.append(f"{label} #{same + 1}" if same else label)
    return labels


def _student_name(run: FinishedRun) -> str:
    """Name of a student; of texts without the folder that its weights came from."""
    name = run.report["student"]
    prefix, _, path = name.rpartition(":")
    return f"{prefix}:{Path(path).name}" if run.is_text and Path(path).is_absolute() else name


def _base_names(teachers: str) -> str:
    """Names of teachers without their folders."""
    return ",".join(Path(name).name for name in teachers.split(","))


def _format_value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
