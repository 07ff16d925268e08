"""A training from the command's options to the finished folder.

config.json              the options
recipe.json              the resolved recipe: no field is left to a default
metrics.jsonl, events.*  loss terms and validation figures of every round
checkpoint.safetensors   the last good state, for --resume
student.safetensors      the network's weights of the best round
model.json               what is needed to use them (and preprocess.safetensors for ZCA)
report.json              test figures, and the checksums of all other files; a folder that holds it
                         is finished
curves.png               the figures of every round as a picture
"""

import math
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from torch import nn

from dsdistill.harness import memory, stopping
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import metrics
from dsdistill.harness.runs import progress, run_folder
from kd import recipes
from kd.commands import (
    curves,
    run_inputs,
    run_options,
    teacher_chain,
    training_batches,
    training_parts,
)
from kd.commands.training_parts import TrainingParts
from kd.data import data_source
from kd.data.batching import BatchSource, EvaluationBatches
from kd.data.files import archives
from kd.data.files.file_source import FileSource
from kd.evaluation import scoring, teacher_check
from kd.models import networks, saved_models, seals
from kd.models.saved_models import Model
from kd.models.seals import REPORT
from kd.objectives import loss_spec, terms
from kd.objectives.schemes import Objective
from kd.options import TrainOptions
from kd.parallel import engine, heartbeat
from kd.training import checkpoint
from kd.training.checkpoint import PackedState, TrainingState
from kd.training.loop import train


def resolve(options: TrainOptions) -> TrainOptions:
    """The options with a folder; of a run that is resumed, those that it was started with.

    Args:
        options: That passed `Train.check`.

    Raises:
        UserError: If there is nothing to resume, or the options contradict the stored ones.
    """
    if options.resume:
        assert options.out is not None
        begun = [
            link.out for link in teacher_chain.earlier_trainings(options, options.out) if link.out
        ]
        if not (options.out / "config.json").exists() and any(map(Path.exists, begun)):
            return replace(options, resume=False)  # a chain that was stopped before its last link
        return run_options.restore(options.out, options)
    if options.out is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("several processes of one training need --out, the folder they share")
    return replace(options, out=options.out or _free_folder(options))


def run(options: TrainOptions) -> dict[str, Any]:
    """The whole of `kd train`: the trainings of a chain that come first, then the one asked for.

    Args:
        options: As `resolve` gives them.

    Returns:
        What its `report.json` holds; nothing in a process that does not write.

    Raises:
        UserError: If anything is unknown, missing or does not fit together, a folder cannot be
            used, or the loss is not finite.
    """
    assert options.out is not None
    if not options.resume:
        run_folder.check_free(options.out, REPORT)
    if options.given.get("loss"):
        loss_spec.parse(
            options.given["loss"], terms.TERM_FUNCTIONS
        )  # its last link may be far away
    earlier: list[Path] = []
    for link in teacher_chain.earlier_trainings(options, options.out):
        assert link.out is not None
        begun = (link.out / "config.json").exists()
        if begun and (link.out / REPORT).exists():
            run_options.require_same(link, seals.read(link.out, "config.json"))
        else:
            progress.say(f"first {link.out}: {link.student or training_parts.DEFAULT_STUDENT}")
            _train(replace(link, resume=begun), earlier)
        earlier.append(link.out)
    return _train(options, earlier)


def _train(options: TrainOptions, earlier: Sequence[Path]) -> dict[str, Any]:
    """One training: find all its parts, train, read the test set once, write the folder.

    Args:
        options: Of it.
        earlier: Folders of the trainings of its chain that are finished.
    """
    folder, parts = options.out, training_parts.assemble(options)
    assert folder is not None
    objective = training_parts.build_objective(parts, options)
    _check_used(options, parts)
    source = training_batches.load(parts, options)
    training_parts.check_step(parts, objective, source.sizes)
    if options.compile:
        parts.student.classifier.network.compile()
    _check_teachers(options, parts)
    hashes = run_inputs.hashes(parts, options)
    run_inputs.require_same_inputs(parts.on, hashes)
    for link in earlier:
        stored = seals.read(link, "config.json").get(run_folder.INPUTS_KEY, {})
        run_inputs.require_same_data(link, stored, hashes)
    batches = training_batches.prepare(parts, options, objective, source)
    hashes |= {run_options.HASH_KEY: run_options.digest(options)}
    with engine.decide_on_main(parts.on, lambda: _open_run(folder, options, hashes)) as run:
        run = replace(run, writes=parts.on.is_main_process)
        if run.writes:
            run_folder.write_json(folder / "recipe.json", asdict(parts.recipe))
        with heartbeat.watch(parts.on, folder):
            student, state, spent = _fit(options, parts, objective, batches, run)
        if not run.writes:
            return {}
        saved_models.save_run(folder, student)
        report = _report(options, parts, student, state) | spent
        seals.write(folder, REPORT, report, seals.SEALED_FILES)
        curves.draw(folder)  # last: a picture must not cost a training
        return report


def _open_run(folder: Path, options: TrainOptions, hashes: Mapping[str, str]) -> run_folder.Run:
    """The run's folder, locked, of a run that was started with the same inputs or starts now."""
    values, defaults = run_options.to_json(options), run_options.to_json(TrainOptions())
    run = run_folder.start(
        folder,
        values,
        result=REPORT,
        resume=options.resume,
        defaults=defaults,
        free=run_options.MAY_DIFFER_ON_RESUME,
    )
    try:
        run.require_same(hashes)
    except BaseException:
        run.close()
        raise
    return run


def _check_used(options: TrainOptions, parts: TrainingParts) -> None:
    """Refuse options that have no effect on this kind of data.

    Raises:
        UserError: If one is given.
    """
    streamed = isinstance(parts.source, FileSource)
    if options.workers is not None and not streamed:
        raise UserError("--workers has no effect without --augment imagenet: leave it out")
    if options.validation_fraction is not None and archives.is_timm_name(options.data):
        raise UserError(
            f"--validation-fraction has no effect on {options.data}, which has a validation part "
            "of its own: leave it out"
        )


def _check_teachers(options: TrainOptions, parts: TrainingParts) -> None:
    """Say how good each teacher is, on validation images or else on training images."""
    say = progress.say if parts.on.is_main_process else lambda line: None
    held: EvaluationBatches | None = _validation_batches(options, parts)
    part = "validation"
    if held is None:
        say(_describe_no_validation(options, parts))
    if held is None and parts.teachers:
        fitted, device = parts.student.preprocess, parts.on.device
        shuffled = parts.source.shuffled(parts.recipe, fitted, device, options.readers)
        held, part = None if shuffled is None else teacher_check.FirstImages(shuffled), "training"
    minimum = options.min_teacher_accuracy
    if parts.teachers and held is None:
        say("the teachers are not judged: there are no real images to judge them on")
        if minimum is not None:
            raise UserError(
                f"--min-teacher-accuracy {minimum:g} needs real images to judge the teacher on, "
                f"and there are none ({parts.source.note}): leave it out"
            )
    elif held is not None:
        more = partial(_training_images, options, parts) if part == "validation" else _none
        for name, teacher in zip(parts.taught_by, parts.teachers, strict=True):
            teacher_check.check(name, teacher, held, minimum=minimum, part=part, more=more, say=say)


def _training_images(
    options: TrainOptions, parts: TrainingParts, count: int
) -> EvaluationBatches | None:
    """Up to so many training images, spread over the classes, as they are judged."""
    fitted, device = parts.student.preprocess, parts.on.device
    return parts.source.sample(count, parts.recipe, fitted, device, options.readers)


def _none(count: int) -> None:
    """No further images: those that are judged are training images already."""


def _describe_no_validation(options: TrainOptions, parts: TrainingParts) -> str:
    """What falls away where no image is held out, in one line.

    Raises:
        UserError: If an option is given that needs validation images.
    """
    for name in ("metric", "average_best", "patience", "validate_every"):
        if name in options.given:
            raise UserError(
                f"--{name.replace('_', '-')} has no effect without validation images: "
                "leave it out, or hold some out with --validation-fraction"
            )
    fraction = data_source.fraction_or_default(options.validation_fraction)
    lost = ["the weights of the last epoch are saved, not of the best"]
    if parts.recipe.average_best > 1:
        lost.append(f"and not the mean of {parts.recipe.average_best} epochs")
    if parts.student.outputs == "centred labels":
        lost.append("and its outputs are not calibrated")
    if parts.source.distilled is not None and parts.source.note:
        why = "there are no real images"
    elif parts.source.distilled is not None or fraction == 0:
        why = "none are held out"
    else:
        why = f"a share of {fraction:g} of so few images of each class is none"
    return f"no validation images ({why}): {', '.join(lost)}"


def _report(
    options: TrainOptions, parts: TrainingParts, student: Model, state: TrainingState
) -> dict[str, Any]:
    return {
        **_test_metrics(options, parts, student),
        "validation_accuracy": _validation_accuracy(options, parts, student, state),
        "best_epoch": state.best_epoch,
        "epochs": state.epoch,
        "steps": state.step,
        "parameters": networks.parameter_count(student.classifier),
        "peak_memory": memory.peak(),
        "seed": options.seed,
        "data": parts.source.name,
        "train_images": parts.source.count,
        "student": student.name,
        "teacher": ",".join(parts.taught_by) or None,
        "recipe": asdict(parts.recipe),
        "output_temperature": student.output_temperature,
        "note": parts.source.note,
        "device": str(parts.on.device),
        "processes": parts.on.num_processes,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "timm", "numpy", "accelerate")},
    }


def _fit(
    options: TrainOptions,
    parts: TrainingParts,
    objective: Objective,
    batches: BatchSource,
    run: run_folder.Run,
) -> tuple[Model, TrainingState, dict[str, float]]:
    """The student with its best weights, the last state of its training, and what it took."""
    student = parts.student
    held = _validation_batches(options, parts)

    def validate(network: nn.Module) -> Mapping[str, float]:
        assert held is not None
        judged = student.classifier.with_network(network)
        return scoring.validate(judged, held, parts.on, logits=student.outputs == "logits")

    saved = run.load_state()
    if saved:
        checkpoint.check(saved, parts.recipe)
    earlier = saved[1].get("seconds", 0.0) if saved else 0.0
    began = time.perf_counter()
    startup = time.time() - psutil.Process().create_time()

    def save(state: PackedState) -> None:
        arrays, meta = state
        seconds = earlier + time.perf_counter() - began
        run.save_state(arrays, {**meta, "recipe": asdict(parts.recipe), "seconds": seconds})

    validation_images = parts.source.validation_count
    with (
        stopping.watch() as flag,
        _log_and_progress(parts, run, saved, len(batches)) as (log, show),
    ):
        state = train(
            objective,
            batches,
            parts.recipe,
            options.seed,
            on=parts.on,
            validate=validate if held else None,
            validation_images=validation_images,
            saved=saved,
            save=save,
            stopping=lambda: flag.requested,
            log=log,
            show=show,
        )
    _report_early_stop(parts, state, len(batches))
    student.classifier.network.load_state_dict(state.best)
    if held and student.outputs == "centred labels":
        temperature = metrics.fit_temperature(*scoring.outputs_and_labels(student.classifier, held))
        student = replace(student, output_temperature=temperature)
    seconds = earlier + time.perf_counter() - began
    return student, state, {"seconds": seconds, "startup_seconds": startup}


def _report_early_stop(parts: TrainingParts, state: TrainingState, per_epoch: int) -> None:
    """One line where patience has ended a training before its last step."""
    recipe = parts.recipe
    total = recipe.total_steps(math.ceil(per_epoch / recipe.accumulate))
    if state.step < total and parts.on.is_main_process:
        waited = f"{recipe.patience} validation{'' if recipe.patience == 1 else 's'}"
        progress.say(
            f"stopped at step {state.step} of {total}: no better validation {recipe.metric} in "
            f"{waited}"
        )


@contextmanager
def _log_and_progress(
    parts: TrainingParts, run: run_folder.Run, saved: PackedState | None, per_epoch: int
) -> Iterator[tuple[run_folder.Metrics | None, progress.ShowProgress | None]]:
    """Where figures go and how progress is shown, in the process that writes."""
    if not run.writes:
        yield None, None
        return
    steps = parts.recipe.total_steps(math.ceil(per_epoch / parts.recipe.accumulate))
    done = saved[1]["step"] if saved else 0
    with (
        run_folder.Metrics(run.folder, resume_from=done if run.resumed else None) as log,
        progress.bar(steps, start=done) as show,
    ):
        yield log, show


def _test_metrics(options: TrainOptions, parts: TrainingParts, student: Model) -> dict[str, Any]:
    """Figures on the test set; its only use."""
    fitted, on = student.preprocess, parts.on
    batches = parts.source.test(parts.recipe, fitted, on.device, options.readers)
    if batches is None:
        return {"test_accuracy": None, "test_images": 0}
    found = scoring.evaluate(
        student.classifier,
        batches,
        dict(zip(parts.taught_by, parts.teachers, strict=True)),
        temperature=student.output_temperature,
        classes=parts.source.classes,
    )
    for note in found.pop("notes"):
        progress.say(note)
    return {"test_accuracy": found.pop("accuracy"), "test_images": found.pop("images"), **found}


def _validation_accuracy(
    options: TrainOptions, parts: TrainingParts, student: Model, state: TrainingState
) -> float | None:
    """Of the weights that are saved: a mean of several epochs' is judged once more."""
    held = _validation_batches(options, parts)
    if len(state.kept) == 1 or held is None:
        return state.best_accuracy
    return scoring.evaluate(student.classifier, held)["accuracy"]


def _validation_batches(options: TrainOptions, parts: TrainingParts) -> EvaluationBatches | None:
    fitted, on = parts.student.preprocess, parts.on
    return parts.source.validation(parts.recipe, fitted, on.device, options.readers)


def _free_folder(options: TrainOptions) -> Path:
    """The first free `runs/kd-STUDENT-DATA-N`."""
    named = recipes.by_name(options.recipe).student if options.recipe else None
    name = options.student or named or training_parts.DEFAULT_STUDENT
    short = Path(name).resolve().name if Path(name).is_dir() else re.sub(r"\W+", "-", name)
    return run_folder.next_free(f"kd-{short}-{Path(options.data).stem}")
