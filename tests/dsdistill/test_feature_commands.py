"""Features through the commands of `dsdistill`: distilled, evaluated, given other labels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsdistill.commands import distil, evaluation_parts
from dsdistill.commands import evaluate as evaluate_command
from dsdistill.harness.data import distilled_set
from dsdistill.harness.data.feature_file import PartialFeatures
from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation.protocol import stored_bytes
from dsdistill.harness.evaluation.results import Result
from dsdistill.harness.reports import report as reports
from dsdistill.options import EvaluateOptions, KipOptions, LabelSolveOptions

D, CLASSES = 6, ("a", "b", "c")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of three overlapping classes: 150 of training and 60 of test images."""
    path = tmp_path_factory.mktemp("features") / "f.npz"
    rng = np.random.default_rng(0)
    labels = np.arange(210) % 3
    means = rng.normal(size=(3, D))
    partial = PartialFeatures(path, {"draw_order": None}, (210, D), resume=False)
    partial.append((5 + means[labels] + rng.normal(size=(210, D))).astype(np.float32))
    partial.finish(labels, CLASSES, np.where(np.arange(210) < 150, 0, 2), np.arange(210))
    return path


@pytest.fixture(scope="module")
def solved(file: Path) -> Path:
    options = LabelSolveOptions(
        str(file),
        kernel="linear",
        images_per_class=3,  # nine images, seven values
        validation_fraction=0.1,
        out=file.parent / "ls",
    )
    return distil.run_label_solve(options)


def test_label_solve_reads_features_and_draws_no_picture(solved: Path, file: Path) -> None:
    distilled = distilled_set.load(solved / distilled_set.FILE_NAME)
    assert distilled.images.shape == (9, 1, 1, D)
    assert distilled.preprocess.kind == "centre"
    assert distilled.provenance["kernel"] == "linear"
    assert distilled.provenance["data"]["source"] == str(file)
    assert not (solved / "distilled.png").exists()


@pytest.mark.parametrize("kernel", ["linear", "fc"])
def test_kip_learns_features(file: Path, tmp_path: Path, kernel: str) -> None:
    options = KipOptions(
        str(file), kernel=kernel, images_per_class=1, steps=5, out=tmp_path / "kip"
    )
    run = distil.run_kip(options)
    before, after = (
        distilled_set.load(run / distilled_set.FILE_NAME).provenance["metrics"][name]
        for name in ("initial_test_accuracy", "test_accuracy")
    )
    assert after >= before - 0.1
    with pytest.raises(UserError, match="singular for more than 7 images, got 9"):
        distil.run_kip(
            replace(options, kernel="linear", images_per_class=3, ridge=1e-6, out=tmp_path / "x")
        )


def parts(solved: Path, **changes: object) -> evaluation_parts.EvaluationParts:
    options = EvaluateOptions(solved, learners="ridge", controls="random,random-solved,full")
    return evaluation_parts.assemble(replace(options, **changes))  # pyright: ignore[reportArgumentType]


def test_random_images_with_solved_labels_are_the_same_images(solved: Path) -> None:
    arms = {arm.name: arm for arm in parts(solved).arms}
    plain, relabelled = (arms[name].draw(1) for name in ("random", "random-solved"))
    np.testing.assert_array_equal(plain.images(), relabelled.images())
    np.testing.assert_array_equal(plain.data.labels, relabelled.data.labels)
    assert plain.targets is None
    assert relabelled.targets is not None
    assert relabelled.targets.shape == (9, 3)
    # A label is three floats in place of one index.
    assert stored_bytes(relabelled) - stored_bytes(plain) == 9 * (3 * 4 - 1)
    assert arms["random-solved"].identity != arms["random"].identity


def test_solved_labels_of_any_images_give_the_classifier_of_all(
    solved: Path, tmp_path: Path
) -> None:
    """With more images than values the rows are equal: the images carry nothing."""
    options = EvaluateOptions(
        solved,
        learners="ridge,ridge:linear,linear-probe",
        controls="random,random-solved,full",
        seeds=2,
        cache=None,
        out=tmp_path / "evaluation",
    )
    report = reports.load(evaluate_command.run(options))

    def results(learner: str, arm: str) -> list[Result]:
        return [r for r in report.results if (r.learner, r.arm) == (learner, arm)]

    for learner in ("ridge", "ridge:linear"):
        accuracies = {
            arm: [result.accuracy for result in results(learner, arm)]
            for arm in ("distilled", "random-solved", "full")
        }
        assert accuracies["random-solved"] == accuracies["full"] == accuracies["distilled"]
    assert all(row.accuracy is not None for row in report.rows)
    assert results("linear-probe", "full")[0].images == 135
    assert not (tmp_path / "evaluation" / reports.IMAGES_FILE).exists()


def test_soft_labels_need_a_teacher(solved: Path) -> None:
    with pytest.raises(UserError, match="random-soft has the labels of a teacher"):
        parts(solved, controls="random-soft")


def test_soft_labels_are_the_probabilities_of_the_teacher(solved: Path) -> None:
    whole = parts(solved)
    logits = np.random.default_rng(0).normal(size=(D, 3))

    def teacher(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), D) @ logits

    names = ["random", "random-soft"]
    splits, own = whole.splits, whole.distilled
    found = evaluation_parts.combine(own, splits, whole.learners, names, teacher=teacher)
    plain, soft = (arm.draw(0) for arm in found.arms[-2:])
    assert isinstance(soft, Examples)
    assert soft.targets is not None
    exponents = np.exp(teacher(plain.images()))
    expected = exponents / exponents.sum(1, keepdims=True) - 1 / 3
    np.testing.assert_allclose(soft.targets, expected, atol=1e-6)
    assert found.arms[-1].identity is None  # a function has no identity: nothing is cached
