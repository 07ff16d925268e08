"""One self-contained HTML page about one or several evaluations.

On top stands the answer: whether the distilled set beats random images.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from dsdistill.harness.evaluation.results import Row
from dsdistill.harness.memory import format_bytes
from dsdistill.harness.reports import (
    gallery,
    growth,
    html,
    plot_style,
    tables,
    verdict,
    wording,
)
from dsdistill.harness.reports.html import Cell
from dsdistill.harness.reports.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACCURACY_COLUMNS = (
    "trained on",
    "test accuracy, %",
    "0 to 100 %",
    "95 % interval",
    "n",
    "images",
    "size",
)
ACCURACY_CAPTION = (
    "Mean ± sample deviation over n seeds, with the 95 % t interval of the mean, cut off at 0 and "
    "100 %"
)
HOLLOW_MARKS_NOTE = "Hollow marks in plots: trained with augmentation."
GROWTH_NOTE = (
    "Filled marks: measured here, with 95 % intervals. Hollow marks: published by others, with "
    "other networks, budgets and preprocessing; those marked were not checked against their "
    "source."
)


def render(
    reports: Sequence[Report], *, title: str, pictures: Mapping[str, bytes] | None = None
) -> str:
    """Render one page about one or several evaluations.

    Args:
        reports: Reports, in the order in which they are shown.
        title: Title of the page.
        pictures: Contents of PNG files, by caption.
    """
    names = _unique_titles(reports)
    pictures = pictures or {}
    sections = {
        "Test accuracy": [_join_reports(names, _accuracy_section)],
        "Scores": _with_note(_join_reports(names, _scores), tables.SCORES_NOTE),
        "Accuracy against images per class": [_growth(reports)],
        "Images": [_picture(png, name) for name, png in pictures.items()],
        "Classes": [_join_reports(names, _classes)],
        "Confusion": [_join_reports(names, _confusion)],
        "Learning curves": [_join_reports(names, _curves)],
        "Probabilities": _with_note(_join_reports(names, _quality), tables.QUALITY_NOTE),
        "Cost": _with_note(_join_reports(names, _cost), tables.COST_NOTE),
        "Failures": [_join_reports(names, _failures)],
        "Notes": [_join_reports(names, _notes)],
        "Reproduce": [_join_reports(names, _commands)],
    }
    filled = {name: html.section(_anchor(name), name, *parts) for name, parts in sections.items()}
    filled = {name: text for name, text in filled.items() if text}
    return html.document(title, [_header(title, names, list(filled)), *filled.values()])


def _unique_titles(reports: Sequence[Report]) -> dict[str, Report]:
    """Reports by title; equal titles are numbered."""
    names: dict[str, Report] = {}
    for report in reports:
        numbered = (f"{report.title} ({n})" for n in itertools.count(2))
        free = (name for name in itertools.chain([report.title], numbered) if name not in names)
        names[next(free)] = report
    return names


def _header(title: str, names: Mapping[str, Report], sections: Sequence[str]) -> str:
    links = (f'<a href="#{_anchor(name)}">{html.text(name)}</a>' for name in sections)
    answer = _answer(next(iter(names.values()))) if len(names) == 1 else _compare_answers(names)
    return "\n".join(
        [
            "<header>",
            f"<h1>{html.text(title)}</h1>",
            answer,
            f'<nav aria-label="Contents">{" ".join(links)}</nav>',
            "</header>",
        ]
    )


def _answer(report: Report) -> str:
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


def _compare_answers(names: Mapping[str, Report]) -> str:
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


def _join_reports(names: Mapping[str, Report], part: Callable[[Report, str], str]) -> str:
    """Join one part of every report, each under its title where there are several.

    Args:
        names: The reports, by title.
        part: Function from a report and a text that is unique to it, for identifiers, to markup.
    """
    parts = [(name, part(report, str(i))) for i, (name, report) in enumerate(names.items())]
    if len(names) == 1:
        return parts[0][1]
    return "\n".join(f"<h3>{html.text(name)}</h3>\n{text}" for name, text in parts if text)


def _with_note(content: str, note: str) -> list[str]:
    return [content, html.paragraph(note, "quiet")] if content else []


def _accuracy_section(report: Report, n: str) -> str:
    groups = _group_by_learner(report, [(row, _accuracy_cells(row)) for row in report.rows])
    caption = "Test accuracy with {}: mean, 95 % interval, and below it every seed"
    return "\n".join(
        [
            html.table(ACCURACY_CAPTION, ACCURACY_COLUMNS, groups),
            _figure_per_learner(report, gallery.accuracy, f"accuracy-{n}", caption),
            html.paragraph(HOLLOW_MARKS_NOTE, "quiet")
            if any(row.augmented for row in report.rows)
            else "",
        ]
    )


def _accuracy_cells(row: Row) -> list[Cell]:
    first = row.results[0]
    accuracy: list[Cell] = [html.text(wording.accuracy(row)), _bar(row), wording.interval(row)]
    if row.failures:
        accuracy = [(html.text(wording.failure(row)), len(accuracy))]
    return [
        _label(row),
        *accuracy,
        str(len(row.results)),
        f"{first.images:,}",
        format_bytes(first.bytes),
    ]


def _figure_per_learner(
    report: Report, draw: "Callable[[Report, str], Figure | None]", name: str, caption: str
) -> str:
    """Build one figure for each learner that has something to draw.

    Args:
        report: The report to draw.
        draw: A function of `gallery`, which returns None if there is nothing to draw.
        name: Prefix of identifiers, unique within the page.
        caption: Caption with a placeholder for the learner.
    """
    figures = []
    for i, learner in enumerate(report.learners):
        if figure := draw(report, learner):
            alt = caption.format(learner)
            content = plot_style.svg(figure, name=f"{name}-{i}", alt=alt)
            figures.append(html.figure(content, f"{alt}."))
    return html.figure_grid(figures)


def _bar(row: Row) -> str:
    """Bar of mean and interval between 0 and 100 %, hidden from screen readers."""
    if row.accuracy is None:
        return ""
    low, high = (100 * min(max(x, 0), 1) for x in (row.accuracy.low, row.accuracy.high))
    kind = "bar" if row.arm.startswith("distilled") else "bar control"
    return (
        f'<span class="{kind}" aria-hidden="true"><i style="width:{100 * row.accuracy.mean:.1f}%">'
        f'</i><b style="left:{low:.1f}%;width:{high - low:.1f}%"></b></span>'
    )


def _scores(report: Report, _: str) -> str:
    rows = [[html.text(cell) for cell in tables.score_cells(score)] for score in report.scores]
    first = html.table(tables.SCORES_CAPTION, tables.SCORE_COLUMNS, [("", rows)])
    further = [[html.text(cell) for cell in line] for line in tables.further_cells(report)]
    if not further:
        return first
    table = html.table(tables.FURTHER_CAPTION, tables.FURTHER_COLUMNS, [("", further)])
    return f"{first}\n{table}"


def _growth(reports: Sequence[Report]) -> str:
    """Plot each data set that several reports share."""
    groups: dict[str, list[Report]] = {}
    for report in reports:
        groups.setdefault(report.data["name"], []).append(report)
    figures, hollow = [], False
    for data, group in groups.items():
        for learner in growth.learner_names(group) if len(group) > 1 else ():
            alt = f"Test accuracy against images per class: {learner} on {data}"
            figure = growth.plot(group, [learner])
            hollow = hollow or bool(growth.published_results(group, learner))
            content = plot_style.svg(figure, name=f"growth-{len(figures)}", alt=alt)
            figures.append(html.figure(content, f"{alt}."))
    return html.figure_grid(figures) + (html.paragraph(GROWTH_NOTE, "quiet") if hollow else "")


def _picture(png: bytes, caption: str) -> str:
    return html.figure(html.picture(png, caption), caption)


def _classes(report: Report, n: str) -> str:
    return _figure_per_learner(
        report, gallery.classes, f"classes-{n}", "Test accuracy of each class with {}"
    )


def _confusion(report: Report, n: str) -> str:
    caption = "Confusion of {} trained on the distilled set: percent of each true class's images"
    return _figure_per_learner(report, gallery.confusion, f"confusion-{n}", caption)


def _curves(report: Report, n: str) -> str:
    caption = "Training loss of {}, mean of the seeds; other labels have other floors"
    return _figure_per_learner(report, gallery.curves, f"curves-{n}", caption)


def _quality(report: Report, _: str) -> str:
    if not tables.has_quality(report.rows):
        return ""
    return _by_arm(report, tables.QUALITY_CAPTION, tables.QUALITY_COLUMNS, tables.quality_cells)


def _cost(report: Report, n: str) -> str:
    facts = "".join(
        f"<dt>{html.text(name)}</dt><dd>{html.text(value)}</dd>\n"
        for name, value in tables.run_facts(report)
    )
    caption = "Seconds that {} took, on a logarithmic axis"
    return "\n".join(
        [
            f"<dl>\n{facts}</dl>",
            _by_arm(report, tables.COST_CAPTION, tables.COST_COLUMNS, tables.cost_cells),
            _figure_per_learner(report, gallery.cost, f"cost-{n}", caption),
        ]
    )


def _failures(report: Report, _: str) -> str:
    return html.bullet_list(map(html.text, tables.failures(report)))


def _notes(report: Report, _: str) -> str:
    return html.bullet_list(map(html.text, report.notes))


def _commands(report: Report, _: str) -> str:
    return html.code(report.commands)


def _by_arm(
    report: Report, caption: str, head: Sequence[str], cells: Callable[[Row], list[str]]
) -> str:
    """Build a table with a line for each row, by learner."""
    names, lines = tables.by_arm(report.rows, head, cells)
    escaped = [(row, list(map(html.text, line))) for row, line in lines]
    return html.table(caption, names, _group_by_learner(report, escaped))


def _group_by_learner(
    report: Report, lines: Sequence[tuple[Row, Sequence[Cell]]]
) -> list[tuple[str, list[Sequence[Cell]]]]:
    """Group lines of markup by learner."""
    return [
        (learner, [line for row, line in lines if row.learner == learner])
        for learner in report.learners
    ]


def _label(row: Row) -> str:
    return html.text(wording.arm_label(row.arm, row.augmented))


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")
