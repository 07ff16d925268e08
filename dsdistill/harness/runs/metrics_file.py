"""Figures of a run, step by step: one JSON object per line, and the same for TensorBoard."""

import json
from pathlib import Path

from dsdistill.harness import files
from dsdistill.harness.runs import progress, tensorboard


class Metrics:
    """Writer of named figures to `metrics.jsonl` and to a TensorBoard event file.

    Args:
        folder: The run's folder.
        resume_from: Step of the checkpoint of a resumed run. Lines of later steps are dropped, so
            that the file equals that of an uninterrupted run.
    """

    def __init__(self, folder: Path, *, resume_from: int | None = None) -> None:
        self._path = folder / "metrics.jsonl"
        if resume_from is not None:
            self._drop_after(resume_from)
        self._file = self._path.open("a")
        self._events = tensorboard.EventFile(folder, resume_from)

    def write(self, step: int, **figures: float) -> None:
        """Append the figures of one step, and flush them for readers of the files."""
        figures = {name: float(value) for name, value in figures.items()}  # NumPy's too
        self._file.write(json.dumps(files.replace_not_finite({"step": step, **figures})) + "\n")
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
        lines = self._path.read_bytes().split(b"\n")[:-1]  # the last line may be incomplete
        steps = [(line, _parse_step(line)) for line in lines]
        if damaged := sum(parsed is None for _, parsed in steps):
            progress.say(f"note: {self._path}: {damaged} of {len(lines)} lines damaged, dropped")
        earlier = [line for line, parsed in steps if parsed is not None and parsed <= step]
        files.write_bytes(self._path, b"".join(line + b"\n" for line in earlier))


def _parse_step(line: bytes) -> int | None:
    """Step of a line of `metrics.jsonl`; None if the line is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if type(step) is int else None
