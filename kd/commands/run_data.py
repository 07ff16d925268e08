"""The data of a finished run, or others like them, as its student takes them."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from kd.data import data_source
from kd.data.data_source import DataSource
from kd.data.files import file_source
from kd.data.files.file_source import FileSource
from kd.models import seals
from kd.models.saved_models import Model
from kd.recipe import Recipe


def read_recipe(run: Path) -> Recipe:
    """What the run was trained with, as far as it says how images are cut."""
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
) -> DataSource | FileSource:
    """Data at the size and with the channels and class order of a student.

    Args:
        name: As in `sources.resolve`.
        student: Of the run.
        recipe: Of the run: images that it cut from files are read in that way.
        config: Options of the run.
        root: Where data sets lie.
        announce: As in `datasets.load`.

    Raises:
        UserError: If they cannot be had.
    """
    h, w, channels = student.shape
    if recipe.augment == "imagenet":
        return file_source.resolve(
            name,
            root=root,
            image_size=h,
            validation_fraction=data_source.fraction_or_default(config.get("validation_fraction")),
            channels=channels,
            classes=student.classes,
            announce=announce,
        )
    if data_source.is_distilled(name):
        return data_source.resolve(name, root=root)
    return data_source.resolve(
        name,
        root=root,
        image_size=h if h == w else None,
        validation_fraction=0.0,  # of what is only judged nothing is held out
        channels=channels,
        classes=student.classes,
        announce=announce,
    )
