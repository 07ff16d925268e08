"""A picture of a training: loss terms and the figure of its metric against steps."""

import json
from pathlib import Path
from typing import Any

from dsdistill.harness import files
from dsdistill.harness.reports import plot_style
from kd.models.seals import REPORT
from kd.runs import run_figures

# Figures of metrics.jsonl.
NOT_PLOTTED = (
    *("step", "epoch", "lr"),
    *("images_per_second", "texts_per_second", "tokens_per_second"),
)


def draw(folder: Path) -> None:
    """Write `curves.png` from the readable lines of `metrics.jsonl`; nothing if there are none.

    Damaged lines are skipped, since the picture is not the record of the run.

    Args:
        folder: Folder of the run.
    """
    rows = _read_rows(folder / "metrics.jsonl")
    if not rows:
        return
    names = dict.fromkeys(name for row in rows for name in row if name not in NOT_PLOTTED)
    terms = [name for name in names if not name.startswith("validation_")]
    with plot_style.style_context():
        figure = plot_style.new_figure(3.5, 9)
        left, right = figure.subplots(1, 2)
        _plot_lines(left, rows, terms)
        left.set(ylabel="loss terms, weighted (mean of a round)", xlabel="step", yscale="log")
        plot_style.format_log_axis(left.yaxis)
        report = folder / REPORT
        known = files.read_json(report) if report.is_file() else {}
        shown = run_figures.validated(run_figures.of_report(known))
        _plot_lines(right, rows, [f"validation_{shown.name}"])
        unit = " (fraction)" if shown.in_percent else ""
        right.set(ylabel=f"validation {shown.words}{unit}", xlabel="step")
        if shown.logarithmic:
            right.set_yscale("log")
            plot_style.format_log_axis(right.yaxis)
    files.write_bytes(folder / "curves.png", plot_style.png(figure))


def _read_rows(path: Path) -> list[dict[str, float]]:
    """The numbers of each line that has a step."""
    rows = []
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            stored = json.loads(line)
        except (ValueError, RecursionError):
            continue
        row = stored if isinstance(stored, dict) else {}
        known = {
            name: number
            for name, value in row.items()
            if (number := _plottable_number(value)) is not None
        }
        if "step" in known:
            rows.append(known)
    return rows


def _plottable_number(value: Any) -> float | None:
    """The value as a number that a plot can show; None if it is not one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e30 else None


def _plot_lines(axes: Any, rows: list[dict[str, float]], names: list[str]) -> None:
    for name in names:
        known = [(row["step"], row[name]) for row in rows if name in row]
        if known:
            axes.plot(*zip(*known, strict=True), label=plot_style.label(name), marker=".")
    if axes.lines:
        axes.legend()
