"""Figures of a finished student on test images: `kd evaluate`."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from dsdistill.harness import progress, runs
from dsdistill.harness.errors import UserError
from kd import engine, models, networks, scoring, sources, teachers
from kd.files import streaming
from kd.files.streaming import Files
from kd.networks import Shape
from kd.options import TOLD, Evaluate
from kd.recipe import Recipe
from kd.sources import Source
from kd.zoo import labels


def evaluate(options: Evaluate) -> dict[str, Any]:
    """Accuracy, NLL, calibration, agreement with the teacher, size and latency.

    Raises:
        UserError: If run, data or teacher cannot be had or do not fit together.
    """
    device = engine.make(options.device).device
    student = models.load_run(options.run)
    config = runs.read_json(options.run / "config.json")
    recipe = _recipe(options.run)
    source = _source(options, config, student.shape, recipe)
    test = source.test(recipe, student.preprocess, device)
    if test is None:
        raise UserError(f"nothing to test on: {source.note or source.name + ' has no test images'}")
    student = models.fitted(f"student {options.run}", student, source.shape, source.classes)
    name = options.teacher or config.get("teacher")
    teacher = None
    if name is not None:
        first = networks.names("--teacher", name)[0]
        own = config if options.teacher is None else {}  # what was said of the run's teacher
        mapping = own.get("class_map")
        teacher = teachers.load(
            first,
            student.preprocess,
            source.shape,
            source.classes,
            class_map=labels.read_class_map(Path(mapping)) if mapping else None,
            **{name.removeprefix("teacher_"): own.get(name) for name in TOLD},
        )
        for remark in teachers.remarks(teacher):
            progress.say(f"teacher {first}: {remark}")
        teacher.to(device)
    student.classifier.to(device)
    return {
        "run": str(options.run),
        "student": student.name,
        "teacher": name,
        "data": source.name,
        **scoring.figures(student, test, teacher),
        "output_temperature": student.output_temperature,
        "parameters": networks.parameters(student.classifier),
        **scoring.latency(student.classifier, student.shape),
    }


def _recipe(run: Path) -> Recipe:
    """What the run was trained with, as far as it says how images are cut."""
    stored = runs.read_json(run / "recipe.json") if (run / "recipe.json").exists() else {}
    known = {f.name: stored[f.name] for f in fields(Recipe) if f.name in stored}
    return Recipe(**known)


def _source(
    options: Evaluate, config: dict[str, Any], shape: Shape, recipe: Recipe
) -> Source | Files:
    """The images to test on, at the size the student takes."""
    name = options.data or config.get("data")
    if not isinstance(name, str):
        raise UserError(f"{options.run} does not say what it was trained on: give DATA")
    h, w, _ = shape
    if recipe.augment == "imagenet":
        held = sources.fraction(config.get("validation_fraction"))
        root = options.data_root
        return streaming.resolve(name, root=root, image_size=h, validation_fraction=held)
    size = h if h == w and not sources.is_distilled(name) else None
    return sources.resolve(name, root=options.data_root, image_size=size)
