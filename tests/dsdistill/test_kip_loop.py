"""Whole KIP runs: phases, exact resume, early stop, choice of the support, divergence."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsdistill.commands.distil import run_kip, run_label_solve
from dsdistill.harness import memory
from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from dsdistill.harness.data.preprocess import identity
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import metrics_file, progress, run_folder
from dsdistill.kernels import gram, networks
from dsdistill.loops import selection, timing
from dsdistill.loops.kip_loop import run_to_end
from dsdistill.loops.label_solve_loop import accumulate_sums
from dsdistill.loops.plan import Phase, Plan
from dsdistill.loops.selection import Candidate
from dsdistill.methods import kip, outer_loss
from dsdistill.methods.adam import Adam
from dsdistill.methods.gauss_newton import GaussNewton
from dsdistill.methods.initial_support import Support, draw_support
from dsdistill.methods.outer_loss import SquaredError
from dsdistill.options import KipOptions, LabelSolveOptions

FC1, FC2 = networks.parse("fc", 1), networks.parse("fc", 2)


def examples(seed: int, n: int) -> Examples:
    """Images of three classes that differ in their means."""
    means = np.random.default_rng(0).standard_normal((3, 6, 6, 1))
    labels = np.arange(n) % 3
    noise = np.random.default_rng(seed).standard_normal((n, 6, 6, 1))
    data = LabeledImages((means[labels] + noise).astype(np.float32), labels, ("a", "b", "c"))
    return Examples(data, identity(1), is_preprocessed=True)


TRAIN, VALIDATION = examples(1, 90), examples(2, 30)


@pytest.fixture
def support() -> Support:
    return draw_support(TRAIN, 2, noise=False, corruption=0, seed=0)


def plan(*steps: int, networks: tuple = (FC1,), patience: int | None = None, **changes) -> Plan:
    """A plan of phases with these numbers of steps, with `fc(2)` in all but the last."""
    phase_list = [Phase(kip.KipObjective((FC2,), **changes), n) for n in steps[:-1]]
    phase_list.append(Phase(kip.KipObjective(networks, **changes), steps[-1]))
    return Plan(tuple(phase_list), target_batch=30, seed=0, patience=patience)


def opened(folder: Path) -> run_folder.Run:
    resume = (folder / "config.json").exists()
    return run_folder.start(folder, {}, result="result", resume=resume)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def interrupted_at(monkeypatch, stop: int) -> None:
    """Raise Ctrl-C while the line of this step is written."""
    write = metrics_file.Metrics.write

    def stopping(self, step: int, **figures: float) -> None:
        if step == stop:
            raise KeyboardInterrupt
        write(self, step, **figures)

    monkeypatch.setattr(metrics_file.Metrics, "write", stopping)


OPTIONS = {
    "plain": {},
    "cosine": {
        "cosine_steps": 6,
        "learn_labels": True,
        "optimizer": Adam(label_learning_rate=0.3),
    },
    "sampling": {"networks": (FC1, FC2)},
    "augment": {"augment": ("flip", "shift", "rotate")},
    "newton": {"optimizer": GaussNewton(0.3), "learn_labels": True},
}


STOPS = [("plain", 2), ("plain", 4), *((name, 7) for name in OPTIONS)]


@pytest.mark.parametrize(("name", "stop"), STOPS)
def test_resume_is_exact_in_every_phase(name, stop, support, tmp_path, monkeypatch):
    """Three steps of warm-up and six more, stopped in the first phase, at its end, and later."""
    walk = plan(3, 6, **OPTIONS[name])
    best, last = run_to_end(opened(tmp_path / "whole"), walk, support, TRAIN, VALIDATION)
    with monkeypatch.context() as context:
        interrupted_at(context, stop)
        with pytest.raises(KeyboardInterrupt):
            run_to_end(opened(tmp_path / "cut"), walk, support, TRAIN, VALIDATION)
    found, end = run_to_end(opened(tmp_path / "cut"), walk, support, TRAIN, VALIDATION)
    np.testing.assert_array_equal(end.state.images, last.state.images)
    np.testing.assert_array_equal(end.state.labels, last.state.labels)
    np.testing.assert_array_equal(found.images, best.images)
    assert (found.step, found.loss) == (best.step, best.loss)
    texts = [(tmp_path / x / "metrics.jsonl").read_text() for x in ("whole", "cut")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("stop", "seconds"), [(None, 4170), (5, 2100)])
def test_long_work_is_announced_before_it_begins(
    stop, seconds, support, tmp_path, monkeypatch, capsys
):
    """A pair with a target takes 2 s in the warm-up and 1 s later, half of that to predict.

    A step has 6 (2.5 * 6 + 30) = 270 pairs' worth: 9 or, after step 4, 5 of them. The start and
    each of 6, or 5, steps predict 30 images from 6, the end of the run 100.
    """
    monkeypatch.setattr(timing, "FORWARD_COST", 0.5)
    monkeypatch.setattr(
        timing, "time_tile", lambda network, *_: timing.Timing(20 if network is FC2 else 10, 10)
    )
    walk = replace(plan(3, 6), validation_images=30, closing_images=100)
    if stop is not None:
        with monkeypatch.context() as context:
            interrupted_at(context, stop)
            with pytest.raises(KeyboardInterrupt):
                run_to_end(opened(tmp_path), walk, support, TRAIN, VALIDATION)
        capsys.readouterr()
    run_to_end(opened(tmp_path), walk, support, TRAIN, VALIDATION)
    announced, *_ = capsys.readouterr().err.splitlines()
    assert announced == (
        f"expected: {progress.format_duration(seconds)} to the end of the run "
        "(10 s per tile, 1 pairs of images per second)"
    )


def test_long_work_of_the_second_kernel_is_announced(support, tmp_path, monkeypatch, capsys):
    """Half of six steps that cost 270 pairs, at 1 s per pair; the other kernel is quick."""
    monkeypatch.setattr(
        timing, "time_tile", lambda network, *_: timing.Timing(10, 10) if network is FC2 else None
    )
    run_to_end(opened(tmp_path), plan(6, networks=(FC1, FC2)), support, TRAIN, VALIDATION)
    announced, *_ = capsys.readouterr().err.splitlines()
    assert announced.startswith(f"expected: {progress.format_duration(3 * 270)} to the end")


def test_label_solve_is_announced_before_it_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "time_tile", lambda *_: timing.Timing(10, 10))
    accumulate_sums(opened(tmp_path), FC1, TRAIN.images(slice(5)), TRAIN, closing_images=30)
    announced, *_ = capsys.readouterr().err.splitlines()
    assert announced.startswith(f"expected: {progress.format_duration(5 * (90 + 30))} to the end")


def test_a_warm_up_is_numbered_shown_and_judged_at_its_end(support, tmp_path, capsys):
    run_to_end(opened(tmp_path), plan(3, 6), support, TRAIN, VALIDATION)
    figures = lines(tmp_path)
    assert [f["step"] for f in figures] == list(range(1, 10))
    assert [f["phase"] for f in figures] == [1] * 3 + [2] * 6
    assert ["validation_loss" in f for f in figures] == [False] * 2 + [True] * 7
    shown = capsys.readouterr().err.splitlines()
    assert re.match(r"expected: .* to the end of the run \(.* per warm-up step, ", shown[0])
    assert re.match(r"expected: .* to the end of the run \(.* per step, ", shown[2])
    assert shown[1].startswith("3/3 warm-up steps")
    assert shown[-1].startswith("6/6 steps")


def test_the_expected_duration_counts_both_phases_and_all_predictions(
    support, tmp_path, capsys, monkeypatch
):
    """After the first of three warm-up steps; a step takes 100 s by either measurement."""
    monkeypatch.setattr(timing, "step_seconds", lambda *_, **__: 100.0)
    monkeypatch.setattr(timing.StepTimer, "seconds", lambda self, step: 100.0)
    walk = replace(plan(3, 6), validation_images=60, closing_images=600)
    run_to_end(opened(tmp_path), walk, support, TRAIN, VALIDATION)
    n = len(support.images)
    pairs = n * (n + 30)
    steps = 100 * (2 + 6)
    predictions = timing.FORWARD_COST * 100 / pairs * n * (60 * 7 + 600)
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith(f"expected: {progress.format_duration(steps + predictions)} to the end")


def test_each_phase_starts_adam_afresh_and_keeps_the_images(support, tmp_path):
    """The second phase equals a run from the first phase's support with the same targets."""
    walk = plan(3, 2)
    _, last = run_to_end(opened(tmp_path), walk, support, TRAIN, VALIDATION)
    first, second = (phase.objective for phase in walk.phases)
    *_, warm = kip.distill(first, support, TRAIN, steps=3, target_batch=30, seed=0)
    state = second.restart(warm.state.images, warm.state.labels)
    options = {"steps": 5, "target_batch": 30, "seed": 0, "state": state, "done": 3}
    *_, end = kip.distill(second, support, TRAIN, **options)
    np.testing.assert_array_equal(last.state.images, end.state.images)
    assert int(last.state.moments.count) == 2  # type: ignore[attr-defined]


def test_several_networks_are_recorded_and_the_first_one_judges(support, tmp_path, monkeypatch):
    judges = []
    real = selection.scorer

    def scorer(fit, *rest, **options):
        judges.append(fit.__self__.networks[0])
        return real(fit, *rest, **options)

    monkeypatch.setattr(selection, "scorer", scorer)
    run_to_end(opened(tmp_path), plan(20, networks=(FC2, FC1)), support, TRAIN, VALIDATION)
    assert {f["network"] for f in lines(tmp_path)} == {0, 1}
    assert judges == [FC2]


def scripted(monkeypatch, loss: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """Script the scorer: loss and accuracy as functions of the step and of the number of images."""
    asked = []

    def judge(fit, outer, validation, unit=None):
        def score(step, images, labels):
            asked.append((step, len(validation)))
            images, labels = np.asarray(images), np.asarray(labels)
            return Candidate(step, images, labels, 0.5, loss(step, len(validation)))

        return score

    monkeypatch.setattr(selection, "scorer", judge)
    return asked


def test_patience_stops_a_run_and_a_resumed_one_stays_stopped(support, tmp_path, monkeypatch):
    asked = scripted(monkeypatch, lambda step, _: abs(step - 10) + 1)
    walk = plan(120, patience=4)  # a validation every three steps
    best, last = run_to_end(opened(tmp_path), walk, support, TRAIN, VALIDATION)
    assert (best.step, last.done) == (9, 21)
    assert [step for step, _ in asked] == [*range(0, 22, 3)]
    again, end = run_to_end(opened(tmp_path), walk, support, TRAIN, VALIDATION)
    assert (again.step, end.done) == (9, 21)
    assert len(lines(tmp_path)) == 21


def test_patience_counts_from_the_steps_not_from_the_start(support, tmp_path, monkeypatch):
    """An initial support better than all later ones must not end a run that improves."""
    scripted(monkeypatch, lambda step, _: 1 / step if step else 0.0)
    best, last = run_to_end(opened(tmp_path), plan(40, patience=2), support, TRAIN, VALIDATION)
    assert (best.step, last.done) == (0, 40)


def test_no_patience_in_a_warm_up(support, tmp_path, monkeypatch):
    scripted(monkeypatch, lambda step, _: float(step))
    _, last = run_to_end(opened(tmp_path), plan(3, 40, patience=1), support, TRAIN, VALIDATION)
    assert last.done == 3 + 2


@pytest.mark.parametrize(("full", "chosen"), [(0.1, 4), (0.01, 10)])
def test_the_choice_is_made_on_all_validation_images(support, tmp_path, monkeypatch, full, chosen):
    """The best on the subset competes with the last one, which may be better on all images."""

    def loss(step: int, images: int) -> float:
        return abs(step - 4) + 1 if images < 30 else {4: 0.05}.get(step, full)

    asked = scripted(monkeypatch, loss)
    walk = replace(plan(10), validation_images=12)
    best, _ = run_to_end(opened(tmp_path), walk, support, TRAIN, VALIDATION)
    assert best.step == chosen
    assert best.loss == min(full, 0.05)
    assert [a for a in asked if a[1] == 30] == [(4, 30), (10, 30)]
    assert {n for _, n in asked} == {12, 30}


def test_with_few_validation_images_all_judge_and_none_twice(support, tmp_path, monkeypatch):
    asked = scripted(monkeypatch, lambda step, _: 1.0)
    run_to_end(opened(tmp_path), plan(5), support, TRAIN, VALIDATION)
    assert asked == [(step, 30) for step in range(6)]


def test_the_subset_is_balanced_and_fixed():
    sample = selection.subset(VALIDATION, 12, seed=0)
    assert np.bincount(sample.data.labels).tolist() == [4, 4, 4]
    np.testing.assert_array_equal(sample.images(), selection.subset(VALIDATION, 12, 0).images())
    assert selection.subset(VALIDATION, 30, seed=0) is VALIDATION
    assert len(selection.subset(VALIDATION, 1, seed=0)) == 3  # at least one per class


def with_losses(monkeypatch, *losses: float) -> None:
    """Replace KIP's steps by ones that keep the support and have these losses."""

    def step(self, state, targets, step):
        return kip.Step(step + 1, state, losses[min(step, len(losses) - 1)], 0, 1, 1.0)

    monkeypatch.setattr(kip.Stepper, "step", step)


def test_a_diverging_loss_stops_with_the_last_good_checkpoint(support, tmp_path, monkeypatch):
    with_losses(monkeypatch, 0.2, 0.1, 0.15, 2.5)
    run = opened(tmp_path)
    walk = plan(200, learn_labels=True, optimizer=Adam(label_learning_rate=0.5))
    message = (
        r"diverges: for 10 steps in a row above 2, 2.5 at step 13: raise --ridge \(now 0.01\) or "
        r"lower --learning-rate \(now 0.04\) or --label-learning-rate \(now 0.5\)"
    )
    with pytest.raises(UserError, match=message):
        run_to_end(run, walk, support, TRAIN, VALIDATION)
    kept = run.load_state()
    assert kept is not None
    assert kept[1]["done"] == 3
    assert kept[0]["best.images"].shape == support.images.shape
    run.close()
    with pytest.raises(UserError, match="at step 13"):
        run_to_end(opened(tmp_path), walk, support, TRAIN, VALIDATION)


def test_a_loss_that_is_high_for_a_while_stops_nothing(support, tmp_path, monkeypatch):
    with_losses(monkeypatch, 0.2, *[2.5] * 9, 0.1, *[2.5] * 9, 0.1)
    _, last = run_to_end(opened(tmp_path), plan(40), support, TRAIN, VALIDATION)
    assert last.done == 40


def test_a_small_first_loss_is_no_measure(support, tmp_path, monkeypatch):
    """A distilled support has nearly no loss at first; the zero prediction is the measure."""
    nothing = outer_loss.zero_value(SquaredError(), 3)
    with_losses(monkeypatch, 1e-6, 9 * nothing)
    _, last = run_to_end(opened(tmp_path), plan(40), support, TRAIN, VALIDATION)
    assert last.done == 40
    assert math.isclose(last.limit, 10 * nothing)


def test_a_support_that_is_not_finite_ends_before_it_is_kept(support, tmp_path):
    run = opened(tmp_path)
    with pytest.raises(UserError, match=r"not finite at step .*--ridge .*--learning-rate"):
        run_to_end(run, plan(50, optimizer=Adam(1e38)), support, TRAIN, VALIDATION)
    kept = run.load_state()
    assert kept is not None
    assert all(np.isfinite(array).all() for array in kept[0].values())


def test_a_run_that_needs_too_much_memory_leaves_its_folder_free(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(gram, "free_bytes", lambda: 1e6)
        with pytest.raises(UserError, match="lower --target-batch"):
            run_kip(KipOptions(optimizer="gauss-newton", out=tmp_path / "a"))
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available", lambda: 3e5)
        with pytest.raises(UserError, match=r"Label Solve .* lower --images-per-class"):
            run_label_solve(LabelSolveOptions(out=tmp_path / "b"))
    assert not any(tmp_path.iterdir())
