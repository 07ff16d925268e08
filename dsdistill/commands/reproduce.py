"""Write the command lines that reproduce a result, without options at their defaults."""

from collections.abc import Mapping
from typing import Any, cast

from dsdistill.harness import shell
from dsdistill.harness.runs import run_folder
from dsdistill.options import (
    OPTIMIZER_DEFAULTS,
    EvaluateOptions,
    KipOptions,
    LabelSolveOptions,
    with_defaults,
)

METHODS = ("kip", "ls")


def distil_line(method: str, config: Mapping[str, Any], *, whitened: bool = False) -> str | None:
    """The command that made a set of `dsdistill kip` or `ls`; None if its file does not tell.

    Args:
        method: The method that the set's file names.
        config: The options that the set's file states; values of any type, which are quoted.
        whitened: Whether its images are whitened by ZCA, which the line then says: earlier
            versions did so by default with other kernels too.
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
    chosen = {**config, **more} | ({"preprocess": "zca"} if whitened else {})
    options = {k: v for k, v in chosen.items() if k in defaults and k != "data"}
    line = shell.line(f"dsdistill {method}", options, defaults, data)
    return line if line.isprintable() else None


def evaluate_line(options: EvaluateOptions) -> str:
    """The command that repeats an evaluation."""
    stated = {k: v for k, v in vars(options).items() if k not in _LOCATION_OPTIONS}
    defaults = vars(EvaluateOptions(options.run))
    return shell.line("dsdistill evaluate", stated, defaults, str(options.run))


_LOCATION_OPTIONS = ("run", "out", "resume", "cache", "data_root")
