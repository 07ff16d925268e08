"""Help pages for people: argparse sets them, from the option classes that tyro parses.

A page gathers the options under headings, says what holds where an option is left out, and ends
with examples. The text of an option is the string below its field, or the field's metadata `help`.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import re
import shutil
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from dsdistill.harness import shell

MAX_WIDTH = 100  # characters; longer lines are hard to read
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: "True|False"}


@dataclass(frozen=True)
class Shown:
    """Annotation of an option: how its page shows it.

    Attributes:
        metavar: Stands for the value; by default it follows from the type.
        default: What holds where the option is left out; by default the field's own default, and
            nothing where that is None or an absent flag.
    """

    metavar: str | None = None
    default: str | None = None


@dataclass(frozen=True)
class Layout:
    """How the page of a command is arranged.

    Attributes:
        groups: Heading -> names of the fields below it, separated by spaces, those that people need
            first on top. Arguments without a flag stand above all groups.
        examples: Whole command lines.
        notes: Heading -> a text between the heading and its options.
    """

    groups: Mapping[str, str]
    examples: tuple[str, ...]
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Option:
    """An option or argument of a command, as its page shows it.

    Attributes:
        name: Name of the field.
        flag: Such as `--image-size`; empty for an argument without a flag.
        metavar: Stands for the value; None for a flag that takes none.
        text: What it is or does.
        default: What holds where it is left out; empty where nothing is to be said.
        required: Whether it must be given.
    """

    name: str
    flag: str
    metavar: str | None
    text: str
    default: str
    required: bool

    @property
    def help(self) -> str:
        """The text with the default."""
        end = f" (default: {self.default})" if self.default else ""
        return self.text + (" (required)" if self.required and self.flag else end)


def render_command(prog: str, options: type) -> str:
    """The page of one command.

    Args:
        prog: The words that call it, such as `dsdistill kip`.
        options: Dataclass of its options, with its `Layout` as the attribute `LAYOUT`.
    """
    layout: Layout = vars(options)["LAYOUT"]
    known = {option.name: option for option in read_options(options)}
    arguments = [option for option in known.values() if not option.flag]
    usage = " ".join(
        (
            prog,
            *(f"{o.flag} {o.metavar}" for o in known.values() if o.required and o.flag),
            "[options]",
            *(o.metavar or "" for o in arguments),
        )
    )
    page = _parser(usage, inspect.getdoc(options) or "", _list_examples(layout.examples))
    _add_group(page, "Arguments", arguments)
    for heading, names in layout.groups.items():
        _add_group(page, heading, [known[name] for name in names.split()], layout.notes)
    return page.format_help()


def render_program(prog: str, description: str, commands: Mapping[str, type]) -> str:
    """The page of a program: its commands with one line each.

    Args:
        prog: Name of the program.
        description: What it is for.
        commands: Name -> dataclass of the command's options; its docstring's first line is shown.
    """
    end = f"{prog} COMMAND --help lists the options of a command."
    page = _parser(f"{prog} COMMAND [options]", description, end, column=14)
    group = page.add_argument_group("Commands")
    for name, options in commands.items():
        line = (inspect.getdoc(options) or "").splitlines()[0].rstrip(".")
        group.add_argument(name, metavar=name, help=line.replace("%", "%%"))
    group = page.add_argument_group("Options")
    group.add_argument("-h", "--help", action="store_true", help="Show this page")
    group.add_argument("--version", action="store_true", help="Show the version")
    completion = "Print a script that completes commands and options in bash, zsh or tcsh"
    group.add_argument("--tyro-print-completion", metavar="SHELL", help=completion)
    return page.format_help()


def read_options(options: type) -> Iterator[Option]:
    """The options of a dataclass, and of the dataclasses that it holds, in their order."""
    hints = get_type_hints(options, include_extras=True)
    for known in dataclasses.fields(options):
        hint, annotations = _split(hints[known.name])
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from read_options(hint)
            continue
        text = known.metadata.get("help") or _field_docstrings(options)[known.name]
        shown = next((a for a in annotations if isinstance(a, Shown)), Shown())
        positional = tyro.conf.Positional in annotations
        missing = dataclasses.MISSING
        required = known.default is missing and known.default_factory is missing
        value = known.default_factory() if callable(known.default_factory) else known.default
        is_flag = hint is bool and value is False
        metavar = None if is_flag else shown.metavar or _metavar(hint)
        yield Option(
            known.name,
            "" if positional else shell.flag(known.name),
            f"[{metavar}]" if positional and not required else metavar,
            text,
            format_default(None if required or is_flag else value)
            if shown.default is None
            else shown.default,
            required,
        )


def format_default(value: object) -> str:
    """A default as a user would type it; empty for None and for no values at all."""
    if isinstance(value, tuple):
        return " ".join(map(format_default, value))
    if isinstance(value, Path) and value.is_relative_to(Path.home()):
        return str(Path("~") / value.relative_to(Path.home()))
    if isinstance(value, float):
        return re.sub(r"e-0(\d)$", r"e-\1", f"{value:g}")
    return "" if value is None else str(value)


def _parser(
    usage: str, description: str, epilog: str, *, column: int = 26
) -> argparse.ArgumentParser:
    """A parser that only sets a page; help texts begin in the given column."""

    def formatter(prog: str) -> argparse.HelpFormatter:
        return _Formatter(prog, max_help_position=column, width=_width())

    paragraphs = description.split("\n\n")
    return argparse.ArgumentParser(
        usage=usage,
        description="\n\n".join(textwrap.fill(p, _width()) for p in paragraphs),
        epilog=epilog,
        formatter_class=formatter,
        add_help=False,
    )


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the metavar as it is, and the names of options in one piece."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return str(action.metavar)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def _width() -> int:
    return min(shutil.get_terminal_size().columns - 2, MAX_WIDTH)


def _add_group(
    page: argparse.ArgumentParser,
    heading: str,
    options: list[Option],
    notes: Mapping[str, str] | None = None,
) -> None:
    if not options:
        return
    note = (notes or {}).get(heading)
    group = page.add_argument_group(heading, note and textwrap.fill(note, _width() - 2))
    for option in options:
        text = option.help.replace("%", "%%")
        if not option.flag:
            group.add_argument(option.name, metavar=option.metavar, help=text)
        elif option.metavar is None:
            group.add_argument(option.flag, action="store_true", help=text)
        else:
            group.add_argument(option.flag, metavar=option.metavar, help=text)


def _list_examples(lines: tuple[str, ...]) -> str:
    return "\n  ".join((f"Example{'s' if len(lines) > 1 else ''}:", *lines))


def _split(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type hint without its annotations, and these; None is no part of an optional type."""
    annotations: tuple[Any, ...] = ()
    while get_origin(hint) is Annotated:
        hint, *more = get_args(hint)
        annotations += tuple(more)
    if get_origin(hint) in (Union, types.UnionType):
        others = [part for part in get_args(hint) if part is not type(None)]
        hint = Union[tuple(others)]  # noqa: UP007  the parts are known at run time only
    return hint, annotations


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"{_metavar(get_args(hint)[0])} ..."
    return METAVARS[hint]


@functools.cache
def _field_docstrings(cls: type) -> dict[str, str]:
    """Name of a field -> the string below it, also of fields that are inherited."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            texts |= _class_docstrings(base.__module__).get(base.__name__, {})
    return texts


@functools.cache
def _class_docstrings(module: str) -> dict[str, dict[str, str]]:
    """Name of a class of a module -> name of a field -> the string below it."""
    classes: dict[str, dict[str, str]] = {}
    for definition in ast.parse(inspect.getsource(sys.modules[module])).body:
        if not isinstance(definition, ast.ClassDef):
            continue
        texts = classes.setdefault(definition.name, {})
        for above, below in itertools.pairwise(definition.body):
            match above, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    texts[name] = " ".join(text.split())
    return classes
