r"""Safe display of names that come from users and files.

A class, a file or a data set may have any name: with an escape sequence that recolours a terminal,
a line feed, marks that reverse the reading direction, bytes that are not UTF-8. Files keep a name
unchanged; whatever displays one passes it through here.
"""

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

MAX_NAME_CHARACTERS = 32  # characters of a name in a plot
# Control characters, marks without width, surrogates, line and paragraph separators.
_INVISIBLE_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
_ESCAPED_BYTES = "".join(map(chr, range(0xDC80, 0xDD00)))  # as `os.fsdecode` keeps them
_JOINERS = "\u200c\u200d"  # within words of Persian and of Indic scripts, and within emoji


def printable(text: str) -> str:
    r"""Escape characters that a screen would obey or hide, as `\n`, `\x1b`, ...; one line results.

    Args:
        text: Any string. A byte of a file name that is not UTF-8, which Python keeps as a lone
            surrogate, is written as `\xe9`.

    Returns:
        A string that can be encoded as UTF-8. A second call changes nothing.
    """
    if text.isascii() and text.isprintable():
        return text
    before, after = f" {text}", f"{text} "[1:]
    around = zip(before, text, after, strict=False)
    return "".join(_escape_character(a, character, b) for a, character, b in around)


def quote(name: str) -> str:
    r"""The printable name between quotation marks, for a message.

    Not `repr`, which doubles every backslash: a class of the folder `caf\xe9` would be shown as
    `'caf\\xe9'`, a name that is nowhere.
    """
    shown = printable(name)
    mark = '"' if "'" in shown and '"' not in shown else "'"
    return f"{mark}{shown}{mark}"


def shorten(text: str, most: int = MAX_NAME_CHARACTERS) -> str:
    """The printable text, with its middle cut out if it is longer than `most` characters.

    Names in a data set often begin alike, so the end is kept too.
    """
    shown = printable(text)
    if len(shown) <= most:
        return shown
    tail = (most - 1) // 2
    return f"{shown[: most - 1 - tail]}…{shown[-tail:]}"


def abbreviate_names(names: Sequence[str]) -> str:
    """The first few names for a message, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def console(*, stderr: bool = False, soft_wrap: bool = False) -> "Console":
    """A console without markup: `[/x]` and `:smile:` are printed as they are.

    Args:
        stderr: Whether to write to standard error.
        soft_wrap: Whether to leave the wrapping of long lines to the terminal.
    """
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, soft_wrap=soft_wrap)


def _escape_character(before: str, character: str, after: str) -> str:
    if unicodedata.category(character) not in _INVISIBLE_CATEGORIES:
        return character
    if character in _JOINERS and not before.isascii() and not after.isascii():
        return character
    if character in _ESCAPED_BYTES:
        return f"\\x{ord(character) - ord(_ESCAPED_BYTES[0]) + 0x80:02x}"
    return character.encode("unicode_escape").decode()
