"""The images of a training, and the pictures that its teachers see in their place."""

from dataclasses import dataclass, replace

from dsdistill.harness.data import datasets, paired_folder
from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError
from kd import recipe
from kd.assembly import teacher_chain
from kd.data import data_source, grouped_classes, transfer_images
from kd.data.data_source import DataSource
from kd.data.files import file_source
from kd.data.files.file_source import FileSource
from kd.options import TrainOptions
from kd.recipe import Recipe
from kd.runs import private_data


@dataclass(frozen=True, eq=False)
class TeacherData:
    """Another picture of every image, which the teachers see in its place.

    Attributes:
        source: The pictures, in the rows and parts of the images.
        preprocess: Preprocessing of the pictures.
    """

    source: DataSource
    preprocess: Preprocess


def load(
    options: TrainOptions, named: Recipe | None, classes: tuple[str, ...] | None
) -> DataSource | FileSource:
    """Resolve the data: streamed from files for random crops, and otherwise loaded as a whole."""
    size = options.given.get("image_size") or (named and named.image_size)
    augment = options.given.get("augment") or (named and named.augment)
    if options.pate is not None:
        if augment in recipe.STREAMED_AUGMENTS:
            raise UserError(
                f"--pate answers images that are loaded as a whole, which --augment {augment} does "
                "not: leave it out"
            )
        return private_data.source(options, size, classes)
    source = _resolve(options, size, augment, classes)
    if options.class_groups is not None:
        source = grouped_classes.join(
            source, grouped_classes.read(options.class_groups, source.classes)
        )
    if options.transfer is None:
        return source
    assert isinstance(source, DataSource)
    return _with_transfer(options, source)


def _resolve(
    options: TrainOptions, size: int | None, augment: str | None, classes: tuple[str, ...] | None
) -> DataSource | FileSource:
    """The data themselves, without what replaces their training images or classes."""
    if augment in recipe.STREAMED_AUGMENTS:
        if options.transfer is not None:
            raise UserError(
                f"--transfer is decoded before the training, and --augment {augment} reads files "
                "while it goes on: use --augment crop-flip"
            )
        if options.sound is not None:
            raise UserError(
                f"--seconds, --mel-bands and --sample-rate are for recordings, and --augment "
                f"{augment} is for images: leave them out"
            )
        return file_source.resolve(
            options.data,
            root=options.data_root,
            image_size=size,
            validation_fraction=data_source.fraction_or_default(options.validation_fraction),
            channels=options.channels,
            classes=classes,
        )
    if options.head == "none" and transfer_images.is_flat(options.data):
        return _flat_source(options, size)
    return data_source.resolve(
        options.data,
        root=options.data_root,
        image_size=size,
        validation_fraction=options.validation_fraction,
        channels=options.channels,
        classes=classes,
        sound=options.sound,
    )


def _flat_source(options: TrainOptions, size: int | None) -> DataSource:
    """Load a folder of images without classes.

    Raises:
        UserError: If an option is for labelled images.
    """
    given = {
        "--transfer": options.transfer,
        "--teacher-data": options.teacher_data,
        "--validation-fraction": options.validation_fraction,
        "the options of recordings": options.sound,
    }
    for name, value in given.items():
        if value is not None:
            raise UserError(
                f"{options.data} holds images without classes, all of which are trained on, and "
                f"{name} needs classes or recordings: leave it out"
            )
    return transfer_images.load_flat(options.data, image_size=size, channels=options.channels)


def _with_transfer(options: TrainOptions, source: DataSource) -> DataSource:
    """Replace the training images by those of `--transfer`.

    Raises:
        UserError: If the data or the transfer set do not fit.
    """
    name = options.transfer
    assert name is not None
    if source.distilled is not None:
        raise UserError(
            f"--transfer takes validation and test images from DATA, and {options.data} is a "
            "distilled set: name the real data set, or leave --transfer out"
        )
    if source.mel is not None:
        raise UserError("--transfer is for images, and the data are recordings: leave it out")
    if datasets.absolute_name(name) == datasets.absolute_name(options.data):
        raise UserError(
            f"--transfer {name} is DATA itself, and would train on its validation images: leave "
            "it out, and use --loss kd:1 to leave the labels out"
        )
    if options.teacher_weights == "by-label":
        raise UserError(
            "--teacher-weights by-label takes labels, and the images of --transfer have none: "
            "leave it out"
        )
    images = transfer_images.load(
        name, root=options.data_root, shape=source.shape, classes=source.classes
    )
    return replace(source, transfer=images)


def load_teacher_data(
    options: TrainOptions, named: Recipe | None, source: DataSource | FileSource
) -> TeacherData | None:
    """Load the teachers' own pictures; None where they see the student's images.

    Raises:
        UserError: If the data have no files, or a file has no counterpart.
    """
    if options.teacher_data is None or teacher_chain.is_taught_by_chain(options):
        return None
    if options.transfer is not None:
        raise UserError(
            "--teacher-data has another picture of every image of DATA, and --transfer trains on "
            "others: leave one of them out"
        )
    splits = source.splits if isinstance(source, DataSource) else None
    if splits is None or splits.layout is None or source.distilled is not None:
        raise UserError(
            "--teacher-data has a file for each file of a folder that is decoded before the "
            "training: give such a folder as DATA, without --augment imagenet"
        )
    size = options.given.get("image_size") or (named and named.image_size)
    folder = options.teacher_data.expanduser()
    pictures = DataSource(
        folder.resolve().stem, paired_folder.load(folder, splits, splits.layout, size)
    )
    return TeacherData(pictures, pictures.fit(None))
