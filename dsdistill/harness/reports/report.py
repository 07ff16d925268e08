"""The report of an evaluation as a value, and its form in `report.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import results
from dsdistill.harness.evaluation import scores as scoring
from dsdistill.harness.evaluation.results import Result, Row
from dsdistill.harness.evaluation.scores import SetScores
from dsdistill.harness.memory import format_bytes
from dsdistill.harness.reports import schema, wording
from dsdistill.harness.runs import run_folder

FORMAT_VERSION = 2
FILE_NAME = "report.json"
IMAGES_FILE = "images.png"  # shown in the page of a folder that holds it
COLUMNS = (
    "trained on",
    "learner",
    "augmented",
    "test accuracy, %",
    "95 % interval",
    "n",
    "images",
    "size",
    "training",
    "tuning",
)


@dataclass(frozen=True)
class Report:
    """What `report.json` holds.

    Attributes:
        title: Of the report.
        notes: Sentences on what limits the figures.
        commands: Lines that make everything again.
        classes: Names, in the order of `Result.per_class` and `Result.confusion`.
        data: `name`, `sha256`, and the number of images of `train`, `validation` and `test`.
        images_per_class: Of the distilled set.
        results: One a training.
        distilled: `method`, `kernel`, `seconds`, `peak_memory`, `metrics`, `images`, `bytes` and
            `compression` of the set, each of which may be None or missing.
        seconds: Of the call that wrote it, in which kept results were not measured again.
        peak_memory: Of its process, in bytes.
        machine: Where.
        versions: Of packages, by name.
    """

    title: str
    notes: Sequence[str]
    commands: Sequence[str]
    classes: Sequence[str]
    data: Mapping[str, Any]
    images_per_class: int
    results: tuple[Result, ...]
    distilled: Mapping[str, Any]
    seconds: float
    peak_memory: int
    machine: str
    versions: Mapping[str, str]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The results by learner, augmentation and arm."""
        return tuple(results.group_by_training(self.results))

    @cached_property
    def scores(self) -> tuple[SetScores, ...]:
        """One a learner."""
        return tuple(scoring.score_learners(self.rows))

    @cached_property
    def compared(self) -> tuple[Row, ...]:
        """The rows that are compared: a learner's augmented ones only if it has no others."""
        plain = {row.learner for row in self.rows if not row.augmented}
        return tuple(row for row in self.rows if row.augmented != (row.learner in plain))

    @property
    def learners(self) -> list[str]:
        """Names, in the order in which they first appear."""
        return list(dict.fromkeys(row.learner for row in self.rows))

    def row(self, learner: str, arm: str) -> Row | None:
        """One of the rows that are compared."""
        found = (row for row in self.compared if (row.learner, row.arm) == (learner, arm))
        return next(found, None)


def row_cells(row: Row) -> list[str]:
    """One row under `COLUMNS`, in words."""
    return [
        row.arm,
        row.learner,
        "yes" if row.augmented else "no",
        wording.accuracy(row),
        wording.interval(row),
        str(len(row.results)),
        str(row.results[0].images),
        format_bytes(row.results[0].bytes),
        wording.duration_text(wording.training_seconds(row)),
        wording.duration_text(wording.tuning_seconds(row)),
    ]


def load(path: Path) -> Report:
    """Read a report.

    Args:
        path: `report.json`, or the folder that holds it.

    Raises:
        UserError: If there is none, it is damaged, or it is not of an evaluation.
    """
    file = path / FILE_NAME if path.is_dir() else path
    stored = run_folder.read_json(file)
    if not isinstance(stored, dict) or stored.get("format") != FORMAT_VERSION:
        found = stored.get("format") if isinstance(stored, dict) else type(stored).__name__
        raise UserError(
            f"{file} is no report of an evaluation of format {FORMAT_VERSION} (its format: {found}): make "
            "it with this version's `dsdistill evaluate`"
        )
    try:
        return _parse({k: v for k, v in stored.items() if k != "format"})
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): evaluate once more") from error


DATA_TYPES = {"name": str, "sha256": str | None, "train": int, "validation": int, "test": int}
DISTILLED_TYPES = {
    "method": str | None,
    "kernel": str | None,
    "seconds": float | None,
    "peak_memory": float | None,
    "images": int | None,
    "bytes": int | None,
    "compression": float | None,
}
FACT_TYPES = {
    "parameters": float | None,
    "flops": float | None,
    "latency_ms": Mapping[str, float] | None,
    "curve": Sequence[Sequence[float | None]] | None,
}


def _parse(stored: Mapping[str, Any]) -> Report:
    """The report, with every type as it must be.

    Raises:
        ValueError: With what is wrong.
    """
    report = schema.build(Report, stored)
    if missing := DATA_TYPES.keys() - report.data.keys():
        raise ValueError(f"data lacks {', '.join(sorted(missing))}")
    schema.check("data", report.data, DATA_TYPES)
    schema.check("distilled", report.distilled, DISTILLED_TYPES)
    for result in report.results:
        schema.check("facts", result.facts or {}, FACT_TYPES)
        _check_figures(result, len(report.classes))
    if not report.results:
        raise ValueError("results is empty")
    _ = report.rows, report.scores  # refuse accuracies that are no fractions
    return report


def _check_figures(result: Result, k: int) -> None:
    square = result.confusion is None or (
        len(result.confusion) == k and all(len(line) == k for line in result.confusion)
    )
    if not square or (result.per_class is not None and len(result.per_class) != k):
        raise ValueError(f"figures of {result.learner} on {result.arm} are not of {k} classes")
    if result.accuracy is not None and not 0 <= result.accuracy <= 1:
        raise ValueError(f"accuracy must be a fraction in [0, 1], got {result.accuracy}")
    for point in (result.facts or {}).get("curve") or ():
        if len(point) != 2 or point[0] is None:
            raise ValueError(f"a point of a curve must be a step and a loss, got {point}")
