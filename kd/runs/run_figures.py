"""Figures that trainings are compared by, as `report.json` and `metrics.jsonl` hold them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Part = Literal["test", "validation"]
FRACTION, CORRELATION, POSITIVE = (0.0, 1.0), (-1.0, 1.0), (0.0, math.inf)


@dataclass(frozen=True)
class Figure:
    """A figure of a network on test or validation data.

    Attributes:
        name: Its name in files, behind that of the part.
        words: Its name for people.
        bounds: Smallest and largest possible value; fractions are shown in percent.
        sign: 1 if larger values are better, -1 if smaller ones are.
        digits: Digits behind the point.
        logarithmic: Whether its curves need a logarithmic axis.
    """

    name: str
    words: str
    bounds: tuple[float, float]
    sign: int = 1
    digits: int = 3
    logarithmic: bool = False

    @property
    def in_percent(self) -> bool:
        """Whether it is shown in percent."""
        return self.bounds == FRACTION

    @property
    def scale(self) -> float:
        """Factor of the values that are shown."""
        return 100.0 if self.in_percent else 1.0

    @property
    def title(self) -> str:
        """Its name for people, with its unit."""
        return f"{self.words}, %" if self.in_percent else self.words


ACCURACY = Figure("accuracy", "accuracy", FRACTION, digits=1)
LINEAR_PROBE = Figure("linear_probe_accuracy", "linear probe accuracy", FRACTION, digits=1)
# What a student without a head is validated by, under the name of the accuracy that it has not.
LEAVE_ONE_OUT = Figure(
    "accuracy", "accuracy of the nearest neighbours, each image left out", FRACTION, digits=1
)
FIGURES: Mapping[str, Figure] = {
    figure.name: figure
    for figure in (
        ACCURACY,
        LINEAR_PROBE,
        Figure("nearest_neighbours_accuracy", "nearest neighbours accuracy", FRACTION, digits=1),
        Figure("robust_accuracy", "accuracy under attack", FRACTION, digits=1),
        Figure("macro_f1", "macro F1", FRACTION, digits=1),
        Figure("balanced_accuracy", "balanced accuracy", FRACTION, digits=1),
        Figure("mean_average_precision", "mean average precision", FRACTION, digits=1),
        Figure("micro_f1", "micro F1", FRACTION, digits=1),
        Figure("entity_f1", "entity F1", FRACTION, digits=1),
        Figure("matthews", "Matthews' correlation", CORRELATION),
        Figure("spearman", "Spearman's correlation", CORRELATION),
        Figure("pearson", "Pearson's correlation", CORRELATION),
        Figure("cosine", "cosine to the teacher's embedding", CORRELATION),
        Figure("source_to_target", "translations found", FRACTION, digits=1),
        Figure("target_to_source", "sources found", FRACTION, digits=1),
        Figure("mse", "mean squared error", POSITIVE, sign=-1),
        Figure("perplexity", "perplexity", POSITIVE, sign=-1, digits=2, logarithmic=True),
        Figure("bits_per_byte", "bits per byte", POSITIVE, sign=-1),
    )
}
# Task of texts -> its figure where none was asked for.
OF_TASK = {
    "regress": "spearman",
    "tag": "macro_f1",
    "mlm": "perplexity",
    "causal": "perplexity",
    "embed": "cosine",
}


def of_report(report: Mapping[str, Any]) -> Figure:
    """The figure that a run is compared by: that of its metric, for images the accuracy.

    A student without a head has no accuracy of its own, but that of a linear probe of its
    embedding.

    Args:
        report: Content of its `report.json`.
    """
    if report.get("head") == "none":
        return LINEAR_PROBE
    return FIGURES.get(report.get("metric") or "") or of_task(report.get("task"))


def validated(figure: Figure) -> Figure:
    """The figure on validation data that belongs to one on test data."""
    return LEAVE_ONE_OUT if figure is LINEAR_PROBE else figure


def of_task(task: str | None) -> Figure:
    """The figure that runs of a task are compared by whose metrics differ.

    Args:
        task: Task of texts; None for images.
    """
    return FIGURES[OF_TASK.get(task or "", ACCURACY.name)]


def judged_part(report: Mapping[str, Any]) -> Part:
    """The part of the data whose figures count: validation where there are no test texts.

    Args:
        report: Content of a `report.json`.
    """
    judged = str(report.get("judged_on") or "")
    return "validation" if "task" in report and judged.startswith("validation") else "test"
