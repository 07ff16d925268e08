"""The rooms of the house: no circle of imports, none that runs up, each framework in its package.

`docs/architecture.md` says what each room is for.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the ground up: a module imports from its own room and from rooms that stand before it. The
# modules that stand beside the rooms are named one by one.
ROOMS = (
    "dsdistill.harness",
    "dsdistill.harness.runs",
    "dsdistill.harness.data",
    "dsdistill.harness.evaluation",
    "dsdistill.harness.reports",
    "dsdistill.parallel",
    "dsdistill.published_sets",
    "dsdistill.kernels",
    "dsdistill.methods",
    "dsdistill.loops",
    "dsdistill.options",
    "dsdistill.commands",
    "dsdistill.distilled",
    "dsdistill.api_data",
    "dsdistill.api_runs",
    "dsdistill.api_evaluation",
    "dsdistill.api",
    "dsdistill.cli",
    "dsdistill",
    "kd.numbers",
    "kd.attack",
    "kd.recipe",
    "kd.recipes",
    "kd.per_teacher",
    "kd.privacy",
    "kd.parallel",
    "kd.models",
    "kd.data",
    "kd.losses",
    "kd.objectives",
    "kd.training",
    "kd.evaluation",
    "kd.synthesis",
    "kd.api_arguments",
    "kd.api",
    "kd.api_synthesis",
    "kd.graphs",
    "kd.estimator",
    "kd.options",
    "kd.runs",
    "kd.exports",
    "kd.assembly",
    "kd.commands",
    "kd.cli",
    "kd",
)
HARNESS = tuple(room for room in ROOMS if room.startswith("dsdistill.harness"))
# `dsdistill evaluate` trains networks of `kd` beside its own learners: inside functions alone.
LAZY = {("dsdistill.commands", "kd.evaluation")}
FORBIDDEN = {"dsdistill": ("torch", "torchvision", "timm", "accelerate"), "kd": ("jax", "optax")}


def _modules() -> dict[str, Path]:
    paths = [p for package in ("dsdistill", "kd") for p in sorted((ROOT / package).rglob("*.py"))]
    names = {p: ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


MODULES = _modules()


def _imported(name: str) -> Iterator[tuple[str, bool]]:
    """What a module imports, and whether inside a function."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    lazy = {id(inner) for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module, id(node) in lazy


GRAPH = {name: list(_imported(name)) for name in MODULES}


def _room(module: str) -> str:
    """The innermost room that a module stands in."""
    return max((r for r in ROOMS if f"{module}.".startswith(f"{r}.")), key=len)


def test_no_circle() -> None:
    sorter = TopologicalSorter(
        {name: {to for to, _ in imports if to in MODULES} for name, imports in GRAPH.items()}
    )
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_import_runs_up() -> None:
    up = [
        f"{name} imports {to}"
        for name, imports in GRAPH.items()
        for to, lazy in imports
        if to in MODULES
        and ROOMS.index(_room(to)) > ROOMS.index(_room(name))
        and not (lazy and (_room(name), _room(to)) in LAZY)
    ]
    assert not up, "\n".join(up)


def test_kd_takes_from_dsdistill_its_harness_alone() -> None:
    others = [
        f"{name} imports {to}"
        for name, imports in GRAPH.items()
        for to, _ in imports
        if name.startswith("kd") and to.startswith("dsdistill") and _room(to) not in HARNESS
    ]
    assert not others, "\n".join(others)


def test_each_package_has_one_framework() -> None:
    breaches = [
        f"{name} imports {to}"
        for name, imports in GRAPH.items()
        for to, lazy in imports
        if to.partition(".")[0] in FORBIDDEN[name.partition(".")[0]]
        and not (lazy and to.partition(".")[0] in ("torch", "torchvision"))  # files of others
    ]
    assert not breaches, "\n".join(breaches)


def test_the_harness_knows_no_framework() -> None:
    breaches = [
        f"{name} imports {to}"
        for name, imports in GRAPH.items()
        for to, lazy in imports
        if _room(name) in HARNESS and to.partition(".")[0] in ("jax", "torch") and not lazy
    ]
    assert not breaches, "\n".join(breaches)
