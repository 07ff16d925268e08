"""The command `dsdistill`: kip, ls, evaluate, report, inspect, export, cache.

Only options are imported here; the frameworks are imported inside the commands, so that
`dsdistill --help` answers at once. What is wrong with the input is said in one line.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsdistill import options
from dsdistill.harness import command
from dsdistill.harness.text import printable


def kip(chosen: options.Kip) -> None:
    from dsdistill import pipeline

    _distil(pipeline.run_kip, chosen)


def label_solve(chosen: options.LabelSolve) -> None:
    from dsdistill import pipeline

    _distil(pipeline.run_label_solve, chosen)


def evaluate(chosen: options.Evaluate) -> None:
    from dsdistill import scorecard
    from dsdistill.kernels import devices

    devices.use_all()
    scorecard.run(chosen)


def report(chosen: options.Report) -> None:
    from dsdistill import scorecard

    print(printable(str(scorecard.compare(chosen))))


def inspect(chosen: options.Inspect) -> None:
    from dsdistill import summary

    summary.print_set(chosen.file, as_json=chosen.json)


def export(chosen: options.Export) -> None:
    from dsdistill import export as exporting

    print(printable(str(exporting.write(chosen.file, chosen.format, chosen.out))))


def cache(chosen: options.Cache) -> None:
    from dsdistill import cache as kept

    kept.run(clear=chosen.clear, older_than=chosen.older_than)


def _distil(run: Callable[[Any], Path], chosen: options.Source) -> None:
    from dsdistill import hosts, summary
    from dsdistill.kernels import devices

    devices.use_all()
    with hosts.joined(chosen.hosts):
        folder = run(chosen)
        if hosts.first():
            summary.print_run(folder)


COMMANDS: command.Commands = {
    "kip": (options.Kip, kip),
    "ls": (options.LabelSolve, label_solve),
    "evaluate": (options.Evaluate, evaluate),
    "report": (options.Report, report),
    "inspect": (options.Inspect, inspect),
    "export": (options.Export, export),
    "cache": (options.Cache, cache),
}


def main() -> None:
    """Run one command of the line that the user typed."""
    description = "Condense an image data set into a few synthetic images."
    command.main("dsdistill", description, COMMANDS, "stopped")


if __name__ == "__main__":
    main()
