"""DD-Ranking's scores of a distilled set, one set of scores per learner."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dsdistill.harness.evaluation import controls, statistics
from dsdistill.harness.evaluation.results import Row
from dsdistill.harness.evaluation.statistics import PairedDifference


@dataclass(frozen=True)
class SetScores:
    """Scores of a distilled set by one learner; None where an arm is missing or failed.

    Attributes:
        learner: Name of the learner.
        hlr: Hard-label recovery, from the arms `full` and `distilled-hard`.
        ior: Improvement over random, from the arms `distilled` and `random`.
        lrs: Label-robust score, from these two.
        ars: Augmentation-robust score, from `distilled` and `random` with and without
            augmentation.
        versus_random: `distilled` minus `random`, paired by the seeds that both have.
        further: The same of each further set that the learner was trained on, by its name.
    """

    learner: str
    hlr: float | None
    ior: float | None
    lrs: float | None
    ars: float | None
    versus_random: PairedDifference | None
    further: Mapping[str, PairedDifference | None] = field(default_factory=dict)


def score_learners(rows: Sequence[Row]) -> list[SetScores]:
    """Score the distilled set by each learner, in the order in which the learners first appear.

    All scores but the ARS come from the rows without augmentation, or, for a learner that was
    only trained with it, from the augmented ones: a difference between the two kinds would
    measure the augmentation.

    Args:
        rows: Rows from `results.group_by_training`, whose mean accuracies are compared.
    """
    learners = dict.fromkeys(row.learner for row in rows)
    return [_score_learner(name, [row for row in rows if row.learner == name]) for name in learners]


def _score_learner(learner: str, rows: Sequence[Row]) -> SetScores:
    table = {(row.arm, row.augmented): row for row in rows}
    augmented = all(row.augmented for row in rows)

    def mean(arm: str, augmented: bool = augmented) -> float | None:
        row = table.get((arm, augmented))
        return row.accuracy.mean if row and row.accuracy else None

    def gain(augmented: bool) -> float | None:
        accuracies = mean("distilled", augmented), mean("random", augmented)
        return _apply_if_known(statistics.improvement_over_random, *accuracies)

    def versus_random(arm: str) -> PairedDifference | None:
        return _paired_difference(table.get((arm, augmented)), table.get(("random", augmented)))

    further = [arm for arm, kind in table if kind == augmented and not controls.is_reserved(arm)]
    hlr = _apply_if_known(statistics.hard_label_recovery, mean("full"), mean("distilled-hard"))
    ior = gain(augmented)
    return SetScores(
        learner,
        hlr,
        ior,
        lrs=_apply_if_known(statistics.label_robust_score, hlr, ior),
        ars=_apply_if_known(statistics.augmentation_robust_score, gain(True), gain(False)),
        versus_random=versus_random("distilled"),
        further={arm: versus_random(arm) for arm in further},
    )


def _apply_if_known(
    formula: Callable[[float, float], float], a: float | None, b: float | None
) -> float | None:
    """Apply a formula to two values; None if one is unknown."""
    return None if a is None or b is None else formula(a, b)


def _paired_difference(a: Row | None, b: Row | None) -> PairedDifference | None:
    if a is None or b is None or a.failures or b.failures:
        return None
    first, second = _by_seed(a), _by_seed(b)
    seeds = [seed for seed in first if seed in second]
    if not seeds:
        return None
    pairs = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
    return statistics.paired_difference(*pairs, bounds=(-1.0, 1.0))


def _by_seed(row: Row) -> dict[int, float]:
    return {r.seed: r.accuracy for r in row.results if r.accuracy is not None}
