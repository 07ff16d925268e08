"""The plots of a report: one of each kind for every learner that has the figures for it."""

import itertools
import re
from typing import TYPE_CHECKING

from dsdistill.harness.evaluation.results import Row
from dsdistill.harness.reports import plots, wording
from dsdistill.harness.reports.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_NAME_LENGTH = 60  # characters of a learner's part of a file name
PER_CLASS_ARMS = ("distilled", "random", "full")  # arms of the plot of accuracies per class


def figures(report: Report) -> "dict[str, Figure]":
    """Draw the plots of a report, by file name; learners share a plot where it stays readable."""
    plots_by_name = {
        "accuracy": plots.accuracies(report.rows),
        "cost": plots.cost(report.rows, report.distilled.get("seconds")),
    }
    if any(wording.fact(row, "curve") for row in report.rows):
        plots_by_name["curves"] = plots.curves(report.rows)
    taken: set[str] = set()
    for learner in report.learners:
        name = _file_name(learner, taken)
        for kind, figure in (("classes", classes), ("confusion", confusion)):
            if drawn := figure(report, learner):
                plots_by_name[f"{kind}-{name}"] = drawn
    return plots_by_name


def _file_name(learner: str, taken: set[str]) -> str:
    """A learner's part of a file name: ASCII, short, and different from the names in `taken`."""
    plain = re.sub(r"[^A-Za-z0-9]", "-", learner)[:MAX_NAME_LENGTH]
    numbered = (f"{plain}-{n}" for n in itertools.count(2))
    name = next(name for name in itertools.chain([plain], numbered) if name.lower() not in taken)
    taken.add(name.lower())  # some file systems ignore case
    return name


def accuracy(report: Report, learner: str) -> "Figure | None":
    """Draw a learner's accuracies, on the axis that all learners share."""
    return plots.accuracies(_learner_rows(report, learner), among=report.rows)


def classes(report: Report, learner: str) -> "Figure | None":
    """Draw the accuracies per class; None if there are none."""
    arm_rows = (report.row(learner, arm) for arm in PER_CLASS_ARMS)
    rows = [row for row in arm_rows if row is not None and plots.mean_per_class(row)]
    return plots.per_class(rows, report.classes) if rows else None


def confusion(report: Report, learner: str) -> "Figure | None":
    """Draw the confusion matrix of the distilled set; None if a seed has none."""
    row = report.row(learner, "distilled")
    if row is None or plots.total_confusion(row) is None:
        return None
    return plots.confusion(row, report.classes)


def curves(report: Report, learner: str) -> "Figure | None":
    """Draw the training losses; None if the learner reports none."""
    rows = [row for row in _learner_rows(report, learner) if wording.fact(row, "curve")]
    return plots.curves(rows, among=report.rows) if rows else None


def cost(report: Report, learner: str) -> "Figure | None":
    """Draw the seconds that a learner took."""
    return plots.cost(_learner_rows(report, learner), report.distilled.get("seconds"))


def _learner_rows(report: Report, learner: str) -> list[Row]:
    return [row for row in report.rows if row.learner == learner]
