"""The report of an evaluation as a value, and its form in `report.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dsdistill.harness import files
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import results
from dsdistill.harness.evaluation import scores as scoring
from dsdistill.harness.evaluation.results import Result, Row
from dsdistill.harness.evaluation.scores import SetScores
from dsdistill.harness.memory import format_bytes
from dsdistill.harness.reports import schema, wording

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
    """The content of `report.json`.

    Attributes:
        title: Title of the report.
        notes: Sentences on what limits the figures.
        commands: Command lines that reproduce everything.
        classes: Class names, in the order of `Result.per_class` and `Result.confusion`.
        data: `name`, `sha256`, and the number of images of `train`, `validation` and `test`.
        images_per_class: Number of images that the distilled set has of each class.
        results: One result per training.
        distilled: `method`, `kernel`, `seconds`, `peak_memory`, `metrics`, `images`, `bytes` and
            `compression` of the set, each of which may be None or missing.
        seconds: Seconds of the call that wrote the report; cached results are not measured again.
        peak_memory: Largest size of its process, in bytes.
        machine: Description of the machine.
        versions: Versions of packages, by name.
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
        """One set of scores per learner."""
        return tuple(scoring.score_learners(self.rows))

    @cached_property
    def compared_rows(self) -> tuple[Row, ...]:
        """Rows to compare: a learner's augmented ones only if it has no others."""
        plain = {row.learner for row in self.rows if not row.augmented}
        return tuple(row for row in self.rows if row.augmented != (row.learner in plain))

    @property
    def learners(self) -> list[str]:
        """Names of the learners, in the order in which they first appear."""
        return list(dict.fromkeys(row.learner for row in self.rows))

    def row(self, learner: str, arm: str) -> Row | None:
        """The compared row of a learner and an arm; None if there is none."""
        rows = (row for row in self.compared_rows if (row.learner, row.arm) == (learner, arm))
        return next(rows, None)


def row_cells(row: Row) -> list[str]:
    """Cells of one row under `COLUMNS`, as plain text."""
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
        UserError: If the file is missing, damaged or no report of an evaluation.
    """
    file = path / FILE_NAME if path.is_dir() else path
    stored = files.read_json(file)
    if not isinstance(stored, dict) or stored.get("format") != FORMAT_VERSION:
        version = stored.get("format") if isinstance(stored, dict) else type(stored).__name__
        raise UserError(
            f"{file} is not a report of an evaluation in format {FORMAT_VERSION} (its format: "
            f"{version}): write it again with this version's `dsdistill evaluate`"
        )
    try:
        return _parse({k: v for k, v in stored.items() if k != "format"})
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): run `dsdistill evaluate` again") from error


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
    """Build a report from JSON, with every type checked.

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
    _ = report.rows, report.scores  # raises for accuracies that are not fractions
    return report


def _check_figures(result: Result, k: int) -> None:
    square = result.confusion is None or (
        len(result.confusion) == k and all(len(line) == k for line in result.confusion)
    )
    if not square or (result.per_class is not None and len(result.per_class) != k):
        raise ValueError(f"figures of {result.learner} on {result.arm} are not for {k} classes")
    if result.accuracy is not None and not 0 <= result.accuracy <= 1:
        raise ValueError(f"accuracy must be a fraction in [0, 1], got {result.accuracy}")
    for point in (result.facts or {}).get("curve") or ():
        if len(point) != 2 or point[0] is None:
            raise ValueError(f"a point of a curve must be a step and a loss, got {point}")
