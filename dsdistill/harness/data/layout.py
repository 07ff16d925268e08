"""Layout of an image folder: the class of each file, and whether it is for training or testing.

    photos/train/cat/1.jpg    photos/val/cat/7.jpg    photos/test/cat/9.jpg     three parts
    photos/Training/cat/1.jpg photos/Testing/cat/7.jpg                          two parts
    photos/cat/1.jpg          photos/dog/2.jpg                                  no parts

Parts have the names that torchvision, timm and Hugging Face know, in any case, alone or with
something else that all parts share (`seg_train` and `seg_test`, `train2017` and `val2017`). `test`
is for the test, `val` for validation. Without a `test` that has classes, `val` serves as the test,
and validation images are held out of `train`, as in a folder without parts.

A class is a folder, or a value in a table beside the images (`metadata_files`).

This module reads only folders, tables, and the first bytes of files without an extension.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsdistill.harness.data import class_names, metadata_files
from dsdistill.harness.data.labeled_images import DataError
from dsdistill.harness.data.walk import (
    SkippedFiles,
    count_broken_links,
    count_loose_images,
    find_images,
    folder_identity,
    has_loose_images,
    holds_images,
    subfolders,
)
from dsdistill.harness.runs import progress
from dsdistill.harness.text import abbreviate_names, quote

PART_KEYWORDS = {  # Hugging Face's, which include those of timm and torchvision
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
PART_BY_KEYWORD = {
    keyword: part for part, keywords in PART_KEYWORDS.items() for keyword in keywords
}
_ANY_KEYWORD = "|".join(sorted(PART_BY_KEYWORD, key=len, reverse=True))
_KEYWORD_IN_NAME = re.compile(rf"(?<![a-z])({_ANY_KEYWORD})(?:set)?(?![a-z])")
MAX_DEPTH = 3  # nested single folders that are followed, as unpacked archives have them
# Folders beside `images` whose pictures are not of a class.
BESIDE_IMAGES = {"annotation", "annotations", "labels", "masks", "segmentations", "trimaps"}
# Pictures as cameras and editors write them, which are not read here and can be converted.
UNREAD_PICTURES = {".heic", ".heif", ".hif", ".avif", ".jxl", ".svg", ".psd", ".xcf", ".exr"}
UNREAD_PICTURES |= {
    ".raw",
    ".dng",
    ".cr2",
    ".cr3",
    ".nef",
    ".arw",
    ".orf",
    ".rw2",
    ".raf",
    ".eps",
    ".pdf",
}
ANNOTATIONS_FILE = "val_annotations.txt"  # Tiny-ImageNet: file name, tab, class, tab, a box


@dataclass(frozen=True, eq=False)
class FolderPart:
    """Images of one part.

    Attributes:
        folder: Folder of the part.
        classes: Class names, in label order.
        files: Paths of the images, class by class.
        labels: Class index of each file.
    """

    folder: Path
    classes: tuple[str, ...]
    files: list[Path]
    labels: list[int]

    def reorder(self, classes: Sequence[str]) -> "FolderPart":
        """The same part with its classes in another order.

        Args:
            classes: The same classes according to `class_names.match`, in the new order.
        """
        order = class_names.match(classes, self.classes)
        assert order is not None, f"{classes} and {self.classes} are different classes"
        members: list[list[Path]] = [[] for _ in self.classes]
        for file, label in zip(self.files, self.labels, strict=True):
            members[label].append(file)
        files = [file for label in order for file in members[label]]
        labels = [new for new, old in enumerate(order) for _ in members[old]]
        return FolderPart(self.folder, tuple(classes), files, labels)


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
        line = f"{self.root}: {count:,} images of {len(self.train.classes)} classes are evaluated"
        progress.note(f"{line}, {source}{self._skipped_clause}")
        self._announce_order()

    def summary(self, train: int, validation: int, test: int) -> str:
        """One line on which folder serves as which part, with the numbers of images used."""
        folder = _relative_name(self.root, self.train.folder)
        held_out = f"held out of {folder or 'them'}"
        clauses = (
            f"{train:,} training images of {len(self.train.classes)} classes{_from_clause(folder)}",
            f"{validation:,} for validation, "
            + (
                f"from {_relative_name(self.root, self.validation.folder)}"
                if self.validation
                else held_out
            ),
            f"{test:,} for the test, "
            + (f"from {_relative_name(self.root, self.test.folder)}" if self.test else held_out),
        )
        line = f"{self.root}: {'; '.join(clauses)}"
        return line + self._skipped_clause

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
    root = _descend(path)
    _refuse_images_beside_annotations(root)
    roles = _find_parts(root, skipped)
    train = _read_part(roles.get("train", root), (root,), skipped)
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
    return FolderLayout(root, train, validation, test, str(skipped), draw_order)


def find_lone_test_part(path: Path) -> Path | None:
    """Find the test part of a folder without a training part, or else its only validation part.

    An evaluation needs no training part, which `list_folder` requires. None for any other folder.
    """
    named: dict[str, list[Path]] = {}
    for folder in subfolders(_descend(path)):
        if (part := _part_name(folder.name)) and _is_labelled(folder):
            named.setdefault(part, []).append(folder)
    candidates = named.get("test") or named.get("validation") or []
    return candidates[0] if "train" not in named and len(candidates) == 1 else None


def _descend(path: Path, *, part: bool = False) -> Path:
    """Descend to the folder with the data: `archive/archive` if `archive` holds nothing else.

    Args:
        path: Folder to start at.
        part: Whether it is one part, in which a folder named `train` is a class, not a part.
    """
    inner = path
    for _ in range(MAX_DEPTH + 1):
        if metadata_files.find(inner):
            return inner
        inside = [folder for folder in subfolders(inner) if holds_images(folder)]
        if len(inside) > 1 or (len(inside) == 1 and _part_name(inside[0].name) and not part):
            return inner
        if not inside or has_loose_images(inner):
            break
        inner = inside[0]
    return path


def _find_parts(root: Path, skipped: SkippedFiles) -> dict[str, Path]:
    """Find the folder of each part; none if `root` holds class folders."""
    folders = [folder for folder in subfolders(root) if holds_images(folder)]
    named: dict[str, list[Path]] = {}
    for folder in folders:
        if part := _part_name(folder.name):
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
    if not _is_labelled(parts["train"]) and not metadata_files.find(root):
        raise DataError(
            f"{parts['train']} has images and no class folders: expected one folder of images per "
            "class (if it is a class itself, rename it)"
        )
    for folder in (*others, *sorted(part_folders - {*parts.values()})):
        skipped.folders.append(f"{_relative_name(root, folder)} (no part)")
    for folder in subfolders(root):
        if _part_name(folder.name) and folder not in folders:
            skipped.folders.append(f"{_relative_name(root, folder)} (no images)")
    skipped.loose += count_loose_images(root)
    return parts


def _part_name(name: str) -> str | None:
    """The part that a folder's name means by itself; None for any other name."""
    return PART_BY_KEYWORD.get(name.casefold())


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
    labelled = {part for part, candidates in named.items() if any(map(_is_labelled, candidates))}
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
    labelled = [folder for folder in candidates if _is_labelled(folder)]
    if len(labelled) > 1:
        raise DataError(
            f"{root} has {_list_names(labelled)}, which mean the same part: keep one of them, "
            "and move the others away"
        )
    return (labelled or candidates)[0]


def _is_labelled(folder: Path) -> bool:
    """Whether the images of a part have classes; an unlabelled test set has none."""
    if (folder / ANNOTATIONS_FILE).is_file() or metadata_files.find(folder):
        return True
    return any(map(holds_images, subfolders(folder)))


def _read_beside_train(
    folder: Path, root: Path, train: FolderPart, skipped: SkippedFiles
) -> FolderPart | None:
    """Read a part beside the training part, in its class order; None for a part without classes.

    Raises:
        DataError: If its classes differ from those of the training part.
    """
    if (table := _read_metadata(folder, (root,), skipped)) is not None:
        return _same_classes(train, table)
    inside = [f for f in subfolders(folder) if holds_images(f)]
    unknown_name = len(inside) == 1 and class_names.from_folder(inside[0].name) not in train.classes
    is_flat = unknown_name and not any(map(holds_images, subfolders(inside[0])))
    if not (folder / ANNOTATIONS_FILE).is_file() and (not inside or is_flat):
        skipped.folders.append(f"{_relative_name(root, folder)} (images without classes)")
        return None
    return _same_classes(train, _read_part(folder, (root,), skipped))


def _same_classes(train: FolderPart, part: FolderPart) -> FolderPart:
    """Bring a part into the class order of the training part.

    Raises:
        DataError: If its classes differ from those of the training part.
    """
    if class_names.match(train.classes, part.classes) is None:
        different = sorted({*train.classes} ^ {*part.classes})
        raise DataError(
            f"{train.folder} and {part.folder} must have the same classes: "
            f"only one of them has {abbreviate_names(different)}"
        )
    return part.reorder(train.classes)


def _read_part(folder: Path, above: tuple[Path, ...], skipped: SkippedFiles) -> FolderPart:
    """Read the classes and files of one part, in the order of their folders.

    Raises:
        DataError: If there are fewer than two classes, a class has no images, or two classes have
            the same name.
    """
    if (folder / ANNOTATIONS_FILE).is_file():
        return _read_annotations(folder, skipped)
    if (table := _read_metadata(folder, above, skipped)) is not None:
        return table
    inside = _descend(folder, part=True)
    above, folder = (*above, folder), inside
    folders: dict[str, Path] = {}
    for path in subfolders(folder):
        name = class_names.from_folder(path.name)
        if name in folders:
            raise DataError(
                f"{folder} has two folders of the same name, {quote(name)}, encoded differently: "
                "merge them, or rename one"
            )
        folders[name] = path
    if not folders:
        raise DataError(
            f"{folder} has no class folders: expected one folder of images per class, or a "
            "metadata.csv with the columns file_name and label"
        )
    if len(folders) == 1:
        raise DataError(
            f"{folder} has one class folder, {quote(next(iter(folders)))}: expected at least two"
        )
    skipped.loose += count_loose_images(folder)
    skipped.broken += count_broken_links(folder)
    files, labels = [], []
    for label, path in enumerate(folders.values()):
        other = SkippedFiles()
        images = sorted(find_images(path, {folder_identity(p) for p in (*above, folder)}, other))
        if not images:
            contents = f" ({other})" if str(other) else ""
            foreign = [kind for kind in (+other.files) if kind in UNREAD_PICTURES]
            remedy = "convert them to JPEG or PNG" if foreign else "remove it"
            raise DataError(f"class folder {path} has no images{contents}: {remedy}")
        skipped.files.update(other.files)
        skipped.broken += other.broken
        skipped.hidden += other.hidden
        files += images
        labels += [label] * len(images)
    return FolderPart(folder, tuple(folders), files, labels)


def _read_annotations(folder: Path, skipped: SkippedFiles) -> FolderPart:
    """Read a part whose classes are listed in a text file, as for Tiny-ImageNet's validation set.

    Raises:
        DataError: If the file cannot be read, or names an image that does not exist.
    """
    path = folder / ANNOTATIONS_FILE
    names: dict[Path, str] = {}
    images = folder / "images" if (folder / "images").is_dir() else folder
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except ValueError as error:
        raise DataError(f"{path} is not text: {error}") from error
    for number, line in enumerate(filter(str.strip, lines), start=1):
        name, _, rest = line.partition("\t")
        label = class_names.from_folder(rest.partition("\t")[0].strip())
        file = images / name
        if not label or Path(name).name != name or not file.is_file():
            raise DataError(
                f"{path}: line {number} must be the name of a file in {images}, a "
                f"tab and a class, got {line[:60]!r}"
            )
        names[file] = label
    return _part_by_name(folder, path, names, images, skipped)


def _read_metadata(
    folder: Path, above: tuple[Path, ...], skipped: SkippedFiles
) -> FolderPart | None:
    """Read a part whose classes are listed in a table in its folder, or in a folder above.

    Returns:
        The part; None if there is no table, or it has no classes or covers other folders only:
        then folders are classes.

    Raises:
        DataError: If the table cannot be read, or its rows are not images in its folder.
    """
    inside = _descend(folder, part=True)
    for directory in dict.fromkeys((inside, folder, *above)):
        if (path := metadata_files.find(directory)) is None:
            continue
        classes = metadata_files.read(path)
        if classes is None:
            progress.note(f"{path} has no column of classes: it is ignored, folders are classes")
            continue
        names = {file: name for file, name in classes.items() if file.is_relative_to(inside)}
        if not names:
            continue
        progress.note(f"{path}: classes are read from this table; only the images in it are used")
        return _part_by_name(inside, path, names, inside, skipped)
    return None


def _part_by_name(
    folder: Path, table: Path, names: Mapping[Path, str], images: Path, skipped: SkippedFiles
) -> FolderPart:
    """Build a part from the class name of each image.

    Args:
        folder: Folder of the part.
        table: File that the names come from, for messages.
        names: Class name by image.
        images: Folder that contains all images of the part.
        skipped: Counter of the images without a name.

    Raises:
        DataError: If there are fewer than two classes.
    """
    classes = tuple(sorted({*names.values()}))
    if len(classes) < 2:
        raise DataError(f"{table} names {len(classes)} classes: expected at least two")
    unnamed = sum(1 for file in find_images(images, set(), SkippedFiles()) if file not in names)
    if unnamed:
        skipped.folders.append(f"{unnamed:,} images that {table.name} does not name")
    index = {name: label for label, name in enumerate(classes)}
    files = sorted(names, key=lambda file: (index[names[file]], file))
    return FolderPart(folder, classes, files, [index[names[file]] for file in files])


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
