"""Data of a finished run, or other data, in the form that its student takes."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from dsdistill.harness.data.mel_images import MelOptions
from kd.data import data_source, grouped_classes
from kd.data.data_source import DataSource
from kd.data.files import file_source
from kd.data.files.file_source import FileSource
from kd.models import seals
from kd.models.saved_models import Model
from kd.recipe import Recipe

CONFIG = "config.json"


def read_config(run: Path) -> dict[str, Any]:
    """Read the options of a run; empty for an exported folder, which says nothing of its training.

    Raises:
        UserError: If the file is missing or damaged.
    """
    exported = (run / seals.CARD).is_file() and not (run / seals.REPORT).exists()
    if exported and not (run / CONFIG).exists():
        return {}
    return seals.read(run, CONFIG)


def read_recipe(run: Path) -> Recipe:
    """Read the recipe of a run; fields that it does not store keep their defaults."""
    stored = seals.read(run, "recipe.json") if (run / "recipe.json").is_file() else {}
    return Recipe(**{f.name: stored[f.name] for f in fields(Recipe) if f.name in stored})


def load(
    name: str,
    student: Model,
    recipe: Recipe,
    config: Mapping[str, Any],
    *,
    root: Path,
    announce: bool = True,
    held_out: float | None = 0.0,
) -> DataSource | FileSource:
    """Load data in the size and with the channels and class order of a student.

    Args:
        name: Name or path, as in `kd.data.data_source.resolve`.
        student: Student of the run.
        recipe: Recipe of the run, which says whether images are cropped from files, and how.
        config: Options of the run.
        root: Folder of the data sets.
        announce: As in `dsdistill.harness.data.datasets.load`.
        held_out: Share of the training images that is held out for validation; None for the
            default of a training. Those read from files have the share of their training.

    Raises:
        UserError: If the data are missing or damaged.
    """
    source = _resolve(name, student, recipe, config, root, announce, held_out)
    who = f"the student {student.name}"
    return grouped_classes.restore(source, student.class_groups, student.classes, who)


def _resolve(
    name: str,
    student: Model,
    recipe: Recipe,
    config: Mapping[str, Any],
    root: Path,
    announce: bool,
    held_out: float | None,
) -> DataSource | FileSource:
    """The data with their own classes."""
    h, w, channels = student.shape
    if recipe.streams_files:
        return file_source.resolve(
            name,
            root=root,
            image_size=h,
            validation_fraction=data_source.fraction_or_default(config.get("validation_fraction")),
            channels=channels,
            classes=student.classes or None,
            announce=announce,
        )
    if data_source.is_distilled(name):
        return data_source.resolve(name, root=root)
    return data_source.resolve(
        name,
        root=root,
        image_size=h if h == w and student.mel is None else None,
        validation_fraction=held_out,
        channels=channels,
        classes=student.classes or None,
        announce=announce,
        sound=None if student.mel is None else MelOptions(**asdict(student.mel)),
    )
