"""The one exception that a command shows as a single line: the user's input was wrong."""

import difflib
from collections.abc import Iterable

from dsdistill.harness.text import printable


class UserError(ValueError):
    """Input that breaks a rule. The message states the rule, the value got and the remedy.

    It is one line whatever the names in it hold.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def one_line(error: BaseException, *, kind: bool = False) -> str:
    """The message of another library's error on one line; its class where it has no message.

    Args:
        error: Its message may have any number of lines.
        kind: Begin with the class, where the message alone says too little.
    """
    text, name = " ".join(str(error).split()), type(error).__name__
    return f"{name}: {text}" if kind and text else text or name


def first_line(error: BaseException) -> str:
    """The first line alone, where a library explains itself over many, as PyTorch does."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def unknown_name(what: str, got: str, known: Iterable[str]) -> UserError:
    """An error for a name that is not in a table: lists the known names, the nearest first in mind.

    Args:
        what: What the name should have been, such as "data set".
        got: The name as the user wrote it.
        known: Every name that would have been accepted.
    """
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {what} {got!r}{hint} (known: {', '.join(names)})")
