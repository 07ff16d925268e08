"""What an evaluation says, in sentences: is the distilled set better than random images?"""

from dsdistill.harness.evaluation.results import Row
from dsdistill.harness.evaluation.scores import SetScores
from dsdistill.harness.evaluation.statistics import PairedDifference
from dsdistill.harness.reports import wording
from dsdistill.harness.reports.report import Report

BETTER, WORSE, ALIKE, UNKNOWN = "better", "worse", "alike", "unknown"
_OTHER_CONTROLS = ("k-means", "herding")  # other controls of as many images as the set


def subject(report: Report) -> str:
    """What was evaluated, and how."""
    made, seeds = report.distilled, len({result.seed for result in report.results})
    method, kernel = made.get("method"), made.get("kernel")
    by = f" by {method}" if method else ""
    by += f" with the kernel {kernel}" if kernel else ""
    arms = {row.arm for row in report.rows}
    sized = [arm for arm in ("random", *_OTHER_CONTROLS) if arm in arms]
    beside = f" and, the same way, on as many {wording.join_names(sized)} images" if sized else ""
    beside += " and on the full data" if "full" in arms else ""
    count = f"{seeds} seed{'s' if seeds > 1 else ''} each"
    return (
        f"{_describe_set(report)} distilled from {report.data['name']}{by}, judged by the accuracy of "
        f"{wording.join_names(report.learners)} on {report.data['test']:,} test images after "
        f"training on it{beside}; {count}."
    )


def headline(report: Report) -> str:
    """The answer of all learners together."""
    found: dict[str, list[str]] = {}
    for score in report.scores:
        found.setdefault(classify(score), []).append(score.learner)
    parts = {
        BETTER: "the distilled set is better than as many random images for {}",
        WORSE: "it is worse for {}",
        ALIKE: "there is no clear difference for {}",
        UNKNOWN: "nothing can be said for {}",
    }
    if BETTER not in found:
        parts[WORSE] = "the distilled set is worse than as many random images for {}"
        parts[ALIKE] = "the distilled set is not clearly other than as many random images for {}"
        parts[UNKNOWN] = "nothing can be said of the distilled set against random images for {}"
    said = [
        text.format(wording.join_names(found[kind]))
        for kind, text in parts.items()
        if kind in found
    ]
    sentence = "; ".join(said)
    return sentence[:1].upper() + sentence[1:] + "."


def classify(score: SetScores) -> str:
    """Whether the distilled set or random images are better, as far as the seeds can tell."""
    against = score.versus_random
    if against is None or (against.p is None and against.difference.n == 1):
        return UNKNOWN
    if against.p is not None and against.p >= wording.SIGNIFICANCE_LEVEL:
        return ALIKE
    mean = against.difference.mean
    return ALIKE if mean == 0 else BETTER if mean > 0 else WORSE


def answer(report: Report, score: SetScores) -> str:
    """What one learner says: by how much, how sure, and how far from the full data."""
    distilled = report.row(score.learner, "distilled")
    if distilled is None or distilled.accuracy is None:
        why = wording.failure(distilled) if distilled else "not trained on the distilled set"
        return f"{why}."
    against = score.versus_random
    said = [_against_random(against) if against else "not compared with random images"]
    for arm in _OTHER_CONTROLS:
        if row := report.row(score.learner, arm):
            said.append(_describe_distance(distilled, row, arm))
    full = report.row(score.learner, "full")
    said.append(
        _describe_distance(distilled, full, "full data") if full else "full data not trained on"
    )
    return f"{wording.percent(distilled.accuracy.mean)} %, {', '.join(said)}."


def _against_random(against: PairedDifference) -> str:
    difference, n = against.difference, against.difference.n
    text = _describe_gap(difference.mean, "random images", " points")
    if n == 1:
        return f"{text} (one seed: no test)"
    if against.p is None:
        return f"{text} (the same for every seed)"
    p = wording.p_value(against)
    equals = (p if p.startswith("<") else f"= {p}").replace(" ", wording.NO_BREAK_SPACE)
    interval = wording.confidence_interval(difference)
    return f"{text} (95{wording.NO_BREAK_SPACE}% interval {interval}, p{wording.NO_BREAK_SPACE}{equals})"


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
    one = "image" if report.images_per_class == 1 else "images"
    text = f"{count:,} images ({report.images_per_class} {one} a class"
    return f"{text}; 1/{share:,.0f} of the bytes)" if share else f"{text})"
