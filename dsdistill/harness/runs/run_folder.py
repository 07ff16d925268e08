"""A run's folder: never overwritten, resumable, and readable while the run is in progress.

    config.json         options of the run, written first
    metrics.jsonl       one JSON object per line, flushed at once
    events.out.*        the same metrics for TensorBoard
    checkpoint.*        last good state, replaced atomically
    <result>            written last: a folder that contains it is finished
    .lock               present while a process works in the folder, see `locks`

A process that is killed during a write leaves a hidden file, and the old content in place; the
next start removes such files.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsdistill.harness import checksums, files, shell
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import locks, progress, tensorboard

CHECKPOINT = "checkpoint.safetensors"
COMMAND_KEY = "command"  # in config.json: the command of `dsdistill` that the run is of
CHOSEN_KEY = "chosen"  # in config.json: values that the run itself has chosen
INPUTS_KEY = "inputs"  # in config.json: SHA-256 of what the run depends on
REMEDY = ": start anew in another --out"
_STATE_KEY = "meta"  # in a checkpoint's metadata


class RunError(UserError):
    """A run folder that cannot be started, resumed or read as requested."""


def next_free(stem: str, parent: Path = Path("runs")) -> Path:
    """The first of `parent/stem-1`, `parent/stem-2`, ... that does not exist."""
    return next(p for n in itertools.count(1) if not (p := parent / f"{stem}-{n}").exists())


@dataclass(frozen=True)
class Run:
    """An open run folder, which no other process can start or resume until it is closed.

    Attributes:
        folder: Existing, writable folder.
        config: Content of `config.json`; on `--resume`, as the first start stored it.
        resumed: Whether the run was started before.
        writes: Whether this process writes into the folder; with several hosts, one does.
        lock: Lock held by the process that writes; released by `close`.
    """

    folder: Path
    config: dict[str, Any]
    resumed: bool
    writes: bool = True
    lock: locks.Lock | None = field(default=None, repr=False, compare=False)

    def close(self) -> None:
        """Release the folder for other processes; a second call does nothing."""
        if self.lock:
            self.lock.release()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def choose_once(self, name: str, choose: Callable[[], Any]) -> Any:
        """Choose a value at the first start and reuse it at every later one.

        It is stored in `config.json` under `chosen`, apart from the options.

        Args:
            name: Name of the value.
            choose: Called at the first start only; returns a JSON-compatible value.
        """
        chosen = self.config.setdefault(CHOSEN_KEY, {})
        if name not in chosen:
            chosen[name] = choose()
            if self.writes:
                files.write_json(self.folder / "config.json", self.config)
        return chosen[name]

    def require_same(self, inputs: Mapping[str, str]) -> None:
        """Refuse to continue with other data, models or sets than the run was started with.

        The first start stores the hashes in `config.json`; each later one compares. Inputs may be
        passed in several calls.

        Args:
            inputs: SHA-256 of each input of the run, by a readable name such as "training images
                and labels".

        Raises:
            RunError: If an input differs from that of the first start.
        """
        stored = self.config.setdefault(INPUTS_KEY, {})
        for name, value in inputs.items():
            if stored.get(name, value) != value:
                raise RunError(
                    f"changed since the run {self.folder} was started: {name} (SHA-256 was "
                    f"{str(stored[name])[:12]}, is {value[:12]}): put back what it was, or start "
                    "anew in another --out"
                )
        unknown = [name for name in inputs if name not in stored]
        if unknown and self.resumed and (self.folder / CHECKPOINT).exists():
            progress.say(
                f"note: {self.folder} has no hash of: {', '.join(unknown)}; whether that has "
                "changed since the run was started cannot be checked"
            )
        stored.update({name: inputs[name] for name in unknown})
        if unknown and self.writes:
            files.write_json(self.folder / "config.json", self.config)

    def withdraw(self) -> None:
        """Free and close the folder again if the run has no checkpoint: no work is lost by it."""
        if self.resumed or not self.writes or self._has_checkpoint:
            return
        names = ("config.json", "recipe.json", "metrics.jsonl", f"{tensorboard.FILE_PREFIX}*")
        for pattern in names:
            for path in self.folder.glob(pattern):
                path.unlink()
        self.close()
        with contextlib.suppress(OSError):  # it contains other files, which stay
            self.folder.rmdir()

    @contextlib.contextmanager
    def clean_up_on_error(self) -> Iterator[None]:
        """Leave no folder that cannot be used where an error of the user's input ends the run.

        Without a checkpoint the folder is removed, so that the same command can be given again.
        With one, the error says what the checkpoint is good for. A full disk and the like are no
        fault of the input: the folder stays, and --resume goes on from what it has.

        Raises:
            UserError: As raised inside.
        """
        try:
            yield
        except UserError as error:
            self.withdraw()
            explains_itself = isinstance(error, RunError)  # it is about the folder
            if explains_itself or not self.writes or not (self.folder / "config.json").exists():
                raise
            kept = "the last checkpoint" if self._has_checkpoint else "the start of the run"
            message = (
                f"{error}; {self.folder} keeps {kept}: --resume goes on from it with the data and "
                "the options as they were, and with others start anew in another --out"
            )
            raise RunError(message) from error

    @property
    def _has_checkpoint(self) -> bool:
        return (self.folder / CHECKPOINT).exists()

    def save_state(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Replace the checkpoint by named arrays and JSON-compatible metadata."""
        if not self.writes:
            return
        content = checksums.pack(_STATE_KEY, json.dumps(meta), arrays)
        files.write_bytes(self.folder / CHECKPOINT, content)

    def load_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Arrays and metadata of the last checkpoint; None if the run stopped before its first.

        A checkpoint of an earlier version has no checksum; it is accepted with a note.

        Raises:
            RunError: If it is incomplete, or its contents do not match its checksum.
        """
        path = self.folder / CHECKPOINT
        if not path.exists():
            return None
        meta, arrays, checked = checksums.load(
            path, _STATE_KEY, kind="a checkpoint", remedy=REMEDY, error=RunError, required=False
        )
        if not isinstance(meta, dict):
            raise RunError(f"{path} is damaged: expected an object of figures{REMEDY}")
        if not checked:
            progress.say(
                f"note: {path} was written by an earlier version and has no checksum to verify"
            )
        return arrays, meta


def with_choices(config: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a new run's `config.json`: its options, and what it has chosen already."""
    return dict(config) | ({CHOSEN_KEY: dict(chosen)} if chosen else {})


def stored_choices(folder: Path) -> dict[str, Any] | None:
    """Read what the run of a folder has chosen; None if the folder holds no run.

    Raises:
        RunError: If its `config.json` is damaged.
    """
    if not (folder / "config.json").exists():
        return None
    return _stored_config(folder).get(CHOSEN_KEY, {})


def in_memory(config: Mapping[str, Any]) -> Run:
    """A run that writes nothing and cannot be resumed, for a library's caller."""
    return Run(Path(), _as_json(config), resumed=False, writes=False)


def check_free(folder: Path, result: str) -> None:
    """Refuse a folder in which a new run cannot start; nothing is created.

    Raises:
        RunError: If the path is a file, or the folder contains a run or anything else.
    """
    try:
        # Listed once: another process may be writing the first file of a run at this moment.
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        if not folder.exists():
            raise  # a parent is a file
        raise RunError(f"{folder} is a file: choose another --out") from error
    if result in names:
        raise RunError(f"{folder} already holds a finished run: choose another --out")
    if "config.json" in names:
        raise RunError(f"{folder} already holds a run: add --resume, or choose another --out")
    # A start that was killed may have left a hidden file.
    if any(name[0] != "." for name in names):
        raise RunError(f"{folder} is not empty and holds no run: choose another --out")


def start(
    folder: Path,
    config: Mapping[str, Any],
    *,
    result: str,
    resume: bool = False,
    defaults: Mapping[str, Any] | None = None,
    free: tuple[str, ...] = (),
    earlier: Mapping[str, Any] | None = None,
) -> Run:
    """Open a run folder.

    Args:
        folder: Folder of the run; created with its parents.
        config: JSON-compatible options of this call.
        result: Name of the file whose presence means that the run is finished.
        resume: Whether to continue an unfinished run. Its stored options hold; an option of this
            call that is neither the default nor the stored value is refused.
        defaults: Default options, to tell which options this call sets; without them it sets all.
        free: Options that may differ on resume (the location of the data, say).
        earlier: Values of options that runs of earlier versions did not store, see `complete`.

    Raises:
        RunError: If the folder contains a run and `resume` is off, if the run is finished, or if
            the options contradict the stored ones.
    """
    config, defaults = _as_json(config), _as_json(defaults or {})
    if resume:
        _check_resumable(folder, result)
    else:
        check_free(folder, result)
    lock = _acquire_lock(folder, create=not resume)
    try:
        # Checked again, now that no other process can change the folder.
        if resume:
            _check_resumable(folder, result)
            completed = complete(_stored_config(folder), config, earlier or {})
            stored = _reconcile(folder, completed, config, defaults, free)
            _remove_temporaries(folder)
            return Run(folder, stored, True, lock=lock)
        check_free(folder, result)
        _remove_temporaries(folder)
        files.write_json(folder / "config.json", config)
        return Run(folder, config, False, lock=lock)
    except BaseException:
        lock.release()
        raise


def complete(
    stored: Mapping[str, Any], config: Mapping[str, Any], earlier: Mapping[str, Any]
) -> dict[str, Any]:
    """Add to stored options what a run of an earlier version did, which had no such option.

    Args:
        stored: Options as an earlier version may have stored them.
        config: Options of this version, for the same command.
        earlier: Option -> what runs did before there was one.
    """
    return {k: v for k, v in earlier.items() if k in config} | dict(stored)


def stored_options(
    folder: Path,
    config: Mapping[str, Any],
    *,
    result: str | None,
    defaults: Mapping[str, Any],
    free: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Read the configuration of an unfinished run; nothing is locked or changed.

    Args:
        folder, config, defaults, free: As for `start`.
        result: As for `start`; None for a run that may be finished.

    Raises:
        RunError: If there is nothing to resume, or the options contradict the stored ones.
    """
    _check_resumable(folder, result)
    new, defaults = _as_json(config), _as_json(defaults)
    return _reconcile(folder, _stored_config(folder), new, defaults, free)


def _check_resumable(folder: Path, result: str | None) -> None:
    if result is not None and (folder / result).exists():
        raise RunError(f"{folder} holds a finished run: there is nothing to resume")
    if not (folder / "config.json").exists():
        raise RunError(f"{folder} holds no run to resume")


def _acquire_lock(folder: Path, *, create: bool) -> locks.Lock:
    """Lock a folder, creating it first if requested.

    Raises:
        RunError: If another process works in it.
    """
    for attempt in itertools.count(1):
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        try:
            return locks.acquire(folder)
        except locks.LockHeld as holder:
            raise RunError(
                f"{folder} is in use by {holder}: wait until it ends or stop it, or choose "
                "another --out"
            ) from holder
        except FileNotFoundError:  # a concurrent run was refused, and removed the folder
            if not create or attempt == locks.MAX_ATTEMPTS:
                raise
    raise AssertionError


def _remove_temporaries(folder: Path) -> None:
    """Remove temporary files of an interrupted write, also in subfolders that are no other run."""
    subfolders = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    parts = [path for path in subfolders if not (path / "config.json").exists()]
    for directory in (folder, *parts):
        files.remove_temporaries(directory)


def _as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as they are read back from `config.json`: tuples become lists."""
    return json.loads(json.dumps(files.replace_not_finite(options)))


def _stored_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    stored = files.read_json(path, RunError)
    if not isinstance(stored, dict):
        raise RunError(f"{path} is damaged: expected an object of options{REMEDY}")
    for name in (CHOSEN_KEY, INPUTS_KEY):
        if not isinstance(stored.get(name, {}), dict):
            raise RunError(f"{path} is damaged: {name} must be an object{REMEDY}")
    return stored


def _reconcile(
    folder: Path,
    old: dict[str, Any],
    new: Mapping[str, Any],
    defaults: Mapping[str, Any],
    free: tuple[str, ...],
) -> dict[str, Any]:
    """The stored options, updated by the free ones; refuses an option that contradicts them."""
    before, now = old.get(COMMAND_KEY), new.get(COMMAND_KEY)
    if before != now or (new and not new.keys() & old.keys()):
        commands = f" ({before or 'kd train'}, got {now or 'kd train'})"
        raise RunError(f"{folder} holds a run of another command{commands}: choose another --out")
    for name, value in new.items():
        if name in free:
            old[name] = value
        elif value != old.get(name) and (name not in defaults or value != defaults[name]):
            was = f"{shell.flag(name)} {old.get(name)}"
            raise RunError(f"the run was started with {was}, got {value}")
    return old
