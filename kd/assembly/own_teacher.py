"""The teacher of a trained student that is pruned or quantised: by default what it was before."""

from dataclasses import replace
from pathlib import Path

from kd import recipes
from kd.models.seals import QUANTISERS
from kd.objectives import terms
from kd.options import TrainOptions


def with_own_teacher(options: TrainOptions) -> TrainOptions:
    """Let an earlier run that is pruned or quantised learn from itself as it is.

    Nothing changes where another teacher is named, where the loss needs none, and where the run is
    quantised already, so that it has no copy in float32.

    Args:
        options: Options that passed `TrainOptions.check`.
    """
    student = options.student
    if not is_adapted(options) or options.teacher or student is None:
        return options
    named = recipes.by_name(options.recipe) if options.recipe else None
    if not Path(student).is_dir() or (Path(student) / QUANTISERS).exists():
        return options
    loss = options.given.get("loss") or (named and named.loss)
    taught = loss is None or any(term.definition.needs_teacher for term in terms.parse(loss))
    if not taught or (named and named.teacher):
        return options
    return replace(options, teacher=student)


def describe(options: TrainOptions) -> str:
    """Say in one line that the student learns from itself as it was."""
    before = "before it is pruned" if options.prune is not None else "in float32"
    return f"teacher: {options.teacher}, the student {before}; --loss ce:1 trains on labels alone"


def is_adapted(options: TrainOptions) -> bool:
    """Whether the training changes the student's network at its start."""
    return options.prune is not None or options.quantize is not None


def is_trained(options: TrainOptions) -> bool:
    """Whether the student has learned before: it adapts to the change, and does not learn anew."""
    name = options.student or ""
    return options.pretrained or Path(name).is_dir() or "@" in name
