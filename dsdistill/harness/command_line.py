"""Shared by both command lines: an input error prints one line, an interrupt exits cleanly."""

import contextlib
import difflib
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import tyro

from dsdistill.harness import stopping
from dsdistill.harness.errors import UserError
from dsdistill.harness.text import printable

Commands = Mapping[str, tuple[type, Callable[[Any], None]]]


def main(prog: str, description: str, commands: Commands, stopped: str) -> None:
    """Parse the command line and run the command it names.

    Args:
        prog: Program name; starts every message.
        description: Text for the help page.
        commands: For each command name, its options class and the function that runs it. The
            function raises `UserError` or `OSError` for what the user can correct.
        stopped: Message after Ctrl-C or SIGTERM, unless the command says itself what is kept
            (`stopping.StopInterrupt`).

    Raises:
        SystemExit: With code 0 after a help page; with code 2 and one line if the command line
            cannot be read; with code 1 and one line if the command fails.
    """
    options = _parse(prog, description, {name: cls for name, (cls, _) in commands.items()})
    execute = next(execute for cls, execute in commands.values() if type(options) is cls)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As standard error does: the terminal may know Latin-1 only.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with stopping.handle_signals():
            execute(options)
            sys.stdout.flush()
    except BrokenPipeError as error:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from error
    except (UserError, OSError) as error:
        raise SystemExit(printable(f"{prog}: {error}")) from error
    except KeyboardInterrupt as error:
        raise SystemExit(printable(f"{prog}: {str(error) or stopped}")) from error


def _parse(prog: str, description: str, commands: Mapping[str, type]) -> Any:
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.extras.subcommand_cli_from_dict(
                dict(commands),
                prog=prog,
                description=description,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code:
            print(
                printable(f"{prog}: {_shorten_tyro_message(box.getvalue(), commands)}"),
                file=sys.stderr,
            )
        raise


def _shorten_tyro_message(box: str, commands: Iterable[str]) -> str:
    """Turn tyro's framed message into one line that suggests the nearest known name."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    message = " ".join(itertools.takewhile(lambda line: not line.startswith("─"), lines))
    near = _suggested_option(lines) or _nearest_choice(message) or _nearest_name(message, commands)
    return message.rstrip(".") + (f"; did you mean {near}?" if near else "")


def _suggested_option(lines: list[str]) -> str | None:
    after = itertools.dropwhile(lambda line: "Perhaps you meant" not in line, lines)
    return next((line.split()[0] for line in after if line.startswith("--")), None)


def _nearest_choice(message: str) -> str | None:
    match = re.search(r"invalid choice '(.*?)'.*Expected one of \((.*)\)", message)
    return _nearest_name(match[1], re.findall(r"'(.*?)'", match[2])) if match else None


def _nearest_name(text: str, known: Iterable[str]) -> str | None:
    """The known name closest to the last word of a text; None if none is close."""
    return next(iter(difflib.get_close_matches(text.split()[-1], known, n=1)), None)
