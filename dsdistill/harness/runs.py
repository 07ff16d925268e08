"""A run's folder: never overwritten, resumable, and readable while the run goes on.

    config.json         how it was asked for, written first
    metrics.jsonl       one JSON object a line, flushed at once
    events.out.*        the same for TensorBoard
    checkpoint.*        the last good state, replaced atomically
    <result>            written last: a folder that holds it is finished

A process that is killed while it writes leaves a hidden file, and the old content in place.
"""

import contextlib
import io
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from dsdistill.harness import events
from dsdistill.harness.errors import UserError

CHECKPOINT = "checkpoint.safetensors"
CHOSEN = "chosen"  # in a configuration: what the run itself has chosen


class RunError(UserError):
    """A folder that cannot be started, resumed or read as asked."""


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically: written beside it, flushed to disk, then renamed."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically. NaN becomes null, since JSON has none."""
    write_bytes(path, (json.dumps(_finite(value), indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        RunError: If it is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from error


def next_free(stem: str, parent: Path = Path("runs")) -> Path:
    """The first of `parent/stem-1`, `parent/stem-2`, ... that does not exist."""
    return next(p for n in itertools.count(1) if not (p := parent / f"{stem}-{n}").exists())


@dataclass(frozen=True)
class Run:
    """An open run folder.

    Attributes:
        folder: Exists and can be written to.
        config: As stored in `config.json`; on `--resume`, as stored by the first start.
        resumed: Whether there was an earlier start.
        writes: Whether this process writes into the folder; of several hosts' one does.
    """

    folder: Path
    config: dict[str, Any]
    resumed: bool
    writes: bool = True

    def recorded(self, name: str, choose: Callable[[], Any]) -> Any:
        """A value that the first start chooses, and that every later start finds.

        It stands in `config.json` under `chosen`, apart from the options.

        Args:
            name: Of the value.
            choose: Called at the first start alone; JSON-compatible.
        """
        chosen = self.config.setdefault(CHOSEN, {})
        if name not in chosen:
            chosen[name] = choose()
            if self.writes:
                write_json(self.folder / "config.json", self.config)
        return chosen[name]

    def withdraw(self) -> None:
        """Free the folder again if the run was refused before it computed anything."""
        figures = self.folder / "metrics.jsonl"
        begun = figures.exists() and figures.stat().st_size > 0
        if begun or self.resumed or not self.writes or (self.folder / CHECKPOINT).exists():
            return
        for pattern in ("config.json", figures.name, f"{events.NAME}*"):
            for path in self.folder.glob(pattern):
                path.unlink()
        with contextlib.suppress(OSError):  # something else is in it, which stays
            self.folder.rmdir()

    def save_state(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Replace the checkpoint: named arrays and a JSON-compatible remainder."""
        if not self.writes:
            return
        # Not ascontiguousarray, which gives a scalar (a step count) an axis.
        tensors = {name: np.asarray(value, order="C") for name, value in arrays.items()}
        content = safetensors.numpy.save(tensors, {"meta": json.dumps(meta)})
        write_bytes(self.folder / CHECKPOINT, content)

    def load_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The last checkpoint, or None if the run was stopped before its first."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return arrays, json.loads(file.metadata()["meta"])
        except Exception as error:  # a damaged file has many ways to fail
            raise RunError(f"{path} is damaged ({error}): start anew in another folder") from error


def check_free(folder: Path, result: str) -> None:
    """Refuse a folder in which a new run could not start; nothing is created.

    Raises:
        RunError: If it is a file, or holds a run or anything else.
    """
    if (folder / result).exists():
        raise RunError(f"{folder} already holds a finished run: choose another --out")
    if (folder / "config.json").exists():
        raise RunError(f"{folder} already holds a run: add --resume, or choose another --out")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file: choose another --out")
    # A hidden file may be left by a start that was killed.
    if folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir()):
        raise RunError(f"{folder} is not empty and holds no run: choose another --out")


def start(
    folder: Path,
    config: Mapping[str, Any],
    *,
    result: str,
    resume: bool = False,
    defaults: Mapping[str, Any] | None = None,
    free: tuple[str, ...] = (),
) -> Run:
    """Open a run folder.

    Args:
        folder: Where; created with its parents.
        config: JSON-compatible options of this call.
        result: Name of the file whose presence means that the run is finished.
        resume: Continue an unfinished run. Its stored options hold; an option of this call that
            is neither the default nor the stored value is refused.
        defaults: Default options, to tell which of this call's were given.
        free: Options that may differ on resume (where the data lie, say).

    Raises:
        RunError: If the folder holds a run and `resume` is off, if it is finished, or if the
            options contradict the stored ones.
    """
    stored = folder / "config.json"
    config, defaults = _as_json(config), _as_json(defaults or {})
    if resume and (folder / result).exists():
        raise RunError(f"{folder} holds a finished run: there is nothing to resume")
    if resume and not stored.exists():
        raise RunError(f"{folder} holds no run to resume")
    if resume:
        for left_over in folder.glob(".*.safetensors.*"):  # of a kill in the middle of a write
            left_over.unlink()
        return Run(folder, _reconcile(_stored_config(stored), config, defaults, free), True)
    check_free(folder, result)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(stored, config)
    return Run(folder, config, False)


def _as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as `config.json` gives them back, where a tuple has become a list."""
    return json.loads(json.dumps(_finite(options)))


def _stored_config(path: Path) -> dict[str, Any]:
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise RunError(f"{path} is damaged: expected an object of options")
    return stored


def _reconcile(
    old: dict[str, Any],
    new: Mapping[str, Any],
    defaults: Mapping[str, Any],
    free: tuple[str, ...],
) -> dict[str, Any]:
    """The stored options, after refusing a given one that contradicts them."""
    for name, value in new.items():
        if name in free:
            old[name] = value
        elif value != defaults.get(name) and value != old.get(name):
            option = "--" + name.replace("_", "-")
            raise RunError(f"the run was started with {option} {old.get(name)}, got {value}")
    return old


class Metrics:
    """Appends named figures to `metrics.jsonl` and to a TensorBoard event file.

    On resume, lines of steps after the checkpoint are dropped, so that a resumed run's file
    equals that of an uninterrupted one.
    """

    def __init__(self, folder: Path, *, resume_from: int | None = None) -> None:
        self._path = folder / "metrics.jsonl"
        if resume_from is not None:
            self._drop_after(resume_from)
        self._file = self._path.open("a")
        self._events = events.Events(folder, resume_from)

    def write(self, step: int, **figures: float) -> None:
        """Record figures of one step; seen at once by whoever follows the files."""
        figures = {name: float(value) for name, value in figures.items()}  # NumPy's too
        self._file.write(json.dumps(_finite({"step": step, **figures})) + "\n")
        self._file.flush()
        self._events.write(step, figures)

    def close(self) -> None:
        self._file.close()
        self._events.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop_after(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = io.StringIO()
        for line in self._path.read_text().splitlines():
            try:
                keep = json.loads(line)["step"] <= step
            except ValueError:  # the line that was being written when the run was killed
                keep = False
            if keep:
                kept.write(line + "\n")
        write_bytes(self._path, kept.getvalue().encode())


def _finite(value: Any) -> Any:
    """A copy in which NaN and infinities are None, at any depth."""
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
