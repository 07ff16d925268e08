"""Trainings in a row, each with the student of the one before as its teacher.

Born-again networks repeat one network; teacher assistants step down from a large teacher to a small
student. Every training but the last is a run of its own, in folders beside the last one's: OUT-1,
OUT-2, ..., OUT. What is finished of a chain is not done again.

Source: Furlanello et al. (2018), arXiv:1805.04770; Mirzadeh et al. (2020), arXiv:1902.03393.
"""

from dataclasses import replace
from pathlib import Path

from dsdistill.harness import lists
from kd.options import TEACHER_INPUT_OPTIONS, TrainOptions

FIRST_TEACHER_OPTIONS = (
    "class_map",
    *TEACHER_INPUT_OPTIONS,
)  # of the first teacher: an earlier run has the data's classes


def earlier_trainings(options: TrainOptions, out: Path) -> tuple[TrainOptions, ...]:
    """The trainings before the last, in turn; none without a chain."""
    students = _students(options)
    plain = replace(options, generations=None, assistants=None)
    found, teacher = [], options.teacher
    for number, student in enumerate(students, start=1):
        folder = _link_folder(out, number)
        # Another seed each: a generation is another draw of the same network.
        seed = options.seed + len(students) - number + 1 if options.generations else options.seed
        link = replace(plain, student=student, teacher=teacher, out=folder, seed=seed)
        if teacher is None:  # the loss is for those that have one
            link = replace(link, overrides=replace(options.overrides, loss=None))
        found.append(link)
        teacher = str(folder)
        plain = replace(plain, **dict.fromkeys(FIRST_TEACHER_OPTIONS))
    return tuple(found)


def last_teacher(options: TrainOptions) -> str | None:
    """Who teaches the last training of a chain; without one, `--teacher`."""
    count = len(_students(options))
    if count == 0 or options.out is None:
        return options.teacher
    return str(_link_folder(options.out, count))


def is_taught_by_chain(options: TrainOptions) -> bool:
    """Whether the teacher of the last training is one of the chain's."""
    return last_teacher(options) != options.teacher


def _students(options: TrainOptions) -> list[str | None]:
    if options.assistants is not None:
        return list(lists.parse_names("--assistants", options.assistants))
    return [options.student] * ((options.generations or 1) - 1)


def _link_folder(out: Path, number: int) -> Path:
    return out.with_name(f"{out.name}-{number}")
