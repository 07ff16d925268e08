"""Check of a teacher of texts before training: how well it does on validation texts.

It answers through the same tokenizer, network and order of classes as in training: a teacher that
was not fine-tuned, another order of labels or a wrong tokenizer show here, and not as a student
that learns little.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from kd.evaluation import class_order, teacher_check
from kd.evaluation.text_scoring import Answers
from kd.models.language.task import Task


def check(
    name: str,
    task: Task,
    figures: Mapping[str, float],
    given: Answers | None,
    classes: Sequence[str],
    *,
    vocabulary: int = 0,
    part: str = "validation",
    minimum: float | None = None,
    say: Callable[[str], None] = progress.say,
) -> None:
    """Report how well a teacher does, and warn where it cannot teach.

    Args:
        name: Name of the teacher.
        task: Task of the texts.
        figures: Its figures on them.
        given: Its answers; None for the tasks `mlm` and `causal`.
        classes: Names of the classes or tags.
        vocabulary: Number of tokens, for the tasks `mlm` and `causal`.
        part: Kind of the texts, for messages.
        minimum: Smallest accuracy, a fraction; None for mere warnings.
        say: Called with each line.

    Raises:
        UserError: If the accuracy is below `minimum`, or the task has none.
    """
    who = f"teacher {name}"
    say(f"{who}: {_describe(figures)} on {part} texts")
    if minimum is not None and "accuracy" not in figures:
        raise UserError(f"--min-teacher-accuracy has no effect on scores: leave it out ({task})")
    if minimum is not None and figures["accuracy"] < minimum:
        raise UserError(
            f"{who} has {part} accuracy {figures['accuracy']:.1%}, below --min-teacher-accuracy "
            f"{minimum:g}: check that it was fine-tuned for these labels, and their order"
        )
    if given is None:
        if figures["nll"] >= math.log(vocabulary):
            say(f"warning: {who} predicts tokens no better than chance: check that it was trained")
        return
    if not classes:
        if figures["spearman"] <= 0:
            say(f"warning: {who} does not rank the texts as their scores do: check it")
        return
    predicted = given.outputs.argmax(1)
    better = class_order.find_better(predicted, given.targets, len(classes))
    _, at_chance = teacher_check.chance(predicted, given.targets)
    if better is not None:
        text = class_order.describe(better, figures["accuracy"], classes, None)
        say(f"warning: {who} seems to have its labels in another order: {text}")
    elif at_chance:
        say(
            f"warning: {who} cannot be told from chance: check that it was fine-tuned for these "
            "labels"
        )


def _describe(figures: Mapping[str, float]) -> str:
    shares = ("accuracy", "macro_f1", "entity_f1")
    return ", ".join(
        f"{name.replace('_', ' ')} {f'{value:.1%}' if name in shares else f'{value:.3g}'}"
        for name, value in figures.items()
        if name not in ("calibration_error", "mse", "matthews", "pearson")
    )
