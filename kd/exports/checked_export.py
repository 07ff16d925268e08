"""Write an export to a hidden folder, check it there, and only then move it to its place."""

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from dsdistill.harness.errors import UserError, first_line
from kd.options import ExportOptions

# Largest difference, as a share of the range of the outputs. Another order of float32 sums causes
# 1e-7 to 1e-5 of it, a forgotten normalisation or another way to resize 1e-2 and more.
RELATIVE_TOLERANCE = 1e-4

Writer = Callable[[Path, Mapping[str, Any]], None]  # may be called again with another card


class Agreement(Protocol):
    """What a comparison of an export with the student says at least; a dataclass."""

    @property
    def largest_difference(self) -> float: ...

    @property
    def tolerance(self) -> float: ...


def free_path(options: ExportOptions, name: str, suffix: str, sidecar: str | None = None) -> Path:
    """Path to write to, at which nothing exists yet.

    Args:
        options: Options of the command.
        name: Name of the student, of which the default path is made.
        suffix: Suffix of the default path.
        sidecar: Suffix that a second file adds to the name of the first; None without one.

    Raises:
        UserError: If something exists there.
    """
    name = re.sub(r"\W+", "-", name)[-60:] + suffix
    out = Path(os.path.abspath(options.out or options.run / "export" / name))
    suffixes = ("", sidecar) if sidecar else ("",)
    for path in (out.with_name(out.name + suffix) for suffix in suffixes):
        if os.path.lexists(path):
            raise UserError(f"{path} exists already: choose another --out")
    return out


def write(
    options: ExportOptions,
    out: Path,
    writer: Writer,
    card: Mapping[str, Any],
    compare: Callable[[Path], Agreement],
) -> dict[str, Any]:
    """Write an export with its card, if it agrees with the student.

    Args:
        options: Options of the command.
        out: File or folder to write.
        writer: Writes it at a path.
        card: Description of it, to which the comparison is added.
        compare: Compares what was written with the student.

    Returns:
        The path written, and the fields of the comparison.

    Raises:
        UserError: If it cannot be read, or disagrees.
    """
    with _staging_path(out) as path:
        writer(path, card)
        comparison: Any = _require_agreement(options, path, compare)
        writer(path, {**card, "check": asdict(comparison)})
        _require_agreement(options, path, compare)  # the file that is kept, with the final card
        _place(path, out)
    return {"written": str(out), **asdict(comparison)}


def _require_agreement(
    options: ExportOptions, path: Path, compare: Callable[[Path], Agreement]
) -> Agreement:
    try:
        comparison = compare(path)
    except UserError:
        raise  # already one line
    except Exception as error:  # another program's reader may raise anything
        raise UserError(
            f"as {options.format} the student of {options.run} cannot be run "
            f"({first_line(error)}): nothing was written; use another --format"
        ) from error
    # Not `>`, which is false for NaN.
    if not comparison.largest_difference <= comparison.tolerance:
        raise UserError(
            f"as {options.format} the student of {options.run} would answer differently, by up to "
            f"{comparison.largest_difference:.2g} where rounding explains at most "
            f"{comparison.tolerance:.2g}: nothing was written; use another --format"
        )
    return comparison


@contextmanager
def _staging_path(out: Path) -> Iterator[Path]:
    """Yield a path of the same name in a hidden folder on the same disk; delete it afterwards."""
    parent = next(folder for folder in out.parents if folder.is_dir())
    with tempfile.TemporaryDirectory(dir=parent, prefix=".export-") as folder:
        yield Path(folder) / out.name


def _place(path: Path, out: Path) -> None:
    """Move the files from the hidden folder to their place, the one that others describe last."""
    missing = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    placed: list[Path] = []
    try:
        for file in sorted(path.parent.iterdir(), key=lambda file: file == path):
            placed.append(out.with_name(file.name))
            os.rename(file, placed[-1])
    except OSError:
        for other in placed[:-1]:  # a card without the file that it describes
            other.unlink()
        for folder in missing:  # the deepest first
            folder.rmdir()
        raise
