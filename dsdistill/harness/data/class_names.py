"""Class names: how a folder's name becomes one, in which order they stand, and which are the same.

Programs that read class folders number the classes in three orders: torchvision and Hugging Face
sort the names as text, timm sorts them naturally and without regard to case, and arrays count. Here
names that are all numbers stand by value and all others as text. Wherever names are known on both
sides they are matched by name, so that the order is of no account.
"""

import re
import unicodedata
from collections.abc import Sequence

from dsdistill.harness.text import printable

CONTROL_CATEGORIES = {
    "Cc",
    "Cs",
}  # Unicode categories that would break a line, or that no file can hold


def from_folder(name: str) -> str:
    """The class name of a folder: one line of UTF-8, in Unicode's composed normal form (NFC).

    A byte that is no UTF-8 becomes `\\xe9` or the like, a line feed `\\n`. macOS and archives made
    there store `é` as two characters, others as one.
    """
    escaped = (printable(c) if unicodedata.category(c) in CONTROL_CATEGORIES else c for c in name)
    return unicodedata.normalize("NFC", "".join(escaped))


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """A key that sorts `b10` after `B2`, as timm's `natural_key` does.

    Unlike timm's it can compare any two names: a number stands before letters.
    """
    parts = re.split(r"([0-9]+)", name.lower())
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part)


def sort(names: Sequence[str]) -> tuple[str, ...]:
    """The names in the order of their labels: numbers by value, others as text."""
    return tuple(sorted(names, key=int) if are_numbers(names) else sorted(names))


def are_numbers(names: Sequence[str]) -> bool:
    """Whether all names are whole numbers, and no two the same number."""
    if not all(name.isascii() and name.isdecimal() for name in names):
        return False
    return len({int(name) for name in names}) == len(names)


def match(names: Sequence[str], others: Sequence[str]) -> tuple[int, ...] | None:
    """Where each of `names` stands among `others`, if both are the same classes.

    They are where they are equal in normal form, or where all are numbers of equal values
    (`00007` and `7`).

    Returns:
        For each of `names` a position in `others`, or None if they are other classes.
    """
    for key in (lambda names: [unicodedata.normalize("NFC", n) for n in names], _parse_numbers):
        mine, theirs = key(names), key(others)
        if mine is None or theirs is None:
            continue
        place = {name: index for index, name in enumerate(theirs)}
        if len(place) == len(others) == len(set(mine)) and set(mine) == place.keys():
            return tuple(place[name] for name in mine)
    return None


def order_note(names: Sequence[str]) -> str | None:
    """One sentence on the order of these names, where other programs have another one."""
    order, as_text, natural = list(names), sorted(names), sorted(names, key=natural_key)
    if as_text == natural == order:
        return None
    if order == as_text:
        return (
            f"classes stand in the order of their text ({_preview(as_text)}), as in torchvision and "
            f"Hugging Face; timm has {_preview(natural)}"
        )
    if are_numbers(names) and order == sorted(names, key=int):
        return (
            "classes stand in the order of their numbers, as in timm; torchvision and Hugging "
            f"Face order them as text ({_preview(as_text)})"
        )
    return f"classes stand in the order of what they are matched with ({_preview(order)})"


def _preview(names: Sequence[str]) -> str:
    """The first few names, up to 60 characters of them."""
    text = ", ".join(names[:5])
    return (text if len(text) <= 60 else text[:60] + "...") + (", ..." if len(names) > 5 else "")


def _parse_numbers(names: Sequence[str]) -> list[int] | None:
    return [int(name) for name in names] if are_numbers(names) else None
