"""Ranges of the values of options, refused in the same words by every command."""

from collections.abc import Mapping
from typing import Any

from dsdistill.harness import shell
from dsdistill.harness.errors import UserError


def require_at_least(options: Any, least: Mapping[str, int]) -> None:
    """Refuse values that are too small; None is none.

    Args:
        options: The options.
        least: Name of an option -> its smallest value.

    Raises:
        UserError: With the first option, the rule and the value.
    """
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise UserError(f"{shell.flag(name)} must be at least {smallest}, got {value}")


def require_positive(options: Any, *names: str) -> None:
    """Refuse values that are 0, negative, infinite or no number; None is none.

    Args:
        options: The options.
        *names: Names of some of them.

    Raises:
        UserError: With the first option, the rule and the value.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{shell.flag(name)} must be positive, got {value}")
