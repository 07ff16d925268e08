"""The command `kd`: parse, run, print. Frameworks are imported inside the commands."""

import json
import os
import sys
from typing import Any

from dsdistill.harness import command_line
from dsdistill.harness.text import console, printable
from kd.options import (
    AugmentOptions,
    EvaluateOptions,
    ExportOptions,
    FeaturesOptions,
    ReportOptions,
    TrainOptions,
)


def _train(options: TrainOptions) -> None:
    options.check()  # before the seconds that importing torch takes
    from kd.commands import run_options, train

    options = train.resolve(options)
    try:
        report = train.run(options)
    except KeyboardInterrupt as error:
        assert options.out is not None
        message = (
            f"kd: interrupted; continue with `{run_options.resume_line(options.out, options)}`"
        )
        if not (options.out / "config.json").exists():
            message = "kd: interrupted; the same line goes on with what is finished"
        if int(os.environ.get("RANK", "0")) > 0:
            raise SystemExit(1) from error  # the first of several processes says it
        raise SystemExit(printable(message)) from error
    if not report:  # another process writes, and prints
        return
    if report["note"]:
        print(printable(f"kd: {report['note']}"), file=sys.stderr)
    _print_figures(
        {"folder": str(options.out), **{name: report.get(name) for name in _TRAIN_FIELDS}}
    )


def _evaluate(options: EvaluateOptions) -> None:
    from kd.commands.evaluate import evaluate

    found = evaluate(options)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print_figures(
            {name: value for name, value in found.items() if name != "notes"}
        )  # are said


def _export(options: ExportOptions) -> None:
    from kd.commands.export import export

    found = export(options)
    if found["note"]:
        kind = "images" if "random_images" in found else "tokens"
        print(printable(f"kd: compared on random {kind} only: {found['note']}"), file=sys.stderr)
    rounded = {name: f"{found[name]:.2g}" for name in ("largest_difference", "tolerance")}
    fields = (name for name in _EXPORT_FIELDS if name in found)
    _print_figures({name: rounded.get(name, found[name]) for name in fields})


def _features(options: FeaturesOptions) -> None:
    options.check()  # before the seconds that importing torch takes
    from kd.commands import features

    _print_figures(features.run(options))


def _augment(options: AugmentOptions) -> None:
    options.check()  # before the seconds that importing torch takes
    from kd.commands import augment

    if options.preview is None:
        _print_figures(augment.write(options))
    else:
        print("\n".join(augment.preview(options)))


def _report(options: ReportOptions) -> None:
    from dsdistill.harness.files import write_bytes
    from kd.commands import report

    text = report.render(options.runs)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(options.out, text.encode())
    print(printable(str(options.out)))


_EXPORT_FIELDS = (
    "written",
    "largest_difference",
    "tolerance",
    "argmax_agreement",
    "random_images",
    "real_images",
    "texts",
    "lengths",
    "data",
)


_TRAIN_FIELDS = (
    "test_accuracy",
    "test_images",
    "validation_accuracy",
    *(
        f"{part}_{name}"
        for name in ("macro_f1", "matthews", "entity_f1", "spearman", "pearson", "perplexity")
        for part in ("test", "validation")
    ),
    "test_bits_per_byte",
    "validation_bits_per_byte",
    "nll",
    "calibration_error",
    "teacher_agreement",
    "teacher_accuracy",
    "teachers",
    "parameters",
    "seconds",
)


def _print_figures(figures: dict[str, Any]) -> None:
    """Names and values: a table on a terminal, plain lines elsewhere."""
    each = figures.get("teachers") or {}
    figures = {k: v for k, v in figures.items() if k != "teachers"} | {
        f"{name} of teacher {teacher}": value
        for teacher, known in each.items()
        for name, value in known.items()
    }
    rows = [(_label(k), _format_value(v)) for k, v in figures.items() if v is not None]
    if not sys.stdout.isatty():
        for label, value in rows:
            print(f"{label:<38}{value}")
        return
    from rich.table import Table

    table = Table(show_header=False)
    for row in rows:
        table.add_row(*row)
    console().print(table)


_LABELS = {
    "nll": "nll (nats)",
    "calibration_error": "expected calibration error (15 bins)",
    "latency_ms_batch_1": "latency of 1 image on the CPU (ms)",
    "latency_ms_batch_64": "latency of 64 images on the CPU (ms)",
}


def _label(name: str) -> str:
    return _LABELS.get(name, name.replace("_", " "))


def _format_value(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else printable(str(value))


COMMANDS: command_line.Commands = {
    "train": (TrainOptions, _train),
    "evaluate": (EvaluateOptions, _evaluate),
    "export": (ExportOptions, _export),
    "features": (FeaturesOptions, _features),
    "augment": (AugmentOptions, _augment),
    "report": (ReportOptions, _report),
}


def main() -> None:
    """Run the command that the user typed."""
    description = "Train a small student from labels or from a large teacher, and judge it."
    command_line.main("kd", description, COMMANDS, "interrupted")
