"""Arguments behind a network's name: Python's literals by keyword, as in `(drop_path_rate=0.1)`."""

import ast
from collections.abc import Mapping
from typing import Any


def parse(text: str) -> dict[str, Any] | None:
    """Parse arguments in brackets; None if they are not all literals by keyword."""
    try:
        call: Any = ast.parse(f"f{text}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            return None
        arguments = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    # Fewer names than keywords: a `**mapping` has none, and a name may occur twice.
    return arguments if len(arguments) == len(call.keywords) else None


def join(arguments: Mapping[str, Any]) -> str:
    """Write arguments in brackets, as `parse` reads them."""
    return f"({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
