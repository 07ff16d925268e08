"""`dsdistill evaluate` and `dsdistill report`: learners of both frameworks on every kind of data.

Layout of the folder of an evaluation:

    config.json   the options
    results/      one small file per training, from which a stopped evaluation continues
    images.png    the distilled images beside real ones
    plots/        every plot as PNG and SVG
    report.json   all figures; report.md and report.html show them. Written last
"""

import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dsdistill.commands import distil, reproduce, training_data
from dsdistill.commands.evaluation_parts import EvaluationParts, assemble, code_options
from dsdistill.harness import files, machine, memory, shell, stopping
from dsdistill.harness.data import origin
from dsdistill.harness.data.labeled_images import LabeledImages, draw_per_class
from dsdistill.harness.data.preprocess import is_features
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import controls
from dsdistill.harness.evaluation.feature_learner import FeatureLearner
from dsdistill.harness.evaluation.majority import common_class, constant_answer
from dsdistill.harness.evaluation.protocol import Arm, Learner, evaluate, stored_bytes
from dsdistill.harness.evaluation.result_cache import ResultCache
from dsdistill.harness.evaluation.results import Result
from dsdistill.harness.reports import image_grid, page, report, verdict, wording
from dsdistill.harness.reports.image_grid import GridSide
from dsdistill.harness.reports.report import Report
from dsdistill.harness.reports.write import write_report
from dsdistill.harness.runs import progress, run_folder
from dsdistill.harness.runs.options import Storage
from dsdistill.harness.text import console, printable
from dsdistill.options import EvaluateOptions, ReportOptions

# What a file names as trusted is not: `trust_module` is that of this call.
STORAGE = Storage(unstored=("out", "resume"), free=("data_root", "cache", "device", "trust_module"))
VERSIONS = ("dsdistill", "jax", "numpy", "scikit-learn", "scipy", "timm", "torch")


def run(options: EvaluateOptions) -> Path:
    """Evaluate a distilled set, print the comparison, and return the folder of the report.

    Raises:
        UserError: If an option or the data break a rule, before anything is trained.
    """
    options = _restored(options) if options.resume else options
    parts = assemble(options)
    parent = options.run if options.run.is_dir() else options.run.parent
    out = options.out or run_folder.next_free("evaluation", parent)
    folder = run_folder.start(
        out,
        STORAGE.to_json(options),
        result=report.FILE_NAME,
        resume=options.resume,
        defaults=STORAGE.to_json(EvaluateOptions(options.run)),
        free=STORAGE.free,
    )
    typed = {name: getattr(options, name) for name in code_options(options)}
    typed["trust_module"] = options.trust_module
    command = shell.resume_line("dsdistill evaluate", out, str(options.run), **typed)
    with folder, stopping.explain_stop(command, out / report.FILE_NAME):
        began = time.monotonic()
        cache = ResultCache(out / "results", options.cache, shared_arms=controls.CONTROLS)
        results = run_trainings(parts, list(range(options.seeds)), cache)
        draw_images(out, parts)
        line = reproduce.evaluate_line(options)
        write_report(out, build_report(parts, results, time.monotonic() - began, line))
    _print(report.load(out), out)
    return out


def _restored(options: EvaluateOptions) -> EvaluateOptions:
    """The options that the evaluation to continue was started with.

    Raises:
        UserError: If there is none, options of this call contradict its own, or it names code that
            this call does not name.
    """
    if options.out is None:
        raise UserError("--resume needs --out, the folder of the evaluation to continue")
    stored = run_folder.stored_options(
        options.out,
        STORAGE.to_json(options),
        result=report.FILE_NAME,
        defaults=STORAGE.to_json(EvaluateOptions(options.run)),
        free=STORAGE.free,
    )
    restored = STORAGE.from_json(options, options.out, stored)
    distil.require_typed_code(options.out, options, restored, code_options(restored))
    return restored


def compare(options: ReportOptions) -> Path:
    """Write one page that compares any number of evaluations; return its path.

    Raises:
        UserError: If no folder is given, or one holds no evaluation.
    """
    if not options.runs:
        raise UserError("give at least one folder of an evaluation, or of a run that has one")
    folders = [_newest(run) for run in options.runs]
    reports = [report.load(folder) for folder in folders]
    pictures = {
        f"{evaluation.title}: distilled images beside real ones": (
            folder / report.IMAGES_FILE
        ).read_bytes()
        for folder, evaluation in zip(folders, reports, strict=True)
        if (folder / report.IMAGES_FILE).exists()
    }
    title = reports[0].title if len(reports) == 1 else f"{len(reports)} evaluations"
    text = page.render(reports, title=title, pictures=pictures)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(options.out, text.encode())
    return options.out


def _newest(run: Path) -> Path:
    """The folder itself if it is an evaluation's, else the newest evaluation inside it."""
    if (run / report.FILE_NAME).exists():
        return run
    inside = sorted(run.glob(f"*/{report.FILE_NAME}"), key=lambda path: path.stat().st_mtime)
    if not inside:
        raise UserError(f"{run} holds no evaluation: make one with `dsdistill evaluate {run}`")
    return inside[-1].parent


def run_trainings(
    parts: EvaluationParts, seeds: list[int], cache: ResultCache | None
) -> list[Result]:
    """Train every learner on every arm, with progress.

    Args:
        parts: The assembled evaluation.
        seeds: Seeds of the trainings.
        cache: Results of earlier evaluations, to which these are added; None for no cache.
    """
    trainings, results = parts.trainings, []
    with progress.bar(len(trainings) * len(seeds), unit="trainings") as show:

        def on_result(result: Result) -> None:
            results.append(result)
            figure = "failed" if result.accuracy is None else f"{result.accuracy:.1%}"
            show(len(results), **{f"{result.learner} on {result.arm}": figure})

        for learner, augmented, arm in trainings:
            if arm.duplicate_of is not None:
                for result in _copy_results(results, learner, augmented, arm):
                    on_result(result)
                continue
            evaluate(
                learner,
                arm,
                parts.held_out,
                seeds,
                augmented=augmented,
                cache=cache,
                on_result=on_result,
            )
    return results


def _copy_results(
    results: Sequence[Result], learner: Learner, augmented: bool, arm: Arm
) -> list[Result]:
    """Copy the results of the arm that has the same images and labels, at no cost of time."""
    key, size = (learner.name, augmented, arm.duplicate_of), stored_bytes(arm.draw(0))
    return [
        replace(result, arm=arm.name, bytes=size, train_seconds=0.0, tune_seconds=0.0)
        for result in results
        if (result.learner, result.augmented, result.arm) == key
    ]


def draw_images(out: Path, parts: EvaluationParts) -> None:
    """Draw the set beside real images of the same classes; features have no picture."""
    distilled, train = parts.distilled, parts.train
    if is_features(distilled.images.shape[1:]):
        return
    rng = np.random.default_rng(0)
    rows = draw_per_class(train.data, training_data.images_per_class(distilled), rng)
    left = GridSide("real", train.images(rows), train.data.labels[rows])
    right = GridSide("distilled", distilled.images, distilled.hard_labels)
    classes, fitted = distilled.classes, distilled.preprocess
    image_grid.write(out / report.IMAGES_FILE, left, right, classes, fitted)


def build_report(
    parts: EvaluationParts,
    results: Sequence[Result],
    seconds: float,
    command: str | None = None,
) -> Report:
    """Build the report of an evaluation.

    Args:
        parts: The assembled evaluation.
        results: One result per training.
        seconds: Duration of the evaluation.
        command: Command line that repeats it; None for a call from Python.
    """
    source, splits = origin.read_provenance(parts.distilled), parts.splits
    kernel = f" with {source.kernel}" if source.kernel else ""
    distil = None
    if source.config is not None:
        kind = parts.distilled.preprocess.kind
        distil = reproduce.distil_line(source.method, source.config, whitened=kind == "zca")
    return Report(
        title=f"{source.method}{kernel} on {splits.name}, {len(parts.distilled)} images",
        notes=[*source.notes, *_notes(parts, results)],
        commands=[line for line in (distil, command) if line],
        classes=list(parts.distilled.classes),
        data={
            "name": splits.name,
            "sha256": splits.digest,
            "train": len(splits.train),
            "validation": len(splits.validation),
            "test": len(splits.test),
        },
        images_per_class=training_data.images_per_class(parts.distilled),
        results=tuple(results),
        distilled=_describe_set(parts),
        seconds=seconds,
        peak_memory=memory.peak(),
        machine=machine.describe(_accelerators(parts.learners)),
        versions={"python": platform.python_version()}
        | {name: metadata.version(name) for name in VERSIONS},
    )


def _accelerators(learners: Sequence[Learner]) -> list[str]:
    """Accelerators that the learners compute on, each once."""
    names = (getattr(learner, "accelerator", None) for learner in learners)
    return list(dict.fromkeys(filter(None, names)))


def _describe_set(parts: EvaluationParts) -> dict[str, Any]:
    source = origin.read_provenance(parts.distilled)
    full, size = parts.splits.train, parts.distilled.nbytes
    full_size = len(full) * (int(np.prod(full.shape)) * full.store.itemsize + 1)  # 1 for the label
    return {
        "method": source.method,
        "kernel": source.kernel,
        "seconds": source.seconds,
        "peak_memory": source.peak_memory,
        "metrics": dict(source.metrics),
        "images": len(parts.distilled),
        "bytes": size,
        "compression": full_size / size,
    }


def _notes(parts: EvaluationParts, results: Sequence[Result]) -> list[str]:
    whole, notes = len(parts.splits.train), []
    if any(arm.duplicate_of for arm in parts.arms):
        notes.append("The stored labels are hard labels: one training serves both.")
    limited = {r.learner: r.images for r in results if r.arm == "full" and r.images < whole}
    for learner, images in limited.items():
        notes.append(
            f"{learner} on full data: a class-balanced draw of {images} of {whole} images, since "
            "its exact solution of all needs too much memory."
        )
    notes += [*_further_notes(parts), *_same_draw_notes(parts), *_feature_notes(parts.learners)]
    return [*notes, *majority_notes(results, parts.splits.test), *_hints(parts, results)]


def _further_notes(parts: EvaluationParts) -> list[str]:
    """What each further set is, and what of it is not as of the first one."""
    held_out, notes = origin.validation_fraction(parts.distilled), []
    for name, other in parts.further.items():
        source, kind = origin.read_provenance(other), other.preprocess.kind
        kernel = f" with {source.kernel}" if source.kernel else ""
        words = [f"{name}: {source.method}{kernel}, {len(other)} images of the same data"]
        if not other.preprocess.same_as(parts.distilled.preprocess):
            words.append(f"brought from the preprocessing {kind} to that of the first set")
        if (source.validation_fraction or 0) < held_out:
            words.append("perhaps made of images that are held out here for validation")
        notes.append(", ".join(words) + ".")
    return notes


def _feature_notes(learners: Sequence[Learner]) -> list[str]:
    """A note on each backbone whose features learners are trained on."""
    spaces = [learner.space for learner in learners if isinstance(learner, FeatureLearner)]
    return [
        f"@{space.backbone.name}: {space.backbone.width} features of all images by this network "
        f"(weights {space.backbone.identity['weights_sha256'][:12]}), centred on the "
        f"{len(space.train)} training images."
        for space in dict.fromkeys(spaces)
    ]


def majority_notes(results: Sequence[Result], test: LabeledImages) -> list[str]:
    """Notes on accuracies that only reflect how common one class is among the test images."""
    answered: dict[tuple[str, str], set[int]] = {}
    for result in results:
        if result.confusion is not None:
            answers = np.flatnonzero(np.asarray(result.confusion).sum(0))
            answered.setdefault((result.learner, result.arm), set()).update(map(int, answers))
    constant = (
        constant_answer(f"{learner} on {arm}", answers, test.labels, test.classes)
        for (learner, arm), answers in answered.items()
    )
    return [note for note in (common_class(test.labels, test.classes), *constant) if note]


def _same_draw_notes(parts: EvaluationParts) -> list[str]:
    """A note if the random images are all training images, and so the same for every seed."""
    count, classes = training_data.images_per_class(parts.distilled), parts.distilled.classes
    drawn = any(arm.name == "random" for arm in parts.arms)
    if not drawn or len(parts.train) > count * len(classes):
        return []
    return [f"The random images are all {len(parts.train)} training images, for every seed."]


def _hints(parts: EvaluationParts, results: Sequence[Result]) -> list[str]:
    """What to check if no learner beats chance on a set from elsewhere."""
    accuracies = [r.accuracy for r in results if r.arm == "distilled" and r.accuracy is not None]
    if origin.read_provenance(parts.distilled).config is not None or not accuracies:
        return []
    from dsdistill.published_sets import reader

    chance = float(np.bincount(parts.splits.test.labels).max() / len(parts.splits.test))
    hint = reader.chance_hint(max(accuracies), chance, len(parts.splits.test))
    return [hint] if hint else []


def _print(evaluation: Report, out: Path) -> None:
    """Print the part of the report that fits a terminal."""
    from rich.table import Column, Table

    learners = Column("learner", overflow="fold")  # its end may be all that tells two apart
    table = Table("trained on", learners, "test accuracy, %", "95 % interval", "n")
    for row in evaluation.rows:
        arm, count = wording.arm_label(row.arm, row.augmented), str(len(row.results))
        learner, accuracy = printable(row.learner), printable(wording.accuracy(row))
        table.add_row(arm, learner, accuracy, wording.interval(row), count)
    terminal = console(soft_wrap=True)
    terminal.print(table)
    for line in (verdict.headline(evaluation), *evaluation.notes):
        terminal.print(printable(line))
    terminal.print(printable(f"report: {out / 'report.html'}"))
