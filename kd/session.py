"""A training from the command's options to the finished folder.

config.json              the options
metrics.jsonl, events.*  loss terms and validation accuracy of every round
checkpoint.safetensors   the last round, for --resume
student.safetensors      the network's weights of the best round
model.json               what is needed to use them (and preprocess.safetensors for ZCA)
report.json              test figures; written last: a folder that holds it is finished
"""

import platform
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsdistill.harness import metrics, progress, runs
from dsdistill.harness.errors import UserError
from dsdistill.harness.labeled import Examples
from kd import data, models, networks, objectives, recipes, scoring, sources, teachers
from kd.checkpoint import State
from kd.data import Batches
from kd.models import Model
from kd.options import Train
from kd.recipes import Recipe
from kd.sources import Source
from kd.teachers import Teacher
from kd.train import train

REPORT = "report.json"
_FREE = ("data_root", "device")  # may differ when a run is resumed
_PER_CALL = ("out", "resume")  # not options of the training


@dataclass(frozen=True, eq=False)
class Task:
    """Everything that a training needs, found and checked before a folder is made.

    Attributes:
        options: On `--resume`, those the run was started with.
        student: With its initial weights.
        teacher: Frozen, on the device; None to train on labels alone.
        recipe: Resolved: no field is left to a default.
    """

    options: Train
    source: Source
    student: Model
    teacher: Teacher | None
    recipe: Recipe
    device: torch.device


def prepare(options: Train) -> Task:
    """Resolve names, load data, student and teacher.

    Args:
        options: That passed `Train.check`.

    Raises:
        UserError: If anything is unknown, missing or does not fit together.
    """
    if options.resume:
        assert options.out is not None
        options = _stored(_start(options.out, options), options)
    device = device_of(options.device)
    if not Path(options.student).is_dir():
        networks.check_name(options.student)
    source = sources.resolve(
        options.data,
        root=options.data_root,
        image_size=options.image_size,
        validation_fraction=options.validation_fraction,
    )
    student = _student(options, source)
    student.classifier.to(device)
    teacher = None
    if options.teacher is not None:
        teacher = teachers.load(options.teacher, student.preprocess, source.shape, source.classes)
        teacher.to(device)
    recipe = _recipe(options, source.distilled is not None, student.classifier)
    return Task(options, source, student, teacher, recipe, device)


def execute(task: Task, folder: Path) -> dict[str, Any]:
    """Train, read the test set once, and write the folder.

    Returns:
        What `report.json` holds.

    Raises:
        UserError: If the folder cannot be used, or the loss is not finite.
    """
    run = _start(folder, task.options)
    began = time.perf_counter()
    student, state = _fit(task, run)
    models.save_run(folder, student)
    report = {
        **_tested(task, student),
        "validation_accuracy": state.best_accuracy,
        "best_epoch": state.best_epoch,
        "epochs": state.epoch,
        "steps": state.step,
        "parameters": networks.parameters(student.classifier),
        "seconds": time.perf_counter()
        - began,  # of this call: a resumed run's earlier part is lost
        "seed": task.options.seed,
        "data": task.source.name,
        "train_images": len(task.source.train_images),
        "student": student.name,
        "teacher": task.options.teacher,
        "recipe": asdict(task.recipe),
        "output_temperature": student.output_temperature,
        "note": task.source.note,
        "device": str(task.device),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "timm", "numpy")},
    }
    runs.write_json(folder / REPORT, report)
    return report


def next_folder(task: Task) -> Path:
    """The first free `runs/kd-STUDENT-DATA-N`."""
    name = task.options.student
    short = Path(name).resolve().name if Path(name).is_dir() else name.replace(":", "-")
    return runs.next_free(f"kd-{short}-{task.source.name}")


def device_of(name: str) -> torch.device:
    """A device that is there.

    Raises:
        UserError: If it is not, or the name is none.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"device {name!r} is not there ({first}): use --device cpu") from error
    return device


def _fit(task: Task, run: runs.Run) -> tuple[Model, State]:
    """The student with its best weights, and the last state of its training."""
    student, fitted = task.student, task.student.preprocess
    network = student.classifier.network
    batches = data.batches(task.source.train(fitted), task.recipe.batch_size, task.device)
    if task.teacher is not None:
        batches = _taught(batches, task.teacher)
    held = _batches(task.source.validation(fitted), task.device)

    def validate() -> float:
        assert held is not None
        scores = scoring.outputs(student.classifier, held)
        return metrics.accuracy(scores, held.examples.data.labels)

    saved = run.load_state()
    done = saved[1]["step"] if saved else 0
    total = task.recipe.total_steps(len(batches))
    with (
        runs.Metrics(run.folder, resume_from=done if run.resumed else None) as log,
        progress.bar(total, start=done) as show,
    ):
        state = train(
            _objective(task),
            batches,
            task.recipe,
            task.options.seed,
            validate=validate if held else None,
            saved=saved,
            save=run.save_state,
            log=log,
            show=show,
        )
    network.load_state_dict(state.best)
    if held and student.outputs == "centred labels":
        scores = scoring.outputs(student.classifier, held)
        temperature = scoring.fit_temperature(scores, held.examples.data.labels)
        student = replace(student, output_temperature=temperature)
    return student, state


def _objective(task: Task) -> objectives.Objective:
    student, options = task.student.classifier, task.options
    if task.teacher is not None:
        return objectives.Offline(
            student, task.teacher, temperature=options.temperature, alpha=options.alpha
        )
    return objectives.Supervised(student, "hard" if task.student.outputs == "logits" else "centred")


def _taught(batches: Batches, teacher: Teacher) -> Batches:
    """With the teacher's logits: no augmentation changes the images, so one pass is exact."""
    n, k = len(batches.examples), len(batches.examples.data.classes)
    if 4 * n * k > data.RESIDENT_BYTES:
        return batches
    with progress.bar(len(batches), "teacher batches") as show:
        logits = scoring.outputs(teacher, batches, tick=show)
    return replace(batches, teacher_logits=torch.from_numpy(logits).to(batches.device))


def _tested(task: Task, student: Model) -> dict[str, float | None]:
    """Figures on the test set; its only use."""
    batches = _batches(task.source.test(student.preprocess), task.device)
    if batches is None:
        return {"test_accuracy": None}
    found = scoring.figures(student, batches, task.teacher)
    return {"test_accuracy": found.pop("accuracy"), **found}


def _batches(examples: Examples | None, device: torch.device) -> Batches | None:
    return None if examples is None else data.batches(examples, scoring.SCORE_BATCH, device)


def _student(options: Train, source: Source) -> Model:
    """The student before training, with the preprocessing of the images it will see."""
    if source.distilled is not None and options.preprocess is not None:
        raise UserError("a distilled set brings its preprocessing: leave --preprocess out")
    outputs = "centred labels" if source.distilled and options.teacher is None else "logits"
    if Path(options.student).is_dir():
        return replace(_earlier(options, source), outputs=outputs, output_temperature=1.0)
    name, shape, classes = options.student, source.shape, source.classes
    classifier = networks.build(
        name, shape, len(classes), seed=options.seed, pretrained=options.pretrained
    )
    if options.pretrained and options.preprocess is None and source.distilled is None:
        fitted, _ = networks.published(name, shape[-1])
    else:
        fitted = source.fit(options.preprocess)
    return Model(classifier, name, classes, shape, fitted, outputs)


def _earlier(options: Train, source: Source) -> Model:
    """The student of an earlier run, to be trained further."""
    folder = Path(options.student)
    if options.pretrained or options.preprocess is not None:
        raise UserError(
            f"{folder} brings its weights and its preprocessing: "
            "leave --pretrained and --preprocess out"
        )
    model = models.load_run(folder)
    models.check_fit(f"student {folder}", model, source.shape, source.classes)
    if source.distilled is not None and not source.distilled.preprocess.same_as(model.preprocess):
        raise UserError(
            f"student {folder} was trained with another preprocessing than the distilled set's: "
            "give it as --teacher, or train a new student"
        )
    return model


def _recipe(options: Train, distilled: bool, classifier: nn.Module) -> Recipe:
    layer_norm = any(isinstance(m, nn.LayerNorm) for m in classifier.modules())
    recipe = recipes.default(distilled=distilled, layer_norm=layer_norm)
    if options.epochs is not None:
        recipe = replace(recipe, epochs=options.epochs, steps=None)
    given = {name: getattr(options, name) for name in ("batch_size", "lr", "weight_decay")}
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})


def _start(folder: Path, options: Train) -> runs.Run:
    config, defaults = _config(options), _config(Train())
    return runs.start(
        folder, config, result=REPORT, resume=options.resume, defaults=defaults, free=_FREE
    )


def _config(options: Train) -> dict[str, Any]:
    """Options as JSON, with paths that stay right in another working directory."""
    config = {k: v for k, v in asdict(options).items() if k not in _PER_CALL}
    for name in ("data", "student", "teacher", "data_root"):
        value = config[name]
        if value is not None and Path(value).expanduser().exists() and value != "digits":
            config[name] = str(Path(value).expanduser().resolve())
    return config | {"data_root": str(config["data_root"])}


def _stored(run: runs.Run, options: Train) -> Train:
    stored = {k: v for k, v in run.config.items() if k in _config(options)}
    return replace(options, **stored | {"data_root": Path(stored["data_root"])})
