"""`kd report`: seeds of one training together, the lines that make them, and bad folders."""

import json
import re
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
from dsdistill.harness.reports import plot_style
from kd.commands import report
from kd.options import Overrides, TrainOptions
from kd.runs import capacity_gap, curves, finished_runs


def made(
    parent: Path,
    options: TrainOptions,
    *,
    accuracy: float | None = 0.8,
    note: str | None = None,
    curve: str = "accuracy",
    **figures: Any,
) -> Path:
    """A finished run's folder, as far as a report reads it.

    Args:
        parent: Where it goes.
        options: Options of the run.
        accuracy, note, figures: Entries of its report.
        curve: Figure that was measured after each round.
    """
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
            **figures,
        },
    )
    lines = [
        json.dumps({"step": step, "ce": 1 / step, f"validation_{curve}": 0.5 + step / 300})
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


def cells_of(compared: report.Comparison, group: finished_runs.RunGroup) -> dict[str, str]:
    """Cells of the test figures by the name of their column."""
    return dict(
        zip(report.metric_columns(compared), report.metric_cells(compared, group), strict=True)
    )


def compared_in(folder: Path) -> list[report.Comparison]:
    """The comparisons of all runs of a folder."""
    runs = [finished_runs.read(path) for path in sorted(folder.iterdir())]
    return report.comparisons(finished_runs.group_by_options(runs))


def test_runs_that_differ_in_their_seed_are_put_together(folders):
    groups = finished_runs.group_by_options([finished_runs.read(folder) for folder in folders])
    assert [len(group.runs) for group in groups] == [3, 1]
    assert groups[0].label == "mlp:16"
    assert groups[1].label == "mlp:16 from teacher, lr 0.1, decay all True"
    (compared,) = report.comparisons(groups)
    cells = cells_of(compared, groups[0])
    assert cells["test accuracy, %"] == "82.0 ± 2.0"
    low, high = map(float, cells["95 % interval"].split(" to "))
    half = 4.303 * 2 / np.sqrt(3)  # of Student's t with 2 degrees of freedom
    assert (low, high) == pytest.approx((82 - half, 82 + half), abs=0.06)
    assert cells["agrees with teacher, %"] == "–"
    assert report.metric_cells(compared, groups[1])[1:3] == ["90.0", "–"]


def test_groups_of_one_name_are_numbered(tmp_path):
    options = [replace(PLAIN, teacher=f"/{place}/teacher") for place in ("here", "there")]
    found = [finished_runs.read(made(tmp_path, option)) for option in options]
    labels = [group.label for group in finished_runs.group_by_options(found)]
    assert labels == ["mlp:16 from teacher", "mlp:16 from teacher #2"]


def test_students_of_teachers_that_differ_in_their_seed_are_put_together(tmp_path):
    for seed in (0, 1):
        teacher = made(tmp_path, replace(PLAIN, student="mlp:64", seed=seed))
        made(tmp_path, replace(PLAIN, teacher=str(teacher), seed=seed))
        made(tmp_path, replace(PLAIN, student=str(teacher), quantize="w4a4", seed=seed))
    other = made(tmp_path, replace(PLAIN, student="mlp:32"))
    made(tmp_path, replace(PLAIN, teacher=str(other)))
    runs = [finished_runs.read(path) for path in sorted(tmp_path.iterdir())]
    groups = finished_runs.group_by_options(runs)
    assert sorted(len(group.runs) for group in groups) == [1, 1, 2, 2, 2]


def test_gains_stand_beside_the_size_of_the_teachers(tmp_path):
    """Pairs by seed: each student minus the one on labels alone; the chain is followed back."""
    for seed, alone in ((0, 0.70), (1, 0.74)):
        base = replace(PLAIN, seed=seed)
        large, assistant, direct, last, labels = (
            made(tmp_path, options, accuracy=accuracy, steps=9, parameters=size, student=name)
            for options, accuracy, size, name in (
                (replace(base, student="large"), 0.9, 100_000, "large"),
                (replace(base, teacher=f"run-{5 * seed}"), 0.85, 10_000, "middle"),
                (replace(base, teacher=f"run-{5 * seed}"), alone + 0.01, 1_000, "small"),
                (replace(base, teacher=f"run-{5 * seed + 1}"), alone + 0.04, 1_000, "small"),
                (base, alone, 1_000, "small"),
            )
        )
        for folder, teacher in ((assistant, large), (direct, large), (last, assistant)):
            config = json.loads((folder / "config.json").read_text())
            files.write_json(folder / "config.json", config | {"teacher": str(teacher)})
        config = json.loads((direct / "config.json").read_text())
        files.write_json(direct / "config.json", config | {"cache_top": 5})
        config = json.loads((assistant / "config.json").read_text())
        files.write_json(assistant / "config.json", config | {"student": "middle"})
        assert labels.is_dir()
    (compared,) = compared_in(tmp_path)
    taught = capacity_gap.taught_groups(compared.groups, "test_accuracy")
    described = [
        (" > ".join(one.chain), one.teacher_parameters, one.ratio, one.gain and one.gain.mean)
        for one in taught
    ]
    assert described == [
        ("large > middle > small", 10_000, 10, pytest.approx(0.04)),
        ("large > middle", 100_000, 10, None),
        ("large > small", 100_000, 100, pytest.approx(0.01)),
    ]
    assert taught[0].gain is not None
    assert (taught[0].gain.n, taught[0].gain.std) == (2, pytest.approx(0, abs=1e-12))
    page = report.render(sorted(tmp_path.iterdir()))
    assert "Teachers and gains" in page
    assert "large → middle → small" in page
    assert "Gain in accuracy on digits by size of the teacher." in page


def test_students_without_a_head_are_compared_by_a_linear_probe(tmp_path):
    options = replace(TAUGHT, head="none")
    for seed, (linear, near) in enumerate(((0.71, 0.6), (0.75, 0.64))):
        probes = {"linear_probe_accuracy": linear, "nearest_neighbours_accuracy": near}
        figures = {f"test_{name}": value for name, value in probes.items()}
        made(tmp_path, replace(options, seed=seed), accuracy=None, head="none", **figures)
    (alone,) = compared_in(tmp_path)
    (group,) = alone.groups
    cells = cells_of(alone, group)
    assert cells["test linear probe accuracy, %"] == "73.0 ± 2.8"
    assert cells["nearest neighbours accuracy, %"] == "62.0 ± 2.8"
    assert cells["accuracy, %"] == "–"
    page = report.render(sorted(tmp_path.iterdir()))
    assert "73.0 ± 2.8 %." in page
    assert "Validation accuracy of the nearest neighbours, each image left out on" in page
    # Beside a student with a head, whose validation accuracy is that of its answers.
    made(tmp_path, PLAIN, accuracy=0.9)
    (both,) = compared_in(tmp_path)
    headless, whole = (cells_of(both, group) for group in both.groups)
    if headless["test accuracy, %"] != "–":
        headless, whole = whole, headless
    assert headless["linear probe accuracy, %"] == "73.0 ± 2.8"
    assert whole["test accuracy, %"] == "90.0"
    page = report.render(sorted(tmp_path.iterdir()))
    curves, runs = page.partition('id="curves"')[2].partition('id="runs"')[::2]
    assert "mlp:16" in curves.partition("</section>")[0]
    assert "mlp:16 from teacher" not in curves.partition("</section>")[0]
    assert page.count(">90.0<") >= 1
    assert runs.count("<td>–</td>") >= 4  # neither test nor validation of the two without a head


def test_a_seed_without_a_figure_leaves_no_mean(tmp_path):
    found = [
        finished_runs.read(made(tmp_path, replace(PLAIN, seed=seed), accuracy=value))
        for seed, value in enumerate((0.5, None))
    ]
    (compared,) = report.comparisons(finished_runs.group_by_options(found))
    assert report.metric_cells(compared, compared.groups[0])[1:3] == ["–", "–"]


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


def texts(task: str, metric: str, part: str = "test", **figures: Any) -> dict[str, Any]:
    """What the report of a run of texts has beside one of images."""
    return {
        "task": task,
        "metric": metric,
        "judged_on": f"{part} texts",
        "curve": metric,
        **figures,
    }


def test_runs_of_texts_are_compared_by_their_metric(tmp_path):
    options = TrainOptions("stsb", student="bilstm:8")
    for seed, value in enumerate((0.5, -0.1, 0.2)):
        figures = texts("regress", "spearman", test_spearman=value, test_mse=2 + value)
        figures["teacher_spearman"] = 0.75
        made(tmp_path, replace(options, seed=seed), accuracy=None, nll=None, **figures)
    (compared,) = compared_in(tmp_path)
    cells = cells_of(compared, compared.groups[0])
    assert cells["test Spearman's correlation"] == "0.200 ± 0.300"
    assert cells["95 % interval"] == "−0.545 to 0.945"  # 4.303 · 0.3 / √3 on both sides
    assert cells["mean squared error"] == "2.200 ± 0.300"
    assert cells["teacher's Spearman's correlation"] == "0.750 ± 0.000"
    assert cells["accuracy, %"] == cells["NLL, nats"] == "–"
    axes = report.curves(compared.groups, compared.figure).axes[0]
    assert axes.get_ylabel() == "validation Spearman's correlation"
    assert [*np.asarray(axes.lines[0].get_ydata())] == pytest.approx([0.57, 0.64, 0.71])
    page = report.render(sorted(tmp_path.iterdir()))
    assert "On stsb, bilstm:8: Spearman&#x27;s correlation 0.200 ± 0.300." in page
    assert "validation texts; the test texts" in page


def test_a_smaller_perplexity_is_ahead(tmp_path):
    for student, value in (("hf:/far/small", 30.0), ("hf:/far/large", 20.0)):
        figures = texts("causal", "nll", "validation", validation_perplexity=value)
        figures["curve"] = "perplexity"
        made(tmp_path, TrainOptions("play", student=student), accuracy=None, **figures)
    (compared,) = compared_in(tmp_path)
    assert report.curves(compared.groups, compared.figure).axes[0].get_yscale() == "log"
    page = report.render(sorted(tmp_path.iterdir()))
    assert "On play (validation texts), hf:large: perplexity 20.00." in page
    assert "That is 10.00 less than hf:small; one seed" in page
    assert "the validation texts judge too" in page


def test_metrics_that_differ_fall_back_to_that_of_the_task(tmp_path):
    for metric in ("macro_f1", "matthews"):
        figures = texts("classify", metric, test_macro_f1=0.6)
        chosen = TrainOptions("sst2", student="bilstm", overrides=overrides(metric=metric))
        made(tmp_path, chosen, accuracy=0.7, **figures)
    (compared,) = compared_in(tmp_path)
    assert compared.title == "test accuracy, %"
    assert [cells_of(compared, x)["macro F1, %"] for x in compared.groups] == ["60.0", "60.0"]


def test_images_and_texts_share_a_page(folders, tmp_path):
    made(tmp_path / "runs", TrainOptions("digits", student="bert"), **texts("classify", "accuracy"))
    compared = compared_in(tmp_path / "runs")
    assert [one.name for one in compared] == ["digits, images", "digits, classify"]
    page = report.render(sorted((tmp_path / "runs").iterdir()))
    assert page.count("<caption>") == 3  # one of each: figures, costs and runs
    assert "was chosen on validation data; the test data" in page


def test_each_language_has_a_column(tmp_path):
    for seed, value in enumerate((0.5, 0.7)):
        languages = {"de": {"texts": 60, "accuracy": value}, "sw": {"texts": 7, "accuracy": 0.4}}
        figures = texts("classify", "accuracy", languages=languages)
        made(tmp_path, TrainOptions("tweets", student="bert", seed=seed), **figures)
    made(tmp_path, TrainOptions("tweets", student="bilstm"), **texts("classify", "accuracy"))
    page = report.render(sorted(tmp_path.iterdir()))
    table = page[page.index("Test accuracy on tweets by language, in percent") :]
    rows = re.findall(r"<tr><th scope=.row.>(.*?)</th>(.*?)</tr>", table)[:2]
    assert re.findall(r'col">(.*?)<', table)[:3] == ["training", "de, n = 60", "sw, n = 7"]
    assert re.findall(r"<td>(.*?)</td>", rows[0][1]) == ["60.0 ± 14.1", "40.0 ± 0.0"]
    assert re.findall(r"<td>(.*?)</td>", rows[1][1]) == ["–", "–"]


def test_costs_are_columns_and_a_plot(tmp_path):
    sizes = (("bert", 66e6, 12.0, 0.9), ("bilstm", 2e6, 0.5, 0.8))
    for student, parameters, milliseconds, accuracy in sizes:
        figures = texts("classify", "accuracy", latency_ms_batch_1=milliseconds, latency_tokens=23)
        figures |= {"parameters": int(parameters), "teacher_accuracy": 0.93, "accuracy": accuracy}
        made(tmp_path, TrainOptions("sst2", student=student), train_images=600, **figures)
    (compared,) = compared_in(tmp_path)
    cells = [
        dict(zip(report.COST_COLUMNS, report.cost_cells(group), strict=True))
        for group in compared.groups
    ]
    assert [row["latency, ms"] for row in cells] == ["12.0 (23 tokens)", "0.500 (23 tokens)"]
    assert (cells[0]["texts"], cells[0]["images"]) == ("600", "–")
    left, right = report.costs(compared).axes
    assert (left.get_xlabel(), left.get_ylabel()) == ("parameters, millions", "test accuracy, %")
    points = [
        [np.asarray(line.get_xydata())[0].tolist() for line in axes.lines[:2]]
        for axes in (left, right)
    ]
    assert points == [[[66, 90], [2, 80]], [[12, 90], [0.5, 80]]]
    assert np.asarray(left.lines[-1].get_ydata())[0] == pytest.approx(93)  # the teacher
    assert report.render(sorted(tmp_path.iterdir())).count("<svg") == 2


def test_a_metric_that_does_not_exist_is_a_damaged_run(tmp_path):
    folder = made(tmp_path, PLAIN, **texts("classify", "brilliance"))
    with pytest.raises(UserError, match=r"metric is 'brilliance'"):
        report.render([folder])


def test_curves_show_the_metric_of_a_run(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot_style, "png", lambda figure: drawn.append(figure) or b"")
    curves.draw(made(tmp_path, PLAIN, **texts("regress", "spearman")))
    right = drawn[0].axes[1]
    assert right.get_ylabel() == "validation Spearman's correlation"
    assert right.lines[0].get_xdata().tolist() == [21, 42, 63]


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium")
def test_a_browser_has_no_complaint(folders, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(report.render(folders))
    seen = browser.visit(page, tmp_path)
    assert (seen.console, seen.requests) == ([], [])
    assert "82.0 ± 2.0" in seen.dom
