"""The tables of docs/folders.md say what is read, row by row."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "folders.md"


@pytest.fixture(scope="module")
def layouts() -> ModuleType:
    path = ROOT / "benchmarks" / "layouts.py"
    spec = importlib.util.spec_from_file_location("layouts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _table(first: str) -> dict[str, str]:
    """The last column of the table whose first column has that head, by row."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} | timm |"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        rows[cells[0]] = cells[-1]
    return rows


@pytest.mark.parametrize("first", ["layout", "file"])
def test_the_page_has_what_is_read(first: str, layouts: ModuleType, tmp_path: Path) -> None:
    rows = layouts.layout_rows if first == "layout" else layouts.image_rows
    found = dict(rows(tmp_path, others=False))
    stated = _table(first)
    assert stated.keys() == found.keys()
    for name, cell in found.items():
        assert stated[name] == cell, name
