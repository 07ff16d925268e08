"""The figures of a training as a picture: loss terms, and what was validated, against steps."""

import io
import json
from pathlib import Path
from typing import Any

from dsdistill.harness import runs

NOT_DRAWN = ("step", "epoch", "images_per_second", "lr")


def draw(folder: Path) -> None:
    """Write `curves.png` from `metrics.jsonl`; nothing where there are no figures."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not rows:
        return
    from matplotlib.figure import Figure  # not pyplot: which backend it has is the user's choice

    names = [name for name in rows[0] if name not in NOT_DRAWN]
    terms = [name for name in names if not name.startswith("validation_")]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _lines(left, rows, terms)
    left.set(ylabel="loss terms, weighted (mean of a round)", xlabel="step", yscale="log")
    _lines(right, rows, ["validation_accuracy"])
    right.set(ylabel="validation accuracy (fraction)", xlabel="step")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    runs.write_bytes(folder / "curves.png", content.getvalue())


def _lines(axes: Any, rows: list[dict[str, Any]], names: list[str]) -> None:
    for name in names:
        known = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if known:
            axes.plot(*zip(*known, strict=True), label=name, marker=".")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
