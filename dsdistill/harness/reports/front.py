"""Top of a page: whether the distilled set beats random images, before any table."""

from collections.abc import Mapping

from dsdistill.harness.reports import html, tables, verdict
from dsdistill.harness.reports.report import Report


def render_single(report: Report) -> str:
    """Render the answer of one evaluation, its subject, and a line for each learner."""
    lines = (
        f"<b>{html.text(score.learner)}</b>: {html.text(verdict.answer(report, score))}"
        for score in report.scores
    )
    return "\n".join(
        [
            html.paragraph(verdict.headline(report), "answer"),
            html.paragraph(verdict.subject(report)),
            html.bullet_list(lines),
        ]
    )


def render_comparison(names: Mapping[str, Report]) -> str:
    """Render the answer of each evaluation, and one table of all.

    Args:
        names: The evaluations by name.
    """
    answers = (
        f"<b>{html.text(name)}</b>: {html.text(verdict.headline(report))}"
        for name, report in names.items()
    )
    groups = [
        (name, [list(map(html.text, tables.contrast_cells(report, s))) for s in report.scores])
        for name, report in names.items()
    ]
    caption = "Test accuracy after training on the distilled set, and its distance to other data"
    table = html.table(caption, tables.CONTRAST_COLUMNS, groups)
    return "\n".join([html.bullet_list(answers), table])
