"""The exception for wrong user input, which a command prints as a single line."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from dsdistill.harness.text import printable


class UserError(ValueError):
    """Input that breaks a rule. The message states the rule, the value got and the remedy.

    It is one line, whatever characters the names in it contain.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


@contextlib.contextmanager
def name_arguments(
    phrases: Mapping[str, str] | None = None, texts: Sequence[str] = ()
) -> Iterator[None]:
    """Name arguments instead of options in the messages of user errors, for calls from Python.

    Args:
        phrases: Parts of messages that make no sense without a command line -> what stands instead.
        texts: Options whose value is a name: `--device cpu` becomes `device="cpu"`.

    Raises:
        UserError: With `images_per_class` where the message has `--images-per-class`.
    """
    try:
        yield
    except UserError as error:
        raise type(error)(as_arguments(str(error), phrases, texts)) from error


def as_arguments(
    message: str, phrases: Mapping[str, str] | None = None, texts: Sequence[str] = ()
) -> str:
    """Replace the options of a command in a message by arguments, as `name_arguments` does."""
    for phrase, other in (phrases or {}).items():
        message = message.replace(phrase, other)
    for option in texts:
        message = re.sub(rf"--{option} ([a-z]\w*)", rf'{option}="\1"', message)
    # Options of other programs have underscores.
    return re.sub(r"--([a-z][a-z-]*)\b(?!_)", lambda match: match[1].replace("-", "_"), message)


def one_line(error: BaseException, *, kind: bool = False) -> str:
    """Another library's error message on one line, or its class name if there is no message.

    Args:
        error: Error whose message may have any number of lines.
        kind: Whether to prefix the class name, where the message alone says too little.
    """
    return _describe(error, str(error), kind)


def first_line(error: BaseException, *, kind: bool = False) -> str:
    """The first line of an error message, for libraries that write many, as PyTorch does.

    Args:
        error, kind: As for `one_line`.
    """
    return _describe(error, next(iter(str(error).strip().splitlines()), ""), kind)


def _describe(error: BaseException, message: str, kind: bool) -> str:
    text, name = " ".join(message.split()), type(error).__name__
    return f"{name}: {text}" if kind and text else text or name


def unknown_name(what: str, got: str, known: Iterable[str]) -> UserError:
    """Error for an unknown name: lists the known names and suggests the closest.

    Args:
        what: Kind of name expected, such as "data set".
        got: The name as the user wrote it.
        known: All accepted names.
    """
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {what} {got!r}{hint} (known: {', '.join(names)})")
