"""Walk over a folder of images: which files count as images, and what is skipped.

A recording counts as an image here, since it becomes one (`mel_images`).
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dsdistill.harness.data import image_files, wav_files
from dsdistill.harness.text import printable

# Leftovers of other programs, besides names that start with a dot.
IGNORED_NAMES = {"__macosx", "@eadir", "__pycache__", "lost+found", "$recycle.bin", "#recycle"}
IGNORED_NAMES |= {"system volume information", "thumbs.db", "desktop.ini"}


@dataclass
class SkippedFiles:
    """Counts of what lies among the images and is not read.

    Attributes:
        files: Number of files by extension.
        broken: Number of broken links.
        hidden: Number of images whose name starts with a dot.
        folders: Descriptions of folders with images that are not part of the data set.
        loose: Number of images beside the class folders.
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
    """Subfolders that may contain images, including links to folders, sorted by name."""
    with os.scandir(path) as entries:
        names = [
            entry.name for entry in entries if _is_folder(entry) and not _is_ignored(entry.name)
        ]
    return [path / name for name in sorted(names)]


def _is_ignored(name: str) -> bool:
    return name[0] == "." or name.casefold() in IGNORED_NAMES


def holds_images(folder: Path) -> bool:
    """Whether a folder contains an image at any depth."""
    return next(find_images(folder, set(), SkippedFiles()), None) is not None


def has_loose_images(folder: Path) -> bool:
    """Whether a folder contains an image directly."""
    return next(_direct_images(folder), None) is not None


def count_loose_images(folder: Path) -> int:
    """Number of images directly in a folder."""
    return sum(1 for _ in _direct_images(folder))


def _direct_images(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] != "." and _is_file(entry) and _is_image(entry):
                yield Path(entry.path)


def find_images(folder: Path, above: set[tuple[int, int]], skipped: SkippedFiles) -> Iterator[Path]:
    """Yield the images of a folder at any depth, as some data sets nest them.

    Links are followed, but each folder is visited once: a link to a parent would never end.

    Args:
        folder: Folder of a class.
        above: Identities of the folders that contain it.
        skipped: Counter of what is not an image.
    """
    visited, pending = set(above), [folder]
    while pending:
        current = pending.pop()
        if (identity := folder_identity(current)) in visited:
            continue
        visited.add(identity)
        with os.scandir(current) as entries:
            for entry in entries:
                if _is_folder(entry):
                    if not _is_ignored(entry.name):
                        pending.append(Path(entry.path))
                elif not _is_file(entry):  # opening a pipe would block
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
    """Number of broken links directly in a folder."""
    with os.scandir(folder) as entries:
        return sum(e.is_symlink() and not (_is_folder(e) or _is_file(e)) for e in entries)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):  # circular links
        return entry.is_dir()
    return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):
        return entry.is_file()
    return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Whether a file is an image, by its extension; without one, by its signature."""
    extension = os.path.splitext(entry.name)[1].lower()
    if extension in wav_files.EXTENSIONS or extension in image_files.extensions():
        return True
    without_extension = not re.fullmatch(r"\.[a-z][a-z0-9]*", extension)
    return (
        without_extension
        and entry.name[0] != "."
        and _is_file(entry)
        and image_files.has_image_signature(entry.path)
    )


def _extension_label(name: str) -> str:
    """Label under which a file that is not an image is counted."""
    extension = os.path.splitext(name)[1].lower()
    return printable(extension) if extension else "without extension"


def folder_identity(path: Path) -> tuple[int, int]:
    """Device and inode of a folder, the same for all paths to it."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino
