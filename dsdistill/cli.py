"""The command `dsdistill`: kip, ls, select, evaluate, report, inspect, export, cache.

Only options are imported here; the frameworks are imported inside the commands, so that
`dsdistill --help` answers at once. An error in the input is one line.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsdistill import options
from dsdistill.harness import command_line
from dsdistill.harness.text import printable


def kip(chosen: options.KipOptions) -> None:
    from dsdistill.commands import distil, through_backbone

    through_backbone.require_one_host(chosen)
    _distil(distil.run_kip, chosen)


def label_solve(chosen: options.LabelSolveOptions) -> None:
    from dsdistill.commands import distil

    _distil(distil.run_label_solve, chosen)


def select(chosen: options.SelectOptions) -> None:
    from dsdistill.commands import inspect as inspect_command
    from dsdistill.commands import select as selecting
    from dsdistill.parallel import devices

    devices.use_all()
    inspect_command.print_run(selecting.run(chosen), "of random images")


def evaluate(chosen: options.EvaluateOptions) -> None:
    from dsdistill.commands import evaluate as evaluate_command
    from dsdistill.parallel import devices

    if chosen.cache == Path("none"):
        chosen = replace(chosen, cache=None)
    devices.use_all()
    evaluate_command.run(chosen)


def report(chosen: options.ReportOptions) -> None:
    from dsdistill.commands import evaluate as evaluate_command

    print(printable(str(evaluate_command.compare(chosen))))


def inspect(chosen: options.InspectOptions) -> None:
    from dsdistill.commands import inspect as inspect_command

    inspect_command.print_set(chosen.file, as_json=chosen.json)


def export(chosen: options.ExportOptions) -> None:
    from dsdistill.commands import export as exporting

    print(printable(str(exporting.write(chosen.file, chosen.format, chosen.out))))


def cache(chosen: options.CacheOptions) -> None:
    from dsdistill.commands import cache as kept

    kept.run(clear=chosen.clear, older_than=chosen.older_than)


def _distil(run: Callable[[Any], Path], chosen: options.RunOptions) -> None:
    from dsdistill.commands import inspect as inspect_command
    from dsdistill.parallel import devices, hosts

    devices.use_all()
    with hosts.join(chosen.hosts):
        folder = run(chosen)
        if hosts.is_first():
            inspect_command.print_run(folder)


COMMANDS: command_line.Commands = {
    "kip": (options.KipOptions, kip),
    "ls": (options.LabelSolveOptions, label_solve),
    "select": (options.SelectOptions, select),
    "evaluate": (options.EvaluateOptions, evaluate),
    "report": (options.ReportOptions, report),
    "inspect": (options.InspectOptions, inspect),
    "export": (options.ExportOptions, export),
    "cache": (options.CacheOptions, cache),
}


def main() -> None:
    """Run one command of the line that the user typed."""
    description = "Condense an image data set into a few synthetic images."
    command_line.main("dsdistill", description, COMMANDS, "stopped")


if __name__ == "__main__":
    main()
