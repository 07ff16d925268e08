"""The command `kd`: parse, run, print. Frameworks are imported inside the commands."""

import json
import sys
from typing import Any

from dsdistill.harness import command
from kd.options import Evaluate, Train


def main() -> None:
    """Run one command of the line that the user typed."""
    description = "Train a small student from labels or from a large teacher, and judge it."
    commands = {"train": (Train, _train), "evaluate": (Evaluate, _evaluate)}
    command.main("kd", description, commands, "interrupted")


def _train(options: Train) -> None:
    options.check()  # before the seconds that importing torch takes
    from kd import session

    task = session.prepare(options)
    if task.source.note:
        print(f"kd: {task.source.note}", file=sys.stderr)
    folder = task.options.out or session.next_folder(task)
    try:
        report = session.execute(task, folder)
    except KeyboardInterrupt as error:
        message = f"kd: interrupted; continue with `kd train --resume --out {folder}`"
        raise SystemExit(message) from error
    _print({"folder": str(folder), **{name: report.get(name) for name in _SUMMARY}})


def _evaluate(options: Evaluate) -> None:
    from kd.evaluate import evaluate

    found = evaluate(options)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)


_SUMMARY = (
    "test_accuracy",
    "validation_accuracy",
    "nll",
    "calibration_error",
    "teacher_agreement",
    "teacher_accuracy",
    "parameters",
    "seconds",
)


def _print(figures: dict[str, Any]) -> None:
    """Names and values: a table on a terminal, plain lines elsewhere."""
    rows = [(_label(k), _value(v)) for k, v in figures.items() if v is not None]
    if not sys.stdout.isatty():
        for label, value in rows:
            print(f"{label:<38}{value}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


_UNITS = {
    "nll": "nll (nats)",
    "calibration_error": "expected calibration error (15 bins)",
    "latency_ms_batch_1": "latency of 1 image on the CPU (ms)",
    "latency_ms_batch_64": "latency of 64 images on the CPU (ms)",
}


def _label(name: str) -> str:
    return _UNITS.get(name, name.replace("_", " "))


def _value(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
