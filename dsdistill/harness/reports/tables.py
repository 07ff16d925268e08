"""Tables of a report: contrasts, scores, probabilities, costs, as plain text without markup."""

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
FURTHER_COLUMNS = ("learner", "further set", "test accuracy, %", "set − random, points", "p")
FURTHER_CAPTION = "Further sets against as many random images, as the first one"
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
    """Build a table with a line for each row, without the columns that are empty in all lines.

    Args:
        rows: Rows of a report.
        head: Names of the columns.
        cells: Function from a row to its line.

    Returns:
        Names of the remaining columns, and pairs of a row and its line.
    """
    lines = [(row, cells(row)) for row in rows]
    columns = [i for i in range(len(head)) if any(line[i] != NOTHING for _, line in lines)]
    return [head[i] for i in columns], [(row, [line[i] for i in columns]) for row, line in lines]


def contrast_cells(report: Report, score: SetScores) -> list[str]:
    """One line under `CONTRAST_COLUMNS`: the distilled set's mean, and its lead over other data."""
    distilled = report.row(score.learner, "distilled")
    others = (report.row(score.learner, arm) for arm in ("k-means", "herding", "full"))
    return [
        score.learner,
        _accuracy(distilled),
        _difference(score.versus_random),
        wording.p_value(score.versus_random),
        *(_gap(distilled, other) for other in others),
    ]


def score_cells(score: SetScores) -> list[str]:
    """One line under `SCORE_COLUMNS`."""
    difference = score.versus_random
    fractions = (score.hlr, score.ior, score.lrs, score.ars)
    return [
        score.learner,
        *(NOTHING if value is None else f"{value:.3f}" for value in fractions),
        _difference(difference),
        wording.p_value(difference),
    ]


def further_cells(report: Report) -> list[list[str]]:
    """The lines under `FURTHER_COLUMNS`; none without further sets."""
    return [
        [
            score.learner,
            arm,
            _accuracy(report.row(score.learner, arm)),
            _difference(paired),
            wording.p_value(paired),
        ]
        for score in report.scores
        for arm, paired in score.further.items()
    ]


def has_quality(rows: Sequence[Row]) -> bool:
    """Whether there is anything to show under `QUALITY_COLUMNS`."""
    return any(result.nll is not None for row in rows for result in row.results)


def quality_cells(row: Row) -> list[str]:
    """One line under `QUALITY_COLUMNS`; a dash for what any seed lacks."""
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
    """Names and values of what the set and the evaluation took, and of data and machine."""
    distilled, data = report.distilled, report.data
    seconds, memory = distilled.get("seconds"), distilled.get("peak_memory")
    share = distilled.get("compression")
    splits = ", ".join(f"{data[part]:,} {part}" for part in ("train", "validation", "test"))
    facts = [
        ("Method", distilled.get("method")),
        ("Kernel", distilled.get("kernel")),
        ("Distillation took", _format_or_dash(seconds, wording.duration_text)),
        ("Peak memory of the distillation", _format_or_dash(memory, format_bytes)),
        ("Distilled images", _format_or_dash(distilled.get("images"), "{:,}".format)),
        ("Size with labels", _format_or_dash(distilled.get("bytes"), format_bytes)),
        ("Training set is larger by", _format_or_dash(share, "{:,.0f} times".format)),
        ("Evaluation took", wording.duration_text(report.seconds)),
        ("Peak memory of the evaluation", format_bytes(report.peak_memory)),
        ("Data", f"{data['name']}: {splits} images"),
        ("SHA-256 of the training images", data["sha256"] or NOTHING),
        ("Machine", report.machine),
        ("Versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    return [(name, value) for name, value in facts if value and value != NOTHING]


def failures(report: Report) -> list[str]:
    """One line for every training without an accuracy, with its reason."""
    return [f"{_training_label(r)}: {wording.reason(r)}" for r in report.results if _has_failed(r)]


def _has_failed(result: Result) -> bool:
    return result.accuracy is None


def _training_label(result: Result) -> str:
    return (
        f"{result.learner} on {wording.arm_label(result.arm, result.augmented)}, seed {result.seed}"
    )


def _difference(paired: PairedDifference | None) -> str:
    """Format a difference in points, with its interval where there is a test."""
    if paired is None:
        return NOTHING
    mean = _signed_points(paired.difference.mean)
    if paired.p is None:
        return mean
    return f"{mean} ({wording.confidence_interval(paired.difference)})"


def _accuracy(row: Row | None) -> str:
    return NOTHING if row is None else wording.accuracy(row)


def _gap(distilled: Row | None, other: Row | None) -> str:
    if not (distilled and distilled.accuracy and other and other.accuracy):
        return NOTHING
    return _signed_points(distilled.accuracy.mean - other.accuracy.mean)


def _signed_points(fraction: float) -> str:
    """Format a difference in points, with a sign as wide as a digit."""
    return f"{100 * fraction:+.1f}".replace("-", wording.MINUS)


def _format_number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _format_or_dash(value: float | None, format_: Callable[..., str]) -> str:
    return NOTHING if value is None else format_(value)
