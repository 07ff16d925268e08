"""The tables of a report beside its headline: scores, probabilities, costs. Words, not markup."""

from collections.abc import Callable, Sequence

from dsdistill.harness.evaluation.results import Result, Row
from dsdistill.harness.evaluation.scores import SetScores
from dsdistill.harness.evaluation.statistics import PairedDifference
from dsdistill.harness.memory import format_bytes
from dsdistill.harness.reports import wording
from dsdistill.harness.reports.report import Report
from dsdistill.harness.reports.wording import NOTHING
from dsdistill.harness.runs.progress import format_amount

CONTRAST_COLUMNS = (
    "learner",
    "distilled, %",
    "minus random, points",
    "p",
    "minus k-means",
    "minus herding",
    "minus full data",
)
SCORE_COLUMNS = ("learner", "HLR", "IOR", "LRS", "ARS", "distilled − random, points", "p")
SCORES_CAPTION = "Without augmentation where the learner was trained without it; ARS of both"
SCORES_NOTE = (
    "HLR: full data minus distilled images, both with hard labels; 0 is best. IOR: distilled minus "
    "random images. LRS and ARS: DD-Ranking's label-robust and augmentation-robust score, 0 to 1; "
    "0.269 is no better than random images. All are fractions. p: paired t test over the seeds, "
    "beside the difference with its 95 % interval."
)
QUALITY_COLUMNS = (
    "trained on",
    "learning rate",
    "validation accuracy, %",
    "NLL, nats",
    "calibration error, %",
    "agrees with teacher, %",
    "KL from teacher, nats",
)
QUALITY_CAPTION = "Means over the seeds; of the test images but for the validation accuracy"
QUALITY_NOTE = (
    "Probabilities are calibrated with one temperature, fitted on the validation images. The "
    "calibration error has 15 bins of equal width."
)
COST_COLUMNS = (
    "trained on",
    "one training",
    "all tuning",
    "memory until then",
    "images",
    "size",
    "parameters",
    "FLOPs an image",
    "latency of 1, ms",
    "latency of 64, ms",
)
COST_CAPTION = "Of one training, but for tuning: of all trainings that chose the learning rate"
COST_NOTE = (
    "Memory is the largest size of the whole process until the end of the training, so it never "
    "falls. Trainings that are known from an earlier evaluation keep the time they took then."
)


def by_arm(
    rows: Sequence[Row], head: Sequence[str], cells: Callable[[Row], list[str]]
) -> tuple[list[str], list[tuple[Row, list[str]]]]:
    """A table with a line for each row, without the columns that are empty in all of them.

    Args:
        rows: Of a report.
        head: Names of the columns.
        cells: A line under them.

    Returns:
        The names that are left, and the lines with their rows.
    """
    lines = [(row, cells(row)) for row in rows]
    kept = [i for i in range(len(head)) if any(line[i] != NOTHING for _, line in lines)]
    return [head[i] for i in kept], [(row, [line[i] for i in kept]) for row, line in lines]


def contrast_cells(report: Report, score: SetScores) -> list[str]:
    """One line under `CONTRAST_COLUMNS`: the mean on the distilled set, and how far others are from it."""
    own = report.row(score.learner, "distilled")
    others = (report.row(score.learner, arm) for arm in ("k-means", "herding", "full"))
    return [
        score.learner,
        NOTHING if own is None else wording.accuracy(own),
        _difference(score.versus_random),
        wording.p_value(score.versus_random),
        *(_gap(own, other) for other in others),
    ]


def score_cells(score: SetScores) -> list[str]:
    """One line under `SCORE_COLUMNS`."""
    against = score.versus_random
    fractions = (score.hlr, score.ior, score.lrs, score.ars)
    return [
        score.learner,
        *(NOTHING if value is None else f"{value:.3f}" for value in fractions),
        _difference(against),
        wording.p_value(against),
    ]


def has_quality(rows: Sequence[Row]) -> bool:
    """Whether there is anything to show under `QUALITY_COLUMNS`."""
    return any(result.nll is not None for row in rows for result in row.results)


def quality_cells(row: Row) -> list[str]:
    """One line under `QUALITY_COLUMNS`; nothing of what any seed lacks."""
    rate = row.results[0].rate
    return [
        wording.arm_label(row.arm, row.augmented),
        NOTHING if rate is None else f"{rate:g}",
        wording.percent(row.mean("validation_accuracy")),
        _format_number(row.mean("nll")),
        wording.percent(row.mean("calibration_error")),
        wording.percent(row.mean("teacher_agreement")),
        _format_number(row.mean("teacher_kl")),
    ]


def cost_cells(row: Row) -> list[str]:
    """One line under `COST_COLUMNS`."""
    first, latency = row.results[0], wording.fact(row, "latency_ms") or {}
    return [
        wording.arm_label(row.arm, row.augmented),
        wording.duration_text(wording.training_seconds(row)),
        wording.duration_text(wording.tuning_seconds(row)),
        _format_or_dash(max(result.peak_memory for result in row.results) or None, format_bytes),
        f"{first.images:,}",
        format_bytes(first.bytes),
        _format_or_dash(wording.fact(row, "parameters"), format_amount),
        _format_or_dash(wording.fact(row, "flops"), format_amount),
        _format_or_dash(latency.get("1"), "{:.2f}".format),
        _format_or_dash(latency.get("64"), "{:.2f}".format),
    ]


def run_facts(report: Report) -> list[tuple[str, str]]:
    """What the set and the evaluation took, and on what: names and values."""
    made, share = report.distilled, report.distilled.get("compression")
    data = report.data
    splits = ", ".join(f"{data[part]:,} {part}" for part in ("train", "validation", "test"))
    found = [
        ("Method", made.get("method")),
        ("Kernel", made.get("kernel")),
        ("Distillation took", _format_or_dash(made.get("seconds"), wording.duration_text)),
        ("Peak memory of the distillation", _format_or_dash(made.get("peak_memory"), format_bytes)),
        ("Distilled images", _format_or_dash(made.get("images"), "{:,}".format)),
        ("Size with labels", _format_or_dash(made.get("bytes"), format_bytes)),
        ("Training set is larger by", _format_or_dash(share, "{:,.0f} times".format)),
        ("Evaluation took", wording.duration_text(report.seconds)),
        ("Peak memory of the evaluation", format_bytes(report.peak_memory)),
        ("Data", f"{data['name']}: {splits} images"),
        ("SHA-256 of the training images", data["sha256"] or NOTHING),
        ("Machine", report.machine),
        ("Versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    return [(name, value) for name, value in found if value and value != NOTHING]


def failures(report: Report) -> list[str]:
    """Every training without an accuracy, with its reason."""
    return [f"{_training_label(r)}: {wording.reason(r)}" for r in report.results if _has_failed(r)]


def _has_failed(result: Result) -> bool:
    return result.accuracy is None


def _training_label(result: Result) -> str:
    return (
        f"{result.learner} on {wording.arm_label(result.arm, result.augmented)}, seed {result.seed}"
    )


def _difference(against: PairedDifference | None) -> str:
    """In points, with its interval where there is a test."""
    if against is None:
        return NOTHING
    mean = _signed_points(against.difference.mean)
    return (
        mean if against.p is None else f"{mean} ({wording.confidence_interval(against.difference)})"
    )


def _gap(own: Row | None, other: Row | None) -> str:
    if not (own and own.accuracy and other and other.accuracy):
        return NOTHING
    return _signed_points(own.accuracy.mean - other.accuracy.mean)


def _signed_points(fraction: float) -> str:
    """In points, with a sign that is as wide as a digit."""
    return f"{100 * fraction:+.1f}".replace("-", wording.MINUS)


def _format_number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _format_or_dash(value: float | None, said: Callable[..., str]) -> str:
    return NOTHING if value is None else said(value)
