"""Dataclasses from JSON, with every type checked: files may have been edited by others."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
MAX_INTEGER = 2**62  # integer that is believed: twice as many no array can hold


def build(cls: type[T], stored: Any) -> T:
    """An instance of a dataclass from its JSON, dataclasses within tuples included.

    Args:
        cls: With fields of plain types, sequences, mappings and tuples of dataclasses.
        stored: As `json.loads` gives it.

    Raises:
        ValueError: If a field is missing, unknown, or of another type.
    """
    if not isinstance(stored, dict):
        raise ValueError(f"expected an object, got {_short(stored)}")
    known = {f.name: f for f in fields(cls)}  # pyright: ignore[reportArgumentType]
    if unknown := stored.keys() - known.keys():
        raise ValueError(f"unknown {', '.join(sorted(unknown))}")
    needed = {n for n, f in known.items() if f.default is f.default_factory is MISSING}
    if missing := needed - stored.keys():
        raise ValueError(f"{', '.join(sorted(missing))} missing")
    hints = get_type_hints(cls)
    return cls(**{name: _build_value(name, value, hints[name]) for name, value in stored.items()})


def check(what: str, stored: Any, types: Mapping[str, Any]) -> None:
    """Refuse what is no object, or has an entry of another type.

    Entries may be missing, and there may be others.

    Raises:
        ValueError: With the entry and its value.
    """
    if not isinstance(stored, dict):
        raise ValueError(f"{what} is {_short(stored)}, no object")
    for name, hint in types.items():
        if name in stored and not fits(stored[name], hint):
            raise ValueError(f"{what}.{name} is {_short(stored[name])}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON has a type; integers are floats too, truth values are no integers."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Sequence:
        return isinstance(value, list) and all(fits(item, args[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, dict) and all(fits(item, args[1]) for item in value.values())
    if hint in (int, float) and isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= MAX_INTEGER
    return isinstance(value, NoneType if hint is None else hint)


def _build_value(name: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name} is {_short(value)}")
        return tuple(build(get_args(hint)[0], one) for one in value)
    if not fits(value, hint):
        raise ValueError(f"{name} is {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
