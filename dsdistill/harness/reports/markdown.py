"""The report of an evaluation in Markdown."""

import re
from collections.abc import Callable, Sequence

from dsdistill.harness.evaluation.results import Row
from dsdistill.harness.reports import tables, verdict
from dsdistill.harness.reports.report import COLUMNS, Report, row_cells
from dsdistill.harness.text import printable

# Characters that begin markup or a cell in Markdown.
_SPECIAL_CHARACTERS = re.compile(r"[\\`*_\[\]#~$|]")


def render(report: Report) -> str:
    """Render the answer, the tables, how the set was made, and the commands to reproduce it."""
    answers = [f"- {score.learner}: {verdict.answer(report, score)}" for score in report.scores]
    failures = tables.failures(report)
    parts = [
        f"# {_escape(report.title)}",
        _escape(verdict.headline(report)),
        _escape(verdict.subject(report)),
        "\n".join(map(_escape, answers)),
        table(COLUMNS, [row_cells(row) for row in report.rows]),
        "Accuracy: mean ± sample deviation over n seeds, and the 95 % t interval of the mean, "
        "cut off at 0 and 100 %; training: one seed's; tuning: all trainings that chose the "
        "learning rate.",
        "## Scores",
        table(tables.SCORE_COLUMNS, [tables.score_cells(score) for score in report.scores]),
        f"{tables.SCORES_CAPTION}. {tables.SCORES_NOTE}",
        *_further(report),
        *_quality(report),
        "## Cost",
        _by_arm(report, tables.COST_COLUMNS, tables.cost_cells),
        f"{tables.COST_CAPTION}. {tables.COST_NOTE}",
        "\n".join(f"- {_escape(f'{name}: {value}')}" for name, value in tables.run_facts(report)),
        *_bullet_section("## Failures", failures),
        *_bullet_section("## Notes", report.notes),
        "## Reproduce with",
        "\n".join(f"    {printable(command)}" for command in report.commands),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Build a Markdown table from cells of plain text."""
    lines = ["| " + " | ".join(map(_escape, cells)) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def _further(report: Report) -> list[str]:
    lines = tables.further_cells(report)
    return [table(tables.FURTHER_COLUMNS, lines), f"{tables.FURTHER_CAPTION}."] if lines else []


def _quality(report: Report) -> list[str]:
    if not tables.has_quality(report.rows):
        return []
    table_ = _by_arm(report, tables.QUALITY_COLUMNS, tables.quality_cells)
    return ["## Probabilities", table_, f"{tables.QUALITY_CAPTION}. {tables.QUALITY_NOTE}"]


def _by_arm(report: Report, head: Sequence[str], cells: Callable[[Row], list[str]]) -> str:
    """Build a table of all rows, with the learner as second column."""
    (first, *names), lines = tables.by_arm(report.rows, head, cells)
    rows = [[arm, row.learner, *rest] for row, (arm, *rest) in lines]
    return table([first, "learner", *names], rows)


def _bullet_section(title: str, lines: Sequence[str]) -> list[str]:
    return [title, "\n".join(f"- {_escape(line)}" for line in lines)] if lines else []


def _escape(text: str) -> str:
    """Escape text and bring it onto one line, so that it is neither a new cell nor other markup."""
    flat = " ".join(printable(text).split())
    return _SPECIAL_CHARACTERS.sub(r"\\\g<0>", flat).replace("&", "&amp;").replace("<", "&lt;")
