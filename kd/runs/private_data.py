"""The data of a training with `--pate`: private images, and public ones with noisy answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsdistill.harness.data import datasets
from dsdistill.harness.data.labeled_images import LabeledImages
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import run_folder
from kd.data import data_source, public_images
from kd.data.data_source import DataSource
from kd.data.public_images import PublicImages
from kd.models.saved_models import Model
from kd.options import TrainOptions
from kd.privacy import settings as pate_settings
from kd.privacy.settings import PateSettings

ANSWERS = "answers"  # in `config.json`: the noisy answer to each query that was asked


def settings_of(options: TrainOptions) -> PateSettings:
    """The settings of `--pate`."""
    assert options.pate is not None
    return pate_settings.parse(options.pate)


def private_images(
    options: TrainOptions, size: int | None, classes: Sequence[str] | None
) -> LabeledImages:
    """Load the private images: the training images of DATA.

    Args:
        options: Options of the training.
        size: Height and width of the images; None as they are.
        classes: Order of the class names, as for `datasets.load`.

    Raises:
        UserError: If DATA is a distilled set, or δ is too large for so many images.
    """
    if data_source.is_distilled(options.data):
        raise UserError(
            f"--pate asks teachers of private images, and {options.data} is a distilled set: give "
            "the images themselves"
        )
    splits = datasets.load(
        options.data,
        root=options.data_root,
        image_size=size,
        validation_fraction=0.0,
        channels=options.channels,
        classes=classes,
        announce=False,
    )
    if splits.mel is not None or options.sound is not None:
        raise UserError(f"--pate is for images, and {options.data} holds recordings: leave it out")
    settings, count = settings_of(options), len(splits.train)
    if settings.teachers * 2 > count:
        raise UserError(
            f"--pate teachers={settings.teachers} leaves fewer than two of {count} images to a "
            "teacher: take fewer teachers"
        )
    if settings.delta * count >= 1:
        raise UserError(
            f"--pate delta must be below 1 / {count}, the number of private images, or publishing "
            f"one of them would be allowed, got {settings.delta:g}"
        )
    return splits.train


def public_of(options: TrainOptions, private: LabeledImages) -> PublicImages:
    """Load the public images in the shape of the private ones."""
    assert options.public is not None
    shape, classes = private.shape, private.classes
    return public_images.load(
        options.data, options.public, root=options.data_root, shape=shape, classes=classes
    )


def source(options: TrainOptions, size: int | None, classes: Sequence[str] | None) -> DataSource:
    """The public images with the answers of a run; with made-up ones before it has any.

    Args:
        options, size, classes: As for `private_images`.
    """
    private = private_images(options, size, classes)
    public = public_of(options, private)
    answers = stored_answers(options.out)
    if answers is None:  # only to try everything before the teachers are trained
        _, most = settings_of(options).bounds(len(public.images))
        answers = (np.arange(most) % len(private.classes)).tolist()
    return public_images.answered(
        public,
        answers,
        settings_of(options),
        data=_short_name(options.data),
        validation_fraction=options.validation_fraction,
    )


def stored_answers(folder: Path | None) -> list[int] | None:
    """The answers that a run has stored; None if it has none yet."""
    chosen = None if folder is None else run_folder.stored_choices(folder)
    return (chosen or {}).get(ANSWERS)


def test_images(config: Mapping[str, Any], student: Model, *, root: Path) -> DataSource:
    """The images that test the student of a run with `--pate`, which are none of the private ones.

    Args:
        config: Options of the run.
        student: Its student.
        root: Folder of the data sets.

    Raises:
        UserError: If they are missing.
    """
    public = public_images.load(
        config["data"],
        config["public"],
        root=root,
        shape=student.shape,
        classes=student.classes,
    )
    splits = datasets.Splits(public.name, public.images, public.test, public.test, "")
    return DataSource(_short_name(config["data"]), splits)


def _short_name(data: str) -> str:
    return data if data in datasets.NAMES else Path(data).expanduser().resolve().stem
