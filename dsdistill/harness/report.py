"""The evaluation as `report.json` for programs and `report.md` for people."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsdistill.harness.evaluate import Row
from dsdistill.harness.memory import readable
from dsdistill.harness.runs import write_bytes, write_json

COLUMNS = ("data", "learner", "test accuracy, %", "n", "images", "size", "training")


def write(folder: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """Write both files.

    Args:
        folder: Exists.
        rows: One for each learner and data.
        facts: JSON-compatible: the set, the data, the command to reproduce, machine, versions.
    """
    write_json(folder / "report.json", {"rows": [asdict(row) for row in rows], **facts})
    write_bytes(folder / "report.md", markdown(rows, facts).encode())


def markdown(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The report in Markdown: the table, then how it was made."""
    lines = [
        f"# {facts['title']}",
        "",
        *table(rows),
        "",
        "Mean ± standard deviation over n seeds; training time of one seed.",
        *(f"- {note}" for note in facts["notes"]),
        "",
        "Reproduce with:",
        "",
        *(f"    {command}" for command in facts["commands"]),
        "",
    ]
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as the lines of a Markdown table."""
    head = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    return head + [f"| {' | '.join(cells(row))} |" for row in rows]


def cells(row: Row) -> list[str]:
    """One row for a table, in words."""
    return [
        row.data,
        row.learner,
        f"{100 * row.mean:.1f} ± {100 * row.std:.1f}",
        str(row.n),
        str(row.images),
        readable(row.bytes),
        f"{row.train_seconds:.1f} s",
    ]
