"""Verdict of an evaluation, in sentences: is the distilled set better than random images?"""

from dsdistill.harness.evaluation.results import Row
from dsdistill.harness.evaluation.scores import SetScores
from dsdistill.harness.evaluation.statistics import PairedDifference
from dsdistill.harness.reports import wording
from dsdistill.harness.reports.report import Report

BETTER, WORSE, ALIKE, UNKNOWN = "better", "worse", "alike", "unknown"
_OTHER_CONTROLS = ("k-means", "herding")  # with as many images as the set, like `random`


def subject(report: Report) -> str:
    """One sentence on what was evaluated, and how."""
    seeds = len({result.seed for result in report.results})
    method, kernel = report.distilled.get("method"), report.distilled.get("kernel")
    by = f" by {method}" if method else ""
    by += f" with the kernel {kernel}" if kernel else ""
    arms = {row.arm for row in report.rows}
    controls = [arm for arm in ("random", *_OTHER_CONTROLS) if arm in arms]
    others = ""
    if controls:
        others = f" and, the same way, on as many {wording.join_names(controls)} images"
    others += " and on the full data" if "full" in arms else ""
    count = f"{seeds} seed{'s' if seeds > 1 else ''} each"
    return (
        f"{_describe_set(report)} distilled from {report.data['name']}{by}, judged by the accuracy "
        f"of {wording.join_names(report.learners)} on {report.data['test']:,} test images after "
        f"training on it{others}; {count}."
    )


def headline(report: Report) -> str:
    """One sentence with the answer of all learners."""
    learners: dict[str, list[str]] = {}
    for score in report.scores:
        learners.setdefault(classify(score), []).append(score.learner)
    parts = {
        BETTER: "the distilled set is better than as many random images for {}",
        WORSE: "it is worse for {}",
        ALIKE: "there is no clear difference for {}",
        UNKNOWN: "nothing can be said for {}",
    }
    if BETTER not in learners:
        parts[WORSE] = "the distilled set is worse than as many random images for {}"
        alike = "the distilled set is not clearly different from as many random images"
        parts[ALIKE] = f"{alike} for {{}}"
        parts[UNKNOWN] = "nothing can be said of the distilled set against random images for {}"
    sentence = "; ".join(
        text.format(wording.join_names(learners[kind]))
        for kind, text in parts.items()
        if kind in learners
    )
    return sentence[:1].upper() + sentence[1:] + "."


def classify(score: SetScores) -> str:
    """Whether the distilled set or random images are better, as far as the seeds can tell."""
    paired = score.versus_random
    if paired is None or (paired.p is None and paired.difference.n == 1):
        return UNKNOWN
    if paired.p is not None and paired.p >= wording.SIGNIFICANCE_LEVEL:
        return ALIKE
    mean = paired.difference.mean
    return ALIKE if mean == 0 else BETTER if mean > 0 else WORSE


def answer(report: Report, score: SetScores) -> str:
    """One sentence on a learner: its accuracy, and the distances to the other kinds of data."""
    distilled = report.row(score.learner, "distilled")
    if distilled is None or distilled.accuracy is None:
        reason = wording.failure(distilled) if distilled else "not trained on the distilled set"
        return f"{reason}."
    paired = score.versus_random
    parts = [_against_random(paired) if paired else "not compared with random images"]
    for arm in _OTHER_CONTROLS:
        if row := report.row(score.learner, arm):
            parts.append(_describe_distance(distilled, row, arm))
    full = report.row(score.learner, "full")
    parts.append(
        _describe_distance(distilled, full, "full data") if full else "not trained on the full data"
    )
    return f"{wording.percent(distilled.accuracy.mean)} %, {', '.join(parts)}."


def _against_random(paired: PairedDifference) -> str:
    difference, n = paired.difference, paired.difference.n
    text = _describe_gap(difference.mean, "random images", " points")
    if n == 1:
        return f"{text} (one seed: no test)"
    if paired.p is None:
        return f"{text} (the same for every seed)"
    p = wording.p_value(paired)
    test = (f"p {p}" if p.startswith("<") else f"p = {p}").replace(" ", wording.NO_BREAK_SPACE)
    interval = wording.confidence_interval(difference)
    return f"{text} (95{wording.NO_BREAK_SPACE}% interval {interval}, {test})"


def _describe_distance(distilled: Row, other: Row, name: str) -> str:
    if other.accuracy is None or distilled.accuracy is None:
        return f"{name} {wording.failure(other)}"
    return _describe_gap(distilled.accuracy.mean - other.accuracy.mean, name)


def _describe_gap(difference: float, than: str, unit: str = "") -> str:
    size = wording.percent(abs(difference))
    if size == "0.0":
        return f"level with {than}"
    return f"{size}{unit} {'above' if difference > 0 else 'below'} {than}"


def _describe_set(report: Report) -> str:
    images, share = report.distilled.get("images"), report.distilled.get("compression")
    count = images or report.images_per_class * len(report.classes)
    noun = "image" if report.images_per_class == 1 else "images"
    text = f"{count:,} images ({report.images_per_class} {noun} per class"
    return f"{text}; 1/{share:,.0f} of the bytes)" if share else f"{text})"
