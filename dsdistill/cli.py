"""The command `dsdistill`: kip, ls, evaluate, inspect, export.

Only options are imported here; the frameworks are imported inside the commands, so that
`dsdistill --help` answers at once. What is wrong with the input is said in one line.
"""

import signal
import sys
from typing import Any

import tyro

from dsdistill import options
from dsdistill.harness.errors import UserError


def kip(chosen: options.Kip) -> None:
    from dsdistill import pipeline, summary

    summary.print_run(pipeline.run_kip(chosen))


def label_solve(chosen: options.LabelSolve) -> None:
    from dsdistill import pipeline, summary

    summary.print_run(pipeline.run_label_solve(chosen))


def evaluate(chosen: options.Evaluate) -> None:
    from dsdistill import scorecard

    scorecard.run(chosen)


def inspect(chosen: options.Inspect) -> None:
    from dsdistill import summary

    summary.print_set(chosen.file, as_json=chosen.json)


def export(chosen: options.Export) -> None:
    from dsdistill import export as exporting

    print(exporting.write(chosen.file, chosen.format, chosen.out))


COMMANDS: dict[str, tuple[type, Any]] = {
    "kip": (options.Kip, kip),
    "ls": (options.LabelSolve, label_solve),
    "evaluate": (options.Evaluate, evaluate),
    "inspect": (options.Inspect, inspect),
    "export": (options.Export, export),
}


def main() -> None:
    """Run one command. Exit code 2: the command line cannot be read; 1: anything else wrong."""
    chosen: Any = tyro.extras.subcommand_cli_from_dict(
        {name: cls for name, (cls, _) in COMMANDS.items()},
        prog="dsdistill",
        description="Condense an image data set into a few synthetic images.",
    )
    # A polite kill ends like Ctrl-C: with a checkpoint.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    run = next(run for cls, run in COMMANDS.values() if type(chosen) is cls)
    try:
        run(chosen)
    except (UserError, OSError) as error:
        raise SystemExit(f"dsdistill: {error}") from error
    except KeyboardInterrupt as error:
        raise SystemExit("dsdistill: stopped; a run continues with --resume") from error


if __name__ == "__main__":
    sys.exit(main())
