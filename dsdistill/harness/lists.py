"""Comma-separated names on a command line."""

from dsdistill.harness.errors import UserError


def parse_names(option: str, text: str, *, empty: bool = False) -> list[str]:
    """Split a list such as `conv,fc(3)` into names; a comma inside brackets does not split.

    Args:
        option: The option as the user wrote it, for messages.
        text: Value of the option.
        empty: Whether an empty list is allowed.

    Raises:
        UserError: If the list is empty and must not be, or a name occurs twice.
    """
    names = [name.strip() for name in _split_outside_brackets(text) if name.strip()]
    if not names and not empty:
        raise UserError(f"{option} must name at least one")
    if len(set(names)) < len(names):
        raise UserError(f"{option} names one twice: {text}")
    return names


def _split_outside_brackets(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
