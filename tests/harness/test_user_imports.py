"""Objects that a user names as `module:attribute`: where they are looked for, and what is said."""

import hashlib
import sys
from pathlib import Path

import pytest

from dsdistill.harness import imports
from dsdistill.harness.errors import UserError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("colorsys", "neighbour", "faulty"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_the_current_folder_comes_first_and_its_neighbours_are_found_later(here: Path) -> None:
    text = "def late():\n    import neighbour\n    return neighbour.value\n"
    (here / "colorsys.py").write_text(text)  # hides the one of Python
    (here / "neighbour.py").write_text("value = 3\n")
    found = imports.load("object", "colorsys:late")
    assert found.value() == 3
    assert found.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_a_folder_without_the_module_is_not_searched(here: Path) -> None:
    assert imports.load("object", "sys:path").sha256 is None
    assert str(here) not in sys.path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = [\n", "faulty.py, line 1"),
        ("import os\n\nos.stat('nowhere')\n", "FileNotFoundError: .*nowhere.* .faulty.py, line 3."),
        ("import neighbour\n", "No module named 'neighbour' .faulty.py, line 1."),
        ("import sys\nsys.exit('usage')\n", "SystemExit: usage .faulty.py, line 2."),
        ("nett = 1\n", "faulty.py. has no 'net'; did you mean 'nett'"),
    ],
)
def test_what_goes_wrong_is_one_line_with_its_place(here: Path, text: str, words: str) -> None:
    (here / "faulty.py").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        imports.load("object", "faulty:net")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("object 'faulty:net' cannot be imported: ")


@pytest.mark.parametrize("text", ["a:b", "a.b_1:C", "ä:b"])
def test_references(text: str) -> None:
    assert imports.is_reference(text)


@pytest.mark.parametrize(
    "text", ["a", "a:", ":b", "a:b.c", "hf-hub:b", "resnet18:32", "a:b:c", "/a:b"]
)
def test_other_names(text: str) -> None:
    assert not imports.is_reference(text)
