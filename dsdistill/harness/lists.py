"""Comma-separated names on a command line."""

from dsdistill.harness.errors import UserError


def parse_names(option: str, text: str, *, empty: bool = False) -> list[str]:
    """The names of a list such as `conv,fc(3)`. A comma within brackets does not split.

    Args:
        option: As the user wrote it, for the message.
        text: What stands after it.
        empty: Whether no name at all will do.

    Raises:
        UserError: If there is none, or one comes twice.
    """
    found = [name.strip() for name in _split_outside_brackets(text) if name.strip()]
    if not found and not empty:
        raise UserError(f"{option} must name at least one")
    if len(set(found)) < len(found):
        raise UserError(f"{option} names one twice: {text}")
    return found


def _split_outside_brackets(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
