"""Class of each image in one part of a folder, such as its training part.

A class is a folder, or a value in a table beside the images (`metadata_files`), or in the list of
Tiny-ImageNet's validation set.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

from dsdistill.harness.data import class_names, metadata_files, wav_files
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
from dsdistill.harness.text import quote

PART_KEYWORDS = {  # Hugging Face's, which include those of timm and torchvision
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
PART_BY_KEYWORD = {
    keyword: part for part, keywords in PART_KEYWORDS.items() for keyword in keywords
}
MAX_DEPTH = 3  # nested single folders that are followed, as unpacked archives have them
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

    def keep(self, wanted: Callable[[Path], bool]) -> "FolderPart":
        """The same part with some of its files."""
        kept = [wanted(file) for file in self.files]
        files, labels = (list(compress(x, kept)) for x in (self.files, self.labels))
        return replace(self, files=files, labels=labels)


def read_part(folder: Path, above: tuple[Path, ...], skipped: SkippedFiles) -> FolderPart:
    """Read the classes and files of one part, in the order of their folders.

    Raises:
        DataError: If there are fewer than two classes, a class has no images, or two classes have
            the same name.
    """
    if (folder / ANNOTATIONS_FILE).is_file():
        return _read_annotations(folder, skipped)
    if (table := read_table(folder, above, skipped)) is not None:
        return table
    inside = descend(folder, part=True)
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
            remedy = _remedy(+other.files)
            raise DataError(f"class folder {path} has no images{contents}: {remedy}")
        skipped.files.update(other.files)
        skipped.broken += other.broken
        skipped.hidden += other.hidden
        files += images
        labels += [label] * len(images)
    return FolderPart(folder, tuple(folders), files, labels)


def _remedy(kinds: Iterable[str]) -> str:
    """What to do about a class folder that holds files of these extensions alone."""
    if UNREAD_PICTURES & {*kinds}:
        return "convert them to JPEG or PNG"
    return "convert them to WAV" if wav_files.UNREAD_RECORDINGS & {*kinds} else "remove it"


def is_labelled(folder: Path) -> bool:
    """Whether the images of a part have classes; an unlabelled test set has none."""
    if (folder / ANNOTATIONS_FILE).is_file() or metadata_files.find(folder):
        return True
    return any(map(holds_images, subfolders(folder)))


def descend(path: Path, *, part: bool = False) -> Path:
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
        if len(inside) > 1 or (len(inside) == 1 and part_name(inside[0].name) and not part):
            return inner
        if not inside or has_loose_images(inner):
            break
        inner = inside[0]
    return path


def part_name(name: str) -> str | None:
    """The part that a folder's name means by itself; None for any other name."""
    return PART_BY_KEYWORD.get(name.casefold())


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


def read_table(folder: Path, above: tuple[Path, ...], skipped: SkippedFiles) -> FolderPart | None:
    """Read a part whose classes are listed in a table in its folder, or in a folder above.

    Returns:
        The part; None if there is no table, or it has no classes or covers other folders only:
        then folders are classes.

    Raises:
        DataError: If the table cannot be read, or its rows are not images in its folder.
    """
    inside = descend(folder, part=True)
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
