"""What the two command lines share: pages of help, wrong input as one line, a clean end."""

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

from dsdistill.harness import help_page, stopping
from dsdistill.harness.errors import UserError
from dsdistill.harness.help_page import read_options
from dsdistill.harness.text import printable

# Marks an option whose empty value says something, in its `Annotated`.
MAY_BE_EMPTY = "may be empty"
Commands = Mapping[str, tuple[type, Callable[[Any], None]]]
HELP_FLAGS = {"-h", "--help"}


def main(prog: str, description: str, commands: Commands, stopped: str) -> None:
    """Read the command line, and run the command it names or print the page it asks for.

    Args:
        prog: Name of the program, with which every message begins.
        description: What the program is for.
        commands: Name -> class of the command's options, and the function that runs them. That may
            raise `UserError` or `OSError` for what the user can mend.
        stopped: The message after Ctrl-C or SIGTERM, unless the command says itself what is kept
            (`stopping.StopInterrupt`).

    Raises:
        SystemExit: With code 2 and one line if the command line cannot be read; with code 1 and
            one line if the command fails.
    """
    classes = {name: cls for name, (cls, _) in commands.items()}
    page = _requested_page(prog, description, classes, sys.argv[1:])
    refusal = None if page else _refuse_empty_values(sys.argv[1:], classes)
    if refusal is not None:
        print(printable(f"{prog}: {refusal}"), file=sys.stderr)
        raise SystemExit(2)
    options = None if page else _parse(prog, description, classes)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As standard error does: the terminal may know Latin-1 only.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with stopping.handle_signals():
            if page:
                print(page)
            else:
                execute = next(run for cls, run in commands.values() if type(options) is cls)
                execute(options)
            sys.stdout.flush()
    except BrokenPipeError as error:  # the reader has closed the pipe, as `head` does
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


def _requested_page(
    prog: str, description: str, commands: Mapping[str, type], words: list[str]
) -> str | None:
    """The page of help or the version that the words of a command line ask for, if they do."""
    first, *others = words or [""]
    if first == "--version":
        from importlib.metadata import version  # nothing else needs it

        return f"{prog} {version('dsdistill')}"
    if first in HELP_FLAGS:
        return help_page.render_program(prog, description, commands).rstrip()
    if first in commands and not HELP_FLAGS.isdisjoint(others):
        return help_page.render_command(f"{prog} {first}", commands[first]).rstrip()
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


def _shorten_tyro_message(box: str, commands: Mapping[str, type]) -> str:
    """tyro's framed message as one line without Python's types, with the nearest known name."""
    # Where standard output is not UTF-8, tyro draws no frame: lines are indented.
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith(("│", "  "))]
    message = " ".join(itertools.takewhile(lambda line: not line.startswith(("─", "---")), lines))
    message = message.strip()
    message = message.replace("'None', ", "").replace(", 'None'", "")
    message = re.sub(r"^(Missing from .*?:) [A-Z]+ (?=[A-Z][a-z])", r"\1 ", message)
    # Python's own words for a value that a type cannot be made from.
    cause = (
        r"no type matching .*? from \[(.*?)\].*|could not convert .*?: (.*)|invalid lit.*?: (.*)"
    )
    if unread := re.fullmatch(rf"Error parsing (.+?): (?:{cause})", message):
        flag, *values = filter(None, unread.groups())
        message = f"{flag} takes {_expected(flag, commands)}, got {values[0]}"
    near = _suggested_option(lines) or _nearest_choice(message)
    if message.startswith("Unrecognized options"):
        near = near or _nearest_name(message, commands)
    return message.rstrip(".") + (f"; did you mean {near}?" if near else "")


def _expected(flag: str, commands: Mapping[str, type]) -> str:
    """The values that an option takes, in words or as its page shows them."""
    options = (o for name in commands if name in sys.argv for o in read_options(commands[name]))
    metavar = next((option.metavar for option in options if option.flag == flag), None)
    numbers = {"N": "a whole number", "X": "a number", "X ...": "numbers"}
    return numbers.get(metavar or "", metavar or "another value")


def _suggested_option(lines: list[str]) -> str | None:
    after = itertools.dropwhile(lambda line: "Perhaps you meant" not in line, lines)
    return next((line.split()[0] for line in after if line.startswith("--")), None)


def _nearest_choice(message: str) -> str | None:
    match = re.search(r"invalid choice '(.*?)'.*Expected one of \((.*)\)", message)
    return _nearest_name(match[1], re.findall(r"'(.*?)'", match[2])) if match else None


def _nearest_name(text: str, known: Iterable[str]) -> str | None:
    """The known name closest to the last word of a text; None if none is close."""
    return next(iter(difflib.get_close_matches(text.split()[-1], known, n=1)), None)
