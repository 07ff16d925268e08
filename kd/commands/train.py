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

from dsdistill.harness import files, memory, stopping
from dsdistill.harness.errors import UserError, first_line
from dsdistill.harness.runs import metrics_file, progress, run_folder
from kd import recipes
from kd.assembly import (
    image_training,
    own_teacher,
    private_answers,
    run_inputs,
    teacher_chain,
    text_parts,
    text_training,
    training_parts,
)
from kd.assembly.training import Training
from kd.data.batching import BatchSource
from kd.models import seals
from kd.models.seals import REPORT
from kd.objectives import loss_checks, terms
from kd.objectives.schemes import Objective
from kd.options import TrainOptions
from kd.parallel import engine, heartbeat
from kd.recipe import Recipe
from kd.runs import continuation, curves, run_options
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
    taught = own_teacher.with_own_teacher(options)
    if taught.teacher != options.teacher and int(os.environ.get("RANK", "0")) == 0:
        progress.say(own_teacher.describe(taught))
    return replace(taught, out=options.out or _free_folder(options))


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
        loss_terms = terms.parse(options.given["loss"])
        if options.class_weights is not None:
            loss_checks.check_class_weights(loss_terms)
    if options.pate is not None:
        options = private_answers.ask(options)
        assert options.out is not None
    earlier: list[Path] = []
    links = teacher_chain.earlier_trainings(options, options.out)
    if options.recipe in recipes.STAGES and not all(map(_is_finished, links)):
        _check_last_stage(options)
    for link in links:
        assert link.out is not None
        started = (link.out / "config.json").exists()
        if _is_finished(link):
            run_options.require_same(link, seals.read(link.out, "config.json"))
        else:
            progress.say(f"first {link.out}: {_student_name(link)}")
            _train(replace(link, resume=started), earlier)
        earlier.append(link.out)
    return _train(options, earlier)


def _is_finished(options: TrainOptions) -> bool:
    out = options.out
    return out is not None and (out / "config.json").exists() and (out / REPORT).exists()


def _check_last_stage(options: TrainOptions) -> None:
    """Check the last training of a recipe with stages before the first one, which may take days.

    Its student is the one that the first stage begins with.

    Raises:
        UserError: If data, networks, loss or teacher do not fit together.
    """
    parts = _assemble(replace(options, out=None))
    objective = parts.build_objective()
    parts.check_options()
    parts.check_step(objective, parts.load())
    parts.check_teachers()


def _train(options: TrainOptions, earlier: Sequence[Path]) -> dict[str, Any]:
    """Run one training: assemble its parts, train, read the test set once, write the folder.

    Args:
        options: Options of this training.
        earlier: Folders of the finished trainings of its chain.
    """
    folder, parts = options.out, _assemble(options)
    assert folder is not None
    objective = parts.build_objective()
    parts.check_options()
    source = parts.load()
    parts.check_step(objective, source)
    if options.compile:
        parts.compile(objective, source)
    parts.check_teachers()
    hashes = parts.input_hashes()
    run_inputs.require_same_inputs(parts.on, hashes)
    for link in earlier:
        stored = seals.read(link, "config.json").get(run_folder.INPUTS_KEY, {})
        run_inputs.require_same_data(link, stored, hashes)
    batches = parts.prepare(objective, source)
    hashes |= {run_options.HASH_KEY: run_options.digest(options)}
    per_epoch = math.ceil(len(batches) / parts.recipe.accumulate)
    open_run = partial(_open_run, folder, options, hashes, parts.recipe, per_epoch)
    with engine.decide_on_main(parts.on, open_run) as run:
        run = replace(run, writes=parts.on.is_main_process)
        # A lost process is no error of the input: the run stays as it is, to be resumed.
        with heartbeat.watch(parts.on, folder), run.clean_up_on_error():
            if run.writes:
                files.write_json(run.folder / "recipe.json", _recipe_record(parts))
            state, spent = _fit(parts, objective, batches, run)
            parts = parts.finished(state)
            if not run.writes:
                return {}
            parts.save(run.folder)
            report = _report(parts, state) | spent
            seals.write(run.folder, REPORT, report, seals.SEALED_FILES)
        if run.folder != folder:
            continuation.adopt(folder)
            run.close()
            continuation.remove_empty(folder)
        curves.draw(folder)  # last: a picture must not cost a training
        return report


def _assemble(options: TrainOptions) -> Training:
    """Assemble a training of the kind of its data."""
    if text_parts.is_text(options):
        return text_training.assemble(options)
    return image_training.assemble(options)


def _recipe_record(parts: Training) -> dict[str, Any]:
    """The recipe as it was followed: with the networks trained, not the defaults of its name."""
    trained = {"student": parts.student_name, "teacher": ",".join(parts.teacher_names) or None}
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


def _report(parts: Training, state: TrainingState) -> dict[str, Any]:
    return {
        **parts.figures(state),
        **_latency(parts),
        "best_epoch": state.best_epoch,
        "epochs": state.epoch,
        "steps": state.step,
        "peak_memory": memory.peak(),
        "seed": parts.seed,
        "student": parts.student_name,
        "teacher": ",".join(parts.teacher_names) or None,
        "recipe": _recipe_record(parts),
        "device": str(parts.on.device),
        "processes": parts.on.num_processes,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "timm", "numpy", "accelerate")},
    }


def _latency(parts: Training) -> dict[str, float | int]:
    """The student's latency; empty, with a line that says why, where it does not run on a CPU.

    That is no error of the training, which may have taken days.
    """
    try:
        return parts.latency()
    except Exception as error:  # networks of a user raise anything
        progress.say(f"note: no latency: the student does not run on a CPU ({first_line(error)})")
        return {}


def _fit(
    parts: Training, objective: Objective, batches: BatchSource, run: run_folder.Run
) -> tuple[TrainingState, dict[str, float]]:
    """Train; return the last state and the seconds taken."""
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
            validate=parts.validator(),
            validation_images=parts.validation_count,
            saved=saved,
            save=save,
            stopping=lambda: flag.requested,
            log=log,
            show=show,
        )
    _report_early_stop(parts, state, len(batches))
    seconds = earlier + time.perf_counter() - start
    return state, {"seconds": seconds, "startup_seconds": startup}


def _report_early_stop(parts: Training, state: TrainingState, per_epoch: int) -> None:
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
    parts: Training, run: run_folder.Run, saved: PackedState | None, per_epoch: int
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


def _free_folder(options: TrainOptions) -> Path:
    """The first free `runs/kd-STUDENT-DATA-N`."""
    name = _student_name(options)
    short = Path(name).resolve().name if Path(name).is_dir() else re.sub(r"\W+", "-", name)
    return run_folder.next_free(f"kd-{short}-{Path(options.data).stem}")


def _student_name(options: TrainOptions) -> str:
    """Name of the student, or of the one that is trained where none is named."""
    named = recipes.by_name(options.recipe).student if options.recipe else None
    return options.student or named or training_parts.DEFAULT_STUDENT
