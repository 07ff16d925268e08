"""`kd report`: seeds of one training together, the lines that make them, and bad folders."""

import json
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
import tyro

from dsdistill.harness import files
from dsdistill.harness.errors import UserError
from kd.commands import finished_runs, report
from kd.options import Overrides, TrainOptions


def made(
    parent: Path, options: TrainOptions, *, accuracy: float | None = 0.8, note: str | None = None
) -> Path:
    """A finished run's folder, as far as a report reads it."""
    folder = parent / f"run-{len(list(parent.iterdir()))}"
    folder.mkdir()
    config = {k: v for k, v in asdict(options).items() if k not in ("out", "resume", "overrides")}
    config |= {"data_root": str(config["data_root"]), **asdict(options.overrides), "chosen": {}}
    files.write_json(folder / "config.json", config)
    rng = np.random.default_rng(options.seed)
    files.write_json(
        folder / "report.json",
        {
            "student": options.student or "convnet",
            "data": options.data,
            "seed": options.seed,
            "test_accuracy": accuracy,
            "nll": 0.5 + 0.01 * rng.random(),
            "calibration_error": 0.03,
            "teacher_agreement": 0.9 if options.teacher else None,
            "seconds": 12.5,
            "parameters": 1482,
            "peak_memory": 2**30,
            "teacher": options.teacher,
            "note": note,
            "recipe": {},
        },
    )
    lines = [
        json.dumps({"step": step, "ce": 1 / step, "validation_accuracy": 0.5 + step / 300})
        for step in (21, 42, 63)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def overrides(**given: Any) -> Any:
    return Overrides(**given)


PLAIN = TrainOptions("digits", student="mlp:16")
TAUGHT = replace(PLAIN, teacher="/far/teacher", overrides=overrides(lr=0.1, decay_all=True))


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three seeds of one training, and one of another."""
    (tmp_path / "runs").mkdir()
    values = (0.80, 0.84, 0.82)
    found = [
        made(tmp_path / "runs", replace(PLAIN, seed=seed), accuracy=value)
        for seed, value in enumerate(values)
    ]
    return [*found, made(tmp_path / "runs", TAUGHT, accuracy=0.9, note="no <validation> images")]


def test_runs_that_differ_in_their_seed_are_put_together(folders):
    groups = finished_runs.group_by_options([finished_runs.read(folder) for folder in folders])
    assert [len(group.runs) for group in groups] == [3, 1]
    assert groups[0].label == "mlp:16"
    assert groups[1].label == "mlp:16 from teacher, lr 0.1, decay all True"
    cells = dict(zip(report.METRIC_COLUMNS, report.metric_cells(groups[0]), strict=True))
    assert cells["test accuracy, %"] == "82.0 ± 2.0"
    low, high = map(float, cells["95 % interval"].split(" to "))
    half = 4.303 * 2 / np.sqrt(3)  # of Student's t with 2 degrees of freedom
    assert (low, high) == pytest.approx((82 - half, 82 + half), abs=0.06)
    assert cells["agrees with teacher, %"] == "–"
    assert report.metric_cells(groups[1])[1:3] == ["90.0", "–"]


def test_groups_of_one_name_are_numbered(tmp_path):
    options = [replace(PLAIN, teacher=f"/{place}/teacher") for place in ("here", "there")]
    found = [finished_runs.read(made(tmp_path, option)) for option in options]
    labels = [group.label for group in finished_runs.group_by_options(found)]
    assert labels == ["mlp:16 from teacher", "mlp:16 from teacher #2"]


def test_a_seed_without_a_figure_leaves_no_mean(tmp_path):
    found = [
        finished_runs.read(made(tmp_path, replace(PLAIN, seed=seed), accuracy=value))
        for seed, value in enumerate((0.5, None))
    ]
    assert report.metric_cells(finished_runs.group_by_options(found)[0])[1:3] == ["–", "–"]


@pytest.mark.parametrize(
    "options",
    [
        TrainOptions(),
        TAUGHT,
        TrainOptions("a folder", student="resnet18", pretrained=True, seed=3, device="cpu"),
        TrainOptions(
            "digits",
            teacher="x.pt2",
            teacher_mean=(0.1, 0.2),
            class_map=None,
            channels_last=True,
            overrides=overrides(epochs=9, milestones=(3.0, 6.0), schedule="milestones"),
        ),
    ],
)
def test_the_command_makes_the_same_run(options, tmp_path):
    line = finished_runs.read(made(tmp_path, options)).command
    words = shlex.split(line)
    assert words[:2] == ["kd", "train"]
    again = tyro.cli(TrainOptions, args=words[2:], config=(tyro.conf.FlagCreatePairsOff,))
    assert again == options


def test_options_with_their_default_are_left_out(tmp_path):
    assert finished_runs.read(made(tmp_path, PLAIN)).command == "kd train digits --student mlp:16"


def test_the_page_shows_figures_curves_and_commands(folders):
    text = report.render([*folders, folders[0]])
    assert "<h1>2 trainings, 4 runs</h1>" in text  # a folder that is given twice counts once
    assert "82.0 ± 2.0" in text
    assert text.count("<svg") == 1
    assert "kd train digits --student mlp:16 --seed 2" in text
    assert "no &lt;validation&gt; images" in text
    assert "one seed cannot tell" in text
    assert all(str(folder) in text for folder in folders)


def test_intervals_that_overlap_are_said_to(tmp_path):
    for seed, value in enumerate((0.80, 0.84, 0.82)):
        made(tmp_path, replace(PLAIN, seed=seed), accuracy=value)
        made(tmp_path, replace(TAUGHT, seed=seed), accuracy=value + 0.01)
    text = report.render(sorted(tmp_path.iterdir()))
    assert "1.0 points more than mlp:16; their 95 % intervals overlap." in text


def test_axes_of_the_curves_are_labelled(folders):
    groups = finished_runs.group_by_options([finished_runs.read(folder) for folder in folders])
    axes = report.curves(groups).axes[0]
    assert axes.get_xlabel() == "step of the optimizer"
    assert axes.get_ylabel() == "validation accuracy, %"
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [g.label for g in groups]
    assert len(axes.lines) == 4


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("report.json", None, "holds an unfinished run: continue it with"),
        ("config.json", None, "cannot read"),
        ("report.json", "{", "cannot read"),
        ("report.json", "[]", "report.json is damaged: expected a JSON object"),
        ("report.json", "{}", "report.json lacks data"),
        ("config.json", "{}", "damaged run"),
        ("metrics.jsonl", '{"step": 1}\n{"st', "damaged run"),
        ("metrics.jsonl", "[1]", "damaged run"),
        ("metrics.jsonl", '{"step": "one", "validation_accuracy": 1}', "damaged run"),
        ("metrics.jsonl", '{"validation_accuracy": 1}', "damaged run"),
        ("metrics.jsonl", "[" * 100_000, "damaged run"),
    ],
)
def test_a_bad_folder_is_one_clear_error(file, content, message, folders):
    path = folders[1] / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        report.render(folders)
    assert str(folders[1]) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_that_hold_no_run_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no run of `kd train`"):
        report.render([tmp_path])
    with pytest.raises(UserError, match="at least one folder"):
        report.render([])


def test_it_needs_no_framework():
    code = (
        "import sys, kd.commands.report; "
        "print(*{'torch', 'jax', 'matplotlib'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium")
def test_a_browser_has_no_complaint(folders, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(report.render(folders))
    seen = browser.visit(page, tmp_path)
    assert (seen.console, seen.requests) == ([], [])
    assert "82.0 ± 2.0" in seen.dom
