"""Command lines to copy, as reports and messages show them."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def flag(name: str) -> str:
    """The option that sets a field: `--batch-size` for `batch_size`."""
    return "--" + name.replace("_", "-")


def line(
    command: str,
    options: Mapping[str, Any],
    defaults: Mapping[str, Any],
    argument: str | None = None,
) -> str:
    """Write a command with the options that differ from their defaults, quoted for a shell.

    Args:
        command: Program and command, such as `kd train`.
        options: Value of each option by the name of its field, of any type.
        defaults: Their default values. An option whose default is False takes no value.
        argument: The argument without a flag, if there is one: a name or a path.
    """
    words = command.split()
    if argument is not None:
        # A name that starts with a hyphen would be read as an option.
        words.append(f"./{argument}" if argument.startswith("-") else argument)
    for name, value in options.items():
        default = defaults.get(name)
        if value == default:
            continue
        if value is True and default is False:
            words.append(flag(name))
        elif isinstance(value, str | Path) and str(value).startswith("-"):
            words.append(f"{flag(name)}={value}")  # as a separate word it would be read as a flag
        else:
            values = value if isinstance(value, tuple | list) else (value,)
            words += [flag(name), *map(str, values)]
    return shlex.join(words)


def resume_line(command: str, out: Path, argument: str | None = None, **typed: str | None) -> str:
    """Write the command that continues an unfinished run.

    Args:
        command, argument: As for `line`.
        out: Folder of the run.
        **typed: Options that the user must type again, which the folder may not decide: the code
            that is imported; None leaves one out.
    """
    options = {"resume": True, "out": out} | typed
    return line(command, options, {"resume": False}, argument)
