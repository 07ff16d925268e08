"""Original data of a distilled set, split in the same way for both packages.

`dsdistill evaluate` and `kd train` on one set must hold out the same images: otherwise one would
evaluate on images that the other has learned from.
"""

import contextlib
import os
from pathlib import Path

from dsdistill.harness.data import class_names, datasets, metadata_files, provenance
from dsdistill.harness.data.datasets import Splits
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.data.provenance import Provenance
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from dsdistill.harness.text import abbreviate_names

DEFAULT_VALIDATION_FRACTION = 0.1  # for a set that was made without validation images
MAX_DEPTH = 4  # depth of class folders, as in `data/data/train/cat`
MAX_FOLDERS = 100_000  # folders searched for class folders
LOADING_FIELDS = (
    "config.image_size",
    "config.channels",
    "config.validation_fraction",
    "data.sha256",
)


def read_provenance(distilled: DistilledSet) -> Provenance:
    """Read how a set was made, with every type checked."""
    return provenance.parse(distilled.provenance, distilled.images.shape[1:])


def source(path: Path, distilled: DistilledSet) -> str | None:
    """Name or path of the data that a set was distilled from; None if the set does not say.

    Args:
        path: Path of the set, for messages.
        distilled: The set.

    Raises:
        UserError: If what it says about the data or how to load them is impossible.
    """
    record = read_provenance(distilled)
    provenance.require_usable(path, record, ("data.source", *LOADING_FIELDS))
    if record.source is not None and record.source not in datasets.NAMES:
        progress.say(f"{path} names {record.source} as its data, which is read")
    return record.source


def validation_fraction(distilled: DistilledSet) -> float:
    """Share of the training images to hold out for validation when a set is evaluated.

    It is the share that was held out when the set was made. For a set made of all images, as Label
    Solve's are, and for one that does not say, it is `DEFAULT_VALIDATION_FRACTION`: learning rates
    and epochs are chosen on validation images.
    """
    return read_provenance(distilled).validation_fraction or DEFAULT_VALIDATION_FRACTION


def load(path: Path, distilled: DistilledSet, data: str, *, root: Path) -> Splits:
    """Load the data of a set as they were loaded to make it, with the same images held out.

    Args:
        path: Path of the set, for messages.
        distilled: The set; its class order is applied to the data.
        data: Name or path of the data: `source`, or the user's choice.
        root: Folder of torchvision's data sets, as in `datasets.load`.

    Raises:
        UserError: If the data cannot be loaded, or what the set says about loading them is
            impossible.
    """
    record = read_provenance(distilled)
    provenance.require_usable(path, record, LOADING_FIELDS)
    if data == record.source:
        _require_class_folders(path, distilled.classes, Path(data).expanduser())
    if record.validation_fraction is None:
        progress.note(
            f"{path} does not say which images it held out: the validation images held out here "
            "may be among those that it was distilled from"
        )
    elif record.validation_fraction == 0:
        progress.note(
            f"{path} was made of all training images, including the validation images held out here"
        )
    return datasets.load(
        data,
        root=root,
        image_size=record.image_size,
        validation_fraction=validation_fraction(distilled),
        channels=record.channels,
        classes=distilled.classes,
    )


def check_same_data(path: Path, distilled: DistilledSet, splits: Splits, data: str) -> None:
    """Refuse data other than those the set was distilled from.

    Args:
        path: Path of the set, for messages.
        distilled: The set.
        splits: Data from `load`.
        data: Name of the data, for messages.

    Raises:
        UserError: If classes, image shape or hash differ.
    """
    if distilled.classes != splits.train.classes:
        raise UserError(
            f"{path} has {len(distilled.classes)} classes "
            f"({abbreviate_names(distilled.classes)}), but {data} has "
            f"{len(splits.train.classes)} ({abbreviate_names(splits.train.classes)})"
        )
    if distilled.images.shape[1:] != splits.train.shape:
        raise UserError(
            f"{path} has images of shape {distilled.images.shape[1:]}, but {data} of "
            f"{splits.train.shape}"
        )
    stored = read_provenance(distilled).sha256
    if stored is None:
        progress.say(f"{path} has no checksum of its data: {data} is assumed to be the same")
    elif stored != splits.digest:
        raise UserError(
            f"{path} was distilled from other images than {data} holds now, or by a version that "
            f"decoded large JPEGs differently (SHA-256 {stored[:12]}, found {splits.digest[:12]})"
        )


def _require_class_folders(path: Path, classes: tuple[str, ...], folder: Path) -> None:
    """Refuse a folder that cannot be the data before reading it: a set's file may name any folder.

    Raises:
        UserError: If a class has neither a folder nor a table entry within `MAX_DEPTH` levels.
    """
    if not folder.is_dir():
        return
    missing = set(map(_class_key, classes))
    level, visited = [folder], 0
    for _ in range(MAX_DEPTH):
        for parent in level:
            missing -= set(map(_class_key, _classes_of_table(parent)))
        inside: list[os.DirEntry[str]] = []
        for parent in level:
            with contextlib.suppress(OSError):  # an unreadable folder contains no data
                inside += [entry for entry in os.scandir(parent) if entry.is_dir()]
        missing -= {_class_key(entry.name) for entry in inside}
        visited += len(inside)
        if not missing or visited > MAX_FOLDERS:
            break
        level = [Path(entry.path) for entry in inside]
    if missing:
        raise UserError(
            f"{path} names {folder} as its data, which has no folder of its class "
            f"{min(missing)!r}: the data have moved, or the file is wrong"
        )


def _classes_of_table(folder: Path) -> set[str]:
    """Class names in the table of a folder; none without a readable table."""
    with contextlib.suppress(UserError, OSError):
        if table := metadata_files.find(folder):
            return {*(metadata_files.read(table) or {}).values()}
    return set()


def _class_key(name: str) -> str:
    """Form of a class name in which `class_names.match` compares: `00007` becomes `7`."""
    name = class_names.from_folder(name)
    return str(int(name)) if class_names.are_numbers([name]) else name
