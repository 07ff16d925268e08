"""Run one distillation: a data set in, a run's folder out.

load -> fit preprocessing -> distil -> read the test set once -> save the set, draw its picture
"""

import contextlib
import functools
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dsdistill.commands import outcomes, prepare, through_backbone
from dsdistill.commands.outcomes import Outcome
from dsdistill.commands.prepare import Prepared
from dsdistill.harness import paths, shell, stopping
from dsdistill.harness.data import datasets, distilled_set, preprocess
from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.data.preprocess import Preprocess, is_features
from dsdistill.harness.errors import UserError, one_line
from dsdistill.harness.evaluation.held_out import accuracy
from dsdistill.harness.reports import image_grid
from dsdistill.harness.reports.image_grid import GridSide
from dsdistill.harness.runs import progress, run_folder
from dsdistill.harness.runs.options import Storage
from dsdistill.kernels import notation
from dsdistill.methods import initial_support
from dsdistill.options import EARLIER, KipOptions, LabelSolveOptions, RunOptions, with_defaults
from dsdistill.parallel import hosts

PATH_OPTIONS = ("data", "data_root", "init", "features")  # may differ from host to host


def _absolute_init(init: str) -> str:
    return init if init in initial_support.INIT_NAMES else paths.absolute(init)


STORAGE = Storage(
    unstored=("out", "resume", "hosts", "trust_module"),
    free=("data_root",),  # the data may have moved between start and resume
    absolute={
        "data": datasets.absolute_name,
        "init": _absolute_init,
        "features": through_backbone.absolute_name,
    },
)

RunOptionsT = TypeVar("RunOptionsT", bound=RunOptions)


def run_kip(options: KipOptions) -> Path:
    """Run `dsdistill kip` and return the run's folder.

    Raises:
        UserError: If an option or the data break a rule, or the loss diverges.
        KeyboardInterrupt: If stopped by hand, after a checkpoint.
    """
    return _run(options, "kip", outcomes.kip_outcome)


def run_label_solve(options: LabelSolveOptions) -> Path:
    """Run `dsdistill ls` and return the run's folder.

    Raises:
        UserError: If an option or the data break a rule.
        KeyboardInterrupt: If stopped by hand, after a checkpoint.
    """
    return _run(options, "ls", outcomes.label_solve_outcome)


def _run(
    options: RunOptionsT,
    method: str,
    distil: Callable[[RunOptionsT, run_folder.Run, Prepared], Outcome],
) -> Path:
    if options.resume and options.out is None:
        raise UserError("--resume needs --out, the folder of the run to continue")
    options = options if options.resume else with_defaults(options)
    config = _config(options, method)
    hosts.check_same({name: value for name, value in config.items() if name not in PATH_OPTIONS})
    if options.resume:
        run, options = _reopen(options, method)
        with run, _explain_stop(options, method, run.folder):
            prepared = prepare.prepare(options, run.config.get(run_folder.CHOSEN_KEY, {}))
            return _distil_and_finish(options, run, prepared, distil)
    folder = Path(hosts.decide(lambda: str(_free_folder(options, method))))
    with stopping.explain_stop():
        prepared = prepare.prepare(
            options
        )  # before the folder exists: a wrong option leaves none behind
    settled = {"images_per_class": prepared.images_per_class, **prepared.completed}
    options = replace(options, **settled)
    config = run_folder.with_choices(_config(options, method), prepared.chosen)
    with (
        hosts.open_run(
            lambda: run_folder.start(folder, config, result=distilled_set.FILE_NAME)
        ) as run,
        _explain_stop(options, method, folder),
    ):
        return _distil_and_finish(options, run, prepared, distil)


def _distil_and_finish(
    options: RunOptionsT,
    run: run_folder.Run,
    prepared: Prepared,
    distil: Callable[[RunOptionsT, run_folder.Run, Prepared], Outcome],
) -> Path:
    with hosts.explain_lost_host(run.folder), run.clean_up_on_error():
        inputs = prepared.digests()
        hosts.check_same(inputs)
        run.require_same(inputs)
        with through_backbone.features_file(run):
            return _finish(options, run, prepared, distil(options, run, prepared))


def _explain_stop(
    options: RunOptions, method: str, folder: Path
) -> contextlib.AbstractContextManager[None]:
    code = {name: value for name, value in vars(options).items() if name in _code_options(options)}
    code["trust_module"] = options.trust_module if isinstance(options, KipOptions) else None
    command = shell.resume_line(f"dsdistill {method}", folder, **code)
    return stopping.explain_stop(command, folder / distilled_set.FILE_NAME)


def _finish(options: RunOptions, run: run_folder.Run, prepared: Prepared, result: Outcome) -> Path:
    """Evaluate on the test set, which is read here for the first time, and save the set."""
    splits, fitted = prepared.splits, prepared.train.preprocess
    classes = splits.train.classes
    hard = np.repeat(np.arange(len(classes)), prepared.images_per_class)
    before = result.before
    test = Examples(splits.test, fitted)
    after, initial = _accuracies(result, test)
    figures = {"test_accuracy": after, "initial_test_accuracy": initial}
    provenance = outcomes.provenance(options, run, prepared, result, figures)
    if not run.writes:
        return run.folder
    distilled = distilled_set.DistilledSet(
        result.images, result.labels, fitted, classes, provenance
    )
    # The set may be the work of hours: it is saved before anything else can go wrong.
    distilled_set.save(run.folder / distilled_set.FILE_NAME, distilled)
    sides = GridSide("before", before.images, hard), GridSide("after", result.images, hard)
    draw(run.folder / "distilled.png", sides, classes, fitted)
    return run.folder


def draw(
    picture: Path, sides: tuple[GridSide, GridSide], classes: tuple[str, ...], fitted: Preprocess
) -> None:
    """Draw the picture of a set that is saved; a failure is reported and does not end the run.

    Features have no picture.

    Args:
        picture: Path of the picture.
        sides: The two sets.
        classes: Class names, in label order.
        fitted: Preprocessing of both.
    """
    if is_features(sides[0].images.shape[1:]):
        return
    try:
        image_grid.write(picture, *sides, classes, fitted)
    except Exception as error:  # a font, a name, a full disk
        reason = one_line(error, kind=True)
        progress.say(f"note: the set is saved, but {picture} could not be drawn ({reason})")


def _accuracies(result: Outcome, test: Examples) -> tuple[float, float]:
    """Test accuracies of the distilled set and of the initial support."""
    before, k = result.before, result.labels.shape[1]
    if result.images is not before.images:
        after = result.fit(result.images, result.labels)
        initial = result.fit(before.images, before.labels)
        return accuracy(after, test, "test images"), accuracy(initial, test, "test images, before")
    # The same images with other labels: the kernel, which takes most of the time, is evaluated
    # once for both.
    both = result.fit(result.images, np.concatenate([result.labels, before.labels], 1))
    batches = progress.track_if_slow(test.batches(), "test images")
    scores = np.concatenate([both(test.images(rows)) for rows in batches])
    right = [s.argmax(1) == test.data.labels for s in (scores[:, :k], scores[:, k:])]
    return float(right[0].mean()), float(right[1].mean())


def _config(options: RunOptions, method: str) -> dict[str, Any]:
    """Options as `config.json` stores them, with absolute paths."""
    return {run_folder.COMMAND_KEY: method} | STORAGE.to_json(options)


def _free_folder(options: RunOptions, method: str) -> Path:
    folder = options.out or run_folder.next_free(f"{method}-{Path(options.data).stem}")
    run_folder.check_free(folder, distilled_set.FILE_NAME)
    return folder


def _reopen(options: RunOptionsT, method: str) -> tuple[run_folder.Run, RunOptionsT]:
    """Open the run to resume, with the options that it was started with."""
    assert options.out is not None
    run = hosts.open_run(
        functools.partial(
            run_folder.start,
            options.out,
            _config(options, method),
            result=distilled_set.FILE_NAME,
            resume=True,
            defaults=_config(type(options)(), method) | {run_folder.COMMAND_KEY: None},
            free=STORAGE.free,
            earlier=EARLIER,
        )
    )
    try:
        return run, _restore_options(options, run)
    except BaseException:
        run.close()
        raise


def _code_options(options: RunOptions) -> list[str]:
    """Names of the options that name code, as `module:attribute`, which is imported."""
    texts = {"kernel": options.kernel}
    if isinstance(options, KipOptions) and options.warm_up is not None:
        texts["warm_up"] = prepare.split_warm_up(options.warm_up)[0]
    names = [name for name, text in texts.items() if notation.is_code(text)]
    if isinstance(options, KipOptions) and through_backbone.is_code(options.features):
        names.append("features")
    return names


def _restore_options(options: RunOptionsT, run: run_folder.Run) -> RunOptionsT:
    """Restore the options of a run from its `config.json`.

    Raises:
        RunError: If one is unknown, or its value is not of its type, or names code that this call
            does not name: a file may not choose the code that runs here.
    """
    chosen = run.config.get(run_folder.CHOSEN_KEY, {})
    rules = {
        "target_batch must be a whole number": isinstance(chosen.get("target_batch", 1), int),
        f"{prepare.PREPROCESS_KEY} must be one of {', '.join(preprocess.KINDS)}": (
            chosen.get(prepare.PREPROCESS_KEY, "zca") in preprocess.KINDS
        ),
    }
    for rule, holds in rules.items():
        if not holds:
            raise run_folder.RunError(
                f"{run.folder / 'config.json'} is damaged: {run_folder.CHOSEN_KEY}.{rule}"
                f"{run_folder.REMEDY}"
            )
    restored = STORAGE.from_json(options, run.folder, run.config)
    complete = with_defaults(restored)
    for name, value in vars(complete).items():
        if value != getattr(restored, name):  # a run stores what its defaults have become
            raise run_folder.RunError(
                f"{run.folder / 'config.json'} is damaged: {name} must have a value"
                f"{run_folder.REMEDY}"
            )
    require_typed_code(run.folder, options, restored, _code_options(restored))
    return restored


def require_typed_code(folder: Path, options: Any, restored: Any, names: Sequence[str]) -> None:
    """Refuse code that a run's `config.json` names and this call does not.

    Args:
        folder: Folder of the run.
        options: Options of this call.
        restored: Options of the run.
        names: Options that name code.

    Raises:
        RunError: If one differs: a file may not choose the code that runs here.
    """
    for name in names:
        code = getattr(restored, name)
        if getattr(options, name) != code:
            raise run_folder.RunError(
                f"{folder / 'config.json'} names the code {code}, and a file may not choose "
                "the code that runs here: if that code is yours or you trust it, add "
                f"{shlex.join([shell.flag(name), code])}"
            )
