"""Layout of an image folder: which of its images are for training, validation and the test.

    photos/train/cat/1.jpg    photos/val/cat/7.jpg    photos/test/cat/9.jpg     three parts
    photos/Training/cat/1.jpg photos/Testing/cat/7.jpg                          two parts
    photos/cat/1.jpg          photos/dog/2.jpg                                  no parts

Parts have the names that torchvision, timm and Hugging Face know, in any case, alone or with
something else that all parts share (`seg_train` and `seg_test`, `train2017` and `val2017`). `test`
is for the test, `val` for validation. Without a `test` that has classes, `val` serves as the test,
and validation images are held out of `train`, as in a folder without parts.

`folder_part` reads the classes of a part. Only folders, tables, and the first bytes of files
without an extension are read here.

A data set is of images or of recordings; whichever are fewer are left out.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsdistill.harness.data import class_names, metadata_files, wav_files
from dsdistill.harness.data.folder_part import (
    ANNOTATIONS_FILE,
    PART_BY_KEYWORD,
    FolderPart,
    descend,
    is_labelled,
    part_name,
    read_part,
    read_table,
)
from dsdistill.harness.data.labeled_images import DataError
from dsdistill.harness.data.walk import (
    SkippedFiles,
    count_loose_images,
    has_loose_images,
    holds_images,
    subfolders,
)
from dsdistill.harness.runs import progress
from dsdistill.harness.text import abbreviate_names, quote

_ANY_KEYWORD = "|".join(sorted(PART_BY_KEYWORD, key=len, reverse=True))
_KEYWORD_IN_NAME = re.compile(rf"(?<![a-z])({_ANY_KEYWORD})(?:set)?(?![a-z])")
# Folders beside `images` whose pictures are not of a class.
BESIDE_IMAGES = {"annotation", "annotations", "labels", "masks", "segmentations", "trimaps"}


@dataclass(frozen=True, eq=False)
class FolderLayout:
    """Images of a folder by part.

    Attributes:
        root: The folder, or the one inside it that contains the data.
        train: Training part; all images if the folder has no parts.
        validation, test: Validation and test part; None if the folder has none.
        skipped: Description of what is not used; empty if everything is.
        draw_order: Class indices in the text order of the folder names. Images are held out in
            this order, so that they are the same whatever the order of the classes.
    """

    root: Path
    train: FolderPart
    validation: FolderPart | None
    test: FolderPart | None
    skipped: str
    draw_order: tuple[int, ...]

    @property
    def files(self) -> list[Path]:
        """All images: training, validation and test."""
        return [file for part in self._parts for file in part.files]

    @property
    def holds_recordings(self) -> bool:
        """Whether the files are recordings, which become images."""
        return bool(self.train.files) and wav_files.is_wav(self.train.files[0])

    @property
    def noun(self) -> str:
        """What the files are, in messages."""
        return "recordings" if self.holds_recordings else "images"

    @property
    def labels(self) -> list[int]:
        """Class index of each file."""
        return [label for part in self._parts for label in part.labels]

    @property
    def ends(self) -> tuple[int, int]:
        """Positions in `files` where the training and the validation images end."""
        train = len(self.train.files)
        return train, train + (len(self.validation.files) if self.validation else 0)

    @property
    def _parts(self) -> list[FolderPart]:
        return [part for part in (self.train, self.validation, self.test) if part]

    def announce(self, train: int, validation: int, test: int) -> None:
        """Print which folder serves as which part, and the order of the classes if it matters."""
        progress.note(self.summary(train, validation, test))
        self._announce_order()

    def _announce_order(self) -> None:
        if order := class_names.order_note(self.train.classes):
            progress.note(f"{self.root}: {order}")

    def announce_evaluation(self, count: int, *, every: bool) -> None:
        """Print which images a finished model is evaluated on, where nothing is trained.

        Args:
            count: Number of images.
            every: Whether they are all images of the folder.
        """
        if self.test:
            source = f"from {_relative_name(self.root, self.test.folder)}"
        else:
            source = "all of them" if every else "the share that is held out of them for the test"
        classes = f"{len(self.train.classes)} classes"
        line = f"{self.root}: {count:,} {self.noun} of {classes} are evaluated"
        progress.note(f"{line}, {source}{self._skipped_clause}")
        self._announce_order()

    def summary(self, train: int, validation: int, test: int) -> str:
        """One line on which folder serves as which part, with the numbers of images used."""
        folder = _relative_name(self.root, self.train.folder)
        held_out = f"held out of {folder or 'them'}"
        clauses = (
            f"{train:,} training {self.noun} of {len(self.train.classes)} classes"
            + _from_clause(folder),
            self._validation_clause(validation, held_out),
            f"{test:,} for the test, "
            + (f"from {_relative_name(self.root, self.test.folder)}" if self.test else held_out),
        )
        line = f"{self.root}: {'; '.join(clauses)}"
        return line + self._skipped_clause

    def _validation_clause(self, count: int, held_out: str) -> str:
        """Where the validation images come from; Label Solve and features take none by default."""
        if self.validation:
            folder = _relative_name(self.root, self.validation.folder)
            return f"{count:,} for validation, from {folder}"
        return f"{count:,} for validation, {held_out}" if count else "none for validation"

    @property
    def _skipped_clause(self) -> str:
        return f"; left out: {self.skipped}" if self.skipped else ""


def list_folder(path: Path, classes: Sequence[str] | None = None) -> FolderLayout:
    """Find the images of a folder, their classes and parts.

    Args:
        path: The folder.
        classes: Order of the classes, if known; it is used if the folder has exactly these
            classes, by name or, where all are numbers, by value.

    Raises:
        DataError: If the folders are not a data set, or are ambiguous.
        OSError: If a folder cannot be read.
    """
    if not path.is_dir():
        raise DataError(f"no such folder: {path}")
    skipped = SkippedFiles()
    root = descend(path)
    _refuse_images_beside_annotations(root)
    roles = find_parts(root, skipped)
    train = read_part(roles.get("train", root), (root,), skipped)
    text_order, order = train.classes, class_names.sort(train.classes)
    if classes is not None and class_names.match(classes, train.classes) is not None:
        order = tuple(classes)
    train = train.reorder(order)
    draw_order = class_names.match(text_order, order)
    assert draw_order is not None, "the classes are the same"
    others: dict[str, FolderPart | None] = {
        name: _read_beside_train(roles[name], root, train, skipped)
        for name in roles
        if name != "train"
    }
    validation, test = others.get("validation"), others.get("test")
    if test is None:
        validation, test = None, validation
    train, validation, test = _keep_one_kind(train, validation, test, skipped)
    return FolderLayout(root, train, validation, test, str(skipped), draw_order)


def _keep_one_kind(
    train: FolderPart, validation: FolderPart | None, test: FolderPart | None, skipped: SkippedFiles
) -> tuple[FolderPart, FolderPart | None, FolderPart | None]:
    """Leave out recordings among images, or images among recordings, whichever are fewer.

    Raises:
        DataError: If a class of the training part has files of the other kind alone.
    """
    parts = [part for part in (train, validation, test) if part]
    recordings = [wav_files.is_wav(file) for part in parts for file in part.files]
    if all(recordings) or not any(recordings):
        return train, validation, test
    heard = 2 * sum(recordings) > len(recordings)
    kept, other = ("recordings", "images") if heard else ("images", "recordings")
    left_out = len(recordings) - sum(recordings) if heard else sum(recordings)
    skipped.folders.append(f"{left_out:,} {other} among {kept}")

    def is_kept(file: Path) -> bool:
        return wav_files.is_wav(file) == heard

    chosen = train.keep(is_kept)
    if missing := sorted({*train.labels} - {*chosen.labels}):
        raise DataError(
            f"{train.folder} holds {kept}, and class {quote(train.classes[missing[0]])} has "
            f"{other} alone: a data set is of one kind"
        )
    rest = (
        part and part.keep(lambda f: wav_files.is_wav(f) == heard) for part in (validation, test)
    )
    validation, test = rest
    return chosen, validation, test


def find_lone_test_part(path: Path) -> Path | None:
    """Find the test part of a folder without a training part, or else its only validation part.

    An evaluation needs no training part, which `list_folder` requires. None for any other folder.
    """
    named: dict[str, list[Path]] = {}
    for folder in subfolders(descend(path)):
        if (part := part_name(folder.name)) and is_labelled(folder):
            named.setdefault(part, []).append(folder)
    candidates = named.get("test") or named.get("validation") or []
    return candidates[0] if "train" not in named and len(candidates) == 1 else None


def find_parts(root: Path, skipped: SkippedFiles) -> dict[str, Path]:
    """Find the folder of each part; none if `root` holds class folders."""
    folders = [folder for folder in subfolders(root) if holds_images(folder)]
    named: dict[str, list[Path]] = {}
    for folder in folders:
        if part := part_name(folder.name):
            named.setdefault(part, []).append(folder)
    for part, candidates in _find_compound_names(folders).items():
        named.setdefault(part, candidates)
    part_folders = {folder for candidates in named.values() for folder in candidates}
    others = [folder for folder in folders if folder not in part_folders]
    if not named or _are_classes(root, named, others):
        return {}
    parts = {part: _choose_candidate(root, candidates) for part, candidates in named.items()}
    if "train" not in parts:
        raise DataError(
            f"{root} has {_list_names(parts.values())} and no train folder: name the one to "
            f"train on {root / 'train'}, or give its path"
        )
    if not is_labelled(parts["train"]) and not metadata_files.find(root):
        raise DataError(
            f"{parts['train']} has images and no class folders: expected one folder of images per "
            "class (if it is a class itself, rename it)"
        )
    for folder in (*others, *sorted(part_folders - {*parts.values()})):
        skipped.folders.append(f"{_relative_name(root, folder)} (no part)")
    for folder in subfolders(root):
        if part_name(folder.name) and folder not in folders:
            skipped.folders.append(f"{_relative_name(root, folder)} (no images)")
    skipped.loose += count_loose_images(root)
    return parts


def _find_compound_names(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Find folders such as `seg_train` and `seg_test`, which differ in the part keyword only."""
    stems: dict[str, dict[str, list[Path]]] = {}
    for folder in folders:
        name = folder.name.casefold()
        if len(words := _KEYWORD_IN_NAME.findall(name)) == 1:
            parts = stems.setdefault(_KEYWORD_IN_NAME.sub("", name), {})
            parts.setdefault(PART_BY_KEYWORD[words[0]], []).append(folder)
    splits = [parts for parts in stems.values() if "train" in parts and len(parts) > 1]
    return splits[0] if len(splits) == 1 else {}


def _are_classes(root: Path, named: dict[str, list[Path]], others: Sequence[Path]) -> bool:
    """Whether folders that are named like parts are classes, as `train` is among vehicles.

    Raises:
        DataError: If it is ambiguous.
    """
    if metadata_files.find(root):
        return False  # the table names the classes, no folder does
    labelled = {part for part, candidates in named.items() if any(map(is_labelled, candidates))}
    if not others or {"train"} < labelled:
        return False
    alike = all(_KEYWORD_IN_NAME.search(folder.name.casefold()) for folder in others)
    if not labelled and len(named) == 1 and not alike:
        return True
    parts = [folder for candidates in named.values() for folder in candidates]
    raise DataError(
        f"{root} has {_list_names(parts)} beside {_list_names(others)}: if they are parts, give "
        "the path of one, or move the others away; if they are classes, rename them"
    )


def _choose_candidate(root: Path, candidates: Sequence[Path]) -> Path:
    """Choose the folder of a part: of several candidates, the one that has classes.

    Raises:
        DataError: If several candidates have classes.
    """
    labelled = [folder for folder in candidates if is_labelled(folder)]
    if len(labelled) > 1:
        raise DataError(
            f"{root} has {_list_names(labelled)}, which mean the same part: keep one of them, "
            "and move the others away"
        )
    return (labelled or candidates)[0]


def _read_beside_train(
    folder: Path, root: Path, train: FolderPart, skipped: SkippedFiles
) -> FolderPart | None:
    """Read a part beside the training part, in its class order; None for a part without classes.

    Raises:
        DataError: If its classes differ from those of the training part.
    """
    if (table := read_table(folder, (root,), skipped)) is not None:
        return _same_classes(train, table)
    inside = [f for f in subfolders(folder) if holds_images(f)]
    unknown_name = len(inside) == 1 and class_names.from_folder(inside[0].name) not in train.classes
    is_flat = unknown_name and not any(map(holds_images, subfolders(inside[0])))
    if not (folder / ANNOTATIONS_FILE).is_file() and (not inside or is_flat):
        skipped.folders.append(f"{_relative_name(root, folder)} (images without classes)")
        return None
    return _same_classes(train, read_part(folder, (root,), skipped))


def _same_classes(train: FolderPart, part: FolderPart) -> FolderPart:
    """Bring a part into the class order of the training part.

    Raises:
        DataError: If its classes differ from those of the training part.
    """
    if class_names.match(train.classes, part.classes) is None:
        gaps = (
            (part.folder, sorted({*train.classes} - {*part.classes})),
            (train.folder, sorted({*part.classes} - {*train.classes})),
        )
        lacking = "; ".join(
            f"{folder} lacks {abbreviate_names(names)}" for folder, names in gaps if names
        )
        raise DataError(
            f"{train.folder} and {part.folder} must have the same classes, but {lacking}: "
            "add images of what is missing, or remove it from the other folder"
        )
    return part.reorder(train.classes)


def _refuse_images_beside_annotations(root: Path) -> None:
    """Refuse `images/` and `annotations/` as two classes; Oxford-IIIT Pet ships with both.

    Raises:
        DataError: If they are the only folders; the message says how to arrange the images.
    """
    folders = {folder.name.casefold(): folder for folder in subfolders(root)}
    others = [folders[name] for name in sorted(BESIDE_IMAGES & folders.keys())]
    if "images" not in folders or not others or metadata_files.find(root):
        return
    images = folders["images"]
    if (others[0] / "trainval.txt").is_file() and has_loose_images(images):
        raise DataError(
            f"{root} is the Oxford-IIIT Pet data set as it ships, with its classes in the names of "
            f"the files: put each image that {others[0] / 'trainval.txt'} names into "
            f"{root / 'train'}/CLASS and each of test.txt into {root / 'test'}/CLASS, where CLASS "
            "is the name without its number; docs/folders.md has the lines"
        )
    if {*folders} - {"images", *BESIDE_IMAGES} or not any(map(holds_images, others)):
        return
    remedy = (
        f"give the path {images}"
        if any(map(holds_images, subfolders(images)))
        else "put the images into one folder per class"
    )
    raise DataError(
        f"{root} has images/ beside {_list_names(others)}, which are not classes: {remedy}"
    )


def _relative_name(root: Path, folder: Path) -> str:
    return "" if folder == root else f"{folder.relative_to(root)}/"


def _from_clause(inside: str) -> str:
    return f" from {inside}" if inside else ""


def _list_names(folders: Iterable[Path]) -> str:
    return abbreviate_names([f"{folder.name}/" for folder in folders])
