"""Dataclasses from JSON, with every type checked: a file may have been edited."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
MAX_INTEGER = 2**62  # largest plausible integer: no array holds 2**63 values


def build(cls: type[T], stored: Any) -> T:
    """Build an instance of a dataclass from JSON, including dataclasses within tuples.

    Args:
        cls: A dataclass with fields of plain types, sequences, mappings and tuples of dataclasses.
        stored: A value as `json.loads` returns it.

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
    """Refuse a value that is not an object, or that has an entry of another type.

    Entries may be missing, and there may be others.

    Args:
        what: Name of the value in messages.
        stored: A value as `json.loads` returns it.
        types: Type hints by the name of the entry.

    Raises:
        ValueError: With the entry and its value.
    """
    if not isinstance(stored, dict):
        raise ValueError(f"{what} must be an object, got {_short(stored)}")
    for name, hint in types.items():
        if name in stored and not fits(stored[name], hint):
            raise ValueError(f"{what}.{name} is {_short(stored[name])}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value has a type; integers count as floats, truth values not as integers."""
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
        return tuple(build(get_args(hint)[0], item) for item in value)
    if not fits(value, hint):
        raise ValueError(f"{name} is {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
