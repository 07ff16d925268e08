"""Command lines that make a result again; options that have their default are left out."""

import shlex
from collections.abc import Mapping
from typing import Any, cast

from dsdistill.harness.runs import run_folder
from dsdistill.options import (
    OPTIMIZER_DEFAULTS,
    EvaluateOptions,
    KipOptions,
    LabelSolveOptions,
    with_defaults,
)

METHODS = ("kip", "ls")


def distil_line(method: str, config: Mapping[str, Any]) -> str | None:
    """The command that made a set of `dsdistill kip` or `ls`; None if its file does not say it.

    Args:
        method: As the set's file says.
        config: The options, as the set's file says: values of any kind, which are quoted.
    """
    defaults = vars(LabelSolveOptions())
    if method == "kip":
        optimizer = config.get("optimizer", KipOptions.optimizer)
        if not isinstance(optimizer, str) or optimizer not in OPTIMIZER_DEFAULTS:
            return None
        defaults = vars(with_defaults(KipOptions(optimizer=cast(Any, optimizer)))) | {
            "optimizer": KipOptions.optimizer
        }
    data, more = config.get("data"), config.get(run_folder.CHOSEN_KEY, {})
    if method not in METHODS or not isinstance(data, str) or not isinstance(more, Mapping):
        return None
    chosen = {**config, **more}
    given = {k: v for k, v in chosen.items() if k in defaults and k != "data"}
    # What starts with a hyphen would be an option, and not the data.
    start = ["dsdistill", method, f"./{data}" if data.startswith("-") else data]
    line = _line(start, given, defaults)
    return line if line.isprintable() else None


def evaluate_line(options: EvaluateOptions) -> str:
    """Of an evaluation."""
    given = {k: v for k, v in vars(options).items() if k not in _LOCATION_OPTIONS}
    return _line(
        ["dsdistill", "evaluate", str(options.run)], given, vars(EvaluateOptions(options.run))
    )


_LOCATION_OPTIONS = ("run", "out", "resume", "cache", "data_root")


def _line(words: list[str], given: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    for name, value in given.items():
        if value == defaults.get(name):
            continue
        option = "--" + name.replace("_", "-")
        values = value if isinstance(value, tuple | list) else (value,)
        if value is True:
            words.append(option)
        elif isinstance(value, str) and value.startswith("-"):
            words.append(f"{option}={value}")  # by itself it would be another option
        else:
            words += [option, *map(str, values)]
    return shlex.join(words)
