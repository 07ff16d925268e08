"""Figures of a finished student on test images: `kd evaluate`."""

from typing import Any

from dsdistill.harness import runs
from dsdistill.harness.errors import UserError
from kd import data, models, networks, scoring, sources, teachers
from kd.networks import Shape
from kd.options import Evaluate
from kd.session import device_of


def evaluate(options: Evaluate) -> dict[str, Any]:
    """Accuracy, NLL, calibration, agreement with the teacher, size and latency.

    Raises:
        UserError: If run, data or teacher cannot be had or do not fit together.
    """
    device = device_of(options.device)
    student = models.load_run(options.run)
    config = runs.read_json(options.run / "config.json")
    source = _source(options, config, student.shape)
    if source.splits is None:
        raise UserError(f"nothing to test on: {source.note}")
    real = source.splits.test
    models.check_fit(f"student {options.run}", student, real.shape, real.classes)
    name = options.teacher or config.get("teacher")
    teacher = None
    if name is not None:
        teacher = teachers.load(name, student.preprocess, real.shape, real.classes)
        teacher.to(device)
    student.classifier.to(device)
    test = source.test(student.preprocess)
    if test is None:
        raise UserError(f"{source.name} has no test images")
    batches = data.batches(test, scoring.SCORE_BATCH, device)
    return {
        "run": str(options.run),
        "student": student.name,
        "teacher": name,
        "data": source.splits.name,
        "test_images": len(test),
        **scoring.figures(student, batches, teacher),
        "output_temperature": student.output_temperature,
        "parameters": networks.parameters(student.classifier),
        **scoring.latency(student.classifier, student.shape),
    }


def _source(options: Evaluate, config: dict[str, Any], shape: Shape) -> sources.Source:
    """The images to test on, at the size the student takes."""
    name = options.data or config.get("data")
    if not isinstance(name, str):
        raise UserError(f"{options.run} does not say what it was trained on: give DATA")
    h, w, _ = shape
    size = h if h == w and not sources.is_distilled(name) else None
    return sources.resolve(name, root=options.data_root, image_size=size)
