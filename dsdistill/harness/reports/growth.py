"""Plots of accuracy against images per class: evaluations of one data set, published results."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dsdistill.harness.evaluation.statistics import Summary
from dsdistill.harness.reports import published
from dsdistill.harness.reports.plot_style import (
    INK,
    MAX_TITLE_LENGTH,
    SERIES,
    ArmStyle,
    arm_style,
    label,
    new_figure,
    style_context,
)
from dsdistill.harness.reports.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTROLS = ("random", "k-means", "herding")
_PUBLISHED_MARKERS = "soDv^<>Ph*"
_OFFSET_FACTOR = 1.05  # factor in x between marks that would cover each other


@dataclass(frozen=True)
class Line:
    """Accuracies of one kind of data at every number of images per class that was measured."""

    label: str
    style: ArmStyle
    points: Sequence[tuple[int, Summary]]


def plot(reports: Sequence[Report], learners: Sequence[str] = ()) -> "Figure":
    """Draw one panel per learner: distilled sets, controls, full data and published results.

    Args:
        reports: Reports on one data set.
        learners: Names of the learners to draw; all if empty.
    """
    learners = learners or learner_names(reports)
    entries = [
        len(lines(reports, name)) + len(published_results(reports, name)) + 1 for name in learners
    ]
    heights = [2.4 + 0.09 * count for count in entries]
    with style_context():
        figure = new_figure(0.3 + sum(heights))
        panels = figure.subplots(
            len(learners), squeeze=False, gridspec_kw={"height_ratios": heights}
        )[:, 0]
        for axes, learner in zip(panels, learners, strict=True):
            _draw_panel(axes, reports, learner)
    return figure


def learner_names(reports: Sequence[Report]) -> list[str]:
    """Names of all learners of several reports."""
    return list(dict.fromkeys(name for report in reports for name in report.learners))


def lines(reports: Sequence[Report], learner: str) -> list[Line]:
    """Lines of a learner's panel: one for each method and kernel, then the controls."""
    methods = list(dict.fromkeys(map(method_and_kernel, reports)))
    lines_ = []
    for i, name in enumerate(methods):
        same = [report for report in reports if method_and_kernel(report) == name]
        label = "distilled" if len(methods) == 1 else f"distilled, {name}"
        lines_.append(Line(label, _method_style(i), _points(same, learner, "distilled")))
    lines_ += [Line(arm, arm_style(arm), _points(reports, learner, arm)) for arm in CONTROLS]
    return [line for line in lines_ if line.points]


def method_and_kernel(report: Report) -> str:
    """Method and kernel of a distilled set; the report's title if neither is known."""
    known = (report.distilled.get("method"), report.distilled.get("kernel"))
    return " ".join(filter(None, known)) or report.title


def published_results(reports: Sequence[Report], learner: str) -> list[published.PublishedResult]:
    """Published results on the data set with a learner of the same kind."""
    kind = "ridge" if learner.startswith("ridge") else "network"
    return published.lookup(reports[0].data["name"], kind)


def _method_style(i: int) -> ArmStyle:
    """Style of the i-th method: that of distilled sets first, then others that no control has."""
    styles = [arm_style(arm) for arm in ("distilled", "distilled-hard", "distilled-teacher")]
    return styles[i] if i < len(styles) else SERIES[-1]


def _points(reports: Sequence[Report], learner: str, arm: str) -> list[tuple[int, Summary]]:
    """Pairs of images per class and accuracy, in order, without duplicates between reports."""
    rows = [(report.images_per_class, report.row(learner, arm)) for report in reports]
    known = {(n, row.accuracy) for n, row in rows if row and row.accuracy}
    return sorted(known, key=lambda point: (point[0], point[1].mean))


def _draw_panel(axes: Any, reports: Sequence[Report], learner: str) -> None:
    counts = {report.images_per_class for report in reports}
    for line in lines(reports, learner):
        _draw_line(axes, line)
    _draw_full_data_level(axes, reports, learner)
    for i, result in enumerate(published_results(reports, learner)):
        x, y = np.array(list(result.accuracies)), 100 * np.array(list(result.accuracies.values()))
        style = {"color": INK, "markerfacecolor": "none", "alpha": 0.6, "lw": 0}
        # Slightly to the right of the measured marks.
        axes.plot(
            x * _OFFSET_FACTOR ** (i + 1),
            y,
            _PUBLISHED_MARKERS[i % 10],
            label=result.label,
            **style,
        )
        counts |= set(result.accuracies)
    axes.set_xscale("log")
    axes.set_xticks(sorted(counts), [f"{count:,}" for count in sorted(counts)])
    axes.set_xticks([], minor=True)
    axes.set(
        xlabel="images per class", ylabel="test accuracy, %", title=label(learner, MAX_TITLE_LENGTH)
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.22), ncols=2, columnspacing=1)


def _draw_line(axes: Any, line: Line) -> None:
    counts = sorted({n for n, _ in line.points})
    means = [np.mean([100 * a.mean for m, a in line.points if m == n]) for n in counts]
    style = {"color": line.style.colour, "marker": line.style.marker}
    name = label(line.label, MAX_TITLE_LENGTH)
    axes.plot(counts, means, ls=line.style.line, label=name, **style)
    x = [n for n, _ in line.points]
    y = np.array([100 * a.mean for _, a in line.points])
    intervals = 100 * np.array([[a.mean - a.low, a.high - a.mean] for _, a in line.points]).T
    axes.errorbar(x, y, intervals, ls="", **style)


def _draw_full_data_level(axes: Any, reports: Sequence[Report], learner: str) -> None:
    rows = [report.row(learner, "full") for report in reports]
    known = [row.accuracy for row in rows if row and row.accuracy]
    if known:
        style = arm_style("full")
        level = 100 * float(np.mean([a.mean for a in known]))
        axes.axhline(level, color=style.colour, linestyle=style.line, lw=1, label="full data")
