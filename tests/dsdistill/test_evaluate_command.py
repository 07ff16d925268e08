"""`dsdistill evaluate` and `dsdistill report` on digits: full, stopped and cached; wrong input."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsdistill.commands import distil, evaluation_parts
from dsdistill.commands import evaluate as evaluate_command
from dsdistill.harness import machine
from dsdistill.harness.data import distilled_set
from dsdistill.harness.errors import UserError
from dsdistill.harness.reports import report as reports
from dsdistill.harness.stopping import StopInterrupt
from dsdistill.options import EvaluateOptions, LabelSolveOptions, ReportOptions
from kd.commands import train as train_command
from kd.evaluation import learners
from kd.options import Overrides, TrainOptions

ARMS = ["distilled", "distilled-hard", "random", "k-means", "herding", "full"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def evaluated(kip_run: Path, cache: Path, tmp_path_factory) -> Path:
    """An evaluation by ridge regression and a network with two seeds."""
    out = tmp_path_factory.mktemp("evaluation") / "first"
    options = EvaluateOptions(
        kip_run, learners="ridge,mlp:16", seeds=2, steps=20, cache=cache, out=out
    )
    return evaluate_command.run(options)


def test_every_arm_of_every_learner_is_there(evaluated: Path, kip_run: Path):
    report = reports.load(evaluated)
    assert [(row.learner, row.arm) for row in report.rows] == [
        (learner, arm) for learner in ("ridge", "mlp:16") for arm in ARMS
    ]
    distilled, random, full = (report.row("ridge", arm) for arm in ("distilled", "random", "full"))
    known = distilled_set.load(kip_run / distilled_set.FILE_NAME).provenance["metrics"][
        "test_accuracy"
    ]
    assert [r.accuracy for r in distilled.results] == [pytest.approx(known)] * 2
    assert random.accuracy.mean < distilled.accuracy.mean < full.accuracy.mean
    assert (random.results[0].images, full.results[0].images) == (20, 1295)
    assert random.results[0].bytes == 20 * (64 * 4 + 1)
    mlp = report.row("mlp:16", "distilled").results
    grid = learners.network_learner("mlp:16", steps=20).rates
    assert mlp[0].rate in grid
    assert mlp[0].rate == mlp[1].rate
    assert mlp[0].facts["parameters"] == 64 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10
    assert report.scores[0].ior == pytest.approx(distilled.accuracy.mean - random.accuracy.mean)
    assert report.distilled["compression"] == pytest.approx(1295 * 257 / (20 * (64 + 10) * 4))


def test_the_files_of_an_evaluation(evaluated: Path, kip_run: Path):
    report = reports.load(evaluated)
    distil, evaluate = report.commands
    assert distil == "dsdistill kip digits --images-per-class 2 --steps 60"
    assert shlex.split(evaluate) == [
        *("dsdistill", "evaluate", str(kip_run), "--learners", "ridge,mlp:16"),
        *("--seeds", "2", "--steps", "20"),
    ]
    for name in ("report.md", "report.html"):
        assert "k-means" in (evaluated / name).read_text()
    assert evaluate in (evaluated / "report.md").read_text()
    assert {path.suffix for path in (evaluated / "plots").iterdir()} == {".png", ".svg"}
    assert (evaluated / "images.png").stat().st_size > 5000


class _Trainings:
    """Count the trainings of networks."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        call = learners.NetworkLearner.__call__

        def counted(learner, *arguments):
            self.count += 1
            return call(learner, *arguments)

        patch.setattr(learners.NetworkLearner, "__call__", counted)


def test_another_evaluation_takes_the_controls_from_the_cache(
    evaluated: Path, kip_run: Path, cache: Path, tmp_path: Path, monkeypatch
):
    trainings = _Trainings(monkeypatch)
    options = EvaluateOptions(
        kip_run, learners="mlp:16", seeds=2, steps=20, cache=cache, out=tmp_path / "b"
    )
    again = reports.load(evaluate_command.run(options))
    # The labels are hard, so one training serves two arms: each seed, and the grid twice more.
    assert trainings.count == 2 + 2
    first = reports.load(evaluated)
    for arm in ARMS:
        a, b = (report.row("mlp:16", arm) for report in (first, again))
        assert [r.accuracy for r in a.results] == [r.accuracy for r in b.results]
    trainings.count = 0
    evaluate_command.run(
        replace(options, controls="full", cache=tmp_path / "empty", out=tmp_path / "c")
    )
    assert trainings.count == 2 * (2 + 2)


def test_a_stopped_evaluation_goes_on_where_it_was(kip_run: Path, tmp_path: Path):
    """A stopped evaluation runs the missing trainings and ends with the same figures."""
    line = [
        *("evaluate", str(kip_run), "--learners", "mlp:16", "--controls", "random", "--seeds", "3"),
        *("--steps", "150", "--cache", "None"),
    ]
    command = [str(Path(sys.executable).with_name("dsdistill")), *line]
    out = tmp_path / "stopped"
    running = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.DEVNULL)
    results = out / "results"
    began = time.monotonic()
    while not results.exists() or len(list(results.glob("*.json"))) < 4:
        assert running.poll() is None, "it ended before it could be killed"
        assert time.monotonic() - began < 300
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (out / "report.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
    options = EvaluateOptions(
        kip_run, learners="mlp:16", controls="random", seeds=3, steps=150, cache=None
    )
    with pytest.raises(UserError, match="add --resume, or choose another --out"):
        evaluate_command.run(replace(options, out=out))
    with pytest.raises(UserError, match="was started with --steps 150"):
        evaluate_command.run(replace(options, steps=151, out=out, resume=True))
    config = json.loads((out / "config.json").read_text())
    for name in ("networks:Own", "ridge:networks:own", "linear-probe@networks:Own"):
        (out / "config.json").write_text(json.dumps(config | {"learners": name}))
        with pytest.raises(UserError, match="a file may not choose the code that runs here"):
            evaluate_command.run(EvaluateOptions(kip_run, out=out, resume=True))
    (out / "config.json").write_text(json.dumps(config))
    # The line that a stop prints: what the folder holds is what goes on.
    evaluate_command.run(EvaluateOptions(kip_run, out=out, resume=True))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    whole = evaluate_command.run(replace(options, out=tmp_path / "whole"))
    one, other = (reports.load(folder).results for folder in (out, whole))
    assert [(r.arm, r.seed, r.rate, r.accuracy, r.nll) for r in one] == [
        (r.arm, r.seed, r.rate, r.accuracy, r.nll) for r in other
    ]
    with pytest.raises(UserError, match="finished"):
        evaluate_command.run(replace(options, out=out))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    train_command.run(
        TrainOptions("digits", student="mlp:32", out=out, overrides=Overrides(epochs=5))
    )
    return out


def test_a_teacher_relabels_and_is_compared_with(kip_run: Path, teacher: Path, tmp_path: Path):
    options = EvaluateOptions(
        kip_run,
        learners="ridge",
        controls="random",
        teacher=str(teacher),
        seeds=1,
        cache=None,
        out=tmp_path / "a",
    )
    report = reports.load(evaluate_command.run(options))
    assert [row.arm for row in report.rows] == [*ARMS[:2], "distilled-teacher", "random"]
    for row in report.rows:
        (result,) = row.results
        assert 0.3 < result.teacher_agreement <= 1
        assert result.teacher_kl > 0
    parts = evaluation_parts.assemble(options)
    relabelled = next(arm for arm in parts.arms if arm.name == "distilled-teacher").draw(0)
    np.testing.assert_allclose(relabelled.labels().sum(1), 0, atol=1e-6)  # probabilities minus 1/k
    assert relabelled.labels().min() >= -0.1 - 1e-6


def test_augmentation_is_trained_beside_the_plain(kip_run: Path, tmp_path: Path):
    options = EvaluateOptions(
        kip_run, learners="ridge,mlp:16", controls="random", augment="crop", seeds=1
    )
    report = reports.load(
        evaluate_command.run(replace(options, steps=20, cache=None, out=tmp_path / "a"))
    )
    kinds = [(row.learner, row.augmented) for row in report.rows]
    assert kinds == [("ridge", False)] * 3 + [("mlp:16", False)] * 3 + [("mlp:16", True)] * 3
    assert report.scores[0].ars is None
    assert report.scores[1].ars is not None


def test_a_learner_that_fails_is_in_the_report(kip_run: Path, tmp_path: Path, monkeypatch):
    call = learners.NetworkLearner.__call__

    def failing(learner, train, validation, seed, /):
        if seed == 1:
            raise UserError("loss is nan at step 3")
        return call(learner, train, validation, seed)

    monkeypatch.setattr(learners.NetworkLearner, "__call__", failing)
    options = EvaluateOptions(
        kip_run, learners="mlp:16", controls="random", seeds=2, steps=20, cache=None
    )
    folder = evaluate_command.run(replace(options, out=tmp_path / "a"))
    report = reports.load(folder)
    assert [row.accuracy for row in report.rows] == [None] * 3
    for name in ("report.md", "report.html"):
        assert "failed 1 of 2: loss is nan at step 3" in (folder / name).read_text()


def test_accelerators_are_named_once(kip_run: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(learners.NetworkLearner, "accelerator", "Some GPU")
    options = EvaluateOptions(
        kip_run, learners="mlp:4,mlp:5", controls="", seeds=1, steps=1, cache=None
    )
    report = reports.load(evaluate_command.run(replace(options, out=tmp_path / "a")))
    assert report.machine == f"{machine.describe()}, Some GPU"


def test_a_set_from_elsewhere(kip_run: Path, tmp_path: Path):
    """The layout, pixels and labels of a condensed set of the DC project."""
    ours = distilled_set.load(kip_run / distilled_set.FILE_NAME)
    images = torch.from_numpy(ours.images.transpose(0, 3, 1, 2).copy())
    data = [[images, torch.from_numpy(ours.hard_labels)]]
    torch.save({"data": data, "accs_all_exps": {"ConvNet": [0.5]}}, tmp_path / "res.pt")
    options = EvaluateOptions(
        tmp_path / "res.pt",
        data="digits",
        learners="ridge",
        controls="random",
        seeds=1,
        cache=None,
        out=tmp_path / "a",
    )
    report = reports.load(evaluate_command.run(options))
    assert report.row("ridge", "distilled").accuracy.mean > 0.85
    assert any("--pixels" in note or "standardised" in note for note in report.notes)
    assert report.commands == [
        f"dsdistill evaluate {tmp_path / 'res.pt'} --learners ridge "
        "--controls random --seeds 1 --data digits"
    ]
    with pytest.raises(UserError, match="does not say what it was distilled from: add --data"):
        evaluate_command.run(replace(options, data=None, out=tmp_path / "b"))


def test_a_set_at_chance_gets_a_hint(kip_run: Path, tmp_path: Path):
    ours = distilled_set.load(kip_run / distilled_set.FILE_NAME)
    noise = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.save({"images": noise, "labels": torch.from_numpy(ours.hard_labels)}, tmp_path / "x.pt")
    options = EvaluateOptions(
        tmp_path / "x.pt", data="digits", learners="ridge", controls="", seeds=1
    )
    stated = replace(options, pixels="standardised", cache=None, out=tmp_path / "a")
    notes = reports.load(evaluate_command.run(stated)).notes
    assert any("chance" in note and "--labels" in note for note in notes)


def test_several_evaluations_on_one_page(
    evaluated: Path, kip_run: Path, cache: Path, tmp_path: Path
):
    kip_run = Path(shutil.copytree(kip_run, tmp_path / "kip"))
    inside = kip_run / "evaluation-1"
    options = EvaluateOptions(kip_run, learners="ridge", controls="random", seeds=1, cache=cache)
    assert evaluate_command.run(options) == inside
    page = evaluate_command.compare(
        ReportOptions((evaluated, kip_run), tmp_path / "pages" / "both.html")
    )
    text = page.read_text()
    assert text.count("dsdistill kip digits --images-per-class 2 --steps 60") >= 2
    for address in ('src="http', 'href="http', "url(http", "@import"):
        assert address not in text
    with pytest.raises(UserError, match="holds no evaluation"):
        evaluate_command.compare(ReportOptions((tmp_path,), tmp_path / "none.html"))
    with pytest.raises(UserError, match="at least one folder"):
        evaluate_command.compare(ReportOptions(()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learners": "rigde"}, "rigde"),
        ({"learners": ""}, "--learners must name at least one"),
        ({"learners": "ridge:fcc"}, "fcc"),
        ({"controls": "randon"}, "did you mean 'random'"),
        ({"seeds": 0}, "--seeds"),
        ({"steps": 0}, "--steps"),
        ({"resume": True}, "--resume needs --out"),
        ({"labels": "index"}, "--labels is for sets from elsewhere"),
        ({"teacher": "nowhere"}, "nowhere"),
        ({"device": "cuda:7", "learners": "mlp"}, "cuda"),
        ({"data": "mnist0"}, "mnist0"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_folder(kip_run: Path, tmp_path, changes, message):
    options = EvaluateOptions(kip_run, learners="ridge", out=tmp_path / "a", cache=None)
    with pytest.raises(UserError, match=message) as caught:
        evaluate_command.run(
            replace(options, **({"out": None} if changes.get("resume") else {}), **changes)
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_data_that_changed_is_refused(kip_run: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(kip_run, other)
    distilled = distilled_set.load(other / distilled_set.FILE_NAME)
    provenance = json.loads(json.dumps(dict(distilled.provenance)))
    provenance["data"]["sha256"] = "0" * 64
    distilled_set.save(other / distilled_set.FILE_NAME, replace(distilled, provenance=provenance))
    with pytest.raises(UserError, match="was distilled from other images"):
        evaluate_command.run(EvaluateOptions(other))


def test_a_stop_by_hand_says_how_the_evaluation_goes_on(kip_run: Path, tmp_path: Path, monkeypatch):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    options = EvaluateOptions(kip_run, learners="ridge", controls="", seeds=1, cache=None)
    options = replace(options, out=tmp_path / "an out")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_command, "run_trainings", stopped)
        with pytest.raises(
            StopInterrupt, match=f"`dsdistill evaluate {kip_run} --resume --out '.*an out'`$"
        ):
            evaluate_command.run(options)
    monkeypatch.setattr(
        evaluate_command, "write_report", _write_and_stop(evaluate_command.write_report)
    )
    with pytest.raises(StopInterrupt, match=r"an out/report\.json is complete"):
        evaluate_command.run(replace(options, resume=True))


def _write_and_stop(write: Callable[..., None]) -> Callable[..., None]:
    def stopping(*arguments: Any) -> None:
        write(*arguments)
        raise KeyboardInterrupt

    return stopping


@pytest.fixture(scope="module")
def solved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images per class of digits with labels solved, in another preprocessing."""
    out = tmp_path_factory.mktemp("also") / "solved"
    options = LabelSolveOptions("digits", images_per_class=2, preprocess="none", out=out)
    return distil.run_label_solve(options)


def test_sets_are_compared_side_by_side(kip_run: Path, solved_run: Path, tmp_path: Path) -> None:
    options = EvaluateOptions(
        kip_run, also=(solved_run,), learners="ridge", controls="random", seeds=2, cache=None
    )
    folder = evaluate_command.run(replace(options, out=tmp_path / "a"))
    report = reports.load(folder)
    assert [row.arm for row in report.rows] == [
        *("distilled", "distilled-hard", "solved", "solved-hard", "random")
    ]
    rows = {row.arm: row.accuracy for row in report.rows}
    assert rows["solved"].mean > rows["solved-hard"].mean
    [note] = [note for note in report.notes if note.startswith("solved: ls with fc(1)")]
    assert "brought from the preprocessing none" in note
    assert "perhaps made of images that are held out here" in note
    assert f"--also {solved_run}" in report.commands[-1]
    # The same real images, in the preprocessing of the first set.
    parts = evaluation_parts.assemble(options)
    own = distilled_set.load(solved_run / distilled_set.FILE_NAME)
    solved = next(arm for arm in parts.arms if arm.name == "solved").draw(0)
    fitted = parts.distilled.preprocess
    np.testing.assert_allclose(solved.images(), fitted.apply(own.images), atol=1e-5)
    np.testing.assert_array_equal(solved.labels(), own.labels)


def test_a_further_set_that_does_not_fit_is_one_line(
    kip_run: Path, solved_run: Path, tmp_path: Path
) -> None:
    options = EvaluateOptions(kip_run, learners="ridge", cache=None, out=tmp_path / "out")
    other = distilled_set.load(solved_run / distilled_set.FILE_NAME)
    provenance = json.loads(json.dumps(dict(other.provenance)))
    provenance["data"]["sha256"] = "0" * 64
    changed = tmp_path / "changed.safetensors"
    distilled_set.save(changed, replace(other, provenance=provenance))
    for also, message in (
        ((solved_run, solved_run), "is evaluated twice"),
        ((kip_run,), "is evaluated twice"),
        ((changed,), "was distilled from other images"),
        ((tmp_path / "nowhere",), "nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_command.run(replace(options, also=also))
    # A folder with the name of another kind of data is named by its path.
    shutil.copytree(solved_run, tmp_path / "random")
    file = solved_run / distilled_set.FILE_NAME
    parts = evaluation_parts.assemble(replace(options, also=(tmp_path / "random", file)))
    assert list(parts.further) == [str(tmp_path / "random"), "solved"]
