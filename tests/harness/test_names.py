"""Names are text: whatever a class, a file or a data set is called, it stands as it is."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from kd_support import write_npz
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from report_support import report
from rich.table import Table

from dsdistill.commands import inspect
from dsdistill.harness import command_line, files, text
from dsdistill.harness.data import class_names, distilled_set, labeled_images, preprocess
from dsdistill.harness.data.labeled_images import LabeledImages
from dsdistill.harness.errors import UserError, unknown_name
from dsdistill.harness.reports import gallery, growth, image_grid, markdown, page, plot_style
from dsdistill.harness.reports import report as reports
from dsdistill.harness.reports.image_grid import GridSide
from dsdistill.harness.reports.write import write_report
from dsdistill.harness.runs import progress
from kd.commands import report as kd_report
from kd.commands import train
from kd.models import saved_models
from kd.options import Overrides, TrainOptions
from kd.runs import curves, finished_runs, printed_figures

# What a class may be called, and how it is shown.
NAMES = {
    "under_$5_$10": "under_$5_$10",
    "$unbalanced": "$unbalanced",
    r"\frac{1}{0}": r"\frac{1}{0}",
    "50%_#1^2~&": "50%_#1^2~&",
    "_hidden": "_hidden",
    "[/x]": "[/x]",
    "[bold]loud[/bold]": "[bold]loud[/bold]",
    "[link=https://example.org]here": "[link=https://example.org]here",
    ":smile:": ":smile:",
    "</script><script>alert(1)</script>": "</script><script>alert(1)</script>",
    '" onload=\'x\' id="y"': '" onload=\'x\' id="y"',
    "<!-- -- --> ]]> &amp;": "<!-- -- --> ]]> &amp;",
    "a|b `c` *d* ![e](f)": "a|b `c` *d* ![e](f)",
    "two\nlines\r": r"two\nlines\r",
    "tab\tand\x00nul": r"tab\tand\x00nul",
    "\x1b[31mred\x1b[0m\x07": r"\x1b[31mred\x1b[0m\x07",
    "del\x7f c1\x9b31m": r"del\x7f c1\x9b31m",
    "next\x85line\u2028and\u2029": r"next\x85line\u2028and\u2029",
    "tac\u202ecod.exe": r"tac\u202ecod.exe",
    "zero\u200bwidth\ufeff": r"zero\u200bwidth\ufeff",
    "bad\udcffbyte": r"bad\xffbyte",
    "猫": "猫",
    "کتاب\u200cها": "کتاب\u200cها",
    "👩\u200d🔬": "👩\u200d🔬",
    "{0} {name}": "{0} {name}",
}
LONG = "Tomato_" + "x" * 286 + "_healthy"
CLASSES = (*NAMES, LONG)
SHOWN = (*NAMES.values(), LONG)


class Texts(HTMLParser):
    """Text nodes and attributes of a page, and its tags."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.nodes: list[str] = []
        self.attributes: list[str] = []
        self.tags: set[str] = set()
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [value for _, value in attrs if value]
        names = {name for name, _ in attrs}
        assert not any(name.startswith("on") for name in names)

    def handle_data(self, data: str) -> None:
        self.nodes.append(data)


class Terminal(io.StringIO):
    """Says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def strict():
    """A warning, such as that of a glyph that the font lacks, is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def one_line(words: str) -> bool:
    return len(words.splitlines()) == 1 and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", words)


def visible(words: str) -> str:
    """What a terminal shows, without the styles that rich sets."""
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", words)


@pytest.mark.parametrize(("name", "shown"), NAMES.items(), ids=ascii)
def test_a_name_is_printable_on_one_line(name, shown):
    assert text.printable(name) == shown
    assert text.printable(shown) == shown
    assert one_line(shown)
    shown.encode()


def test_a_message_shows_a_name_as_it_is():
    r"""A class of the folder `caf\\xe9` in Latin-1 is shown with the backslash that it has."""
    name = class_names.from_folder(os.fsdecode(b"caf\xe9"))
    assert text.quote(name) == r"'caf\xe9'"
    data = LabeledImages(np.zeros((1, 1, 1, 1)), np.zeros(1, int), (name, "tea"))
    with pytest.raises(UserError, match="class 'tea' has 0 training images"):
        labeled_images.check_images_per_class(data, 1)
    with pytest.raises(UserError) as caught:
        labeled_images.check_images_per_class(replace(data, labels=np.ones(1, int)), 1)
    assert str(caught.value).startswith(r"class 'caf\xe9' has 0 training images")


def test_long_names_keep_both_ends():
    short = text.shorten(LONG, 32)
    assert len(short) == 32
    assert short.startswith("Tomato_x")
    assert short.endswith("x_healthy")
    assert text.shorten("bird", 4) == "bird"
    assert text.shorten("birds", 4) == "bi…s"
    assert len(text.shorten("\x1b" * 100, 32)) == 32


@pytest.mark.parametrize("name", CLASSES, ids=lambda name: ascii(name)[:20])
def test_an_error_is_one_line(name, monkeypatch, capsys):
    assert one_line(str(UserError(f"no such class: {name}")))
    assert one_line(str(unknown_name("class", name, ["cat"])))
    progress.say(f"note: {name}")
    assert one_line(capsys.readouterr().err)

    class Options:
        pass

    def fail(_: object) -> None:
        raise OSError(f"cannot open {name}")

    monkeypatch.setattr(command_line, "_parse", lambda *_: Options())
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            command_line.main("kd", "", {"train": (Options, fail)}, "stopped")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert str(stop.value) == f"kd: cannot open {text.printable(name)}"


def images(shape: tuple[int, int, int], classes: int, each: int = 1):
    pixels = np.random.default_rng(0).random((classes * each, *shape), np.float32)
    return pixels, np.repeat(np.arange(classes), each)


def grid(path: Path, shape: tuple[int, int, int], classes: tuple[str, ...], each: int = 1):
    pixels, labels = images(shape, len(classes), each)
    flat = np.zeros(shape[-1], np.float32)
    fitted = preprocess.Preprocess("standardise", flat, flat + 1)
    side = GridSide("[/x] $5 $10", pixels, labels)
    image_grid.write(path, side, side, classes, fitted)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("start", [0, 20])
def test_the_picture_of_a_set_takes_any_name(start, tmp_path):
    drawn = grid(tmp_path / "set.png", (2, 2, 1), CLASSES[start:])
    assert (drawn[:, :20] < 255).any() or (drawn != drawn[0, 0]).any()


def test_a_name_is_drawn_as_text_and_not_as_a_formula(tmp_path):
    """In mathematics, the dollar signs would vanish and leave a narrower name."""
    with plot_style.plain_text():
        figure = Figure()
        widths = [
            figure.text(0, 0, plot_style.label(name)).get_window_extent().width
            for name in ("under_$5_$10", "under_x5_x10")
        ]
    assert widths[0] == pytest.approx(widths[1], rel=0.05)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 1, 3), (3000, 2, 3), (2, 3000, 1), (4, 4, 2), (900, 1200, 4)]
)
def test_a_picture_of_any_shape_is_drawn(shape, tmp_path):
    drawn = grid(tmp_path / "set.png", shape, ("cat", "dog"))
    assert max(drawn.shape) < 3000


def test_a_picture_of_many_classes_shows_the_first(tmp_path):
    drawn = grid(tmp_path / "set.png", (4, 4, 3), tuple(map(str, range(1000))), each=12)
    assert max(drawn.shape) < 3000


def test_one_image_of_each_of_two_hundred_classes_fits_into_a_picture(tmp_path):
    """One large class, as learned labels make them, does not take the room of the others."""
    pixels, labels = images((4, 4, 1), 200)
    labels[:8] = 0
    side = GridSide("real", np.zeros_like(pixels), labels)
    names = tuple(map(str, range(200)))
    image_grid.write(tmp_path / "set.png", side, side, names, preprocess.identity(1))
    with Image.open(tmp_path / "set.png") as image:
        black = np.asarray(image.convert("L")) < 128
        assert max(image.size) < 2000
    # Two grids of twenty by ten, seven of the two hundred classes without an image.
    assert black.mean() * black.size == pytest.approx(2 * 193 * 0.55**2 * 100**2, rel=0.35)


def test_the_halves_of_a_picture_stand_together(tmp_path):
    black = GridSide("before", np.zeros((10, 8, 8, 1), np.float32), np.arange(10))
    names = tuple(map(str, range(10)))
    image_grid.write(tmp_path / "set.png", black, black, names, preprocess.identity(1))
    with Image.open(tmp_path / "set.png") as image:
        row = np.asarray(image)[image.height // 20 * 10 + 50]  # through images of one class
    dark = np.flatnonzero(row < 128)
    assert np.diff(dark).max() < len(row) / 4
    assert len(dark) > len(row) / 2


def test_rows_of_classes_without_images_stay_empty(tmp_path):
    flat = np.zeros(1, np.float32)
    fitted = preprocess.Preprocess("standardise", flat, flat + 1)
    none = GridSide("none", np.zeros((0, 4, 4, 1), np.float32), np.zeros(0, np.int64))
    image_grid.write(tmp_path / "set.png", none, none, ("cat", "dog"), fitted)
    assert (tmp_path / "set.png").exists()


@pytest.fixture(scope="module")
def nasty() -> list[reports.Report]:
    """Reports whose every text is a nasty name; each has as many classes as a plot names."""
    found = []
    for start in (0, 20):
        classes, learner = CLASSES[start : start + 20], CLASSES[start + 3]
        made = report(learners=("ridge", "convnet"), classes=classes, seed=start)
        failed = replace(made.results[-1], accuracy=None, failure=CLASSES[start + 1])
        results = (*made.results[:-1], failed)
        results = tuple(
            replace(r, learner=learner if r.learner == "convnet" else "_ridge") for r in results
        )
        found.append(
            replace(
                made,
                title=" ".join(CLASSES),
                notes=list(CLASSES),
                commands=[f"dsdistill evaluate {name}" for name in CLASSES],
                data=made.data | {"name": "under_$5_$10\n\udcff"},
                distilled=made.distilled | {"method": f"kip {start} [/x]", "kernel": "$a $b_\x1b"},
                results=results,
                machine=LONG,
            )
        )
    return found


def texts(figure) -> list[str]:
    """Every text of a figure."""
    return [t.get_text() for t in figure.findobj(Text)]


def test_plots_show_names_as_text(nasty):
    for found in nasty:
        shown = [plot_style.label(name) for name in found.classes]
        assert len(set(shown)) == len(shown)
        learner = found.learners[1]
        for figure in (gallery.classes(found, learner), gallery.confusion(found, learner)):
            assert figure is not None
            assert set(shown) <= set(texts(figure))
            content = plot_style.svg(figure, name="p", alt=" ".join(found.classes))
            assert set(shown) <= set(Texts(content).nodes)
            root = ElementTree.fromstring(plot_style.svg_file(figure))
            assert root.tag.endswith("svg")
            plot_style.png(figure)
    by_images = growth.plot(nasty)
    plot_style.png(by_images)
    assert plot_style.label(nasty[0].learners[1], plot_style.MAX_TITLE_LENGTH) in texts(by_images)
    legend = [t.get_text() for t in by_images.axes[0].get_legend().get_texts()]
    assert any(line.startswith("distilled, kip 0 [/x] $a $b_\\x1b") for line in legend)


def test_every_file_of_a_report_is_written(nasty, tmp_path):
    found = nasty[1]
    write_report(tmp_path, found)
    assert reports.load(tmp_path) == found
    raw = json.loads((tmp_path / "report.json").read_text())
    assert raw["classes"] == list(found.classes)  # JSON keeps the names as they are
    written = sorted(path.name for path in (tmp_path / "plots").glob("*.png"))
    assert len(written) == 3 + 2 * 2


def test_plots_of_learners_that_look_alike_have_files_of_their_own():
    made = report(learners=("mlp:64", "mlp-64", "MLP:64", "x" * 300))
    found = gallery.figures(made)
    assert len({name.lower() for name in found}) == 3 + 2 * 4
    assert max(map(len, found)) < 100


def test_a_page_shows_names_as_text(nasty):
    content = page.render(nasty, title=" ".join(CLASSES), pictures={LONG: png(), "[/x]": png()})
    assert one_line(content.replace("\n", " "))
    content.encode()
    parsed = Texts(content)
    nodes = set(parsed.nodes)
    assert " ".join(SHOWN) in nodes  # the title
    assert set(SHOWN) <= nodes  # the notes
    assert not parsed.tags & {"script", "img onerror", "b onload"}
    assert LONG in parsed.attributes  # what is said in place of the picture
    commands = "\n".join(f"dsdistill evaluate {name}" for name in SHOWN)
    assert commands in nodes
    for found in nasty:
        assert text.printable(found.learners[1]) in nodes


def test_reports_are_numbered_whatever_their_titles():
    made = report(learners=("ridge",), classes=("a", "b"))
    found = [replace(made, title=title) for title in ("A", "A", "A (2)")]
    names = page._unique_titles(found)
    assert list(names) == ["A", "A (2)", "A (2) (2)"]
    assert list(map(id, names.values())) == list(map(id, found))


def test_markdown_shows_names_as_text(nasty):
    for found in nasty:
        content = markdown.render(found)
        content.encode()
        parsed = Texts(MarkdownIt("commonmark").enable("table").render(content))
        lines = "".join(parsed.nodes).splitlines()
        assert " ".join(" ".join(SHOWN).split()) in lines
        assert {" ".join(name.split()) for name in SHOWN} <= set(lines)
        assert not parsed.tags & {"script", "em", "strong", "a", "img"}
        assert parsed.tags >= {"h1", "h2", "table", "ul"}
        for name in SHOWN:
            assert f"dsdistill evaluate {name}" in lines


def png() -> bytes:
    box = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(box, "png")
    return box.getvalue()


def test_a_table_on_a_terminal_shows_names_as_text(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "600")
    table = Table()
    for name in CLASSES:
        table.add_row(text.printable(name))
    text.console(soft_wrap=True).print(table)
    shown = visible(sys.stdout.getvalue())
    assert all(name in shown for name in SHOWN)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_names_as_text(terminal, monkeypatch):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setenv("COLUMNS", "200")
    for name in CLASSES:
        with progress.bar(2) as show:
            show(1, **{name: "failed", "note": name})
            show(2, note=name)
    shown = visible(stream.getvalue())
    for name in CLASSES:
        assert text.shorten(f"note {name}", progress.MAX_FIGURE_CHARACTERS) in shown
    assert "\x07" not in shown
    assert "\u202e" not in shown


def distilled(classes: tuple[str, ...]) -> distilled_set.DistilledSet:
    pixels, _ = images((2, 2, 1), len(classes))
    fitted = preprocess.fit("standardise", lambda size: iter([pixels]), (2, 2, 1))
    k = len(classes)
    return distilled_set.DistilledSet(
        pixels, np.eye(k, dtype=np.float32), fitted, classes, {"data": {"name": "[/x]\udcff\n"}}
    )


def test_inspect_shows_names_as_text(tmp_path, capsys, monkeypatch):
    path = tmp_path / "set.safetensors"
    distilled_set.save(path, distilled(CLASSES))
    assert distilled_set.load(path).classes == CLASSES
    monkeypatch.setenv("COLUMNS", "2000")
    inspect.print_set(path, as_json=False)
    shown = capsys.readouterr().out
    assert ", ".join(SHOWN) in shown
    assert r"[/x]\xff\n" in shown
    inspect.print_set(path, as_json=True)
    assert tuple(json.loads(capsys.readouterr().out)["classes"]) == CLASSES


@pytest.mark.parametrize("as_json", [True, False])
def test_inspect_shows_any_provenance(as_json, tmp_path, capsys):
    """A stranger's may have fields of any kind, and under the names of the set's own."""
    deep: object = "end"
    for _ in range(distilled_set.MAX_PROVENANCE_DEPTH - 2):
        deep = {"in": deep}
    odd = {"peak_memory": "[/x]", "bytes": "many", "images": None, "seconds": [], "deep": deep}
    path = tmp_path / "set.safetensors"
    distilled_set.save(path, replace(distilled(("a", "b")), provenance=odd))
    inspect.print_set(path, as_json=as_json)
    shown = capsys.readouterr().out
    assert "[/x]" in shown
    assert "many" not in shown
    assert "end" in shown


def test_provenance_that_is_nested_without_end_is_refused(tmp_path):
    deep: object = 0
    for _ in range(500):
        deep = [deep]
    with pytest.raises(distilled_set.DistilledSetError, match="nested"):
        distilled_set.save(tmp_path / "set", replace(distilled(("a", "b")), provenance={"a": deep}))


def test_standard_output_of_another_encoding_is_no_traceback(tmp_path):
    path = tmp_path / "set.safetensors"
    distilled_set.save(path, distilled(CLASSES))
    line = "import sys; from dsdistill.cli import main; sys.argv[0] = 'dsdistill'; main()"
    found = subprocess.run(
        [sys.executable, "-c", line, "inspect", path],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (found.returncode, found.stderr) == (0, b"")
    assert rb"\u732b" in found.stdout


@pytest.mark.parametrize("terminal", [True, False])
def test_figures_of_kd_show_names_as_text(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal() if terminal else io.StringIO())
    monkeypatch.setenv("COLUMNS", "600")
    for name in CLASSES:
        printed_figures.print_figures({"folder": name})
    shown = visible(sys.stdout.getvalue())
    assert all(name in shown for name in SHOWN)


def kd_run(folder: Path, name: str) -> Path:
    """A finished run whose names are all the same."""
    folder.mkdir()
    options = asdict(TrainOptions(name, student=name))
    config = {k: v for k, v in options.items() if k not in ("out", "resume", "overrides")}
    files.write_json(folder / "config.json", config | {"data_root": "data"})
    figures = {"student": name, "data": name, "seed": 0, "test_accuracy": 0.5}
    rest = {"seconds": 1.0, "parameters": 3, "teacher": name, "note": name, "device": name}
    files.write_json(folder / "report.json", figures | rest)
    lines = [{"step": s, name: 10.0 / s, "validation_accuracy": 0.5} for s in (1, 20, 300)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_of_kd_are_compared_whatever_their_names(tmp_path):
    folders = [kd_run(tmp_path / str(i), name) for i, name in enumerate(CLASSES)]
    content = kd_report.render(folders)
    assert one_line(content.replace("\n", " "))
    content.encode()
    parsed = Texts(content)
    assert set(SHOWN) <= set(parsed.nodes)  # notes, data sets
    assert "script" not in parsed.tags


@pytest.mark.parametrize("name", CLASSES, ids=lambda name: ascii(name)[:20])
def test_curves_are_drawn_whatever_the_terms_are_called(name, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot_style, "png", lambda figure: drawn.append(figure) or b"")
    curves.draw(kd_run(tmp_path / "run", name))
    left = drawn[0].axes[0]
    assert [t.get_text() for t in left.get_legend().get_texts()] == [plot_style.label(name)]
    ticks = [t.get_text() for t in left.get_yticklabels()]
    assert not any("$" in tick for tick in ticks)


def test_a_users_own_tex_settings_do_not_reach_a_name(tmp_path):
    with matplotlib.rc_context({"text.usetex": True}):
        curves.draw(kd_run(tmp_path / "run", "under_$5_$10"))
        grid(tmp_path / "set.png", (2, 2, 1), ("under_$5_$10", "%"))
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000


def test_a_short_logarithmic_axis_has_numbers_too(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot_style, "png", lambda figure: drawn.append(figure) or b"")
    lines = [{"step": s, "ce": loss} for s, loss in ((1, 0.0131), (2, 0.0124))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves.draw(tmp_path)
    axis = drawn[0].axes[0].yaxis
    drawn[0].draw_without_rendering()
    shown = [t.get_text() for t in (*axis.get_ticklabels(), *axis.get_ticklabels(minor=True))]
    assert len([float(text) for text in shown if text]) >= 2


def test_curves_are_drawn_from_the_lines_that_can_be_read(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot_style, "png", lambda figure: drawn.append(figure) or b"")
    deep = "[" * 100_000
    lines = [
        '{"step": 1, "ce": 2.0, "odd": "x"}',
        "no JSON",
        deep,
        "[]",
        '{"ce": 1.0}',
        '{"step": 2, "ce": NaN, "validation_accuracy": {}}',
        '{"step": 3, "ce": 1e400, "late": 1%s}' % ("0" * 400),
        '{"step": 4, "ce": 1.0}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"step": 5, \xff')
    curves.draw(tmp_path)
    (line,) = drawn[0].axes[0].lines
    assert line.get_xydata().tolist() == [[1, 2], [4, 1]]


def test_a_picture_that_cannot_be_drawn_costs_no_result(tmp_path, monkeypatch):
    def fail(_: Path) -> None:
        raise RuntimeError("no picture")

    monkeypatch.setattr(curves, "draw", fail)
    epochs: Any = Overrides(epochs=1)
    data = str(write_npz(tmp_path / "data.npz"))
    options = TrainOptions(data, student="mlp:8", out=tmp_path / "run", overrides=epochs)
    with pytest.raises(RuntimeError, match="no picture"):
        train.run(train.resolve(options))
    assert finished_runs.read(tmp_path / "run").report["student"] == "mlp:8"
    assert saved_models.load_run(tmp_path / "run").name == "mlp:8"
