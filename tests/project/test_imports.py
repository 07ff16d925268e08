"""The import rules: each framework loads without the other, and nothing loads TensorFlow."""

import builtins
import dis
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from types import CodeType

import pytest

import dsdistill
import kd

FRAMEWORKS = ("jax", "torch", "tensorflow")
HARNESS = (
    "data.datasets",
    "data.distilled_set",
    "data.folders",
    "data.preprocess",
    "evaluation.metrics",
    "evaluation.protocol",
    "runs.run_folder",
)
REPORTS = ("page", "report", "write")
RULES = [
    *((f"import dsdistill.harness.{name}", ()) for name in HARNESS),
    *((f"import dsdistill.harness.reports.{name}", ()) for name in REPORTS),
    ("import kd.commands.report", ()),
    ("import dsdistill.cli", ()),
    ("import kd.cli", ()),
    ("import dsdistill.methods.kip", ("jax",)),
    ("import dsdistill.methods.label_solve", ("jax",)),
    ("import dsdistill.kernels.neural_tangents", ("jax",)),
    ("import kd.training.loop", ("torch",)),
]
WRITE_EVENTS = """
import pathlib, tempfile
from dsdistill.harness.runs.metrics_file import Metrics
with tempfile.TemporaryDirectory() as folder:
    with Metrics(pathlib.Path(folder)) as metrics:
        metrics.write(1, loss=0.5)
    assert any(p.stat().st_size > 50 for p in pathlib.Path(folder).glob("events.out.*"))
"""
LOAD_DIGITS = """
import pathlib
from dsdistill.harness.data import datasets, preprocess
train = datasets.load("digits", root=pathlib.Path("none")).train
preprocess.fit("zca", train.chunks, train.shape)
"""


def _loaded(script):
    """Which frameworks a fresh interpreter holds after the script."""
    script += f"\nimport sys\nprint(*(name for name in {FRAMEWORKS} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(("script", "allowed"), RULES, ids=[script for script, _ in RULES])
def test_a_module_loads_its_own_framework_only(script, allowed):
    assert _loaded(script) <= set(allowed)


@pytest.mark.parametrize("script", [WRITE_EVENTS, LOAD_DIGITS], ids=["events", "digits"])
def test_the_harness_at_work_loads_no_framework(script):
    assert not _loaded(script)


def _functions(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _functions(inner)


MODULES = [
    module.name
    for package in (dsdistill, kd)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__")
]


def test_every_name_that_a_function_uses_exists():
    """The linter cannot tell: shapes in annotations are strings that look like unknown names."""
    unknown = []
    for name in MODULES:
        module = importlib.import_module(name)
        loader = module.__spec__.loader
        for code in _functions(loader.get_code(name)):
            for step in dis.get_instructions(code):
                used = step.argval
                known = hasattr(module, str(used)) or hasattr(builtins, str(used))
                if step.opname == "LOAD_GLOBAL" and not known:
                    unknown.append(f"{name}: {used}")
    assert not unknown
