"""The options of a run as its `config.json` stores them, and back, for every command."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from dsdistill.harness.runs import run_folder
from dsdistill.harness.runs.run_folder import REMEDY, RunError

Options = TypeVar("Options")
# Entries of `config.json` beside the options.
OTHER_KEYS = (run_folder.COMMAND_KEY, run_folder.CHOSEN_KEY, run_folder.INPUTS_KEY)


@dataclass(frozen=True)
class Storage:
    """How `config.json` stores the options of one command.

    Attributes:
        unstored: Options that say where a run is, not what it is.
        free: Stored options that may differ when the run is resumed, such as where the data are.
        absolute: Option whose text may contain a path -> function that makes the path absolute, so
            that it holds in every working directory. Values of type `Path` need none.
    """

    unstored: tuple[str, ...]
    free: tuple[str, ...]
    absolute: Mapping[str, Callable[[str], str]] = field(default_factory=dict)

    def to_json(self, options: Any) -> dict[str, Any]:
        """Convert options to JSON-compatible values by name.

        Args:
            options: Options of the command, a dataclass. The options inside an option that is a
                dataclass itself are stored beside the others.
        """
        stored: dict[str, Any] = {}
        for name, value in _values(options).items():
            if name in self.unstored:
                continue
            if is_dataclass(value):
                stored |= self.to_json(value)
            elif value is not None and name in self.absolute:
                stored[name] = self.absolute[name](str(value))
            elif isinstance(value, tuple):
                stored[name] = [_store_path(item) for item in value]
            else:
                stored[name] = _store_path(value)
        return stored

    def from_json(self, options: Options, run: Path, config: Mapping[str, Any]) -> Options:
        """Restore the options that a run was started with.

        Args:
            options: Options of this call, whose unstored and free values hold. So do its values of
                options that `config` lacks, as that of an earlier version does.
            run: Folder of the run, for messages.
            config: Content of the run's `config.json`.

        Raises:
            RunError: If an option is unknown, or its value is not of its type.
        """
        stored = {name: v for name, v in config.items() if name not in (*self.free, *OTHER_KEYS)}
        restored = self._take(stored, options, run)
        for name, value in stored.items():  # what no option has taken
            raise _damaged(run, name, value)
        return restored

    def _take(self, stored: dict[str, Any], options: Options, run: Path) -> Options:
        """Take the values of options out of `stored`."""
        types = get_type_hints(type(options))
        changed: dict[str, Any] = {}
        for name, value in _values(options).items():
            if is_dataclass(value):
                changed[name] = self._take(stored, value, run)
            elif name in stored and name not in self.unstored:
                try:
                    changed[name] = _from_json(stored[name], types[name])
                except TypeError as error:
                    raise _damaged(run, name, stored[name]) from error
                del stored[name]
        return replace(cast(Any, options), **changed)


def _store_path(value: Any) -> Any:
    """A path as absolute text, and any other value as it is."""
    return str(value.absolute()) if isinstance(value, Path) else value


def _from_json(value: Any, kind: Any) -> Any:
    """The value of an option of a type, from JSON.

    Raises:
        TypeError: If it is not of that type.
    """
    origin, members = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for member in members:
            try:
                return _from_json(value, member)
            except TypeError:
                continue
    elif origin is Literal and any(type(m) is type(value) and m == value for m in members):
        return value
    elif origin is tuple and type(value) is list:  # of any length, all of one type
        return tuple(_from_json(item, members[0]) for item in value)
    elif kind is Path and type(value) is str:
        return Path(value)
    elif type(value) is kind or (kind is float and type(value) is int):
        return value
    raise TypeError


def _values(options: Any) -> dict[str, Any]:
    return {known.name: getattr(options, known.name) for known in fields(options)}


def _damaged(run: Path, name: str, value: Any) -> RunError:
    return RunError(
        f"{run / 'config.json'} is damaged or of another version: "
        f"{name} cannot be {value!r}{REMEDY}"
    )
