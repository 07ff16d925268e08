"""The tables of a report beside its headline: scores, probabilities, costs. Words, not markup."""

from collections.abc import Callable, Sequence

from dsdistill.harness.evaluation.results import Result, Row
from dsdistill.harness.evaluation.scores import SetScores
from dsdistill.harness.evaluation.statistics import Paired
from dsdistill.harness.memory import readable
from dsdistill.harness.reports import wording
from dsdistill.harness.reports.report import Report
from dsdistill.harness.reports.wording import NOTHING
from dsdistill.harness.runs.progress import amount

CONTRASTS = (
    "learner",
    "distilled, %",
    "minus random, points",
    "p",
    "minus k-means",
    "minus herding",
    "minus full data",
)
SCORES = ("learner", "HLR", "IOR", "LRS", "ARS", "distilled − random, points", "p")
SCORES_OF = "Without augmentation where the learner was trained without it; ARS of both"
SCORES_SAY = (
    "HLR: full data minus distilled images, both with hard labels; 0 is best. IOR: distilled minus "
    "random images. LRS and ARS: DD-Ranking's label-robust and augmentation-robust score, 0 to 1; "
    "0.269 is no better than random images. All are fractions. p: paired t test over the seeds, "
    "beside the difference with its 95 % interval."
)
QUALITY = (
    "trained on",
    "learning rate",
    "validation accuracy, %",
    "NLL, nats",
    "calibration error, %",
    "agrees with teacher, %",
    "KL from teacher, nats",
)
QUALITY_OF = "Means over the seeds; of the test images but for the validation accuracy"
QUALITY_SAY = (
    "Probabilities are calibrated with one temperature, fitted on the validation images. The "
    "calibration error has 15 bins of equal width."
)
COST = (
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
COST_OF = "Of one training, but for tuning: of all trainings that chose the learning rate"
COST_SAY = (
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


def contrasts(report: Report, score: SetScores) -> list[str]:
    """One line under `CONTRASTS`: the mean on the distilled set, and how far others are from it."""
    own = report.row(score.learner, "distilled")
    others = (report.row(score.learner, arm) for arm in ("k-means", "herding", "full"))
    return [
        score.learner,
        NOTHING if own is None else wording.accuracy(own),
        _difference(score.versus_random),
        wording.chance(score.versus_random),
        *(_gap(own, other) for other in others),
    ]


def scores(score: SetScores) -> list[str]:
    """One line under `SCORES`."""
    against = score.versus_random
    fractions = (score.hlr, score.ior, score.lrs, score.ars)
    return [
        score.learner,
        *(NOTHING if value is None else f"{value:.3f}" for value in fractions),
        _difference(against),
        wording.chance(against),
    ]


def has_quality(rows: Sequence[Row]) -> bool:
    """Whether there is anything to show under `QUALITY`."""
    return any(result.nll is not None for row in rows for result in row.results)


def quality(row: Row) -> list[str]:
    """One line under `QUALITY`; nothing of what any seed lacks."""
    rate = row.results[0].rate
    return [
        wording.label(row.arm, row.augmented),
        NOTHING if rate is None else f"{rate:g}",
        wording.percent(row.mean("validation_accuracy")),
        _number(row.mean("nll")),
        wording.percent(row.mean("calibration_error")),
        wording.percent(row.mean("teacher_agreement")),
        _number(row.mean("teacher_kl")),
    ]


def cost(row: Row) -> list[str]:
    """One line under `COST`."""
    first, latency = row.results[0], wording.fact(row, "latency_ms") or {}
    return [
        wording.label(row.arm, row.augmented),
        wording.time(wording.training(row)),
        wording.time(wording.tuning(row)),
        _known(max(result.peak_memory for result in row.results) or None, readable),
        f"{first.images:,}",
        readable(first.bytes),
        _known(wording.fact(row, "parameters"), amount),
        _known(wording.fact(row, "flops"), amount),
        _known(latency.get("1"), "{:.2f}".format),
        _known(latency.get("64"), "{:.2f}".format),
    ]


def about(report: Report) -> list[tuple[str, str]]:
    """What the set and the evaluation took, and on what: names and values."""
    made, share = report.distilled, report.distilled.get("compression")
    data = report.data
    splits = ", ".join(f"{data[part]:,} {part}" for part in ("train", "validation", "test"))
    found = [
        ("Method", made.get("method")),
        ("Kernel", made.get("kernel")),
        ("Distillation took", _known(made.get("seconds"), wording.time)),
        ("Peak memory of the distillation", _known(made.get("peak_memory"), readable)),
        ("Distilled images", _known(made.get("images"), "{:,}".format)),
        ("Size with labels", _known(made.get("bytes"), readable)),
        ("Training set is larger by", _known(share, "{:,.0f} times".format)),
        ("Evaluation took", wording.time(report.seconds)),
        ("Peak memory of the evaluation", readable(report.peak_memory)),
        ("Data", f"{data['name']}: {splits} images"),
        ("SHA-256 of the training images", data["sha256"] or NOTHING),
        ("Machine", report.machine),
        ("Versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    return [(name, value) for name, value in found if value and value != NOTHING]


def failures(report: Report) -> list[str]:
    """Every training without an accuracy, with its reason."""
    return [f"{_training(r)}: {wording.reason(r)}" for r in report.results if _failed(r)]


def _failed(result: Result) -> bool:
    return result.accuracy is None


def _training(result: Result) -> str:
    return f"{result.learner} on {wording.label(result.arm, result.augmented)}, seed {result.seed}"


def _difference(against: Paired | None) -> str:
    """In points, with its interval where there is a test."""
    if against is None:
        return NOTHING
    mean = _signed(against.difference.mean)
    return mean if against.p is None else f"{mean} ({wording.between(against.difference)})"


def _gap(own: Row | None, other: Row | None) -> str:
    if not (own and own.accuracy and other and other.accuracy):
        return NOTHING
    return _signed(own.accuracy.mean - other.accuracy.mean)


def _signed(fraction: float) -> str:
    """In points, with a sign that is as wide as a digit."""
    return f"{100 * fraction:+.1f}".replace("-", wording.MINUS)


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _known(value: float | None, said: Callable[..., str]) -> str:
    return NOTHING if value is None else said(value)
