"""The data that a distilled set came from, split as both packages split it.

`dsdistill evaluate` and `kd train` on one set must hold out the same images: what one of them
learns from, the other would otherwise judge by.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsdistill.harness import datasets
from dsdistill.harness.artifact import Distilled
from dsdistill.harness.datasets import Splits
from dsdistill.harness.errors import UserError

VALIDATION_FRACTION = 0.1  # of a set that held no validation images out itself


def source(distilled: Distilled) -> str | None:
    """The name or path of the data that a set came from; None where it does not say."""
    found = _entry(distilled, "data", "source")
    return found if isinstance(found, str) and found else None


def validation_fraction(distilled: Distilled) -> float:
    """Share of the training images that is held out for a set.

    That of the set itself; for one that was made of all images, as Label Solve's are, and for one
    that does not say, `VALIDATION_FRACTION`: learning rates and epochs are chosen on something.
    """
    stored = _entry(distilled, "config", "validation_fraction")
    known = isinstance(stored, float) and 0 < stored < 1
    return stored if known else VALIDATION_FRACTION


def load(distilled: Distilled, data: str, *, root: Path) -> Splits:
    """Load the data that a set came from, at the set's image size, with its images held out.

    Args:
        distilled: What its provenance holds of another type than it should counts as missing.
        data: `source`, or what the user says it is.
        root: As in `datasets.load`.

    Raises:
        UserError: If the data cannot be had, or the set's image size is not that of its images.
    """
    size = _entry(distilled, "config", "image_size")
    size = size if isinstance(size, int) and not isinstance(size, bool) else None
    channels = _entry(distilled, "config", "channels")
    h, w, _ = distilled.images.shape[1:]
    if size is not None and (h, w) != (size, size):
        raise UserError(f"the set says that its images have {size}x{size} pixels, but has {h}x{w}")
    return datasets.load(
        data,
        root=root,
        image_size=size,
        validation_fraction=validation_fraction(distilled),
        channels=channels if channels in (1, 3) else None,
        classes=distilled.classes,
    )


def check(distilled: Distilled, splits: Splits, data: str, path: Path) -> None:
    """Refuse data that are not those the set was distilled from.

    Args:
        distilled, splits: The set, and what `load` gave.
        data, path: Names of the data and of the set, for messages.

    Raises:
        UserError: If classes, image shape or hash differ.
    """
    if distilled.classes != splits.train.classes:
        raise UserError(
            f"{path} has classes {_few(distilled.classes)}, but {data} has "
            f"{_few(splits.train.classes)}, or in another order"
        )
    if distilled.images.shape[1:] != splits.train.shape:
        raise UserError(
            f"{path} has images of shape {distilled.images.shape[1:]}, but {data} of "
            f"{splits.train.shape}"
        )
    stored = _entry(distilled, "data", "sha256")
    if stored is not None and stored != splits.digest:
        raise UserError(
            f"{path} was distilled from other images than {data} holds now, or by a version that "
            f"decoded large JPEGs otherwise (SHA-256 {str(stored)[:12]}, found "
            f"{splits.digest[:12]})"
        )


def _entry(distilled: Distilled, *names: str) -> Any:
    """An entry of the provenance's nested mappings, or None where there is none."""
    value: Any = distilled.provenance
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _few(classes: tuple[str, ...]) -> str:
    shown = ", ".join(classes[:4]) + (", ..." if len(classes) > 4 else "")
    return f"{len(classes)} ({shown})"
