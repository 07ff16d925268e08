"""Which files of a folder are images of which class, and for training, validation or test.

    photos/train/cat/1.jpg    photos/val/cat/7.jpg    photos/test/cat/9.jpg     three parts
    photos/Training/cat/1.jpg photos/Testing/cat/7.jpg                          two
    photos/cat/1.jpg          photos/dog/2.jpg                                  none

The names of the parts are those that torchvision, timm and Hugging Face know, in any case, alone or
with something else that all parts share (`seg_train` and `seg_test`, `train2017` and `val2017`).
`test` is tested on and `val` chosen by. Where there is no `test` with classes, `val` is tested on
and the images to choose by are held out of `train`, as with a folder that has no parts at all.

A class is a folder, or stands in a table beside the images (`metadata_files`).

Nothing is read here but folders, tables, and files without an extension.
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
from dsdistill.harness.text import abbreviate_names

PART_KEYWORDS = {  # of a part: Hugging Face's, which include those of timm and torchvision
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
PART_BY_KEYWORD = {
    keyword: part for part, keywords in PART_KEYWORDS.items() for keyword in keywords
}
_ANY_KEYWORD = "|".join(sorted(PART_BY_KEYWORD, key=len, reverse=True))
_KEYWORD_IN_NAME = re.compile(rf"(?<![a-z])({_ANY_KEYWORD})(?:set)?(?![a-z])")
MAX_DEPTH = 3  # folders in folders that are followed, as unpacking archives leaves them
# Folders beside `images` that hold pictures of something else than a class.
BESIDE_IMAGES = {"annotation", "annotations", "labels", "masks", "segmentations", "trimaps"}
ANNOTATIONS_FILE = "val_annotations.txt"  # of Tiny-ImageNet: name of a file, tab, class, and a box


@dataclass(frozen=True, eq=False)
class FolderPart:
    """The images of one part.

    Attributes:
        folder: Where they lie.
        classes: Names, in label order.
        files: Paths, class by class.
        labels: A class index each.
    """

    folder: Path
    classes: tuple[str, ...]
    files: list[Path]
    labels: list[int]

    def reorder(self, classes: Sequence[str]) -> "FolderPart":
        """The part with its classes in another order.

        Args:
            classes: The same classes, as `class_names.match` has it.
        """
        order = class_names.match(classes, self.classes)
        assert order is not None, f"{classes} and {self.classes} are other classes"
        members: list[list[Path]] = [[] for _ in self.classes]
        for file, label in zip(self.files, self.labels, strict=True):
            members[label].append(file)
        files = [file for label in order for file in members[label]]
        labels = [new for new, old in enumerate(order) for _ in members[old]]
        return FolderPart(self.folder, tuple(classes), files, labels)


@dataclass(frozen=True, eq=False)
class FolderLayout:
    """The images of a folder by part.

    Attributes:
        root: The folder, or the one inside it that holds the data.
        train: All of them where the folder has no parts.
        validation, test: None where the folder has none.
        left_out: In words; empty where nothing is.
        draw_order: Class indices in the order of the folders' names as text, by which images are
            held out: the same ones whatever the order of the classes.
    """

    root: Path
    train: FolderPart
    validation: FolderPart | None
    test: FolderPart | None
    skipped: str
    draw_order: tuple[int, ...]

    @property
    def files(self) -> list[Path]:
        """All images: of training, validation and test."""
        return [file for part in self._parts for file in part.files]

    @property
    def labels(self) -> list[int]:
        """One class index a file."""
        return [label for part in self._parts for label in part.labels]

    @property
    def ends(self) -> tuple[int, int]:
        """Where among `files` the training and the validation images end."""
        train = len(self.train.files)
        return train, train + (len(self.validation.files) if self.validation else 0)

    @property
    def _parts(self) -> list[FolderPart]:
        return [part for part in (self.train, self.validation, self.test) if part]

    def announce(self, train: int, validation: int, test: int) -> None:
        """Tell the user what was taken for what, and the order of the classes if it matters."""
        progress.note(self.summary(train, validation, test))
        self._announce_order()

    def _announce_order(self) -> None:
        if order := class_names.order_note(self.train.classes):
            progress.note(f"{self.root}: {order}")

    def announce_evaluation(self, count: int, *, every: bool) -> None:
        """Tell the user which images a finished model is judged on; nothing is trained on here.

        Args:
            count: Their number.
            every: Whether they are all that the folder has.
        """
        if self.test:
            which = f"from {_relative_name(self.root, self.test.folder)}"
        else:
            which = "all of them" if every else "the share that is held out of them for the test"
        line = f"{self.root}: {count:,} images of {len(self.train.classes)} classes are judged"
        progress.note(f"{line}, {which}{self._without}")
        self._announce_order()

    def summary(self, train: int, validation: int, test: int) -> str:
        """One line on what was taken for what; the numbers are those of the images used."""
        inside = _relative_name(self.root, self.train.folder)
        held = f"held out of {inside or 'them'}"
        words = (
            f"{train:,} training images of {len(self.train.classes)} classes{_from_clause(inside)}",
            f"{validation:,} for validation, "
            + (
                f"from {_relative_name(self.root, self.validation.folder)}"
                if self.validation
                else held
            ),
            f"{test:,} for the test, "
            + (f"from {_relative_name(self.root, self.test.folder)}" if self.test else held),
        )
        line = f"{self.root}: {'; '.join(words)}"
        return line + self._without

    @property
    def _without(self) -> str:
        return f"; left out: {self.skipped}" if self.skipped else ""


def list_folder(path: Path, classes: Sequence[str] | None = None) -> FolderLayout:
    """Find the images of a folder.

    Args:
        path: The folder.
        classes: The order of the classes, where it is known; it is kept if the folder has just
            these classes, by name or, where all are numbers, by value.

    Raises:
        DataError: If the folders do not make a data set, or could make several.
        OSError: If one of them cannot be read.
    """
    if not path.is_dir():
        raise DataError(f"no such folder: {path}")
    skipped = SkippedFiles()
    root = _descend(path)
    _refuse_images_beside_annotations(root)
    roles = _find_parts(root, skipped)
    train = _read_part(roles.get("train", root), (root,), skipped)
    as_text, order = train.classes, class_names.sort(train.classes)
    if classes is not None and class_names.match(classes, train.classes) is not None:
        order = tuple(classes)
    train = train.reorder(order)
    draw_order = class_names.match(as_text, order)
    assert draw_order is not None, "they are the same classes"
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
    """The test part of a folder that has no part to train on, or its validation part if alone.

    What is only judged needs none to train on, which `list_folder` asks for. None for any other
    folder.
    """
    named: dict[str, list[Path]] = {}
    for folder in subfolders(_descend(path)):
        if (part := _part_name(folder.name)) and _is_labelled(folder):
            named.setdefault(part, []).append(folder)
    candidates = named.get("test") or named.get("validation") or []
    return candidates[0] if "train" not in named and len(candidates) == 1 else None


def _descend(path: Path, *, part: bool = False) -> Path:
    """The folder that holds the data: `zipped/zipped` where `zipped` holds nothing else.

    Args:
        path: Where to begin.
        part: Whether it is one part, in which a folder `train` holds classes and is no part.
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
    """The folder of each part; none where `root` holds class folders."""
    folders = [folder for folder in subfolders(root) if holds_images(folder)]
    named: dict[str, list[Path]] = {}
    for folder in folders:
        if part := _part_name(folder.name):
            named.setdefault(part, []).append(folder)
    for part, candidates in _find_compound_names(folders).items():
        named.setdefault(part, candidates)
    taken = {folder for candidates in named.values() for folder in candidates}
    others = [folder for folder in folders if folder not in taken]
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
            f"{parts['train']} has images and no class folders: expected one folder of "
            "images a class (if it is a class itself, rename it)"
        )
    for folder in (*others, *sorted(taken - {*parts.values()})):
        skipped.folders.append(f"{_relative_name(root, folder)} (no part)")
    for folder in subfolders(root):
        if _part_name(folder.name) and folder not in folders:
            skipped.folders.append(f"{_relative_name(root, folder)} (no images)")
    skipped.loose += count_loose_images(root)
    return parts


def _part_name(name: str) -> str | None:
    """Which part a folder's name means by itself."""
    return PART_BY_KEYWORD.get(name.casefold())


def _find_compound_names(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Folders such as `seg_train` and `seg_test`, whose names differ in the word of the part."""
    stems: dict[str, dict[str, list[Path]]] = {}
    for folder in folders:
        name = folder.name.casefold()
        if len(words := _KEYWORD_IN_NAME.findall(name)) == 1:
            parts = stems.setdefault(_KEYWORD_IN_NAME.sub("", name), {})
            parts.setdefault(PART_BY_KEYWORD[words[0]], []).append(folder)
    whole = [parts for parts in stems.values() if "train" in parts and len(parts) > 1]
    return whole[0] if len(whole) == 1 else {}


def _are_classes(root: Path, named: dict[str, list[Path]], others: Sequence[Path]) -> bool:
    """Whether folders that are named as parts are classes, as a train among vehicles is.

    Raises:
        DataError: If nobody can know.
    """
    if metadata_files.find(root):
        return False  # no folder is a class there, and the table says which images count
    labelled = {part for part, candidates in named.items() if any(map(_is_labelled, candidates))}
    if not others or {"train"} < labelled:
        return False
    alike = all(_KEYWORD_IN_NAME.search(folder.name.casefold()) for folder in others)
    if not labelled and len(named) == 1 and not alike:
        return True
    parts = [folder for candidates in named.values() for folder in candidates]
    raise DataError(
        f"{root} has {_list_names(parts)} beside {_list_names(others)}: if they are parts, give the "
        "path of one, or move the others away; if they are classes, rename them"
    )


def _choose_candidate(root: Path, candidates: Sequence[Path]) -> Path:
    """The one folder of a part, or of several the one that has classes.

    Raises:
        DataError: If several have.
    """
    labelled = [folder for folder in candidates if _is_labelled(folder)]
    if len(labelled) > 1:
        raise DataError(
            f"{root} has {_list_names(labelled)}, which mean the same part: leave one of them, "
            "or move the other away"
        )
    return (labelled or candidates)[0]


def _is_labelled(folder: Path) -> bool:
    """Whether the images of a part have classes; those of a hidden test often have none."""
    if (folder / ANNOTATIONS_FILE).is_file() or metadata_files.find(folder):
        return True
    return any(map(holds_images, subfolders(folder)))


def _read_beside_train(
    folder: Path, root: Path, train: FolderPart, skipped: SkippedFiles
) -> FolderPart | None:
    """A part beside that of training, in the order of its classes; None if it has no classes.

    Raises:
        DataError: If its classes are others.
    """
    if (table := _read_metadata(folder, (root,), skipped)) is not None:
        return _same_classes(train, table)
    inside = [f for f in subfolders(folder) if holds_images(f)]
    alone = len(inside) == 1 and class_names.from_folder(inside[0].name) not in train.classes
    flat = alone and not any(map(holds_images, subfolders(inside[0])))
    if not (folder / ANNOTATIONS_FILE).is_file() and (not inside or flat):
        skipped.folders.append(f"{_relative_name(root, folder)} (images without classes)")
        return None
    return _same_classes(train, _read_part(folder, (root,), skipped))


def _same_classes(train: FolderPart, part: FolderPart) -> FolderPart:
    """A part in the order of the classes of the training part.

    Raises:
        DataError: If its classes are others.
    """
    if class_names.match(train.classes, part.classes) is None:
        different = sorted({*train.classes} ^ {*part.classes})
        raise DataError(
            f"{train.folder} and {part.folder} must have the same classes: "
            f"only one of them has {abbreviate_names(different)}"
        )
    return part.reorder(train.classes)


def _read_part(folder: Path, above: tuple[Path, ...], skipped: SkippedFiles) -> FolderPart:
    """The classes and files of one part, in the order of their folders.

    Raises:
        DataError: If there are fewer than two classes, one has no images, or two have one name.
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
                f"{folder} has two folders of one name, {name!r}, which differ in how "
                "they write it: merge them, or rename one"
            )
        folders[name] = path
    if not folders:
        raise DataError(
            f"{folder} has no class folders: expected one folder of images a class, or a "
            "metadata.csv with the columns file_name and label"
        )
    if len(folders) == 1:
        raise DataError(
            f"{folder} has one class folder, {next(iter(folders))!r}: expected at least two"
        )
    skipped.loose += count_loose_images(folder)
    skipped.broken += count_broken_links(folder)
    files, labels = [], []
    for label, path in enumerate(folders.values()):
        other = SkippedFiles()
        images = sorted(find_images(path, {folder_identity(p) for p in (*above, folder)}, other))
        if not images:
            what = f" ({other})" if str(other) else ""
            raise DataError(f"class folder {path} has no images{what}: remove it")
        skipped.files.update(other.files)
        skipped.broken += other.broken
        skipped.hidden += other.hidden
        files += images
        labels += [label] * len(images)
    return FolderPart(folder, tuple(folders), files, labels)


def _read_annotations(folder: Path, skipped: SkippedFiles) -> FolderPart:
    """A part whose classes stand in a text file, as Tiny-ImageNet's validation images.

    Raises:
        DataError: If the file cannot be read, or names an image that is not there.
    """
    path = folder / ANNOTATIONS_FILE
    found: dict[Path, str] = {}
    where = folder / "images" if (folder / "images").is_dir() else folder
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except ValueError as error:
        raise DataError(f"{path} is no text: {error}") from error
    for number, line in enumerate(filter(str.strip, lines), start=1):
        name, _, rest = line.partition("\t")
        label = class_names.from_folder(rest.partition("\t")[0].strip())
        file = where / name
        if not label or Path(name).name != name or not file.is_file():
            raise DataError(
                f"{path}: line {number} must be the name of a file in {where}, a "
                f"tab and a class, got {line[:60]!r}"
            )
        found[file] = label
    return _part_by_name(folder, path, found, where, skipped)


def _read_metadata(
    folder: Path, above: tuple[Path, ...], skipped: SkippedFiles
) -> FolderPart | None:
    """A part whose classes stand in a table in its folder, or in one above it.

    Returns:
        None where there is no table, or one without classes or about other folders alone: then
        folders are classes.

    Raises:
        DataError: If the table cannot be read, or its rows are not of images in its folder.
    """
    inside = _descend(folder, part=True)
    for place in dict.fromkeys((inside, folder, *above)):
        if (path := metadata_files.find(place)) is None:
            continue
        classes = metadata_files.read(path)
        if classes is None:
            progress.note(f"{path} has no column of classes: it is not read, folders are classes")
            continue
        here = {file: name for file, name in classes.items() if file.is_relative_to(inside)}
        if not here:
            continue
        progress.note(f"{path}: the classes stand in it, and its images are those that it names")
        return _part_by_name(inside, path, here, inside, skipped)
    return None


def _part_by_name(
    folder: Path, table: Path, names: Mapping[Path, str], where: Path, skipped: SkippedFiles
) -> FolderPart:
    """A part whose images have these class names.

    Args:
        folder: Of the part.
        table: The file that gives the names.
        names: A class name by image.
        where: Which folder all images of the part lie in.
        left_out: Counts the images without a name.

    Raises:
        DataError: If there are fewer than two classes.
    """
    classes = tuple(sorted({*names.values()}))
    if len(classes) < 2:
        raise DataError(f"{table} names {len(classes)} classes: expected at least two")
    unnamed = sum(1 for file in find_images(where, set(), SkippedFiles()) if file not in names)
    if unnamed:
        skipped.folders.append(f"{unnamed:,} images that {table.name} does not name")
    index = {name: label for label, name in enumerate(classes)}
    files = sorted(names, key=lambda file: (index[names[file]], file))
    return FolderPart(folder, classes, files, [index[names[file]] for file in files])


def _refuse_images_beside_annotations(root: Path) -> None:
    """Refuse `images/` and `annotations/` as two classes, as Oxford-IIIT Pet ships with masks.

    Raises:
        DataError: With the way to arrange them.
    """
    folders = {folder.name.casefold(): folder for folder in subfolders(root)}
    others = [folders[name] for name in sorted(BESIDE_IMAGES & folders.keys())]
    if "images" not in folders or not others or metadata_files.find(root):
        return
    images = folders["images"]
    if (others[0] / "trainval.txt").is_file() and has_loose_images(images):
        raise DataError(
            f"{root} is as the Oxford-IIIT Pet data set ships, with its classes in the names of "
            f"the files: put each image that {others[0] / 'trainval.txt'} names into "
            f"{root / 'train'}/CLASS and each of test.txt into {root / 'test'}/CLASS, where CLASS "
            "is the name without its number; docs/folders.md has the lines"
        )
    if {*folders} - {"images", *BESIDE_IMAGES} or not any(map(holds_images, others)):
        return
    remedy = (
        f"give the path {images}"
        if any(map(holds_images, subfolders(images)))
        else "put the images into one folder a class"
    )
    raise DataError(
        f"{root} has images/ beside {_list_names(others)}, which are no classes: {remedy}"
    )


def _relative_name(root: Path, folder: Path) -> str:
    return "" if folder == root else f"{folder.relative_to(root)}/"


def _from_clause(inside: str) -> str:
    return f" from {inside}" if inside else ""


def _list_names(folders: Iterable[Path]) -> str:
    return abbreviate_names([f"{folder.name}/" for folder in folders])
