"""`kd report`: finished runs on one page, the seeds of one training together."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation.statistics import Summary
from dsdistill.harness.memory import format_bytes
from dsdistill.harness.reports import html, plot_style, wording
from dsdistill.harness.reports.wording import NOTHING
from kd.commands import finished_runs
from kd.commands.finished_runs import FinishedRun, RunGroup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRIC_COLUMNS = (
    "training",
    "test accuracy, %",
    "95 % interval",
    "n",
    "NLL, nats",
    "calibration error, %",
    "agrees with teacher, %",
    "teacher's accuracy, %",
)
COST_COLUMNS = ("training", "parameters", "seconds", "peak memory", "steps", "images", "device")
RUN_COLUMNS = ("folder", "seed", "test accuracy, %", "validation accuracy, %", "best epoch")
METRICS_NOTE = (
    "Mean ± sample deviation over n runs, with the 95 % t interval of the mean, cut off at "
    "0 and 100 %. Runs are put together if their options differ in the seed alone. The best epoch "
    "was chosen on validation images; the test images were read once."
)


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
    title = f"{_plural(len(groups), 'training')}, {_plural(len(runs), 'run')}"
    notes = dict.fromkeys(note for run in runs if (note := run.report.get("note")))
    sections = [
        html.section(
            "test",
            "Test figures",
            _table(METRIC_COLUMNS, groups, metric_cells),
            _note(METRICS_NOTE),
        ),
        html.section("curves", "Learning curves", _curves(groups)),
        html.section("cost", "Cost", _table(COST_COLUMNS, groups, cost_cells)),
        html.section("runs", "Every run", _run_table(groups)),
        html.section("notes", "Notes", html.bullet_list(map(html.text, notes))),
        html.section("reproduce", "Reproduce", html.code(run.command for run in runs)),
    ]
    head = f"<header>\n<h1>{html.text(title)}</h1>\n{_answer(groups)}\n</header>"
    return html.document(title, [head, *filter(None, sections)])


def metric_cells(group: RunGroup) -> list[str]:
    """One line under `METRIC_COLUMNS`."""
    accuracy = group.summary("test_accuracy")
    return [
        group.label,
        wording.spread(accuracy),
        wording.confidence_interval(accuracy),
        str(len(group.runs)),
        wording.spread(group.summary("nll"), scale=1, digits=3),
        wording.spread(group.summary("calibration_error")),
        wording.spread(group.summary("teacher_agreement")),
        wording.spread(group.summary("teacher_accuracy")),
    ]


def cost_cells(group: RunGroup) -> list[str]:
    """One line under `COST_COLUMNS`."""
    report = group.runs[0].report
    memory = [run.report.get("peak_memory") or 0 for run in group.runs]
    steps, images = report.get("steps"), report.get("train_images")
    return [
        group.label,
        f"{report['parameters']:,}",
        wording.spread(group.summary("seconds"), scale=1),
        format_bytes(max(memory)) if any(memory) else NOTHING,
        NOTHING if steps is None else f"{steps:,}",
        NOTHING if images is None else f"{images:,}",
        report.get("device") or NOTHING,
    ]


def curves(groups: Sequence[RunGroup]) -> "Figure":
    """Draw validation accuracy against steps: a colour for each group, a line for each run."""
    with plot_style.style_context():
        figure = plot_style.new_figure(2.9 + 0.15 * len(groups))
        axes = figure.subplots()
        for i, group in enumerate(groups):
            style = plot_style.SERIES[i % len(plot_style.SERIES)]
            label = plot_style.label(group.label, plot_style.MAX_TITLE_LENGTH)
            for run in filter(lambda run: run.curve, group.runs):
                steps, values = zip(*run.curve, strict=True)
                axes.plot(
                    steps,
                    [100 * value for value in values],
                    style.marker,
                    ls=style.line,
                    color=style.colour,
                    markersize=3.5,
                    alpha=0.8,
                    label=label,
                )
                label = None  # the legend names a group once
        axes.set(xlabel="step of the optimizer", ylabel="validation accuracy, %")
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2))
    return figure


def _answer(groups: Sequence[RunGroup]) -> str:
    """Say which training is ahead on each data set, and whether the intervals are apart."""
    lines = []
    for data in _data_names(groups):
        known = [(group, a) for group, a in _accuracies(groups, data) if a is not None]
        if not known:
            lines.append(f"On {data}: no test accuracy.")
            continue
        ranking = sorted(known, key=lambda pair: -pair[1].mean)
        best, accuracy = ranking[0]
        line = f"On {data}, {best.label}: {wording.spread(accuracy)} %."
        lines.append(f"{line} {_margin(accuracy, *ranking[1])}" if len(ranking) > 1 else line)
    return "\n".join(html.paragraph(line, "answer") for line in lines)


def _margin(accuracy: Summary, second: RunGroup, other: Summary) -> str:
    lead = wording.percent(accuracy.mean - other.mean)
    text = f"That is {lead} points more than {second.label}"
    if accuracy.n == 1 or other.n == 1:
        return f"{text}; one seed cannot tell whether by chance."
    apart = accuracy.low > other.high
    return f"{text}; their 95 % intervals {'are apart' if apart else 'overlap'}."


def _accuracies(groups: Sequence[RunGroup], data: str) -> list[tuple[RunGroup, Summary | None]]:
    return [(group, group.summary("test_accuracy")) for group in groups if group.data == data]


def _curves(groups: Sequence[RunGroup]) -> str:
    figures = []
    for i, data in enumerate(_data_names(groups)):
        validated = [g for g in groups if g.data == data and any(run.curve for run in g.runs)]
        if validated:
            alt = f"Validation accuracy on {data}, one line per run"
            content = plot_style.svg(curves(validated), name=f"curves-{i}", alt=alt)
            figures.append(html.figure(content, f"{alt}."))
    return html.figure_grid(figures)


def _table(
    head: Sequence[str], groups: Sequence[RunGroup], cells: Callable[[RunGroup], list[str]]
) -> str:
    lines = [(group.data, [html.text(cell) for cell in cells(group)]) for group in groups]
    columns = [i for i in range(len(head)) if any(line[i] != NOTHING for _, line in lines)]
    bodies = [
        (data, [[line[i] for i in columns] for group_data, line in lines if group_data == data])
        for data in _data_names(groups)
    ]
    return html.table("By data set", [head[i] for i in columns], bodies)


def _run_table(groups: Sequence[RunGroup]) -> str:
    bodies = [(group.label, [_run_cells(run) for run in group.runs]) for group in groups]
    return html.table("As each run's own report says", RUN_COLUMNS, bodies)


def _run_cells(run: FinishedRun) -> list[str]:
    epoch = run.report.get("best_epoch")
    return [
        html.text(run.folder),
        str(run.report["seed"]),
        wording.percent(run.report["test_accuracy"]),
        wording.percent(run.report.get("validation_accuracy")),
        NOTHING if epoch is None else str(epoch),
    ]


def _data_names(groups: Sequence[RunGroup]) -> list[str]:
    """Names of the data sets, without duplicates."""
    return list(dict.fromkeys(group.data for group in groups))


def _note(text: str) -> str:
    return html.paragraph(text, "quiet")


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
