"""The size of a teacher against what its student gains: the capacity gap of teachers and chains.

A teacher that is much larger than its student may teach it less than one between the two in size
(Mirzadeh et al. 2020, arXiv:1902.03393), so the teachers of one student stand side by side, with
the chain of trainings that each comes from.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsdistill.harness.evaluation.statistics import Summary
from dsdistill.harness.reports import plot_style
from kd.runs import finished_runs
from kd.runs.finished_runs import FinishedRun, RunGroup
from kd.runs.run_figures import Figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure as PlotFigure

ANY = (-math.inf, math.inf)


@dataclass(frozen=True)
class TaughtGroup:
    """A training from one teacher that is a run itself.

    Attributes:
        group: The training.
        chain: Names of the networks that taught each other, the student last.
        teacher_parameters: Number of weights of the teacher.
        gain: Figure minus that of the same student trained on labels alone for as many steps,
            paired by seed where the seeds are the same; None where no such training is there.
    """

    group: RunGroup
    chain: Sequence[str]
    teacher_parameters: int
    gain: Summary | None

    @property
    def ratio(self) -> float:
        """Weights of the teacher for each of the student's."""
        return self.teacher_parameters / self.group.report["parameters"]


def taught_groups(groups: Sequence[RunGroup], name: str) -> list[TaughtGroup]:
    """The trainings whose teachers are runs that are still there, the smallest teacher first.

    Args:
        groups: Trainings on the same data.
        name: Name of the figure in `report.json`.
    """
    taught = []
    for group in groups:
        teachers = _teachers(group.runs[0])
        if teachers:
            chain = [run.report["student"] for run in (*reversed(teachers), group.runs[0])]
            parameters = teachers[0].report["parameters"]
            taught.append(TaughtGroup(group, chain, parameters, _gain(group, groups, name)))
    return sorted(taught, key=lambda each: each.teacher_parameters)


def draw(taught: Sequence[TaughtGroup], figure: Figure) -> "PlotFigure":
    """Draw the gains against the size of the teachers: a line for each student.

    Args:
        taught: Trainings whose gains are known.
        figure: The figure that is gained.
    """
    students = dict.fromkeys(_student(each) for each in taught)
    with plot_style.style_context():
        plot = plot_style.new_figure(2.6 + 0.15 * len(students))
        axes = plot.subplots()
        for i, student in enumerate(students):
            style = plot_style.SERIES[i % len(plot_style.SERIES)]
            gains = [(each, each.gain) for each in taught if _student(each) == student]
            known = [(each, gain) for each, gain in gains if gain is not None]
            axes.errorbar(
                [each.teacher_parameters for each, _ in known],
                [figure.scale * gain.mean for _, gain in known],
                [figure.scale * gain.std if gain.n > 1 else 0 for _, gain in known],
                fmt=style.marker,
                ls=style.line,
                color=style.colour,
                label=plot_style.label(student[0], plot_style.MAX_TITLE_LENGTH),
            )
        axes.axhline(0, color=plot_style.INK, ls="--", lw=0.8)
        axes.set(xlabel="parameters of the teacher", ylabel=f"gain, {figure.title}")
        axes.set_xscale("log")
        axes.margins(0.15)
        plot_style.format_log_axis(axes.xaxis)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2))
    return plot


def _student(each: TaughtGroup) -> tuple[str, int]:
    report = each.group.report
    return report["student"], report["parameters"]


def _teachers(run: FinishedRun) -> list[FinishedRun]:
    """The teacher of a run, its teacher, and so on, as far as they are runs that are there."""
    teachers: list[FinishedRun] = []
    known = {run.folder.resolve()}
    while (folder := _teacher_folder(run)) is not None and folder.resolve() not in known:
        known.add(folder.resolve())
        run = finished_runs.read(folder)
        teachers.append(run)
    return teachers


def _teacher_folder(run: FinishedRun) -> Path | None:
    """Folder of a run's teacher; None of several, and of one that is no finished run."""
    named = run.report.get("teacher")
    if not named or "," in named:
        return None
    chained = run.config.get("assistants") or run.config.get("generations")
    # Trainings of a chain lie side by side, wherever they were moved.
    folder = run.folder.with_name(Path(named).name) if chained else None
    if folder is None:
        folder = Path(run.config.get("teacher") or named)
    return folder if finished_runs.is_finished(folder) else None


def _gain(group: RunGroup, groups: Sequence[RunGroup], name: str) -> Summary | None:
    """What a training gains over the same student, trained as long on labels alone."""
    like = ("student", "parameters", "steps")
    for other in groups:
        same = all(other.report.get(key) == group.report.get(key) for key in like)
        if not same or other.report.get("teacher"):
            continue
        values, alone = _by_seed(group, name), _by_seed(other, name)
        if len(values) < len(group.runs) or len(alone) < len(other.runs):
            continue  # a run lacks the figure, or two have one seed
        if values.keys() != alone.keys():
            alone = dict.fromkeys(values, sum(alone.values()) / len(alone))
        return finished_runs.summarise([values[seed] - alone[seed] for seed in values], ANY)
    return None


def _by_seed(group: RunGroup, name: str) -> dict[int, float]:
    """The figures of a training by seed; those that are not known are left out."""
    figures = {run.report["seed"]: run.report.get(name) for run in group.runs}
    return {seed: value for seed, value in figures.items() if value is not None}
