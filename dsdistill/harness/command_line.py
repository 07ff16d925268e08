"""What the two command lines share: a wrong input is one line, and a stop is a clean end."""

import contextlib
import difflib
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_type_hints

import tyro

from dsdistill.harness import stopping
from dsdistill.harness.errors import UserError
from dsdistill.harness.text import printable

# Marks an option whose empty value says something, in its `Annotated`.
MAY_BE_EMPTY = "may be empty"
Commands = Mapping[str, tuple[type, Callable[[Any], None]]]


def main(prog: str, description: str, commands: Commands, stopped: str) -> None:
    """Read the command line and run the command it names.

    Args:
        prog: Opens every message.
        description: For the help page.
        commands: Name -> class of its options, and what runs them. That may raise `UserError` or
            `OSError` for what the user can mend.
        stopped: What to say after Ctrl-C or SIGTERM, which end a command the same way, unless it
            says itself what is kept (`stopping.StopInterrupt`).

    Raises:
        SystemExit: With code 0 after a help page; with code 2 and one line if the command line
            cannot be read; with code 1 and one line if the command fails.
    """
    classes = {name: cls for name, (cls, _) in commands.items()}
    if (refusal := _refuse_empty_values(sys.argv[1:], classes)) is not None:
        print(printable(f"{prog}: {refusal}"), file=sys.stderr)
        raise SystemExit(2)
    options = _parse(prog, description, classes)
    execute = next(execute for cls, execute in commands.values() if type(options) is cls)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error does: Latin-1 alone
    try:
        with stopping.handle_signals():
            execute(options)
            sys.stdout.flush()
    except BrokenPipeError as error:  # whoever reads has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from error
    except (UserError, OSError) as error:
        raise SystemExit(printable(f"{prog}: {error}")) from error
    except KeyboardInterrupt as error:
        raise SystemExit(printable(f"{prog}: {str(error) or stopped}")) from error


def _refuse_empty_values(words: Sequence[str], commands: Mapping[str, type]) -> str | None:
    """Why a line with an empty value is refused; None for one without.

    An unset variable of the shell gives one. As a path it would be the current folder, and as a
    name an option that is not given.
    """
    command = commands.get(words[0]) if words else None
    hints = get_type_hints(command, include_extras=True) if command else {}
    allowed = {
        f"--{name.replace('_', '-')}"
        for name, hint in hints.items()
        if MAY_BE_EMPTY in getattr(hint, "__metadata__", ())
    }
    before = "the command"
    for word in words:
        option, equals, value = word.partition("=")
        option = option.replace("_", "-")
        if option.startswith("--") and equals and not value.strip():
            before, empty = option, True
        else:
            empty = not word.strip()
        if empty and before not in allowed:
            return (
                f"an empty value after {before} (an unset variable of the shell?): give one, or "
                "leave it out" + (" with its option" if before.startswith("--") else "")
            )
        before = option if word.startswith("--") else repr(word)
    return None


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
    """tyro's framed message as one line, with the nearest known name."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    message = " ".join(itertools.takewhile(lambda line: not line.startswith("─"), lines))
    near = _suggested_option(lines) or _nearest_choice(message) or _nearest_name(message, commands)
    return message.rstrip(".") + (f"; did you mean {near}?" if near else "")


def _suggested_option(lines: list[str]) -> str | None:
    after = itertools.dropwhile(lambda line: "Perhaps you meant" not in line, lines)
    return next((line.split()[0] for line in after if line.startswith("--")), None)


def _nearest_choice(message: str) -> str | None:
    found = re.search(r"invalid choice '(.*?)'.*Expected one of \((.*)\)", message)
    return _nearest_name(found[1], re.findall(r"'(.*?)'", found[2])) if found else None


def _nearest_name(text: str, known: Iterable[str]) -> str | None:
    """The known name that is nearest to the last word."""
    return next(iter(difflib.get_close_matches(text.split()[-1], known, n=1)), None)
