"""More epochs: another length for a run, finished or not.

The learning rate is a function of the step and the length, so from the step reached on it is that
of a training of the new length: after a finished run it rises again.

A finished run is continued in `RUN/continued`, a run of its own that begins with copies of the
options, the figures and the last checkpoint. Until it ends the finished run stays as it is; then
its files are replaced, `report.json` last. A process that is killed at any moment of that leaves
what `--resume` goes on from.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from dsdistill.harness import files
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import locks, progress, run_folder
from dsdistill.harness.runs.run_folder import Run
from kd.models import seals
from kd.models.seals import REPORT
from kd.options import TrainOptions
from kd.recipe import Recipe

FOLDER = "continued"
LENGTHS = ("epochs", "steps", "patience")  # options that may change on resume
EARLIER_KEY = "earlier_lengths"  # in config.json: the lengths before each change, and its step
_BEGINNING = ("config.json", "metrics.jsonl", run_folder.CHECKPOINT)


def work_folder(folder: Path) -> Path:
    """The folder in which a run is trained: a folder inside it once it is finished."""
    return folder / FOLDER if (folder / REPORT).exists() else folder


def is_begun(folder: Path) -> bool:
    """Whether a finished run is being continued."""
    return (work_folder(folder) / "config.json").exists()


def is_complete(folder: Path) -> bool:
    """Whether a finished run has been continued to the end, but its files not all replaced."""
    return (folder / FOLDER / REPORT).exists()


def begin(folder: Path) -> None:
    """Begin to continue a finished run, unless that has begun.

    Raises:
        UserError: If the run has no checkpoint, or its options or figures are damaged.
    """
    if is_begun(folder):
        return
    seals.verify(folder, *_BEGINNING)
    for path in folder.glob(f".{FOLDER}.*"):  # left by a kill
        shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{FOLDER}.") as temporary:
        for name in _BEGINNING:
            if (folder / name).exists():
                shutil.copyfile(folder / name, Path(temporary, name))
        shutil.rmtree(folder / FOLDER, ignore_errors=True)  # left empty by a kill
        with contextlib.suppress(OSError):  # another process has begun at the same moment
            os.rename(temporary, folder / FOLDER)


def adopt(folder: Path) -> None:
    """Replace the files of a finished run by those of its continuation, `report.json` last."""
    inside = folder / FOLDER
    replaced = [p for p in inside.rglob("*") if p.is_file() and p.name != locks.LOCK_FILE]
    for path in sorted(replaced, key=lambda path: path.name == REPORT):
        place = folder / path.relative_to(inside)
        place.parent.mkdir(exist_ok=True)
        os.replace(path, place)


def remove_empty(folder: Path) -> None:
    """Remove what `adopt` has emptied, once nothing holds its lock."""
    with contextlib.suppress(OSError):  # it contains other files, which stay
        for path in (folder / FOLDER).iterdir():
            path.rmdir()
        (folder / FOLDER).rmdir()


def finish(folder: Path) -> dict[str, Any]:
    """Replace the files of a run whose continuation was killed while it did so.

    Returns:
        The content of `report.json`.

    Raises:
        UserError: If another process is doing so.
    """
    try:
        lock = locks.acquire(folder / FOLDER)
    except locks.LockHeld as holder:
        raise UserError(f"{folder} is in use by {holder}: wait until it ends") from holder
    try:
        adopt(folder)
    finally:
        lock.release()
    remove_empty(folder)
    return seals.read(folder, REPORT)


def changed_lengths(folder: Path, options: TrainOptions) -> dict[str, Any]:
    """The stored lengths of a run that differ from those of the options; empty if none do."""
    stored = files.read_json(folder / "config.json")
    new = {name: getattr(options.overrides, name) for name in LENGTHS}
    return {name: stored.get(name) for name in LENGTHS if stored.get(name) != new[name]}


def check(folder: Path, out: Path, recipe: Recipe, per_epoch: int) -> int:
    """Refuse a new length that leaves nothing to train; return the number of steps taken.

    Args:
        folder: Folder with the checkpoint.
        out: Folder of the run, for messages.
        recipe: Recipe with the new length.
        per_epoch: Number of steps in an epoch.

    Raises:
        UserError: If all steps are taken, patience is exhausted, or a finished run has no
            checkpoint.
    """
    from kd.training import checkpoint  # needs torch, which reports do without

    saved = Run(folder, {}, resumed=True, writes=False).load_state()
    if saved is None and (folder / REPORT).exists():
        raise UserError(f"{out} has no {run_folder.CHECKPOINT}, from which it could go on")
    if saved is not None:
        saved = checkpoint.adapt_to_length(saved, recipe)
    done, stale = (saved[1].get(name, 0) for name in ("step", "stale")) if saved else (0, 0)
    total = recipe.total_steps(per_epoch)
    if done >= total:
        option = f"--steps {total}" if recipe.steps is not None else f"--epochs {recipe.epochs}"
        raise UserError(
            f"{out} has taken {done} steps, {done / per_epoch:g} epochs, and {option} is not more: "
            "give more, or leave it out"
        )
    if recipe.patience is not None and stale >= recipe.patience:
        raise UserError(
            f"{out} was stopped by --patience {recipe.patience}, after {stale} validations without "
            "a better one: give a larger --patience, or more --epochs"
        )
    length = f"{total} steps" if recipe.steps is not None else f"{recipe.epochs} epochs"
    progress.say(
        f"{out} goes on from step {done} of {total}: the learning rate is from here on that of a "
        f"training of {length}; the best epoch so far counts"
    )
    return done


def store_lengths(run: Run, earlier: dict[str, Any], done: int, digest: str, key: str) -> None:
    """Store new lengths in `config.json`, and what they were before.

    Args:
        run: The opened run, whose `config` has the new lengths.
        earlier: The lengths before.
        done: Number of steps taken with them.
        digest: Hash of the new options.
        key: Key of that hash among the inputs.
    """
    history = run.config.setdefault(EARLIER_KEY, [])
    former = {name: earlier.get(name, run.config.get(name)) for name in LENGTHS}
    history.append({"until_step": done} | former)
    run.config.setdefault(run_folder.INPUTS_KEY, {})[key] = digest
    files.write_json(run.folder / "config.json", run.config)
