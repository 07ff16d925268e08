"""Command lines that make a result again; options that have their default are left out."""

import shlex
from collections.abc import Mapping
from typing import Any

from dsdistill.harness import runs
from dsdistill.options import Evaluate, Kip, LabelSolve, settled


def distil(made: Mapping[str, Any]) -> str:
    """Of a distilled set of `dsdistill kip` or `dsdistill ls`.

    Args:
        made: Its provenance.
    """
    defaults = vars(LabelSolve())
    if made["method"] == "kip":
        optimizer = made["config"].get("optimizer", Kip.optimizer)
        defaults = vars(settled(Kip(optimizer=optimizer))) | {"optimizer": Kip.optimizer}
    chosen = {**made["config"], **made["config"].get(runs.CHOSEN, {})}
    given = {k: v for k, v in chosen.items() if k in defaults and k != "data"}
    return _line(["dsdistill", made["method"], str(made["config"]["data"])], given, defaults)


def evaluation(options: Evaluate) -> str:
    """Of an evaluation."""
    given = {k: v for k, v in vars(options).items() if k not in _PLACES}
    return _line(["dsdistill", "evaluate", str(options.run)], given, vars(Evaluate(options.run)))


_PLACES = ("run", "out", "resume", "cache", "data_root")


def _line(words: list[str], given: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    for name, value in given.items():
        if value == defaults.get(name):
            continue
        option = "--" + name.replace("_", "-")
        values = value if isinstance(value, tuple | list) else (value,)
        words += [option] if value is True else [option, *map(str, values)]
    return shlex.join(words)
