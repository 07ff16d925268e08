"""Evaluations that never took place, from a seeded generator, for reports and pages."""

from dataclasses import replace

import numpy as np

from dsdistill.harness.evaluation.results import Result
from dsdistill.harness.reports.report import Report

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "bag")
LEVELS = {
    "distilled": 0.78,
    "distilled-hard": 0.71,
    "random": 0.62,
    "k-means": 0.72,
    "herding": 0.7,
    "full": 0.9,
}
SEEDS = 5
TEST = 1600


def report(
    *,
    seed: int = 0,
    images_per_class: int = 10,
    learners: tuple[str, ...] = ("ridge", "convnet", "mlp:64"),
    classes: tuple[str, ...] = CLASSES,
    gain: float = 0.0,
    **fields,
) -> Report:
    """A whole report; `ridge` has no randomness of its own, others have curves and augmentation.

    Args:
        seed: Of the generator.
        images_per_class: Of the distilled set.
        learners: Names.
        classes: Names.
        gain: Added to every accuracy but the full data's.
        fields: Of the report, in place of those made here.
    """
    rng = np.random.default_rng(seed)
    found = [
        result(rng, arm, learner, augmented, i, classes, images_per_class, gain)
        for learner in learners
        for augmented in ((False,) if learner == "ridge" else (False, True))
        for arm in LEVELS
        for i in range(SEEDS)
    ]
    made = Report(
        title=f"kip on fashion-mnist, {images_per_class * len(classes)} images",
        notes=["ridge on full data: a class-balanced draw of 5000 of 54000 images."],
        commands=[
            f"dsdistill kip fashion-mnist --images-per-class {images_per_class} --kernel fc",
            "dsdistill evaluate runs/kip-1 --learners ridge,convnet,mlp:64 --seeds 5",
        ],
        classes=list(classes),
        data={
            "name": "fashion-mnist",
            "sha256": "5f" * 32,
            "train": 54000,
            "validation": 6000,
            "test": TEST,
        },
        images_per_class=images_per_class,
        results=tuple(found),
        distilled={
            "method": "kip",
            "kernel": "fc",
            "seconds": 1260.5,
            "peak_memory": 2_200_000_000,
            "metrics": {"test_accuracy": 0.78},
            "images": images_per_class * len(classes),
            "bytes": 3200 * images_per_class * len(classes),
            "compression": 169.0,
        },
        seconds=4321.0,
        peak_memory=3_300_000_000,
        machine="Linux-6.1-x86_64",
        versions={"python": "3.11.2", "numpy": "2.4.6", "torch": "2.14.1"},
    )
    return replace(made, **fields)


def result(
    rng: np.random.Generator,
    arm: str,
    learner: str,
    augmented: bool,
    seed: int,
    classes: tuple[str, ...] = CLASSES,
    images_per_class: int = 10,
    gain: float = 0.0,
) -> Result:
    """One training, with a confusion matrix that its accuracy agrees with."""
    fixed = learner == "ridge" and arm not in ("random", "k-means")
    if fixed:  # the same whatever the seed
        rng = np.random.default_rng(len(arm))
    k, network = len(classes), learner != "ridge"
    level = LEVELS[arm] + (gain if arm != "full" else 0) + 0.02 * augmented - 0.05 * network
    confusion = _confusion(rng, k, min(level + 0.01 * rng.normal(), 0.99))
    images = 54000 if arm == "full" else images_per_class * k
    return Result(
        arm,
        learner,
        augmented,
        seed,
        images=images,
        bytes=images * (3140 if arm == "distilled" else 785),
        rate=0.01 if network else None,
        accuracy=float(confusion.trace() / confusion.sum()),
        validation_accuracy=level,
        nll=float(-np.log(level)),
        calibration_error=0.03,
        per_class=(confusion.diagonal() / confusion.sum(1)).tolist(),
        confusion=confusion.tolist(),
        train_seconds=0.0 if fixed and seed else 0.4 + 12 * network + 60 * (arm == "full"),
        tune_seconds=40.0 if network and seed == 0 else 0.0,
        peak_memory=1_500_000_000 + seed,
        facts=_facts(rng) if network else None,
    )


def _confusion(rng: np.random.Generator, k: int, accuracy: float) -> np.ndarray:
    """Counts whose rows share a number of test images; some classes are easier than others."""
    each = TEST // k
    right = np.clip(accuracy + np.linspace(-0.08, 0.08, k), 0, 1)
    counts = np.zeros((k, k), np.int64)
    for c in range(k):
        wrong = rng.dirichlet(np.full(k, 0.3))
        wrong[c] = 0
        wrong *= (1 - right[c]) / wrong.sum()
        wrong[c] = right[c]
        counts[c] = rng.multinomial(each, wrong / wrong.sum())
    return counts


def _facts(rng: np.random.Generator) -> dict:
    steps = np.arange(0, 301, 15)
    floor = rng.uniform(0.02, 0.2) + 0.01 * rng.random(len(steps))
    losses = 2.3 * np.exp(-steps / rng.uniform(50, 110)) + floor
    return {
        "parameters": 320_010,
        "flops": 92_000_000,
        "latency_ms": {"1": 0.41, "64": 8.7},
        "curve": [[int(s), float(v)] for s, v in zip(steps, losses, strict=True)],
    }
