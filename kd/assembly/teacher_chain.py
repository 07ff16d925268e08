"""Chains of trainings, in which the student of each is the teacher or the start of the next.

Born-again networks repeat one network; teacher assistants step down from a large teacher to a small
student; the stages of a recipe train one student on with one loss after the other. Every training
is a run with a folder: OUT-1, OUT-2, ..., and OUT for the last. Finished trainings of a chain are
not repeated.

Source: Furlanello et al. (2018), arXiv:1805.04770; Mirzadeh et al. (2020), arXiv:1902.03393.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dsdistill.harness import lists
from kd import recipes
from kd.models import network_names, networks
from kd.options import TEACHER_INPUT_OPTIONS, TrainOptions
from kd.recipe import COPYING_AUGMENTS, SCHEDULE_FIELDS, VALIDATION_FIELDS

# Options of the first teacher only: the others are runs on the data's classes and images.
FIRST_TEACHER_OPTIONS = ("class_map", "teacher_data", *TEACHER_INPUT_OPTIONS)
# Options of a student's first weights: a later stage goes on from the stage before.
FIRST_STUDENT_OPTIONS = ("keep_layers", "tokenizer")
# What a recipe of several stages sets for each; given on the command line, for the last one.
STAGE_FIELDS = (
    *("loss", "label_smoothing", "epochs", "steps", "lr", "warmup", "warmup_from", "schedule"),
    *dict.fromkeys(name for names in SCHEDULE_FIELDS.values() for name in names),
    *VALIDATION_FIELDS,
)


def earlier_trainings(options: TrainOptions, out: Path) -> tuple[TrainOptions, ...]:
    """Options of the trainings before the last, in order; empty without a chain."""
    if stages := _stages(options):
        return _earlier_stages(options, out, stages)
    students = _students(options)
    plain = replace(options, generations=None, assistants=None, trust_module=_trusted(options))
    if options.assistants is not None:
        plain = replace(plain, student_view=None)  # they teach, and so see whole images
    links, teacher = [], options.teacher
    for number, student in enumerate(students, start=1):
        folder = _link_folder(out, number)
        # Each generation has another seed, and so other first weights of the same network.
        seed = options.seed + len(students) - number + 1 if options.generations else options.seed
        link = replace(plain, student=student, teacher=teacher, out=folder, seed=seed)
        if teacher is None:  # the loss applies to the trainings that have a teacher
            link = replace(link, overrides=replace(options.overrides, loss=None))
        links.append(link)
        teacher = str(folder)
        plain = replace(plain, **dict.fromkeys(FIRST_TEACHER_OPTIONS))
    return tuple(links)


def _earlier_stages(
    options: TrainOptions, out: Path, stages: Sequence[str]
) -> tuple[TrainOptions, ...]:
    """Options of the trainings with the recipes of the earlier stages."""
    overrides = replace(options.overrides, **dict.fromkeys(STAGE_FIELDS))
    # The last stage judges and caches the teacher's answers; those before it take its layers alone,
    # and of a cache the copies of texts, which all stages share.
    links, link = [], replace(options, overrides=overrides, min_teacher_accuracy=None)
    copies = options.overrides.augment in COPYING_AUGMENTS
    link = replace(link, cache=options.cache if copies else None, cache_top=None)
    for number, recipe in enumerate(stages, start=1):
        folder = _link_folder(out, number)
        links.append(replace(link, recipe=recipe, out=folder))
        link = replace(link, student=str(folder), **dict.fromkeys(FIRST_STUDENT_OPTIONS))
    return tuple(links)


def last_student(options: TrainOptions) -> TrainOptions:
    """The options with the start of the last training's student, which stages before it trained."""
    stages = _stages(options)
    if not stages or options.out is None:
        return options
    folder = _link_folder(options.out, len(stages))
    return replace(options, student=str(folder), **dict.fromkeys(FIRST_STUDENT_OPTIONS))


def _stages(options: TrainOptions) -> tuple[str, ...]:
    """Recipes of the trainings before the last one's."""
    return recipes.STAGES.get(options.recipe or "", ())


def last_teacher(options: TrainOptions) -> str | None:
    """Name of the teacher of a chain's last training; without a chain, `--teacher`."""
    count = len(_students(options))
    if count == 0 or options.out is None:
        return options.teacher
    return str(_link_folder(options.out, count))


def is_taught_by_chain(options: TrainOptions) -> bool:
    """Whether the teacher of the last training is a student of the chain."""
    return last_teacher(options) != options.teacher


def _students(options: TrainOptions) -> list[str | None]:
    if options.assistants is not None:
        return list(lists.parse_names("--assistants", options.assistants))
    return [options.student] * ((options.generations or 1) - 1)


def _trusted(options: TrainOptions) -> str | None:
    """The code that a link's teacher, a run of this chain, may name: the assistants' too."""
    code = filter(networks.is_user_module, network_names.names_in(options.assistants))
    return ",".join([*network_names.names_in(options.trust_module), *code]) or None


def _link_folder(out: Path, number: int) -> Path:
    return out.with_name(f"{out.name}-{number}")
