"""Plots of an evaluation; each function returns a matplotlib figure.

Axes are in percent, steps or seconds and say so; intervals are 95 % t intervals of the mean.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dsdistill.harness.evaluation.results import Row
from dsdistill.harness.reports import wording
from dsdistill.harness.reports.plot_style import (
    BLUE,
    INK,
    MAX_TITLE_LENGTH,
    SERIES,
    ArmStyle,
    arm_styles,
    format_log_axis,
    label,
    new_figure,
    style_context,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_NAMED_CLASSES = 25  # with more, the names of the classes are unreadable
ROW_INCHES = 0.24  # height of one row of a plot


def accuracies(rows: Sequence[Row], *, among: Sequence[Row] | None = None) -> "Figure":
    """Draw the test accuracy of every arm, one panel per learner: mean, interval, and each seed.

    Args:
        rows: Rows to draw.
        among: Rows whose accuracies the axis spans, and whose arms have styles, so that several
            figures share them; by default `rows`.
    """
    with style_context():
        figure, panels = _panels(rows)
        styles = _arm_styles(among or rows)
        for axes, (learner, group) in panels:
            _label_arms(axes, group)
            for y, row in enumerate(group):
                _draw_accuracy(axes, y, row, styles[row.arm])
            axes.set_title(label(learner, MAX_TITLE_LENGTH))
        panels[-1][0].set_xlabel("test accuracy, %")
        panels[-1][0].set_xlim(_accuracy_limits(among or rows))
    return figure


def cost(rows: Sequence[Row], distillation: float | None) -> "Figure":
    """Draw the seconds of distillation, tuning and training by arm, one panel per learner.

    Args:
        rows: Rows to draw.
        distillation: Seconds that the distilled set took; None if unknown.
    """
    with style_context():
        figure, panels = _panels(rows)
        for axes, (learner, group) in panels:
            _label_arms(axes, group)
            for kind, series in zip(("training", "tuning", "distillation"), SERIES, strict=False):
                seconds = [_seconds(row, kind, distillation) for row in group]
                known = [(s, y) for y, s in enumerate(seconds) if s]
                axes.plot(*_unzip(known), series.marker, color=series.colour, label=kind, alpha=0.9)
            axes.set_xscale("log")
            format_log_axis(axes.xaxis)
            axes.set_title(label(learner, MAX_TITLE_LENGTH))
        panels[-1][0].set_xlabel("seconds: of one training, of all tuning, of the distillation")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


def per_class(rows: Sequence[Row], classes: Sequence[str]) -> "Figure":
    """Draw the test accuracy of each class as bars; of many classes the lowest of the first row.

    Args:
        rows: Rows of one learner, at least one without failures.
        classes: Class names, in label order.
    """
    table = {row.arm: values for row in rows if (values := mean_per_class(row))}
    first = next(iter(table.values()))
    order = sorted(range(len(classes)), key=lambda c: (first[c] is None, first[c] or 0))
    chosen = sorted(order[:MAX_NAMED_CLASSES])
    height, styles = 0.8 / len(table), _arm_styles(rows)
    with style_context():
        figure = new_figure(0.9 + len(chosen) * max(0.11 * len(table), 0.2))
        axes = figure.subplots()
        for i, (arm, values) in enumerate(table.items()):
            known = [(y, v) for y, c in enumerate(chosen) if (v := values[c]) is not None]
            style = styles[arm]
            axes.barh(
                [y - 0.4 + (i + 0.5) * height for y, _ in known],
                [100 * v for _, v in known],
                height,
                label=label(arm),
                hatch=style.hatch,
                facecolor="none" if style.colour == INK else style.colour,
                edgecolor=INK,
                linewidth=0.5,
            )
        axes.set_yticks(range(len(chosen)), [label(classes[c]) for c in chosen])
        axes.set(xlim=(0, 100), ylim=(len(chosen) - 0.5, -0.5))
        axes.set_xlabel("test accuracy of the class, % (mean of the seeds)")
        axes.set_ylabel(_class_axis_label(len(chosen), len(classes)))
        axes.grid(visible=False, axis="y")
        axes.set_title(label(rows[0].learner, MAX_TITLE_LENGTH))
        figure.legend(loc="outside upper right", ncols=len(table))
    return figure


def confusion(row: Row, classes: Sequence[str]) -> "Figure":
    """Draw the confusion matrix of all seeds, in percent of each true class (row)."""
    counts = total_confusion(row)
    assert counts is not None
    with np.errstate(invalid="ignore"):
        share = np.nan_to_num(counts / counts.sum(1, keepdims=True))
    k = len(classes)
    named = k <= MAX_NAMED_CLASSES
    with style_context():
        figure = new_figure(min(1.6 + 0.36 * k, 5.2))
        axes = figure.subplots()
        # Shares are shown by opacity, which works on any background.
        axes.imshow(_shade(share), interpolation="none")
        if named:
            names = list(map(label, classes))
            axes.set_xticks(range(k), names, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(k), names)
        if k <= 12:
            _write_numbers(axes, 100 * share)
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_title(f"{label(row.learner)} trained on {_arm_label(row)}, %")
    return figure


def curves(rows: Sequence[Row], *, among: Sequence[Row] | None = None) -> "Figure":
    """Draw the training loss against steps, mean of the seeds, one panel per learner.

    Args:
        rows: Rows to draw.
        among: Rows of all arms, so that several figures give one the same style; by default `rows`.
    """
    with style_context():
        groups = _by_learner([row for row in rows if wording.fact(row, "curve")])
        count, styles = sum(len(group) for group in groups.values()), _arm_styles(among or rows)
        figure = new_figure(2.8 * len(groups) + 0.09 * count)
        panels = figure.subplots(len(groups), squeeze=False)[:, 0]
        for axes, (learner, group) in zip(panels, groups.items(), strict=True):
            for row in group:
                _draw_curve(axes, row, styles[row.arm])
            axes.set(ylabel="training loss", yscale="log", title=label(learner, MAX_TITLE_LENGTH))
            format_log_axis(axes.yaxis)
            axes.set_xlabel("step of the optimizer")
            axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2)
    return figure


def mean_per_class(row: Row) -> list[float | None] | None:
    """Accuracy of each class, mean over the seeds; None if a seed has none."""
    accuracies = [result.per_class for result in row.results]
    if not accuracies or any(values is None for values in accuracies):
        return None
    columns = zip(*(values for values in accuracies if values is not None), strict=True)
    return [None if None in c else float(np.mean(np.array(c, float))) for c in columns]


def total_confusion(row: Row) -> np.ndarray | None:
    """Sum of the confusion matrices of all seeds; None if a seed has none."""
    matrices = [result.confusion for result in row.results]
    return None if not matrices or None in matrices else np.sum(np.array(matrices, np.int64), 0)


def _by_learner(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.learner, []).append(row)
    return groups


def _panels(rows: Sequence[Row]) -> tuple[Any, list[tuple[Any, tuple[str, list[Row]]]]]:
    """Create a figure with one panel per learner, as high as its rows, and a common x axis."""
    groups = _by_learner(rows)
    heights = [len(group) + 1.6 for group in groups.values()]
    figure = new_figure(0.7 + ROW_INCHES * sum(heights))
    panels = figure.subplots(
        len(groups), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    return figure, list(zip(panels, groups.items(), strict=True))


def _label_arms(axes: Any, group: Sequence[Row]) -> None:
    axes.set_yticks(range(len(group)), [_arm_label(row) for row in group])
    axes.set_ylim(len(group) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _arm_label(row: Row) -> str:
    return label(wording.arm_label(row.arm, row.augmented))


def _arm_styles(rows: Sequence[Row]) -> dict[str, ArmStyle]:
    return arm_styles(row.arm for row in rows)


def _draw_accuracy(axes: Any, y: int, row: Row, style: ArmStyle) -> None:
    if row.accuracy is None:
        text = f"failed {len(row.failures)} of {len(row.results)}"
        axes.annotate(text, (0.01, y), xycoords=("axes fraction", "data"), va="center", size=8)
        return
    a = row.accuracy
    axes.errorbar(
        100 * a.mean,
        y,
        xerr=100 * np.array([[a.mean - a.low], [a.high - a.mean]]),
        fmt=style.marker,
        color=style.colour,
        markerfacecolor="none" if row.augmented else style.colour,
    )
    seeds = [100 * r.accuracy for r in row.results if r.accuracy is not None]
    axes.plot(seeds, np.full(len(seeds), y + 0.3), "|", color=INK, alpha=0.5, markersize=4)


def _seconds(row: Row, kind: str, distillation: float | None) -> float | None:
    if kind == "distillation":
        return distillation if row.arm.startswith("distilled") else None
    return wording.training_seconds(row) if kind == "training" else wording.tuning_seconds(row)


def _draw_curve(axes: Any, row: Row, style: ArmStyle) -> None:
    points = _mean_curve(row)
    line = ":" if row.augmented else style.line
    name = _arm_label(row)
    axes.plot(
        *_unzip(points),
        ls=line,
        color=style.colour,
        label=name,
        marker=style.marker,
        markevery=0.25,  # of the diagonal of the panel: colours are fewer than arms
        markersize=4,
        markerfacecolor="none" if row.augmented else style.colour,
    )


def _mean_curve(row: Row) -> list[tuple[float, float]]:
    """Mean loss of the seeds at every step that all of them have."""
    known = [(result.facts or {}).get("curve") for result in row.results]
    seeds = [{s: loss for s, loss in points if loss is not None} for points in known if points]
    steps = sorted(set.intersection(*map(set, seeds)))
    return [(step, sum(losses[step] for losses in seeds) / len(seeds)) for step in steps]


def _accuracy_limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Range of the accuracies and ends of intervals, in percent, with a margin."""
    ends = [100 * x for row in rows if (a := row.accuracy) for x in (a.low, a.high)]
    ends += [100 * r.accuracy for row in rows for r in row.results if r.accuracy is not None]
    low, high = max(min(ends, default=0), 0), min(max(ends, default=100), 100)
    return low - 0.04 * (high - low) - 0.5, high + 0.04 * (high - low) + 0.5


def _unzip(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def _class_axis_label(shown: int, k: int) -> str:
    return "class" if shown == k else f"class (the {shown} lowest of {k})"


def _shade(share: np.ndarray) -> np.ndarray:
    rgb = [int(BLUE[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return np.dstack([np.broadcast_to(rgb, (*share.shape, 3)), 0.85 * share**0.7])


def _write_numbers(axes: Any, percents: np.ndarray) -> None:
    for (i, j), value in np.ndenumerate(percents):
        if round(value):
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", size=8)
