"""`kd evaluate`: figures of a finished student on test data."""

from typing import Any

from kd.commands import evaluation, image_evaluation, text_evaluation
from kd.commands.evaluation import Evaluation
from kd.models import saved_models
from kd.options import EvaluateOptions
from kd.parallel import engine
from kd.runs import run_data


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Measure the figures of a student, its agreement with teachers, its size and latency.

    Args:
        options: Options of the command.

    Raises:
        UserError: If run, data or teacher are missing or do not fit together.
    """
    judged = _prepare(options)
    name, chosen = evaluation.choose_teachers(options, run_data.read_config(options.run))
    return {
        "run": str(options.run),
        "student": judged.student_name,
        "teacher": name,
        "data": judged.data_name,
        "judged_on": judged.judged_on,
        "classes_matched": judged.classes_matched,
        **judged.figures(chosen),
        **judged.size(),
    }


def _prepare(options: EvaluateOptions) -> Evaluation:
    """Load a student of the kind of its data."""
    device = engine.make(options.device).device
    if saved_models.is_text_run(options.run):
        return text_evaluation.prepare(options, device)
    return image_evaluation.prepare(options, device)
