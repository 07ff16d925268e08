"""The walk over a folder of images: which files count as images, and what is passed over."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dsdistill.harness.data import image_files
from dsdistill.harness.text import printable

# Leftovers of other programs, beside names that begin with a dot.
IGNORED_NAMES = {"__macosx", "@eadir", "__pycache__", "lost+found", "$recycle.bin", "#recycle"}
IGNORED_NAMES |= {"system volume information", "thumbs.db", "desktop.ini"}


@dataclass
class SkippedFiles:
    """What lies among the images and is not read.

    Attributes:
        files: How many, by extension.
        broken: Links to nothing.
        hidden: Images whose name begins with a dot.
        folders: With images, and no part of the data set.
        loose: Images beside the class folders.
    """

    files: Counter[str] = field(default_factory=Counter)
    broken: int = 0
    hidden: int = 0
    folders: list[str] = field(default_factory=list)
    loose: int = 0

    def __str__(self) -> str:
        kinds = sorted((+self.files).items(), key=lambda item: (-item[1], item[0]))
        parts = [f"{count:,} {kind}" for kind, count in kinds[:5]]
        if len(kinds) > 5:
            parts.append(f"{self.files.total():,} files that are no images in all")
        parts += [f"{self.broken:,} broken link{'s' * (self.broken > 1)}"] if self.broken else []
        parts += [f"{self.hidden:,} hidden"] if self.hidden else []
        parts += [f"{self.loose:,} beside the class folders"] if self.loose else []
        return ", ".join(parts + self.folders)


def subfolders(path: Path) -> list[Path]:
    """The folders inside that may hold images, links to folders among them, in order of names."""
    with os.scandir(path) as entries:
        names = [
            entry.name for entry in entries if _is_folder(entry) and not _is_ignored(entry.name)
        ]
    return [path / name for name in sorted(names)]


def _is_ignored(name: str) -> bool:
    return name[0] == "." or name.casefold() in IGNORED_NAMES


def holds_images(folder: Path) -> bool:
    """Whether there is an image at any depth."""
    return next(find_images(folder, set(), SkippedFiles()), None) is not None


def has_loose_images(folder: Path) -> bool:
    """Whether there is an image in the folder itself."""
    return next(_direct_images(folder), None) is not None


def count_loose_images(folder: Path) -> int:
    """How many images lie in the folder itself."""
    return sum(1 for _ in _direct_images(folder))


def _direct_images(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] != "." and _is_file(entry) and _is_image(entry):
                yield Path(entry.path)


def find_images(
    folder: Path, above: set[tuple[int, int]], skipped: SkippedFiles
) -> Iterator[Path]:
    """The images at any depth, as some data sets nest them.

    Links are followed, each folder once: a link back to one above it would never end.

    Args:
        folder: Of a class.
        above: Identities of the folders that hold it.
        left_out: Counts what is passed over.
    """
    seen, waiting = set(above), [folder]
    while waiting:
        where = waiting.pop()
        if (identity := folder_identity(where)) in seen:
            continue
        seen.add(identity)
        with os.scandir(where) as entries:
            for entry in entries:
                if _is_folder(entry):
                    if not _is_ignored(entry.name):
                        waiting.append(Path(entry.path))
                elif not _is_file(entry):  # a pipe would be waited for
                    skipped.broken += entry.is_symlink()
                    skipped.files["special"] += not entry.is_symlink()
                elif _is_image(entry):
                    if entry.name[0] != ".":
                        yield Path(entry.path)
                    else:
                        skipped.hidden += 1
                elif entry.name[0] != "." and entry.name.casefold() not in IGNORED_NAMES:
                    skipped.files[_extension_label(entry.name)] += 1


def count_broken_links(folder: Path) -> int:
    """How many links in the folder itself lead to nothing."""
    with os.scandir(folder) as entries:
        return sum(e.is_symlink() and not (_is_folder(e) or _is_file(e)) for e in entries)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):  # of links that go round in a circle
        return entry.is_dir()
    return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):
        return entry.is_file()
    return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    """By the extension; a file that has none is looked into."""
    extension = os.path.splitext(entry.name)[1].lower()
    if extension in image_files.extensions():
        return True
    plain = not re.fullmatch(r"\.[a-z][a-z0-9]*", extension)
    return (
        plain
        and entry.name[0] != "."
        and _is_file(entry)
        and image_files.has_image_signature(entry.path)
    )


def _extension_label(name: str) -> str:
    """What a file that is no image is called where such are counted."""
    extension = os.path.splitext(name)[1].lower()
    return printable(extension) if extension else "without extension"


def folder_identity(path: Path) -> tuple[int, int]:
    """What is one for all paths to a folder: its device and its number there."""
    found = path.stat()
    return found.st_dev, found.st_ino
