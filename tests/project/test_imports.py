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
NEITHER = (
    *(f"dsdistill.harness.{name}" for name in HARNESS),
    *(f"dsdistill.harness.reports.{name}" for name in REPORTS),
    *("kd.commands.report", "dsdistill.cli", "kd.cli"),
)
JAX_ALONE = ("dsdistill.methods.kip", "dsdistill.methods.label_solve")
JAX_ALONE += ("dsdistill.kernels.neural_tangents",)
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


def _loaded(*scripts):
    """Which frameworks a fresh interpreter holds after each of these scripts, one after another."""
    said = f"import sys\nprint(*(name for name in {FRAMEWORKS} if name in sys.modules))"
    script = "\n".join(f"{script}\n{said}" for script in scripts)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(scripts, map(str.split, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(
    ("modules", "allowed"),
    [(JAX_ALONE, {"jax"}), (("kd.training.loop",), {"torch"})],
    ids=["jax", "torch"],
)
def test_a_module_loads_its_own_framework_only(modules, allowed):
    for script, found in _loaded(*(f"import {name}" for name in modules)).items():
        assert set(found) <= allowed, script


def test_the_harness_and_its_work_load_no_framework():
    found = _loaded(*(f"import {name}" for name in NEITHER), WRITE_EVENTS, LOAD_DIGITS)
    assert [script for script, frameworks in found.items() if frameworks] == []


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
