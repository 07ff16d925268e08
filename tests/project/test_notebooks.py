"""The notebooks run from top to bottom at a small size, and are what their scripts say."""

from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
SMALL = {  # name: the cell of settings, and how many pictures there are
    "01_distilled_versus_full": (
        'DATA, IMAGES_PER_CLASS, STEPS = "digits", (1, 2), 10\nSEEDS, LEARNERS = 1, "ridge,mlp:2"',
        3,
    ),
    "02_kip_and_label_solve": (
        'DATA, IMAGES_PER_CLASS, STEPS, KERNEL = "digits", 2, 10, "fc"',
        4,
    ),
    "03_choosing_a_kd_loss": (
        'DATA, TEACHER, TEACHER_EPOCHS = "digits", "convnet:4", 1\n'
        'STUDENT, EPOCHS, SEEDS, LAYERS = "convnet:2", 1, range(2), "2,6,10"',
        1,
    ),
    "04_your_own_images": (
        "FOLDER, IMAGE_SIZE, EXAMPLES = None, 16, 20\n"
        'TEACHER, TEACHER_EPOCHS, STUDENT, EPOCHS = "test_resnet", 1, "convnet:4", 1',
        2,
    ),
    "05_photographs": (
        "FOLDER, BACKBONE, PIECES, EPOCHS, STEPS = None, None, 12, 1, 2",
        1,
    ),
    "06_language": (
        'DATA, TEACHER, STUDENT = None, "bert:1x24", "bilstm:8"\n'
        "SENTENCES, EPOCHS, COPIES, PASSES = 100, 2, 1, 1",
        0,
    ),
    "07_graphs": ("FILE, SEEDS, EPOCHS = None, range(2), 20", 1),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.fashion] if name.startswith("04") else [])
        for name in SMALL
    ],
)
def test_notebook_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Beside another test, two threads wait for each other at every small product: ten times slower.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "=" in first.source  # the cell of settings, replaced by smaller ones
    first.source, count = SMALL[name]
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == count


@pytest.mark.parametrize("name", SMALL)
def test_notebook_and_script_are_the_same(name: str) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    script = jupytext.read(FOLDER / f"{name}.py")
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ]


@pytest.mark.parametrize("name", SMALL)
def test_committed_outputs_are_small_and_whole(name: str) -> None:
    path = FOLDER / f"{name}.ipynb"
    assert path.stat().st_size < 1_000_000
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert not any(out.output_type == "error" for cell in code for out in cell.outputs)


def test_every_notebook_is_tested() -> None:
    for suffix in ("ipynb", "py"):
        assert {path.stem for path in FOLDER.glob(f"*.{suffix}")} == set(SMALL)
