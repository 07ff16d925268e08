"""Reports: what is written is read again, failures are seen, and plots say what their axes are."""

import io
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_support import CLASSES, report, result

from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import results, statistics
from dsdistill.harness.evaluation.controls import CONTROLS, RELABELLED
from dsdistill.harness.reports import (
    gallery,
    growth,
    markdown,
    page,
    plot_style,
    plots,
    published,
    verdict,
    wording,
)
from dsdistill.harness.reports import report as reports
from dsdistill.harness.reports import tables as report_tables
from dsdistill.harness.reports.write import write_report

REASON = "FloatingPointError: loss is nan | at <step> 3"


def small(**fields):
    return report(learners=("ridge", "convnet"), **fields)


def failing(arm: str, learner: str = "convnet", seeds: tuple[int, ...] = (1,)):
    """A report in which some seeds of one arm failed."""
    found = small()
    without = {"accuracy": None, "confusion": None, "per_class": None, "nll": None}
    return replace(
        found,
        results=tuple(
            replace(r, **without, failure=REASON)
            if (r.arm, r.learner, r.augmented) == (arm, learner, False) and r.seed in seeds
            else r
            for r in found.results
        ),
    )


def row(found, arm: str, learner: str = "convnet"):
    chosen = found.row(learner, arm)
    assert chosen is not None
    return chosen


@pytest.mark.heavy
def test_what_is_written_is_read_again(tmp_path):
    made = small(classes=("<b>", "$x$", "日本", "d"), notes=["a | b"], distilled={"method": None})
    write_report(tmp_path, made)
    assert reports.load(tmp_path) == made
    assert reports.load(tmp_path / "report.json") == made
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    kinds = ("accuracy", "cost", "curves", "classes-ridge", "confusion-convnet")
    assert {f"{kind}.{suffix}" for kind in kinds for suffix in ("png", "svg")} <= names
    assert (tmp_path / "report.md").read_text().startswith("# kip on fashion-mnist")
    assert "<!doctype html>" in (tmp_path / "report.html").read_text()


def stored(found, folder: Path) -> dict:
    """As `report.json` has it, without the plots."""
    text = json.dumps({"format": reports.FORMAT_VERSION, **asdict(found)})
    (folder / "report.json").write_text(text)
    return json.loads(text)


@pytest.fixture(scope="module")
def whole_report(tmp_path_factory) -> str:
    """A whole report as it is stored."""
    return json.dumps(stored(small(), tmp_path_factory.mktemp("stored")))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("format"), "format: None"),
        (lambda s: s.update(format=1), "not a report of an evaluation in format 2"),
        (lambda s: s.pop("classes"), "classes missing"),
        (lambda s: s.update(more=1), "unknown more"),
        (lambda s: s.update(title=3), "title is 3"),
        (lambda s: s.update(results=[]), "results is empty"),
        (lambda s: s.update(results={}), "results is {}"),
        (lambda s: s["data"].pop("test"), "data lacks test"),
        (lambda s: s["distilled"].update(seconds="long"), "distilled.seconds is 'long'"),
        (lambda s: s["results"][3].update(accuracy=78.1), r"fraction in \[0, 1\], got 78.1"),
        (lambda s: s["results"][3].update(accuracy="high"), "accuracy is 'high'"),
        (lambda s: s["results"][3].update(augmented=1), "augmented is 1"),
        (lambda s: s["results"][3].update(seed=True), "seed is True"),
        (lambda s: s["results"][3]["confusion"].pop(), "not for 8 classes"),
        (lambda s: s["results"][3]["confusion"][0].__setitem__(0, 10**40), "confusion is "),
        (lambda s: s["results"][3]["per_class"].pop(), "not for 8 classes"),
        (lambda s: s["results"][-1]["facts"].update(curve=[[1]]), "a step and a loss"),
        (lambda s: s["results"][-1]["facts"].update(flops="many"), "facts.flops is 'many'"),
    ],
)
def test_a_damaged_or_foreign_report_is_one_clear_error(damage, message, whole_report, tmp_path):
    content = json.loads(whole_report)
    damage(content)
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        reports.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"format"'])
def test_what_is_no_report_at_all_is_refused(text, tmp_path):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        reports.load(tmp_path)


def test_a_missing_report_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        reports.load(tmp_path)


def test_means_and_intervals_are_those_of_the_seeds():
    found = row(small(), "random")
    values = [100 * r.accuracy for r in found.results if r.accuracy is not None]
    mean, std = np.mean(values), np.std(values, ddof=1)
    half = 2.776 * std / np.sqrt(5)  # of Student's t with 4 degrees of freedom
    cells = dict(zip(reports.COLUMNS, reports.row_cells(found), strict=True))
    assert cells["test accuracy, %"] == f"{mean:.1f} ± {std:.1f}"
    low, high = map(float, cells["95 % interval"].split(" to "))
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.06)
    assert cells["n"] == "5"


def test_negative_ends_of_an_interval_have_a_sign_as_wide_as_a_digit():
    assert wording.confidence_interval(statistics.summary([-0.1, 0.1])) == "−127.1 to 127.1"


def test_a_learner_without_randomness_is_called_deterministic():
    cells = reports.row_cells(row(small(), "full", "ridge"))
    assert cells[3].endswith("(deterministic)")
    assert "±" not in cells[3]
    assert cells[8] == "60 s"  # one training served all seeds


def test_equal_accuracies_by_chance_are_not_called_deterministic():
    found = row(small(), "random", "ridge")
    same = tuple(replace(r, accuracy=0.5, nll=0.1 * r.seed) for r in found.results)
    assert reports.row_cells(results.group_by_training(same)[0])[3] == "50.0 ± 0.0"


def test_one_seed_has_no_deviation_and_no_interval():
    one = results.group_by_training(
        [result(np.random.default_rng(0), "random", "ridge", False, 0)]
    )[0]
    assert re.fullmatch(r"\d\d\.\d", reports.row_cells(one)[3])
    assert reports.row_cells(one)[4] == wording.NOTHING


def test_a_failure_stands_where_the_mean_would():
    found = failing("random", seeds=(1, 3))
    cells = reports.row_cells(row(found, "random"))
    assert cells[3] == f"failed 2 of 5: {REASON}"
    assert cells[4] == wording.NOTHING
    text = markdown.render(found)
    assert r"failed 2 of 5: FloatingPointError: loss is nan \| at &lt;step> 3" in text
    assert "convnet on random, seed 3: " in text


def test_nothing_is_said_against_random_images_that_failed():
    found = failing("random")
    score = next(score for score in found.scores if score.learner == "convnet")
    assert verdict.classify(score) == verdict.UNKNOWN
    assert "nothing can be said for convnet" in verdict.headline(found)
    assert "not compared with random images" in verdict.answer(found, score)
    whole = next(score for score in found.scores if score.learner == "ridge")
    assert "points above random images" in verdict.answer(found, whole)


def against(a: list[float], b: list[float]):
    rng = np.random.default_rng(0)
    made = [
        replace(result(rng, arm, "convnet", False, i), accuracy=value)
        for arm, values in (("distilled", a), ("random", b))
        for i, value in enumerate(values)
    ]
    return small(results=tuple(made))


@pytest.mark.parametrize(
    ("a", "b", "kind", "said"),
    [
        ([0.8, 0.81, 0.82], [0.5, 0.52, 0.51], verdict.BETTER, "is better than as many random"),
        ([0.5, 0.52, 0.51], [0.8, 0.81, 0.82], verdict.WORSE, "set is worse than as many random"),
        ([0.5, 0.6, 0.55], [0.55, 0.52, 0.57], verdict.ALIKE, "is not clearly different"),
        ([0.5, 0.5], [0.4, 0.4], verdict.BETTER, "is better than"),  # no randomness in either
        ([0.5, 0.5], [0.5, 0.5], verdict.ALIKE, "is not clearly different"),
        ([0.9], [0.1], verdict.UNKNOWN, "Nothing can be said of the distilled set"),
    ],
)
def test_the_answer_is_as_sure_as_the_seeds_allow(a, b, kind, said):
    found = against(a, b)
    assert verdict.classify(found.scores[0]) == kind
    assert said in verdict.headline(found)


def test_an_answer_gives_difference_interval_p_and_distance():
    found = against([0.8, 0.82, 0.81], [0.5, 0.53, 0.53])
    paired = statistics.paired_difference([0.8, 0.82, 0.81], [0.5, 0.53, 0.53])
    answer = verdict.answer(found, found.scores[0]).replace("\u00a0", " ")
    low, high = paired.difference.low, paired.difference.high
    assert answer.startswith("81.0 %, 29.0 points above random images")
    assert f"95 % interval {100 * low:.1f} to {100 * high:.1f}, p < 0.001" in answer
    assert "not trained on the full data" in answer


def test_markdown_has_every_part():
    text = markdown.render(small())
    for heading in ("## Scores", "## Probabilities", "## Cost", "## Notes", "## Reproduce with"):
        assert heading in text
    assert "    dsdistill evaluate runs/kip-1 " in text
    assert "FLOPs an image" in text
    assert "agrees with teacher" not in text  # no column without a value
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_augmented_rows_are_compared_only_where_there_are_no_others():
    both = small()
    assert not any(row.augmented for row in both.compared_rows)
    augmented = replace(both, results=tuple(r for r in both.results if r.augmented))
    assert {row.learner for row in augmented.compared_rows} == {"convnet"}
    assert len(augmented.compared_rows) == len(augmented.rows)


@pytest.mark.heavy
def test_every_axis_is_labelled_with_its_unit():
    found = small()
    made = gallery.figures(found)
    series = [small(images_per_class=n, seed=n) for n in (1, 10)]
    made["growth"] = growth.plot(series)
    units = {
        "accuracy": "%",
        "cost": "seconds",
        "curves": "step",
        "classes-ridge": "%",
        "confusion-ridge": "predicted class",
        "growth": "images per class",
    }
    for name, unit in units.items():
        assert unit in made[name].axes[-1].get_xlabel(), name
    assert made["growth"].axes[0].get_ylabel() == "test accuracy, %"
    assert made["curves"].axes[0].get_ylabel() == "training loss"
    assert made["confusion-ridge"].axes[0].get_ylabel() == "true class"
    assert len(made["accuracy"].axes) == len(found.learners)


@pytest.mark.heavy
def test_logarithmic_axes_have_plain_numbers():
    for seconds in (2.0, 90000.0):  # within a power of ten, and far from it
        figure = plots.cost([row(small(), "distilled")], seconds)
        text = plot_style.svg(figure)
        assert "mathdefault" not in text
        assert ">10</text>" in text


def test_a_failed_arm_says_so_in_the_plot():
    figure = plots.accuracies(failing("random").rows)
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts == ["failed 1 of 5"]


def test_confusion_is_summed_over_the_seeds_and_shown_by_line():
    found = row(small(), "distilled")
    counts = plots.total_confusion(found)
    assert counts is not None
    assert counts.sum() == 5 * np.sum(np.array(found.results[0].confusion))
    shown = [t.get_text() for t in plots.confusion(found, CLASSES).axes[0].texts]
    assert f"{100 * counts[0, 0] / counts[0].sum():.0f}" in shown


def test_of_many_classes_those_least_known_are_shown():
    k = 40
    rng = np.random.default_rng(0)
    names = tuple(f"c{i}" for i in range(k))
    made = results.group_by_training(
        [result(rng, "distilled", "mlp", False, i, names) for i in range(2)]
    )
    axes = plots.per_class(made, names).axes[0]
    values = plots.mean_per_class(made[0])
    assert values is not None
    shown = {label.get_text() for label in axes.get_yticklabels()}
    least = sorted(range(k), key=lambda c: values[c] or 0)[: plots.MAX_NAMED_CLASSES]
    assert shown == {names[c] for c in least}
    assert axes.get_ylabel() == "class (the 25 lowest of 40)"


def test_a_curve_is_the_mean_of_the_steps_that_all_seeds_have():
    rng = np.random.default_rng(0)
    curves = [[[0, 2.0], [5, 1.0], [9, 0.5]], [[0, 4.0], [5, None], [9, 1.5]]]
    made = [
        replace(result(rng, "distilled", "mlp", False, i), facts={"curve": curve})
        for i, curve in enumerate(curves)
    ]
    line = plots.curves(results.group_by_training(made)).axes[0].lines[0]
    assert np.asarray(line.get_xydata()).tolist() == [[0, 3.0], [9, 1.0]]


def further(arm: str, learner: str, seeds: int) -> list[results.Result]:
    rng = np.random.default_rng(0)
    return [replace(result(rng, "distilled", learner, False, i), arm=arm) for i in range(seeds)]


def test_further_sets_have_styles_of_their_own():
    common = ("distilled", "distilled-hard", "distilled-teacher", *CONTROLS, *RELABELLED)
    names = (*common, "b", "a", "c", "d", "e", "f")
    styles = plot_style.arm_styles(names)
    for of in (lambda style: (style.colour, style.line), lambda style: style.marker):
        assert len({of(style) for style in styles.values()}) == len(names)
    assert styles == plot_style.arm_styles(("b", *names))
    arms = ("distilled", "b", "a")
    made = results.group_by_training([x for arm in arms for x in further(arm, "mlp", 2)])
    both, alone = plots.curves(made), plots.curves(made[-1:], among=made)
    assert alone.axes[0].lines[0].get_color() == both.axes[0].lines[-1].get_color()


@pytest.mark.heavy
def test_further_sets_are_compared_with_random_images():
    made = small()
    found = replace(made, results=(*made.results, *further("other", "ridge", 5)))
    assert report_tables.FURTHER_CAPTION not in markdown.render(made)
    for text in (markdown.render(found), page.render([found], title="t")):
        assert report_tables.FURTHER_CAPTION in text
    [cells] = report_tables.further_cells(found)
    assert cells[:3] == ["ridge", "other", wording.accuracy(row(found, "other", "ridge"))]
    assert float(cells[4].removeprefix("< ")) < 0.05


def test_an_svg_for_a_page_takes_ink_and_ground_from_it():
    names = ("<i>", "$a_b$", "日", "d")
    figure = plots.per_class(small(classes=names).rows[:1], names)
    text = plot_style.svg(figure, name="one", alt='a "b" <c>')
    assert text.startswith("<svg viewBox=")
    assert 'aria-label="a &quot;b&quot; &lt;c&gt;"' in text
    assert "currentColor" in text
    assert plot_style.INK not in text
    assert "<style" not in text
    assert "<metadata" not in text
    assert "&lt;i&gt;" in text
    assert "$a_b$" in text
    assert "日" in text
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert ids
    assert all(name.startswith("one-") for name in ids)
    other = plot_style.svg(figure, name="two")
    assert not set(ids) & set(re.findall(r'\bid="([^"]*)"', other))
    for target in re.findall(r'(?:url\(|href=")#([^")]*)', text):
        assert target in ids


@pytest.mark.heavy
def test_files_are_black_on_white():
    figure = plots.cost(small().rows, 100.0)
    text = plot_style.svg_file(figure).decode()
    assert "currentColor" not in text
    assert "#000000" in text
    assert plot_style.png(figure)[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = np.asarray(Image.open(io.BytesIO(plot_style.png(figure))).convert("RGB"))
    assert (pixels[0, 0] == 255).all()
    assert pixels.min() < 10


def test_lines_of_growth_join_the_reports_and_name_how_sets_were_made():
    first = [small(images_per_class=n, seed=n) for n in (10, 1)]
    assert [line.label for line in growth.lines(first, "ridge")] == [
        "distilled",
        "random",
        "k-means",
        "herding",
    ]
    assert [n for n, _ in growth.lines(first, "ridge")[0].points] == [1, 10]
    ls = small(seed=5, distilled={"method": "ls", "kernel": "conv"})
    labels = [line.label for line in growth.lines([*first, ls], "ridge")]
    assert labels[:2] == ["distilled, kip fc", "distilled, ls conv"]


def test_published_figures_stand_beside_with_their_source():
    series = [small(images_per_class=n, seed=n) for n in (1, 10)]
    ridge, network = growth.plot(series).axes
    for axes, found in (
        (ridge, published.lookup("fashion-mnist", "ridge")),
        (network, published.lookup("fashion-mnist", "network")),
    ):
        legend = axes.get_legend()
        assert legend is not None
        shown = [text.get_text() for text in legend.get_texts()]
        assert {entry.label for entry in found} <= set(shown)
        hollow = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
        assert len(hollow) == len(found)
    assert "KIP convnet, Nguyen 2021 (memory)" in {p.label for p in published.PUBLISHED}


def test_published_figures_are_fractions_of_known_data():
    assert len(published.PUBLISHED) == 42
    for entry in published.PUBLISHED:
        assert all(0 < value < 1 for value in entry.accuracies.values())
        assert list(entry.accuracies) == sorted(entry.accuracies)
    kip = next(p for p in published.lookup("fashion-mnist", "ridge") if "augmented" in p.method)
    assert kip.accuracies == {1: 0.767, 10: 0.888, 50: 0.91}
    assert kip.tag == "read"


def test_columns_without_any_value_are_left_out():
    found = small()
    head, _ = report_tables.by_arm(found.rows, report_tables.COST_COLUMNS, report_tables.cost_cells)
    assert head == list(report_tables.COST_COLUMNS)
    ridge = [row for row in found.rows if row.learner == "ridge"]
    head, lines = report_tables.by_arm(ridge, report_tables.COST_COLUMNS, report_tables.cost_cells)
    assert "parameters" not in head
    assert all(len(line) == len(head) for _, line in lines)


@pytest.mark.heavy
def test_a_report_in_which_everything_failed_is_a_report_too(tmp_path):
    empty = {"per_class": None, "confusion": None, "facts": None, "train_seconds": 0.0}
    found = small()
    failed = [
        replace(r, **empty, accuracy=None, tune_seconds=0.0, failure=REASON)
        for r in found.results
        if r.seed == 0 and r.learner == "ridge"
    ]
    found = replace(found, results=tuple(failed), distilled={}, notes=[], commands=[])
    write_report(tmp_path, found)
    assert reports.load(tmp_path) == found
    assert "Nothing can be said" in (tmp_path / "report.md").read_text()
