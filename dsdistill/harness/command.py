"""What the two command lines share: a wrong input is one line, and a stop is a clean end."""

import contextlib
import difflib
import io
import itertools
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import tyro

from dsdistill.harness.errors import UserError


def parse(prog: str, description: str, commands: Mapping[str, type]) -> Any:
    """Read the command line into the options of the command it names.

    Raises:
        SystemExit: With code 0 after a help page; with code 2 and one line on standard error if
            the line cannot be read.
    """
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
            print(f"{prog}: {_one_line(box.getvalue(), commands)}", file=sys.stderr)
        raise


def run(prog: str, command: Callable[[], None], stopped: str) -> None:
    """Run a command.

    Args:
        prog: Opens every message.
        command: May raise `UserError` or `OSError` for what the user can mend.
        stopped: What to say after Ctrl-C or SIGTERM, which ends a command the same way.

    Raises:
        SystemExit: With code 1 and one line, instead of those.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        command()
    except (UserError, OSError) as error:
        raise SystemExit(f"{prog}: {error}") from error
    except KeyboardInterrupt as error:
        raise SystemExit(f"{prog}: {stopped}") from error


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _one_line(box: str, commands: Iterable[str]) -> str:
    """tyro's framed message as one line, with the nearest known name."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    message = " ".join(itertools.takewhile(lambda line: not line.startswith("─"), lines))
    near = _suggested_option(lines) or _nearest_choice(message) or _nearest(message, commands)
    return message.rstrip(".") + (f"; did you mean {near}?" if near else "")


def _suggested_option(lines: list[str]) -> str | None:
    after = itertools.dropwhile(lambda line: "Perhaps you meant" not in line, lines)
    return next((line.split()[0] for line in after if line.startswith("--")), None)


def _nearest_choice(message: str) -> str | None:
    found = re.search(r"invalid choice '(.*?)'.*Expected one of \((.*)\)", message)
    return _nearest(found[1], re.findall(r"'(.*?)'", found[2])) if found else None


def _nearest(text: str, known: Iterable[str]) -> str | None:
    """The known name that is nearest to the last word."""
    return next(iter(difflib.get_close_matches(text.split()[-1], known, n=1)), None)
