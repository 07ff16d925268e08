"""The figures of a training as a picture: loss terms, and what was validated, against steps."""

import json
from pathlib import Path
from typing import Any

from dsdistill.harness import runs
from dsdistill.harness.reports import drawing

NOT_DRAWN = ("step", "epoch", "images_per_second", "lr")


def draw(folder: Path) -> None:
    """Write `curves.png` from `metrics.jsonl`; nothing where there are no figures."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not rows:
        return
    names = [name for name in rows[0] if name not in NOT_DRAWN]
    terms = [name for name in names if not name.startswith("validation_")]
    with drawing.style():
        figure = drawing.blank(3.5, 9)
        left, right = figure.subplots(1, 2)
        _lines(left, rows, terms)
        left.set(ylabel="loss terms, weighted (mean of a round)", xlabel="step", yscale="log")
        drawing.plain_log(left.yaxis)
        _lines(right, rows, ["validation_accuracy"])
        right.set(ylabel="validation accuracy (fraction)", xlabel="step")
    runs.write_bytes(folder / "curves.png", drawing.png(figure))


def _lines(axes: Any, rows: list[dict[str, Any]], names: list[str]) -> None:
    for name in names:
        known = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if known:
            axes.plot(*zip(*known, strict=True), label=drawing.label(name), marker=".")
    if axes.lines:
        axes.legend()
