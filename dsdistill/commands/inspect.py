"""Print what a distilled set holds and how it was made, as text or as JSON."""

import json
from pathlib import Path
from typing import Any

from dsdistill.harness.data import distilled_set
from dsdistill.harness.memory import format_bytes
from dsdistill.harness.runs.progress import format_clock
from dsdistill.harness.text import console, printable

MAX_ROW_DEPTH = 6  # levels of the provenance that get rows of their own


def print_run(folder: Path, compared: str = "before") -> None:
    """Print where a finished run lies and how good it is.

    Args:
        folder: Folder of the run.
        compared: What the initial accuracy is that of.
    """
    distilled = distilled_set.load(distilled_set.locate(folder))
    metrics, data = distilled.provenance["metrics"], distilled.provenance["data"]
    line = (
        f"{folder}: {len(distilled)} images of {data['name']}, "
        f"test accuracy {metrics['test_accuracy']:.2%} by ridge regression "
        f"({metrics['initial_test_accuracy']:.2%} {compared}), "
        f"kernel {distilled.provenance['kernel']}, {format_clock(distilled.provenance['seconds'])}"
    )
    print(printable(line))
    if stopped := distilled.provenance.get("stopped"):
        print(printable(f"stopped early, {stopped}"))


def print_set(path: Path, *, as_json: bool) -> None:
    """Print one distilled set.

    Args:
        path: The set's file, or its run's folder.
        as_json: Print one JSON object, with `metrics.test_accuracy` among its fields.

    Raises:
        DistilledSetError: If the file cannot be trusted.
    """
    file = distilled_set.locate(path)
    description = {"file": str(file), **describe(distilled_set.load(file))}
    if as_json:
        print(json.dumps(description, indent=2))
        return
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in _flatten(description):
        table.add_row(printable(name), printable(_format_value(name, value)))
    console(soft_wrap=True).print(table)


def describe(distilled: distilled_set.DistilledSet) -> dict[str, Any]:
    """Shape, encoding and provenance of a set, JSON-compatible."""
    measured = {
        "images": list(distilled.images.shape),
        "labels": list(distilled.labels.shape),
        "classes": list(distilled.classes),
        "encoding": distilled.encoding,
        "preprocess": distilled.preprocess.kind,
        "bytes": distilled.nbytes,
    }
    # The provenance of another program may use these names for anything.
    return measured | {k: v for k, v in distilled.provenance.items() if k not in measured}


def _flatten(value: dict[str, Any], prefix: str = "", depth: int = 0) -> list[tuple[str, Any]]:
    rows = []
    for name, item in value.items():
        nested = isinstance(item, dict) and depth < MAX_ROW_DEPTH
        rows += _flatten(item, f"{prefix}{name}.", depth + 1) if nested else [(prefix + name, item)]
    return rows


def _format_value(name: str, value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if name in ("bytes", "peak_memory") and type(value) is int:
        return format_bytes(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
