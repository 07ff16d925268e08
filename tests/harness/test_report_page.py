"""The page of a report: whole, escaped, and shown by a browser without asking for anything."""

import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import browser
import numpy as np
import pytest
from PIL import Image
from report_support import report

from dsdistill.harness.reports import html, page
from dsdistill.harness.reports.html import CONTENT_SECURITY_POLICY

needs_browser = pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium")
EVIL = "<script>document.title = 'taken'</script>"
VOID = {"meta", "link", "img", "br"}
PARTS = (
    "Test accuracy",
    "Scores",
    "Images",
    "Classes",
    "Confusion",
    "Learning curves",
    "Probabilities",
    "Cost",
    "Failures",
    "Notes",
    "Reproduce",
)


def png(side: int = 28) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (side, side), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def hostile():
    """A report all of whose text is what a page must not believe."""
    found = report(
        learners=("ridge", EVIL),
        classes=(EVIL, '"><img src=x onerror=alert(1)>', "a&b", "d"),
        title=EVIL,
        notes=[EVIL],
        commands=[EVIL],
        machine=EVIL,
        versions={EVIL: EVIL},
        distilled={"method": EVIL, "kernel": EVIL},
    )
    first, *rest = found.results
    failed = replace(first, accuracy=None, confusion=None, per_class=None, failure=EVIL)
    return replace(found, results=(failed, *rest), data={**found.data, "name": EVIL})


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about one evaluation, with a failure and a picture."""
    found = report(learners=("ridge", "convnet"))
    failed = replace(found.results[0], accuracy=None, failure="loss is nan")
    found = replace(found, results=(failed, *found.results[1:]))
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page.render([found], title=found.title, pictures={"Pairs": png()}))
    return path


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page that compares three evaluations."""
    found = [report(images_per_class=n, seed=n, learners=("ridge", "mlp:64")) for n in (1, 10, 50)]
    path = tmp_path_factory.mktemp("page") / "compared.html"
    path.write_text(page.render(found, title="3 evaluations"))
    return path


class Outline(HTMLParser):
    """Tags that are open, identifiers, and everything that would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._note(tag, dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._note(tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def _note(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.ids += [value for name, value in attributes.items() if name == "id" and value]
        names = ("src", "href", "xlink:href")
        self.links += [value for name in names if (value := attributes.get(name))]
        if tag in ("img", "svg"):
            self.images.append(attributes)


@pytest.mark.parametrize("which", ["single", "several"])
def test_the_page_is_well_formed_and_needs_nothing_else(which, request):
    text = request.getfixturevalue(which).read_text()
    outline = Outline(text)
    assert not outline.open
    assert len(outline.ids) == len(set(outline.ids))
    for link in outline.links:
        assert link.startswith(("#", "data:"))
        assert not link.startswith("#") or link[1:] in outline.ids
    assert all(name in outline.ids for name in re.findall(r"url\(#([^)]*)\)", text))
    assert all(image.get("alt") or image.get("aria-label") for image in outline.images)
    assert "script" not in outline.tags
    assert "@import" not in text
    assert f'content="{CONTENT_SECURITY_POLICY}"' in text


def test_the_parts_come_in_their_order(single, several):
    text = single.read_text()
    places = [text.index(f">{name}</h2>") for name in PARTS]
    assert places == sorted(places)
    assert "Accuracy against images per class</h2>" not in text
    assert "Accuracy against images per class</h2>" in several.read_text()
    assert "Failures</h2>" not in several.read_text()


def test_the_answer_comes_first_and_failures_are_seen(single):
    text = single.read_text()
    assert text.index("The distilled set is better") < text.index("<table>")
    assert "nothing can be said for ridge" in text
    assert "failed 1 of 5: loss is nan" in text
    assert "ridge on distilled, seed 0: loss is nan" in text


def test_text_of_files_is_escaped():
    text = page.render([hostile()], title=EVIL, pictures={EVIL: png()})
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "&lt;script&gt;" in text
    tags = Outline(text).tags
    assert "script" not in tags
    assert tags.count("img") == 1  # the picture


def test_reports_with_one_title_are_told_apart():
    twins = [report(seed=seed, learners=("ridge",)) for seed in (1, 2)]
    text = page.render(twins, title="two")
    assert f"{twins[0].title} (2)</h3>" in text


def test_pages_are_the_same_for_the_same_report():
    found = report(learners=("ridge",))
    assert page.render([found], title="a") == page.render([found], title="a")


def test_small_pictures_are_enlarged_by_whole_pixels():
    assert 'class="pixels" style="width:476px' in html.picture(png(28), "x")  # 17 times
    assert 'class="picture" style="width:384px' in html.picture(png(600), "x")


@needs_browser
@pytest.mark.parametrize("which", ["single", "several"])
def test_a_browser_asks_for_nothing_and_has_no_complaint(which, request, tmp_path):
    path = request.getfixturevalue(which)
    seen = browser.visit(path, tmp_path)
    assert seen.console == []
    assert seen.requests == []
    assert "Reproduce</h2>" in seen.dom


@needs_browser
def test_the_policy_stops_what_the_browser_would_see(single, tmp_path):
    """The test above would notice: without the policy the same additions run and are asked for."""
    more = "<script>document.title='taken'</script><img src='http://127.0.0.1:9/x.png'></main>"
    text = single.read_text().replace("</main>", more)
    guarded, open_page = tmp_path / "guarded.html", tmp_path / "open.html"
    guarded.write_text(text)
    open_page.write_text(text.replace(CONTENT_SECURITY_POLICY, ""))
    seen = browser.visit(guarded, tmp_path)
    assert "<title>taken</title>" not in seen.dom
    assert any("Content Security Policy" in line for line in seen.console)
    assert seen.requests == []
    seen = browser.visit(open_page, tmp_path)
    assert "<title>taken</title>" in seen.dom
    assert seen.requests == ["http://127.0.0.1:9/x.png"]


def widths(text: str, width: int, folder: Path) -> list[int]:
    """Of the viewport and of what would have to scroll in it, without the policy.

    Chromium's window has a smallest width, so the page is measured in a frame.
    """
    measure = (
        "<script>const e = document.documentElement; parent.postMessage("
        "[innerWidth, e.scrollWidth, document.body.scrollWidth], '*')</script></main>"
    )
    outer = (
        "<script>onmessage = m => document.documentElement.dataset.widths = m.data</script>"
        f'<iframe src="inner.html" style="width:{width}px;height:800px;border:0"></iframe>'
    )
    (folder / "inner.html").write_text(
        text.replace(CONTENT_SECURITY_POLICY, "").replace("</main>", measure)
    )
    (folder / "outer.html").write_text(outer)
    seen = browser.visit(folder / "outer.html", folder, (1400, 900))
    found = re.search(r'data-widths="([\d,]*)"', seen.dom)
    assert found is not None
    return list(map(int, found[1].split(",")))


@needs_browser
@pytest.mark.parametrize("which", ["single", "several"])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_itself_never_scrolls_sideways(which, width, request, tmp_path):
    text = request.getfixturevalue(which).read_text()
    assert widths(text, width, tmp_path) == [width] * 3


@needs_browser
def test_words_without_a_space_are_broken(tmp_path):
    word = 300 * "x"
    found = replace(hostile(), title=word, notes=[word], commands=[word], machine=word)
    text = page.render([found], title=word, pictures={word: png()})
    assert widths(text, 360, tmp_path) == [360] * 3


@needs_browser
def test_what_is_too_wide_would_be_noticed(single, tmp_path):
    text = single.read_text().replace("<main>", '<main><div style="width:600px">.</div>')
    assert max(widths(text, 360, tmp_path)) > 600


@needs_browser
@pytest.mark.parametrize("size", [(360, 800), (1200, 900)])
@pytest.mark.parametrize("scheme", [browser.LIGHT, browser.DARK])
def test_light_and_dark_are_both_drawn(single, size, scheme, tmp_path):
    picture = browser.screenshot(single, tmp_path, size, scheme)
    pixels = np.asarray(Image.open(picture).convert("L"), np.float64)
    assert pixels.shape[::-1] == size
    ground, ink = np.median(pixels), np.percentile(np.abs(pixels - np.median(pixels)), 99.5)
    assert ground < 60 if scheme == browser.DARK else ground > 200
    assert ink > 120  # of 255: text stands out
