"""The top of a page: whether the distilled set is worth it, before any table."""

from collections.abc import Mapping

from dsdistill.harness.reports import markup, sheets, verdict
from dsdistill.harness.reports.report import Report


def one(report: Report) -> str:
    """The answer of one evaluation, what it is of, and a line for each learner."""
    lines = (
        f"<b>{markup.text(score.learner)}</b>: {markup.text(verdict.answer(report, score))}"
        for score in report.scores
    )
    return "\n".join(
        [
            markup.paragraph(verdict.headline(report), "answer"),
            markup.paragraph(verdict.subject(report)),
            markup.items(lines),
        ]
    )


def several(names: Mapping[str, Report]) -> str:
    """The answer of each evaluation, and one table of all.

    Args:
        names: The evaluations by name.
    """
    answers = (
        f"<b>{markup.text(name)}</b>: {markup.text(verdict.headline(report))}"
        for name, report in names.items()
    )
    groups = [
        (name, [list(map(markup.text, sheets.contrasts(report, s))) for s in report.scores])
        for name, report in names.items()
    ]
    said = "Test accuracy after training on the distilled set, and its distance to other data"
    return "\n".join([markup.items(answers), markup.table(said, sheets.CONTRASTS, groups)])
