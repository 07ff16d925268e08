"""`kd report`: finished runs on one page, the seeds of one training together."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation.statistics import Summary
from dsdistill.harness.memory import format_bytes
from dsdistill.harness.reports import html, plot_style, wording
from dsdistill.harness.reports.wording import MINUS, NOTHING
from kd.runs import capacity_gap, finished_runs, run_figures
from kd.runs.capacity_gap import TaughtGroup
from kd.runs.finished_runs import FinishedRun, RunGroup
from kd.runs.run_figures import FIGURES, Figure, Part

if TYPE_CHECKING:
    from matplotlib.figure import Figure as PlotFigure

COST_COLUMNS = (
    *("training", "parameters", "latency, ms", "seconds", "peak memory", "steps", "images"),
    *("texts", "device"),
)
QUANTISED_COLUMNS = (
    *("training", "bits", "quantised", "float file, accuracy, %", "file, accuracy, %"),
    *("float file, bytes", "file, bytes", "float file, ms", "file, ms"),
)
QUANTISED_NOTE = (
    "Accuracy on test images, size, and latency of one image of the exported ONNX file, and of the "
    "file of the same student in float32 before it was quantised; both in onnxruntime's default "
    "session, in turn, in one process. A file holds what describes its graph too, which counts in "
    "one of a small network."
)
PRUNED_COLUMNS = (
    *("training", "share asked", "multiply-accumulates before", "after", "parameters before"),
    *("after", "ms before", "after", "accuracy before, %", "after, %"),
)
PRUNED_NOTE = (
    "The student before its channels were pruned, and after the training that followed: "
    "multiply-accumulates and latency of one image, the latter on the CPU, in turn, in one "
    "process; accuracy on test images."
)
GAP_COLUMNS = (
    *("training", "taught by", "teacher's parameters", "times the student's", "teacher"),
    *("student", "gain"),
)
GAP_NOTE = (
    "The gain is the student's figure minus that of the same student trained on labels alone for "
    "as many steps, paired by seed, with its deviation over them. A teacher that is much larger "
    "than its student may teach it less than a smaller one."
)
SPREAD_NOTE = (
    "Mean ± sample deviation over n runs, with the 95 % t interval of the mean, cut off at "
    "{bounds}. Runs are put together if their options differ in the seed alone. "
)
CHOICE_NOTE = "The best epoch was chosen on validation {kind}; the test {kind} were read once."
VALIDATION_NOTE = "Where there are no test texts, the validation texts judge too."
LATENCY = "latency_ms_batch_1"
LATENCY_NOTE = (
    "Latency is the median of several calls with one {input}, on the CPU of the machine that each "
    "training ran on."
)


@dataclass(frozen=True)
class Comparison:
    """Trainings on the same data, with the figure that they are compared by.

    Attributes:
        name: Name of the data, unique on a page.
        part: Part of the data whose figures count.
        figure: The figure.
        groups: The trainings.
    """

    name: str
    part: Part
    figure: Figure
    groups: Sequence[RunGroup]

    @property
    def title(self) -> str:
        """The figure with its part and unit."""
        return f"{self.part} {self.figure.title}"

    @property
    def title_on(self) -> str:
        """The name of the data, with the figure."""
        return f"{self.name}: {self.title}"

    def summary(self, group: RunGroup, *, owner: str = "") -> Summary | None:
        """The figure of one of the trainings; None if a run lacks it.

        Args:
            group: The training.
            owner: `teacher` for its teacher's figure.
        """
        return group.summary(f"{owner or self.part}_{self.figure.name}", self.figure.bounds)


def render(folders: Sequence[Path]) -> str:
    """Render one HTML page that compares runs.

    Args:
        folders: Folders of finished runs; one that is given twice counts once.

    Raises:
        UserError: If no folder is given, or a run is unfinished or damaged.
    """
    if not folders:
        raise UserError("give at least one folder of a finished run")
    different = {folder.resolve(): folder for folder in folders}.values()
    runs = [finished_runs.read(folder) for folder in different]
    groups = finished_runs.group_by_options(runs)
    compared = comparisons(groups)
    title = f"{_plural(len(groups), 'training')}, {_plural(len(runs), 'run')}"
    notes = dict.fromkeys(note for run in runs if (note := run.report.get("note")))
    sections = [
        html.section(
            "test",
            "Test figures",
            *_metric_tables(compared),
            _note(_describe_figures(compared)),
        ),
        html.section("languages", "Languages", *map(_language_table, compared)),
        html.section("curves", "Learning curves", _curves(compared)),
        html.section("quantised", "Quantised students", *_quantised_tables(compared)),
        html.section("pruned", "Pruned students", *_pruned_tables(compared)),
        html.section("teachers", "Teachers and gains", *_gap_tables(compared)),
        html.section("cost", "Cost", _cost_table(compared), _cost_note(runs), _costs(compared)),
        html.section("runs", "Every run", *_run_tables(compared)),
        html.section("notes", "Notes", html.bullet_list(map(html.text, notes))),
        html.section("reproduce", "Reproduce", html.code(run.command for run in runs)),
    ]
    head = f"<header>\n<h1>{html.text(title)}</h1>\n{_answer(compared)}\n</header>"
    return html.document(title, [head, *filter(None, sections)])


def comparisons(groups: Sequence[RunGroup]) -> list[Comparison]:
    """Put trainings on the same data together, and choose the figure that they are compared by.

    Args:
        groups: All trainings of a page.
    """
    together: dict[tuple[str, str | None, Part], list[RunGroup]] = {}
    for group in groups:
        key = group.data, group.report.get("task"), run_figures.judged_part(group.report)
        together.setdefault(key, []).append(group)
    names = Counter(data for data, _, _ in together)
    found = []
    for (data, task, part), members in together.items():
        figures = {run_figures.of_report(group.report) for group in members}
        figure = figures.pop() if len(figures) == 1 else run_figures.of_task(task)
        name = f"{data}, {task or 'images'}" if names[data] > 1 else data
        found.append(Comparison(name, part, figure, members))
    return found


def metric_columns(comparison: Comparison) -> list[str]:
    """Names of the columns of `metric_cells`."""
    others = [other.title for other in FIGURES.values() if other is not comparison.figure]
    return [
        *("training", comparison.title, "95 % interval", "n"),
        *others,
        *("NLL, nats", "calibration error, %", "agrees with teacher, %"),
        f"teacher's {comparison.figure.title}",
    ]


def metric_cells(comparison: Comparison, group: RunGroup) -> list[str]:
    """One line under `metric_columns`."""
    figure, part = comparison.figure, comparison.part
    value = comparison.summary(group)
    others = [
        _spread(group.summary(f"{part}_{other.name}", other.bounds), other)
        for other in FIGURES.values()
        if other is not figure
    ]
    return [
        group.label,
        _spread(value, figure),
        wording.confidence_interval(value, figure.scale, figure.digits),
        str(len(group.runs)),
        *others,
        wording.spread(group.summary("nll"), scale=1, digits=3),
        wording.spread(group.summary("calibration_error")),
        wording.spread(group.summary("teacher_agreement")),
        _spread(comparison.summary(group, owner="teacher"), figure),
    ]


def cost_cells(group: RunGroup) -> list[str]:
    """One line under `COST_COLUMNS`."""
    report, is_text = group.report, group.runs[0].is_text
    memory = [run.report.get("peak_memory") or 0 for run in group.runs]
    steps, count = report.get("steps"), report.get("train_images")
    counted = NOTHING if count is None else f"{count:,}"
    milliseconds = group.summary(LATENCY)
    digits = 1 if milliseconds and milliseconds.mean >= 10 else 3
    latency = wording.spread(milliseconds, scale=1, digits=digits)
    if latency != NOTHING and report.get("latency_tokens") is not None:
        latency += f" ({report['latency_tokens']} tokens)"
    return [
        group.label,
        f"{report['parameters']:,}",
        latency,
        wording.spread(group.summary("seconds"), scale=1),
        format_bytes(max(memory)) if any(memory) else NOTHING,
        NOTHING if steps is None else f"{steps:,}",
        NOTHING if is_text else counted,
        counted if is_text else NOTHING,
        report.get("device") or NOTHING,
    ]


def curves(groups: Sequence[RunGroup], figure: Figure = run_figures.ACCURACY) -> "PlotFigure":
    """Draw a validation figure against steps: a colour for each group, a line for each run."""
    with plot_style.style_context():
        plot = plot_style.new_figure(2.9 + 0.15 * len(groups))
        axes = plot.subplots()
        for i, group in enumerate(groups):
            style = plot_style.SERIES[i % len(plot_style.SERIES)]
            label = plot_style.label(group.label, plot_style.MAX_TITLE_LENGTH)
            for run in filter(lambda run: run.curves[figure.name], group.runs):
                steps, values = zip(*run.curves[figure.name], strict=True)
                axes.plot(
                    steps,
                    [figure.scale * value for value in values],
                    style.marker,
                    ls=style.line,
                    color=style.colour,
                    markersize=3.5,
                    alpha=0.8,
                    label=label,
                )
                label = None  # the legend names a group once
        axes.set(xlabel="step of the optimizer", ylabel=f"validation {figure.title}")
        if figure.logarithmic:
            axes.set_yscale("log")
            plot_style.format_log_axis(axes.yaxis)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2))
    return plot


def costs(comparison: Comparison) -> "PlotFigure":
    """Draw the figure against parameters and latency: a point for each training, with deviation.

    A dashed line is the teacher, where all have the same.
    """
    known = [group for group in comparison.groups if comparison.summary(group)]
    with plot_style.style_context():
        plot = plot_style.new_figure(2.8 + 0.15 * len(known), 2 * plot_style.WIDTH_INCHES)
        left, right = plot.subplots(1, 2, sharey=True)
        largest = max(group.report["parameters"] for group in known)
        unit, word = (1e6, "millions") if largest >= 1e6 else (1e3, "thousands")
        _draw_costs(left, comparison, "parameters", unit)
        left.set(xlabel=f"parameters, {word}", ylabel=comparison.title)
        _draw_costs(right, comparison, LATENCY)
        right.set_xlabel("latency on the CPU, ms")
        plot.legend(*left.get_legend_handles_labels(), loc="outside lower left")
    return plot


def _draw_costs(axes: Any, comparison: Comparison, name: str, unit: float = 1.0) -> None:
    """Draw the figure of each training against one of its costs, and that of their teacher."""
    scale = comparison.figure.scale
    for i, group in enumerate(comparison.groups):
        style = plot_style.SERIES[i % len(plot_style.SERIES)]
        cost, value = group.summary(name), comparison.summary(group)
        if cost and value:
            axes.errorbar(
                cost.mean / unit,
                scale * value.mean,
                scale * value.std if value.n > 1 else None,
                fmt=style.marker,
                color=style.colour,
                label=plot_style.label(group.label, plot_style.MAX_TITLE_LENGTH),
            )
    _draw_teacher(axes, comparison)
    axes.set_xscale("log")
    axes.margins(0.15)
    plot_style.format_log_axis(axes.xaxis)


def _draw_teacher(axes: Any, comparison: Comparison) -> None:
    """Draw the teachers' figure, if it is one."""
    summaries = [comparison.summary(group, owner="teacher") for group in comparison.groups]
    values = {summary.mean for summary in summaries if summary is not None}
    if len(values) == 1:
        value = comparison.figure.scale * values.pop()
        axes.axhline(value, color=plot_style.INK, ls="--", lw=0.8, label="teacher")


def _answer(compared: Sequence[Comparison]) -> str:
    """Say which training is ahead on each data set, and whether the intervals are apart."""
    lines = []
    for comparison in compared:
        figure = comparison.figure
        what = "" if figure is run_figures.ACCURACY else f"{figure.words} "
        unit = " %" if figure.in_percent else ""
        where = comparison.name + (" (validation texts)" * (comparison.part == "validation"))
        judged = [(group, comparison.summary(group)) for group in comparison.groups]
        known = [(group, summary) for group, summary in judged if summary is not None]
        if not known:
            lines.append(f"On {where}: no {comparison.part} {figure.words}.")
            continue
        ranking = sorted(known, key=lambda pair: -figure.sign * pair[1].mean)
        best, value = ranking[0]
        line = f"On {where}, {best.label}: {what}{_spread(value, figure)}{unit}."
        lines.append(f"{line} {_margin(figure, value, *ranking[1])}" if ranking[1:] else line)
    return "\n".join(html.paragraph(line, "answer") for line in lines)


def _margin(figure: Figure, value: Summary, second: RunGroup, other: Summary) -> str:
    lead = f"{figure.scale * abs(value.mean - other.mean):.{figure.digits}f}"
    lead += " points" if figure.in_percent else ""
    text = f"That is {lead} {'more' if figure.sign > 0 else 'less'} than {second.label}"
    if value.n == 1 or other.n == 1:
        return f"{text}; one seed cannot tell whether by chance."
    apart = value.low > other.high if figure.sign > 0 else value.high < other.low
    return f"{text}; their 95 % intervals {'are apart' if apart else 'overlap'}."


def _metric_tables(compared: Sequence[Comparison]) -> list[str]:
    """A table for each figure that trainings are compared by."""
    return [
        _table(
            caption,
            metric_columns(members[0]),
            [(one.name, [metric_cells(one, group) for group in one.groups]) for one in members],
        )
        for caption, members in _by_title(compared, "By data set", lambda one: one.title)
    ]


def _cost_table(compared: Sequence[Comparison]) -> str:
    bodies = [(one.name, [cost_cells(group) for group in one.groups]) for one in compared]
    return _table("By data set", COST_COLUMNS, bodies)


def _language_table(comparison: Comparison) -> str:
    """The figure of the texts of each language; empty without languages."""
    figure, counts = comparison.figure, dict[str, int]()
    for group in comparison.groups:
        for language, row in group.report.get("languages", {}).items():
            counts.setdefault(language, int(row.get("texts") or 0))
    rows = [
        [group.label, *(_spread(group.language(each, figure), figure) for each in counts)]
        for group in comparison.groups
    ]
    if not counts:
        return ""
    head = ["training", *(f"{language}, n = {count:,}" for language, count in counts.items())]
    words = f"{comparison.part.capitalize()} {figure.words} on {comparison.name} by language"
    return _table(words + ", in percent" * figure.in_percent, head, [("", rows)])


def quantised_cells(group: RunGroup) -> list[str]:
    """One line under `QUANTISED_COLUMNS`, of the exported file and of the same in float32."""
    bits = group.report["quantized"]
    how = "after training" if bits["method"] == "calibration" else "in training"
    taught = " with a teacher" if group.report.get("teacher") else ""
    cells = [group.label, f"{bits['bits']}{' full range' * bits['full_range']}", how + taught]
    for name in ("test_accuracy", "bytes", "latency_ms_batch_1"):
        for key in ("float_file", "file"):
            values = [run.report.get(key, {}).get(name) for run in group.runs]
            figure = finished_runs.summarise(values, (-math.inf, math.inf))
            if name == "bytes":
                cells.append(NOTHING if figure is None else f"{figure.mean:,.0f}")
            else:
                scale, digits = (100, 2) if name == "test_accuracy" else (1, 3)
                cells.append(wording.spread(figure, scale, digits))
    return cells


def _quantised_tables(compared: Sequence[Comparison]) -> list[str]:
    """A table of the students that have codes; nothing without any."""
    bodies = [
        (one.name, [quantised_cells(group) for group in one.groups if "quantized" in group.report])
        for one in compared
    ]
    bodies = [(name, rows) for name, rows in bodies if rows]
    return [_table("By data set", QUANTISED_COLUMNS, bodies), _note(QUANTISED_NOTE)] * bool(bodies)


def pruned_cells(group: RunGroup) -> list[str]:
    """One line under `PRUNED_COLUMNS`."""
    figures = [run.report["pruning"] for run in group.runs]
    cells = [group.label, f"{figures[0]['share']:g}"]
    for name, scale, digits in (
        *(("macs", None, 0), ("parameters", None, 0)),
        *(("latency_ms_batch_1", 1, 3), ("test_accuracy", 100, 1)),
    ):
        for key in ("before", "after"):
            values = [each.get(key, {}).get(name) for each in figures]
            summary = finished_runs.summarise(values, (-math.inf, math.inf))
            if summary is None or scale is not None:
                cells.append(wording.spread(summary, scale or 1, digits))
            else:
                cells.append(f"{summary.mean:,.0f}")
    return cells


def _pruned_tables(compared: Sequence[Comparison]) -> list[str]:
    """A table of the students that were pruned; nothing without any."""
    bodies = [
        (one.name, [pruned_cells(group) for group in one.groups if "pruning" in group.report])
        for one in compared
    ]
    bodies = [(name, rows) for name, rows in bodies if rows]
    return [_table("By data set", PRUNED_COLUMNS, bodies), _note(PRUNED_NOTE)] * bool(bodies)


def gap_cells(comparison: Comparison, taught: TaughtGroup) -> list[str]:
    """One line under `GAP_COLUMNS`."""
    figure, group = comparison.figure, taught.group
    return [
        group.label,
        " → ".join(taught.chain),
        f"{taught.teacher_parameters:,}",
        f"{taught.ratio:.3g}",
        _spread(comparison.summary(group, owner="teacher"), figure),
        _spread(comparison.summary(group), figure),
        _spread(taught.gain, figure),
    ]


def _gap_tables(compared: Sequence[Comparison]) -> list[str]:
    """Teachers' sizes and students' gains, with a plot; nothing where no teacher is a run."""
    bodies, plots = [], []
    for i, comparison in enumerate(compared):
        name = f"{comparison.part}_{comparison.figure.name}"
        taught = capacity_gap.taught_groups(comparison.groups, name)
        if taught:
            bodies.append((comparison.title_on, [gap_cells(comparison, one) for one in taught]))
        known = [one for one in taught if one.gain is not None]
        if len({one.teacher_parameters for one in known}) > 1:
            alt = f"Gain in {comparison.figure.words} on {comparison.name} by size of the teacher"
            plot = capacity_gap.draw(known, comparison.figure)
            content = plot_style.svg(plot, name=f"gap-{i}", alt=alt)
            plots.append(html.figure(content, f"{alt}."))
    if not bodies:
        return []
    return [_table("By data set", GAP_COLUMNS, bodies), _note(GAP_NOTE), *plots]


def _curves(compared: Sequence[Comparison]) -> str:
    figures = []
    for i, comparison in enumerate(compared):
        figure = run_figures.validated(comparison.figure)
        validated = [
            group
            for group in comparison.groups
            if any(_is_validated_by(run, figure) and run.curves[figure.name] for run in group.runs)
        ]
        if validated:
            alt = f"Validation {figure.words} on {comparison.name}, one line per run"
            content = plot_style.svg(curves(validated, figure), name=f"curves-{i}", alt=alt)
            figures.append(html.figure(content, f"{alt}."))
    return html.figure_grid(figures)


def _costs(compared: Sequence[Comparison]) -> str:
    """A plot for each data set with several trainings whose latency is known."""
    figures = []
    for i, comparison in enumerate(compared):
        measured = [
            group
            for group in comparison.groups
            if group.summary(LATENCY) and comparison.summary(group)
        ]
        if len(measured) > 1:
            words = comparison.figure.words
            alt = f"{words[:1].upper()}{words[1:]} on {comparison.name}, by parameters and latency"
            content = plot_style.svg(costs(comparison), name=f"costs-{i}", alt=alt)
            figures.append(html.figure(content, f"{alt}."))
    return "\n".join(figures)


def _table(
    caption: str, head: Sequence[str], bodies: Sequence[tuple[str, Sequence[Sequence[str]]]]
) -> str:
    """A table without the columns that have no content."""
    lines = [line for _, rows in bodies for line in rows]
    columns = [i for i in range(len(head)) if any(line[i] != NOTHING for line in lines)]
    shown = [
        (name, [[html.text(line[i]) for i in columns] for line in rows]) for name, rows in bodies
    ]
    return html.table(caption, [head[i] for i in columns], shown)


def _run_tables(compared: Sequence[Comparison]) -> list[str]:
    tables = []
    of_figures = _by_title(compared, "As each run's own report says", lambda one: one.figure.title)
    for caption, members in of_figures:
        figure = members[0].figure
        validation = f"validation {run_figures.validated(figure).title}"
        head = ("folder", "seed", f"test {figure.title}", validation)
        bodies = [
            (group.label, [_run_cells(run, figure) for run in group.runs])
            for one in members
            for group in one.groups
        ]
        tables.append(html.table(caption, (*head, "best epoch"), bodies))
    return tables


def _run_cells(run: FinishedRun, figure: Figure) -> list[str]:
    epoch = run.report.get("best_epoch")
    validated = run_figures.validated(figure)
    values = [run.report.get(f"test_{figure.name}"), None]
    if _is_validated_by(run, validated):
        values[1] = run.report.get(f"validation_{validated.name}")
    return [
        html.text(run.folder),
        str(run.report["seed"]),
        *(NOTHING if value is None else _value(value, figure) for value in values),
        NOTHING if epoch is None else str(epoch),
    ]


def _is_validated_by(run: FinishedRun, figure: Figure) -> bool:
    """Whether the run means this figure by its name on validation data."""
    own = run_figures.validated(run_figures.of_report(run.report))
    return run_figures.LEAVE_ONE_OUT not in (own, figure) or own is figure


def _by_title(
    compared: Sequence[Comparison], caption: str, title: Callable[[Comparison], str]
) -> list[tuple[str, list[Comparison]]]:
    """Comparisons that share a table, with its caption, which says what if there are several."""
    together: dict[str, list[Comparison]] = {}
    for comparison in compared:
        together.setdefault(title(comparison), []).append(comparison)
    several = len(together) > 1
    return [(f"{caption}: {name}" if several else caption, x) for name, x in together.items()]


def _describe_figures(compared: Sequence[Comparison]) -> str:
    """What the tables of test figures hold."""
    plain = all(one.figure.in_percent for one in compared)
    runs = [run for one in compared for group in one.groups for run in group.runs]
    text = SPREAD_NOTE.format(bounds="0 and 100 %" if plain else "the bounds of the figure")
    text += CHOICE_NOTE.format(kind=_kind(runs, "images", "texts", "data"))
    text += _describe_attacks(runs)
    return f"{text} {VALIDATION_NOTE}" if any(x.part == "validation" for x in compared) else text


def _describe_attacks(runs: Sequence[FinishedRun]) -> str:
    """What the accuracies under attack are of; empty without any."""
    attacks = dict.fromkeys(name for run in runs for name in run.report.get("attacks", {}))
    counts = {run.report.get("attacked_images") for run in runs if run.report.get("attacks")}
    if not attacks:
        return ""
    images = " or ".join(f"{count:,}" for count in sorted(filter(None, counts)))
    return f" The accuracy under attack is of {images} test images and {', '.join(attacks)}."


def _cost_note(runs: Sequence[FinishedRun]) -> str:
    measured = [run for run in runs if run.report.get(LATENCY) is not None]
    if not measured:
        return ""
    text = "text of median length"
    return _note(LATENCY_NOTE.format(input=_kind(measured, "image", text, f"image or one {text}")))


def _kind(runs: Sequence[FinishedRun], images: str, texts: str, both: str) -> str:
    """Words for what runs are of."""
    kinds = {run.is_text for run in runs}
    return both if len(kinds) > 1 else texts if kinds == {True} else images


def _spread(summary: Summary | None, figure: Figure) -> str:
    return wording.spread(summary, figure.scale, figure.digits).replace("-", MINUS)


def _value(value: float, figure: Figure) -> str:
    return f"{figure.scale * value:.{figure.digits}f}".replace("-", MINUS)


def _note(text: str) -> str:
    return html.paragraph(text, "quiet")


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
