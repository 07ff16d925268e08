"""Class names: derived from folder names, sorted into label order, and matched between sets.

Programs that read class folders number the classes in three orders: torchvision and Hugging Face
sort the names as text, timm sorts them naturally and ignores case, and arrays count. Here names
that are all numbers are sorted by value, any others as text. Where names are known on both sides
they are matched by name, so that the order does not matter.
"""

import re
import unicodedata
from collections.abc import Sequence

from dsdistill.harness.text import printable

# Unicode categories that would break a line, or that cannot be encoded in a file.
CONTROL_CATEGORIES = {"Cc", "Cs"}


def from_folder(name: str) -> str:
    """The class name of a folder: one line of UTF-8, in Unicode's composed normal form (NFC).

    A byte that is not UTF-8 becomes `\\xe9` or the like, a line feed `\\n`. macOS and archives made
    there store `é` as two characters, other systems as one.
    """
    escaped = (printable(c) if unicodedata.category(c) in CONTROL_CATEGORIES else c for c in name)
    return unicodedata.normalize("NFC", "".join(escaped))


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts `b10` after `B2`, as timm's `natural_key` does.

    Unlike timm's it can compare any two names: numbers sort before letters.
    """
    parts = re.split(r"([0-9]+)", name.lower())
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part)


def sort(names: Sequence[str]) -> tuple[str, ...]:
    """Sort names into label order: numbers by value, others as text."""
    return tuple(sorted(names, key=int) if are_numbers(names) else sorted(names))


def are_numbers(names: Sequence[str]) -> bool:
    """Whether all names are whole numbers of distinct value."""
    if not all(name.isascii() and name.isdecimal() for name in names):
        return False
    return len({int(name) for name in names}) == len(names)


def match(names: Sequence[str], others: Sequence[str]) -> tuple[int, ...] | None:
    """Position of each of `names` in `others`, if both are the same set of classes.

    They are if the names are equal in normal form, or if all are numbers of equal values (`00007`
    and `7`).

    Returns:
        For each of `names` its position in `others`; None if the classes differ.
    """
    for key in (lambda names: [unicodedata.normalize("NFC", n) for n in names], _parse_numbers):
        keys, other_keys = key(names), key(others)
        if keys is None or other_keys is None:
            continue
        position = {name: index for index, name in enumerate(other_keys)}
        if len(position) == len(others) == len(set(keys)) and set(keys) == position.keys():
            return tuple(position[name] for name in keys)
    return None


def order_note(names: Sequence[str]) -> str | None:
    """One sentence on the order of the classes, if other programs order them differently."""
    order, as_text, natural = list(names), sorted(names), sorted(names, key=natural_key)
    if as_text == natural == order:
        return None
    if order == as_text:
        return (
            f"classes are in the order of their text ({_preview(as_text)}), as in torchvision and "
            f"Hugging Face; timm has {_preview(natural)}"
        )
    if are_numbers(names) and order == sorted(names, key=int):
        return (
            "classes are in the order of their numbers, as in timm; torchvision and Hugging "
            f"Face order them as text ({_preview(as_text)})"
        )
    return f"classes are in the order of the classes they are matched with ({_preview(order)})"


def _preview(names: Sequence[str]) -> str:
    """First few names, cut off after 60 characters."""
    text = ", ".join(names[:5])
    return (text if len(text) <= 60 else text[:60] + "...") + (", ..." if len(names) > 5 else "")


def _parse_numbers(names: Sequence[str]) -> list[int] | None:
    return [int(name) for name in names] if are_numbers(names) else None
