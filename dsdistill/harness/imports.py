"""Import an object that a user names as `module:attribute`, from the current folder too.

A name that a user types may be imported, and thereby run. One that stands in a file may not: a
caller imports it only if the user has typed the same name beside the file.
"""

import difflib
import hashlib
import importlib
import os
import re
import sys
import sysconfig
import traceback
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from dsdistill.harness.errors import UserError, first_line

_IDENTIFIER = r"[^\W\d]\w*"
_REFERENCE = re.compile(rf"{_IDENTIFIER}(\.{_IDENTIFIER})*:{_IDENTIFIER}")
# Folders of code that is not the user's: of this project, of Python and of installed packages.
_FOREIGN_FOLDERS = tuple(
    f"{Path(folder).resolve()}{os.sep}"
    for folder in (
        Path(__file__).parents[1],
        Path(__file__).parents[2] / "kd",
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    )
)


@dataclass(frozen=True, eq=False)
class ImportedObject:
    """An attribute of an imported module.

    Attributes:
        value: The attribute.
        module: The module.
    """

    value: Any
    module: ModuleType

    @property
    def sha256(self) -> str | None:
        """SHA-256 of the module's file; None for a module without one, as in a notebook.

        Other files that the module imports are not covered.
        """
        file = getattr(self.module, "__file__", None)
        if file is None or not Path(file).is_file():
            return None
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def is_reference(text: str) -> bool:
    """Whether a text has the form `module:attribute`, with dots in the module only."""
    return _REFERENCE.fullmatch(text) is not None


def load(what: str, name: str) -> ImportedObject:
    """Import a module, and look up an attribute of it.

    The current folder comes before the installed packages if the module is in it, and stays on
    Python's path, since the module's functions may import their neighbours later.

    Args:
        what: Kind of object, for messages: `kernel`, `network`.
        name: The object as `module:attribute`, typed by the user.

    Raises:
        UserError: If the module cannot be imported, or has no such attribute.
    """
    module_name, _, attribute = name.partition(":")
    _find_in_current_folder(module_name)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module may raise anything, or end the program
        raise UserError(f"{what} {name!r} cannot be imported: {describe(error)}") from error
    try:
        return ImportedObject(getattr(module, attribute), module)
    except AttributeError as error:
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        raise UserError(
            f"{what} {name!r} cannot be imported: {_location(module)} has no {attribute!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        ) from error


def describe(error: BaseException) -> str:
    """Describe an error of the user's code in one line, with the file and line of that code."""
    first = first_line(error)
    name = type(error).__name__
    return (name if first in ("", name) else f"{name}: {first}") + place(error)


def place(error: BaseException) -> str:
    """The last file and line of the user's code that an error went through, in brackets.

    Empty for an error that arose elsewhere, and for a syntax error, whose text has both.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = os.path.realpath(frame.filename)
        if os.path.isfile(path) and not path.startswith(_FOREIGN_FOLDERS):
            return f" ({_shorten(path)}, line {frame.lineno})"
    return ""


def _find_in_current_folder(module: str) -> None:
    folder, first = os.getcwd(), module.partition(".")[0]
    importlib.invalidate_caches()
    if folder not in sys.path and PathFinder.find_spec(first, [folder]) is not None:
        sys.path.insert(0, folder)


def _location(module: ModuleType) -> str:
    file = getattr(module, "__file__", None)
    return f"the module {module.__name__}" + (f" ({_shorten(file)})" if file else "")


def _shorten(path: str) -> str:
    """The path relative to the current folder if it lies inside."""
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) else relative
