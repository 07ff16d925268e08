"""The notebooks run from top to bottom, at a small size."""

from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
SMALL = {
    "01_distilled_versus_full": 'DATA, IMAGES_PER_CLASS, STEPS = "digits", 2, 40\n'
    'SEEDS, LEARNERS = range(2), ("ridge", "mlp")'
}


@pytest.mark.parametrize("name", SMALL)
def test_notebook_runs(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "=" in first.source  # the cell of settings, replaced by smaller ones
    first.source = SMALL[name]
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 2


def test_every_notebook_is_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SMALL)
