"""The figures of a training or an evaluation, as a command prints them."""

import sys
from typing import Any

from dsdistill.harness.text import console, printable
from kd.runs import run_figures
from kd.runs.run_figures import FIGURES

_TRAIN_FIELDS = (
    "test_accuracy",
    "test_images",
    "test_macro_f1",
    "test_balanced_accuracy",
    "test_mean_average_precision",
    "test_micro_f1",
    "test_linear_probe_accuracy",
    "test_nearest_neighbours_accuracy",
    "test_probe_images",
    "head",
    "validation_accuracy",
    "test_robust_accuracy",
    "attacked_images",
    "attacks",
    "validation_mean_average_precision",
    "nll",
    "calibration_error",
    "teacher_agreement",
    "teacher_accuracy",
    "teacher_mean_average_precision",
    "teachers",
    "epsilon",
    "delta",
    "answers",
    "queries",
    "parameters",
    "seconds",
)
_OF_TEXTS = ("nll", "calibration_error")  # without the name of a part


def chosen_figures(report: dict[str, Any]) -> dict[str, Any]:
    """The figures that a finished training prints: of texts those of the task.

    Args:
        report: Content of its `report.json`.
    """
    if "task" not in report:
        files = {
            f"{key}_{name}": report.get(key, {}).get(name)
            for key in ("file", "float_file")
            for name in ("test_accuracy", "bytes", "latency_ms_batch_1")
        }
        pruning = {
            f"{key}_pruning_{name}": report.get("pruning", {}).get(key, {}).get(name)
            for key in ("before", "after")
            for name in ("macs", "parameters", "latency_ms_batch_1", "test_accuracy")
        }
        return {name: report.get(name) for name in _TRAIN_FIELDS} | files | pruning
    part, other = "test", "validation"
    if str(report["judged_on"]).startswith(other):
        part, other = other, part
    chosen = f"{other}_{run_figures.of_report(report).name}"
    teachers = {k: v for k, v in report.items() if k.startswith("teacher_") or k == "teachers"}
    return {
        "judged_on": report["judged_on"],
        **{f"{part}_{name}": report.get(f"{part}_{name}") for name in FIGURES},
        "test_texts": report["test_texts"] or None,
        chosen: report.get(chosen),
        **{name: report.get(name) for name in _OF_TEXTS},
        **teachers,
        "languages": report.get("languages"),
        "parameters": report["parameters"],
        "seconds": report["seconds"],
    }


def print_figures(figures: dict[str, Any]) -> None:
    """Print names and values: a table on a terminal, plain lines elsewhere; then languages, if any.

    Args:
        figures: Values by name; one that is None is left out.
    """
    is_text = "latency_tokens" in figures or "test_texts" in figures
    figures = _join_teachers(figures) if is_text else _spread_teachers(_spread_attacks(figures))
    languages = figures.pop("languages", None) or {}
    labels = _LABELS | _latency_labels(figures)
    rows = [
        [labels.get(name) or _label(name), _format_value(value)]
        for name, value in figures.items()
        if value is not None
    ]
    _print_rows(rows, 38)
    if languages:
        names = list(next(iter(languages.values())))
        head = ["language", *map(_label, names)]
        body = [
            [language, *(_format_value(row[name]) for name in names)]
            for language, row in languages.items()
        ]
        _print_rows([head, *body], max(12, *(len(row[0]) + 2 for row in body)), head=True)


def _print_rows(rows: list[list[str]], width: int, *, head: bool = False) -> None:
    """Print a table.

    Args:
        rows: Texts of its cells.
        width: Characters of the first column, where it is printed as plain lines.
        head: Whether the first row names the columns.
    """
    if not sys.stdout.isatty():
        widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
        for first, *rest in rows:
            cells = [f"{x:>{n}}" for x, n in zip(rest, widths[1:], strict=True)] if head else rest
            print(f"{printable(first):<{width - 1}} {''.join(cells)}")
        return
    from rich.table import Table

    table = Table(*rows[0], show_header=True) if head else Table(show_header=False)
    for row in rows[head:]:
        table.add_row(*row)
    console().print(table)


def _spread_attacks(figures: dict[str, Any]) -> dict[str, Any]:
    """A line for each of several attacks; one alone is the accuracy under attack."""
    each = figures.get("attacks") or {}
    spread: dict[str, Any] = {}
    for name, value in figures.items():
        if name != "attacks":
            spread[name] = value
        elif len(each) == 1:
            spread["attack"] = next(iter(each))
        else:
            spread |= {f"under {attack}": known for attack, known in each.items()}
    return spread


def _spread_teachers(figures: dict[str, Any]) -> dict[str, Any]:
    """A line for each figure of each of several teachers."""
    each = figures.get("teachers") or {}
    return {k: v for k, v in figures.items() if k != "teachers"} | {
        f"{name} of teacher {teacher}": value
        for teacher, known in each.items()
        for name, value in known.items()
    }


def _join_teachers(figures: dict[str, Any]) -> dict[str, Any]:
    """One line with all figures of the teacher, or of each of several."""
    named = [name for name in figures if name.startswith("teacher_")]
    known = {name.removeprefix("teacher_"): figures[name] for name in named}
    rest = {k: v for k, v in figures.items() if k not in named and k != "teachers"}
    lines = {"teacher's figures": known} if known else {}
    lines |= {f"teacher {k}": v for k, v in (figures.get("teachers") or {}).items()}
    joined = {
        name: ", ".join(f"{_label(k)} {_format_value(v)}" for k, v in values.items())
        for name, values in lines.items()
    }
    after = list(rest).index("parameters") if "parameters" in rest else len(rest)
    items = list(rest.items())
    return dict([*items[:after], *joined.items(), *items[after:]])


_LABELS = {
    **{
        f"{key}_pruning_{name}": f"{key} pruning: {what}"
        for key in ("before", "after")
        for name, what in (
            ("macs", "multiply-accumulates"),
            ("parameters", "parameters"),
            ("latency_ms_batch_1", "ms per image"),
            ("test_accuracy", "test accuracy"),
        )
    },
    **{
        f"{key}_{name}": f"{words}: {what}"
        for key, words in (("file", "ONNX file"), ("float_file", "the same in float32"))
        for name, what in (
            ("test_accuracy", "test accuracy"),
            ("bytes", "bytes"),
            ("latency_ms_batch_1", "ms per image"),
        )
    },
    "nll": "nll (nats)",
    "calibration_error": "expected calibration error (15 bins)",
    "attacked_images_accuracy": "accuracy of attacked images, clean",
}


def _latency_labels(figures: dict[str, Any]) -> dict[str, str]:
    """Labels of the latencies, by what is measured."""
    noun = "text" if "latency_tokens" in figures else "image"
    return {
        "latency_tokens": "length of a text for latency (tokens)",
        "latency_ms_batch_1": f"latency of 1 {noun} on the CPU (ms)",
        "latency_ms_batch_64": f"latency of 64 {noun}s on the CPU (ms)",
    }


def _label(name: str) -> str:
    for part in ("test_", "validation_"):
        if name.startswith(part):
            return f"{part[:-1]} {_label(name.removeprefix(part))}"
    return FIGURES[name].words if name in FIGURES else name.replace("_", " ")


def _format_value(value: Any) -> str:
    digits = ".4f" if isinstance(value, float) and (abs(value) >= 1e-3 or not value) else ".3g"
    return f"{value:{digits}}" if isinstance(value, float) else printable(str(value))
