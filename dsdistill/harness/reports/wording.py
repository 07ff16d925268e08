"""Figures as text: percentages with their spread, failures, p values, durations."""

from collections.abc import Sequence
from typing import Any

from dsdistill.harness.evaluation.results import Result, Row
from dsdistill.harness.evaluation.statistics import PairedDifference, Summary
from dsdistill.harness.runs.progress import format_duration

NOTHING = "–"  # content of a cell without a value
MINUS = "−"  # as wide as a digit
NO_BREAK_SPACE = "\u00a0"
DETERMINISTIC = "deterministic"
SIGNIFICANCE_LEVEL = 0.05  # a smaller p counts as a difference
_SEED_INVARIANT = ("accuracy", "nll", "confusion")  # equal for all seeds without randomness


def percent(fraction: float | None) -> str:
    """Format a fraction in percent, without the percent sign."""
    return NOTHING if fraction is None else f"{100 * fraction:.1f}"


def spread(summary: Summary | None, scale: float = 100, digits: int = 1) -> str:
    """Format mean ± sample deviation, by default in percent; one value has no deviation."""
    if summary is None:
        return NOTHING
    mean = f"{scale * summary.mean:.{digits}f}"
    return mean if summary.n == 1 else f"{mean} ± {scale * summary.std:.{digits}f}"


def confidence_interval(summary: Summary | None, scale: float = 100, digits: int = 1) -> str:
    """Format the 95 % interval of a mean, by default in percent; one value has none."""
    if summary is None or summary.n == 1:
        return NOTHING
    ends = (f"{scale * end:.{digits}f}" for end in (summary.low, summary.high))
    return " to ".join(ends).replace("-", MINUS)


def is_deterministic(row: Row) -> bool:
    """Whether several seeds all gave the same predictor."""
    first = row.results[0]
    return len(row.results) > 1 and all(
        getattr(result, name) == getattr(first, name)
        for result in row.results
        for name in _SEED_INVARIANT
    )


def accuracy(row: Row) -> str:
    """Format mean ± deviation of the test accuracy in percent, or why there is no mean."""
    if row.failures:
        return failure(row)
    if is_deterministic(row) and row.accuracy:
        return f"{percent(row.accuracy.mean)} ({DETERMINISTIC})"
    return spread(row.accuracy)


def interval(row: Row) -> str:
    """Format the 95 % interval of the mean accuracy, in percent."""
    return NOTHING if is_deterministic(row) else confidence_interval(row.accuracy)


def failure(row: Row) -> str:
    """Say how many seeds failed, and why."""
    reasons = dict.fromkeys(reason(r) for r in row.failures)
    return f"failed {len(row.failures)} of {len(row.results)}: {'; '.join(reasons)}"


def reason(result: Result) -> str:
    """Say on one line why a training has no accuracy."""
    return " ".join((result.failure or "no accuracy").split())


def p_value(paired: PairedDifference | None) -> str:
    """Format the p value of a comparison."""
    if paired is None or paired.p is None:
        return NOTHING
    return "< 0.001" if paired.p < 0.001 else f"{paired.p:.3f}"


def duration_text(seconds: float | None) -> str:
    """Format a duration; a dash for none."""
    return format_duration(seconds) if seconds else NOTHING


def training_seconds(row: Row) -> float | None:
    """Seconds of one training, the mean of those that took place."""
    seconds = [result.train_seconds for result in row.results if result.train_seconds]
    return sum(seconds) / len(seconds) if seconds else None


def tuning_seconds(row: Row) -> float:
    """Seconds of all trainings that chose the learning rate."""
    return sum(result.tune_seconds for result in row.results)


def fact(row: Row, name: str) -> Any:
    """One of `Result.facts`, from the first seed that has it; None if none has."""
    facts = (result.facts or {} for result in row.results)
    return next((known[name] for known in facts if known.get(name) is not None), None)


def arm_label(arm: str, augmented: bool) -> str:
    """Name of an arm, with how it was trained."""
    return f"{arm}, augmented" if augmented else arm


def join_names(names: Sequence[str]) -> str:
    """Join names for a sentence: a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
