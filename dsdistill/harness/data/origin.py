"""The data that a distilled set came from, split as both packages split it.

`dsdistill evaluate` and `kd train` on one set must hold out the same images: what one of them
learns from, the other would otherwise judge by.
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

DEFAULT_VALIDATION_FRACTION = 0.1  # of a set that held no validation images out itself
MAX_DEPTH = 4  # class folders of `data/data/train/cat`
MAX_FOLDERS = 100_000  # that are looked at for class folders
LOADING_FIELDS = (
    "config.image_size",
    "config.channels",
    "config.validation_fraction",
    "data.sha256",
)


def read_provenance(distilled: DistilledSet) -> Provenance:
    """What a set says of how it was made, with every type checked."""
    return provenance.parse(distilled.provenance, distilled.images.shape[1:])


def source(path: Path, distilled: DistilledSet) -> str | None:
    """The name or path of the data that a set came from; None where it does not say.

    Args:
        path: Of the set, for messages.
        distilled: The set.

    Raises:
        UserError: If it says something that cannot be of the data or of how they were read.
    """
    made = read_provenance(distilled)
    provenance.require_usable(path, made, ("data.source", *LOADING_FIELDS))
    if made.source is not None and made.source not in datasets.NAMES:
        progress.say(f"{path} says that its data are {made.source}, which is read")
    return made.source


def validation_fraction(distilled: DistilledSet) -> float:
    """Share of the training images that is held out for a set.

    That of the set itself; for one that was made of all images, as Label Solve's are, and for one
    that does not say, `DEFAULT_VALIDATION_FRACTION`: learning rates and epochs are chosen on something.
    """
    return read_provenance(distilled).validation_fraction or DEFAULT_VALIDATION_FRACTION


def load(path: Path, distilled: DistilledSet, data: str, *, root: Path) -> Splits:
    """Load the data that a set came from as the set was made, with its images held out.

    Args:
        path: Of the set, for messages.
        distilled: The set; its classes give the order of the data's.
        data: `source`, or what the user says it is.
        root: As in `datasets.load`.

    Raises:
        UserError: If the data cannot be had, or the set says something that cannot be of how they
            were read.
    """
    made = read_provenance(distilled)
    provenance.require_usable(path, made, LOADING_FIELDS)
    if data == made.source:
        _require_class_folders(path, distilled.classes, Path(data).expanduser())
    if made.validation_fraction is None:
        progress.note(
            f"{path} does not say which images it held out: those that are held out for validation "
            "here may be among those that it was made of"
        )
    elif made.validation_fraction == 0:
        progress.note(
            f"{path} was made of all training images: those that are held out for validation here "
            "are among them"
        )
    return datasets.load(
        data,
        root=root,
        image_size=made.image_size,
        validation_fraction=validation_fraction(distilled),
        channels=made.channels,
        classes=distilled.classes,
    )


def check_same_data(path: Path, distilled: DistilledSet, splits: Splits, data: str) -> None:
    """Refuse data that are not those the set was distilled from.

    Args:
        path, distilled: The set.
        splits: What `load` gave.
        data: Their name, for messages.

    Raises:
        UserError: If classes, image shape or hash differ.
    """
    if distilled.classes != splits.train.classes:
        raise UserError(
            f"{path} has {len(distilled.classes)} classes ({abbreviate_names(distilled.classes)}), but {data} "
            f"has {len(splits.train.classes)} ({abbreviate_names(splits.train.classes)})"
        )
    if distilled.images.shape[1:] != splits.train.shape:
        raise UserError(
            f"{path} has images of shape {distilled.images.shape[1:]}, but {data} of "
            f"{splits.train.shape}"
        )
    stored = read_provenance(distilled).sha256
    if stored is None:
        progress.say(f"{path} has no checksum of its data: {data} is taken for them")
    elif stored != splits.digest:
        raise UserError(
            f"{path} was distilled from other images than {data} holds now, or by a version that "
            f"decoded large JPEGs otherwise (SHA-256 {stored[:12]}, found {splits.digest[:12]})"
        )


def _require_class_folders(path: Path, classes: tuple[str, ...], folder: Path) -> None:
    """Refuse a folder that cannot be the data, before it is read: a file may name any.

    Raises:
        UserError: If some class has no folder, and stands in no table, up to `MAX_DEPTH` folders deep.
    """
    if not folder.is_dir():
        return
    wanted = set(map(_class_key, classes))
    level, looked = [folder], 0
    for _ in range(MAX_DEPTH):
        for each in level:
            wanted -= set(map(_class_key, _classes_of_table(each)))
        inside: list[os.DirEntry[str]] = []
        for each in level:
            with contextlib.suppress(OSError):  # a folder that may not be read holds no data
                inside += [entry for entry in os.scandir(each) if entry.is_dir()]
        wanted -= {_class_key(entry.name) for entry in inside}
        looked += len(inside)
        if not wanted or looked > MAX_FOLDERS:
            break
        level = [Path(entry.path) for entry in inside]
    if wanted:
        raise UserError(
            f"{path} says that its data are {folder}, which has no folder of its class "
            f"{min(wanted)!r}: they are somewhere else now, or the file is wrong"
        )


def _classes_of_table(folder: Path) -> set[str]:
    """The class names in the table of a folder; none where there is no table that can be read."""
    with contextlib.suppress(UserError, OSError):
        if table := metadata_files.find(folder):
            return {*(metadata_files.read(table) or {}).values()}
    return set()


def _class_key(name: str) -> str:
    """A class name as `class_names.match` compares it: `00007` is `7`."""
    name = class_names.from_folder(name)
    return str(int(name)) if class_names.are_numbers([name]) else name
