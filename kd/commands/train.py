"""`kd train`: a training from the command's options to the finished folder.

config.json              the options
recipe.json              the resolved recipe: no field is left to a default
metrics.jsonl, events.*  loss terms and validation figures of every round
checkpoint.safetensors   the last good state, for --resume
student.safetensors      the network's weights of the best round
model.json               description of the network (with preprocess.safetensors for ZCA)
continued/               more epochs of a finished run, until they replace its files
report.json              test figures and the checksums of all other files; its presence marks a
                         finished run
curves.png               plots of the figures of every round
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

from dsdistill.harness import files, memory, shell, stopping
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import metrics
from dsdistill.harness.runs import metrics_file, progress, run_folder
from kd import recipes
from kd.commands import (
    continuation,
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
from kd.data.files.file_source import FileSource
from kd.evaluation import scoring, teacher_check
from kd.models import networks, saved_models, seals
from kd.models.saved_models import Model
from kd.models.seals import REPORT
from kd.objectives import terms
from kd.objectives.schemes import Objective
from kd.options import TrainOptions
from kd.parallel import engine, heartbeat
from kd.recipe import VALIDATION_FIELDS, Recipe
from kd.training import checkpoint
from kd.training.checkpoint import PackedState, TrainingState
from kd.training.loop import train


def resolve(options: TrainOptions) -> TrainOptions:
    """Add a folder to the options; for a resumed run, restore those that it was started with.

    Args:
        options: Options that passed `TrainOptions.check`.

    Raises:
        UserError: If there is nothing to resume, or the options contradict the stored ones.
    """
    if options.resume:
        assert options.out is not None
        links = teacher_chain.earlier_trainings(options, options.out)
        folders = [link.out for link in links if link.out]
        if not (options.out / "config.json").exists() and any(map(Path.exists, folders)):
            return replace(options, resume=False)  # a chain that was stopped before its last link
        if continuation.is_complete(options.out):
            if options.given.keys() & set(continuation.LENGTHS):
                raise UserError(
                    f"{options.out} was stopped while it replaced its files: finish that first, "
                    f"with `kd train --resume --out {options.out}` alone"
                )
            return options
        return run_options.restore(options.out, options)
    if options.out is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("several processes of one training need --out, the folder they share")
    return replace(options, out=options.out or _free_folder(options))


def run(options: TrainOptions) -> dict[str, Any]:
    """Run the earlier trainings of a chain that are not finished, then the requested training.

    Args:
        options: Options from `resolve`.

    Returns:
        The content of the last training's `report.json`; empty in a process that does not write.

    Raises:
        UserError: If a name is unknown, a file is missing, parts do not fit together, a folder
            cannot be used, or the loss is not finite.
    """
    assert options.out is not None
    if options.resume and continuation.is_complete(options.out):
        return {} if int(os.environ.get("RANK", "0")) > 0 else continuation.finish(options.out)
    if not options.resume:
        run_folder.check_free(options.out, REPORT)
    if options.given.get("loss"):
        # Earlier trainings of a chain may take days: check the last one's loss before them.
        terms.parse(options.given["loss"])
    earlier: list[Path] = []
    for link in teacher_chain.earlier_trainings(options, options.out):
        assert link.out is not None
        started = (link.out / "config.json").exists()
        if started and (link.out / REPORT).exists():
            run_options.require_same(link, seals.read(link.out, "config.json"))
        else:
            progress.say(f"first {link.out}: {link.student or training_parts.DEFAULT_STUDENT}")
            _train(replace(link, resume=started), earlier)
        earlier.append(link.out)
    return _train(options, earlier)


def _train(options: TrainOptions, earlier: Sequence[Path]) -> dict[str, Any]:
    """Run one training: assemble its parts, train, read the test set once, write the folder.

    Args:
        options: Options of this training.
        earlier: Folders of the finished trainings of its chain.
    """
    folder, parts = options.out, training_parts.assemble(options)
    assert folder is not None
    objective = training_parts.build_objective(parts, options)
    _check_used(options, parts)
    source = training_batches.load(parts)
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
    per_epoch = math.ceil(len(batches) / parts.recipe.accumulate)
    open_run = partial(_open_run, folder, options, hashes, parts.recipe, per_epoch)
    with engine.decide_on_main(parts.on, open_run) as run:
        run = replace(run, writes=parts.on.is_main_process)
        # A lost process is no error of the input: the run stays as it is, to be resumed.
        with heartbeat.watch(parts.on, folder), run.clean_up_on_error():
            if run.writes:
                files.write_json(run.folder / "recipe.json", _recipe_record(parts))
            student, state, spent = _fit(parts, objective, batches, run)
            if not run.writes:
                return {}
            saved_models.save_run(run.folder, student)
            report = _report(parts, student, state) | spent
            seals.write(run.folder, REPORT, report, seals.SEALED_FILES)
        if run.folder != folder:
            continuation.adopt(folder)
            run.close()
            continuation.remove_empty(folder)
        curves.draw(folder)  # last: a picture must not cost a training
        return report


def _recipe_record(parts: TrainingParts) -> dict[str, Any]:
    """The recipe as it was followed: with the networks trained, not the defaults of its name."""
    trained = {"student": parts.student.name, "teacher": ",".join(parts.teacher_names) or None}
    return asdict(parts.recipe) | trained


def _open_run(
    folder: Path,
    options: TrainOptions,
    hashes: Mapping[str, str],
    recipe: Recipe,
    per_epoch: int,
) -> run_folder.Run:
    """Open and lock the folder of a new run, or of one that was started with the same inputs.

    A finished run that is continued is opened in a folder inside it.
    """
    storage = run_options.STORAGE
    where, earlier, done = folder, {}, 0
    if options.resume:
        where = continuation.work_folder(folder)
        now = where if continuation.is_begun(folder) else folder
        earlier = continuation.changed_lengths(now, options)
        if earlier:
            done = continuation.check(now, folder, recipe, per_epoch)
        if where != folder:
            continuation.begin(folder)
    run = run_folder.start(
        where,
        storage.to_json(options),
        result=REPORT,
        resume=options.resume,
        defaults=storage.to_json(TrainOptions()),
        free=(*storage.free, *continuation.LENGTHS),
    )
    try:
        if earlier:
            key = run_options.HASH_KEY
            continuation.store_lengths(run, earlier, done, hashes[key], key)
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
    if options.validation_fraction is not None and parts.source.brings_validation:
        line = (
            f"--validation-fraction has no effect on {options.data}, which has a validation part "
            "of its own"
        )
        if not options.resume:
            raise UserError(f"{line}: leave it out")
        progress.say(f"note: {line}")  # of a run that an earlier version has started


def _check_teachers(options: TrainOptions, parts: TrainingParts) -> None:
    """Report the accuracy of each teacher on validation images, or else on training images."""
    say = progress.say if parts.on.is_main_process else lambda line: None
    for line in parts.source.missing_classes():
        say(f"note: {line}")
    batches: EvaluationBatches | None = _validation_batches(parts)
    part = "validation"
    if batches is None:
        say(_describe_no_validation(options, parts))
    if batches is None and parts.teachers:
        fitted, device = parts.student.preprocess, parts.on.device
        shuffled = parts.source.shuffled(parts.recipe, fitted, device, parts.readers)
        batches = None if shuffled is None else teacher_check.FirstImages(shuffled)
        part = "training"
    minimum = options.min_teacher_accuracy
    if parts.teachers and batches is None:
        say("the teachers are not checked: there are no real images to check them on")
        if minimum is not None:
            raise UserError(
                f"--min-teacher-accuracy {minimum:g} needs real images to check the teacher on, "
                f"and there are none ({parts.source.note}): leave it out"
            )
    elif batches is not None:
        more = partial(_training_images, parts) if part == "validation" else _none
        check = partial(teacher_check.check, minimum=minimum, part=part, more=more, say=say)
        for name, teacher in zip(parts.teacher_names, parts.teachers, strict=True):
            check(name, teacher, batches)


def _training_images(parts: TrainingParts, count: int) -> EvaluationBatches | None:
    """At most `count` training images, spread over the classes, in evaluation views."""
    fitted, device = parts.student.preprocess, parts.on.device
    return parts.source.sample(count, parts.recipe, fitted, device, parts.readers)


def _none(count: int) -> None:
    """Add no images: the teacher is checked on training images already."""


def _describe_no_validation(options: TrainOptions, parts: TrainingParts) -> str:
    """Say in one line what a training without validation images lacks.

    Raises:
        UserError: If an option is given that needs validation images.
    """
    for name in VALIDATION_FIELDS:
        if name in options.given:
            raise UserError(
                f"{shell.flag(name)} has no effect without validation images: "
                "leave it out, or hold some out with --validation-fraction"
            )
    fraction = data_source.fraction_or_default(options.validation_fraction)
    lost = ["the weights of the last epoch are saved, not of the best"]
    if parts.recipe.average_best > 1:
        lost.append(f"and not the mean of {parts.recipe.average_best} epochs")
    if not parts.student.gives_logits:
        lost.append("and its outputs are not calibrated")
    if parts.source.distilled is not None and parts.source.note:
        reason = "there are no real images"
    elif parts.source.distilled is not None or fraction == 0:
        reason = "none are held out"
    else:
        reason = f"a share of {fraction:g} of so few images of each class is none"
    return f"no validation images ({reason}): {', '.join(lost)}"


def _report(parts: TrainingParts, student: Model, state: TrainingState) -> dict[str, Any]:
    return {
        **_test_metrics(parts, student),
        "validation_accuracy": _validation_accuracy(parts, student, state),
        "best_epoch": state.best_epoch,
        "epochs": state.epoch,
        "steps": state.step,
        "parameters": networks.parameter_count(student.classifier),
        "peak_memory": memory.peak(),
        "seed": parts.seed,
        "data": parts.source.name,
        "train_images": parts.source.count,
        "student": student.name,
        "teacher": ",".join(parts.teacher_names) or None,
        "recipe": _recipe_record(parts),
        "output_temperature": student.output_temperature,
        "note": parts.source.note,
        "device": str(parts.on.device),
        "processes": parts.on.num_processes,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "timm", "numpy", "accelerate")},
    }


def _fit(
    parts: TrainingParts,
    objective: Objective,
    batches: BatchSource,
    run: run_folder.Run,
) -> tuple[Model, TrainingState, dict[str, float]]:
    """Train; return the student with its best weights, the last state, and the seconds taken."""
    student = parts.student
    validation = _validation_batches(parts)

    def validate(network: nn.Module) -> Mapping[str, float]:
        assert validation is not None
        classifier = student.classifier.with_network(network)
        return scoring.validate(classifier, validation, parts.on, logits=student.gives_logits)

    saved = run.load_state()
    if saved:
        checkpoint.check(saved, parts.recipe)
        saved = checkpoint.adapt_to_length(saved, parts.recipe)
    earlier = saved[1].get("seconds", 0.0) if saved else 0.0
    start = time.perf_counter()
    startup = time.time() - psutil.Process().create_time()

    def save(state: PackedState) -> None:
        arrays, meta = state
        seconds = earlier + time.perf_counter() - start
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
            parts.seed,
            on=parts.on,
            validate=validate if validation else None,
            validation_images=validation_images,
            saved=saved,
            save=save,
            stopping=lambda: flag.requested,
            log=log,
            show=show,
        )
    _report_early_stop(parts, state, len(batches))
    student.classifier.network.load_state_dict(state.best)
    if validation and not student.gives_logits:
        outputs, labels = scoring.outputs_and_labels(student.classifier, validation)
        temperature = metrics.fit_temperature(outputs, labels)
        student = replace(student, output_temperature=temperature)
    seconds = earlier + time.perf_counter() - start
    return student, state, {"seconds": seconds, "startup_seconds": startup}


def _report_early_stop(parts: TrainingParts, state: TrainingState, per_epoch: int) -> None:
    """Say in one line if patience has ended a training before its last step."""
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
) -> Iterator[tuple[metrics_file.Metrics | None, progress.ShowProgress | None]]:
    """Open the log of figures and the progress bar, in the process that writes."""
    if not run.writes:
        yield None, None
        return
    steps = parts.recipe.total_steps(math.ceil(per_epoch / parts.recipe.accumulate))
    done = saved[1]["step"] if saved else 0
    with (
        metrics_file.Metrics(run.folder, resume_from=done if run.resumed else None) as log,
        progress.bar(steps, start=done) as show,
    ):
        yield log, show


def _test_metrics(parts: TrainingParts, student: Model) -> dict[str, Any]:
    """Measure the student on the test set, which is used only here."""
    fitted, on = student.preprocess, parts.on
    batches = parts.source.test(parts.recipe, fitted, on.device, parts.readers)
    if batches is None:
        return {"test_accuracy": None, "test_images": 0}
    figures = scoring.evaluate(
        student.classifier,
        batches,
        dict(zip(parts.teacher_names, parts.teachers, strict=True)),
        temperature=student.output_temperature,
        classes=parts.source.classes,
    )
    for note in figures.pop("notes"):
        progress.say(note)
    accuracy, images = figures.pop("accuracy"), figures.pop("images")
    return {"test_accuracy": accuracy, "test_images": images, **figures}


def _validation_accuracy(
    parts: TrainingParts, student: Model, state: TrainingState
) -> float | None:
    """Validation accuracy of the saved weights; a mean of several epochs is measured again."""
    batches = _validation_batches(parts)
    if len(state.kept) == 1 or batches is None:
        return state.best_accuracy
    return scoring.evaluate(student.classifier, batches)["accuracy"]


def _validation_batches(parts: TrainingParts) -> EvaluationBatches | None:
    fitted, on = parts.student.preprocess, parts.on
    return parts.source.validation(parts.recipe, fitted, on.device, parts.readers)


def _free_folder(options: TrainOptions) -> Path:
    """The first free `runs/kd-STUDENT-DATA-N`."""
    named = recipes.by_name(options.recipe).student if options.recipe else None
    name = options.student or named or training_parts.DEFAULT_STUDENT
    short = Path(name).resolve().name if Path(name).is_dir() else re.sub(r"\W+", "-", name)
    return run_folder.next_free(f"kd-{short}-{Path(options.data).stem}")
