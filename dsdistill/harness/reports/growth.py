"""Accuracy against images per class: several evaluations of one data set, and published ones."""

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
_PUBLISHED_MARKERS = "soDv^<>Ph*"  # markers of published figures
_OFFSET_FACTOR = 1.05  # factor between marks that would lie on each other


@dataclass(frozen=True)
class Line:
    """One kind of data with every number of images that it was measured with."""

    label: str
    look: ArmStyle
    points: Sequence[tuple[int, Summary]]


def plot(reports: Sequence[Report], learners: Sequence[str] = ()) -> "Figure":
    """One panel a learner: distilled sets and controls, full data as a level, published figures.

    Args:
        reports: Of one data set.
        learners: Whose panels are drawn; all without any.
    """
    learners = learners or learner_names(reports)
    legends = [
        len(lines(reports, name)) + len(published_results(reports, name)) + 1 for name in learners
    ]
    heights = [2.4 + 0.09 * count for count in legends]
    with style_context():
        figure = new_figure(0.3 + sum(heights))
        panels = figure.subplots(
            len(learners), squeeze=False, gridspec_kw={"height_ratios": heights}
        )[:, 0]
        for axes, learner in zip(panels, learners, strict=True):
            _draw_panel(axes, reports, learner)
    return figure


def learner_names(reports: Sequence[Report]) -> list[str]:
    """The names of all learners of several reports."""
    return list(dict.fromkeys(name for report in reports for name in report.learners))


def lines(reports: Sequence[Report], learner: str) -> list[Line]:
    """What is drawn as lines: each way of distilling, then the controls."""
    ways = list(dict.fromkeys(map(method_and_kernel, reports)))
    found = []
    for i, name in enumerate(ways):
        same = [report for report in reports if method_and_kernel(report) == name]
        label = "distilled" if len(ways) == 1 else f"distilled, {name}"
        found.append(Line(label, _method_style(i), _points(same, learner, "distilled")))
    found += [Line(arm, arm_style(arm), _points(reports, learner, arm)) for arm in CONTROLS]
    return [line for line in found if line.points]


def method_and_kernel(report: Report) -> str:
    """How a set was made: method and kernel."""
    known = (report.distilled.get("method"), report.distilled.get("kernel"))
    return " ".join(filter(None, known)) or report.title


def published_results(reports: Sequence[Report], learner: str) -> list[published.PublishedResult]:
    """What others have published of the data set with such a learner."""
    judge = "ridge" if learner.startswith("ridge") else "network"
    return published.lookup(reports[0].data["name"], judge)


def _method_style(i: int) -> ArmStyle:
    """The first in the colour of distilled sets, others in those that no control has."""
    ways = [arm_style(arm) for arm in ("distilled", "distilled-hard", "distilled-teacher")]
    return ways[i] if i < len(ways) else SERIES[-1]


def _points(reports: Sequence[Report], learner: str, arm: str) -> list[tuple[int, Summary]]:
    """Images per class and accuracy, in order; figures that several reports share stand once."""
    rows = [(report.images_per_class, report.row(learner, arm)) for report in reports]
    known = {(n, row.accuracy) for n, row in rows if row and row.accuracy}
    return sorted(known, key=lambda point: (point[0], point[1].mean))


def _draw_panel(axes: Any, reports: Sequence[Report], learner: str) -> None:
    counts = {report.images_per_class for report in reports}
    for line in lines(reports, learner):
        _draw_line(axes, line)
    _draw_full_data_level(axes, reports, learner)
    for i, of in enumerate(published_results(reports, learner)):
        x, y = np.array(list(of.accuracies)), 100 * np.array(list(of.accuracies.values()))
        style = {"color": INK, "markerfacecolor": "none", "alpha": 0.6, "lw": 0}
        # To the right of the measured marks, each by a little.
        axes.plot(
            x * _OFFSET_FACTOR ** (i + 1), y, _PUBLISHED_MARKERS[i % 10], label=of.label, **style
        )
        counts |= set(of.accuracies)
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
    look = {"color": line.look.colour, "marker": line.look.marker}
    axes.plot(counts, means, ls=line.look.line, label=label(line.label, MAX_TITLE_LENGTH), **look)
    x = [n for n, _ in line.points]
    y = np.array([100 * a.mean for _, a in line.points])
    around = 100 * np.array([[a.mean - a.low, a.high - a.mean] for _, a in line.points]).T
    axes.errorbar(x, y, around, ls="", **look)


def _draw_full_data_level(axes: Any, reports: Sequence[Report], learner: str) -> None:
    rows = [report.row(learner, "full") for report in reports]
    known = [row.accuracy for row in rows if row and row.accuracy]
    if known:
        of = arm_style("full")
        level = 100 * float(np.mean([a.mean for a in known]))
        axes.axhline(level, color=of.colour, linestyle=of.line, lw=1, label="full data")
