"""The Python examples of the documentation run, page by page from top to bottom."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGES = ("docs/kd-python.md", "docs/distill-python.md", "docs/kd.md", "docs/graphs.md")
EXAMPLES = Path(__file__).parent / "examples"
FENCE = "```"
# In front of a block that is compiled alone, because it needs what a test does not have.
NOT_RUN = re.compile(r"<!-- not run: .+ -->")


def blocks(page: str) -> Iterator[tuple[str, bool]]:
    """The Python blocks of a page, each at its lines of the page, and whether it is run."""
    lines = page.splitlines()
    starts = [i for i, line in enumerate(lines) if line.strip() == f"{FENCE}python"]
    for start in starts:
        end = lines.index(FENCE, start + 1)
        before = next((line for line in reversed(lines[:start]) if line.strip()), "")
        source = "\n" * (start + 1) + "\n".join(lines[start + 1 : end]) + "\n"
        yield source, NOT_RUN.fullmatch(before.strip()) is None


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    examples = list(blocks((ROOT / page).read_text(encoding="utf-8")))
    assert any(is_run for _, is_run in examples)
    namespace = {"__name__": "__main__"}
    for source, is_run in examples:
        code = compile(source, str(ROOT / page), "exec")
        if is_run:
            exec(code, namespace)


def test_a_block_is_run_unless_a_comment_says_why_not() -> None:
    page = "```python\na = 1\n```\n\n<!-- not run: no network -->\n```python\nb = 2\n```\n"
    (first, runs), (second, none) = blocks(page)
    assert (runs, none) == (True, False)
    assert first.splitlines()[1:] == ["a = 1"]
    assert second.splitlines()[6:] == ["b = 2"]


def _write_photos(folder: Path) -> None:
    """A folder as a stranger has it: JPEGs of other sizes, one folder per class."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog", "horse")):
        (folder / name).mkdir(parents=True)
        for number in range(8):
            pixels = rng.integers(60 * label, 60 * label + 90, (20 + number, 24, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_of_a_stranger_runs_and_is_short(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger must get there in at most fifteen lines."""
    monkeypatch.chdir(tmp_path)
    _write_photos(tmp_path / "photos")
    source = script.read_text(encoding="utf-8")
    lines = [line for line in source.splitlines() if line.strip() and line[0] != "#"]
    assert len(lines) <= 15
    exec(compile(source, str(script), "exec"), {"__name__": "__main__"})
