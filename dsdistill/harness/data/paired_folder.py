"""A second folder with another picture of every image: depth, infrared, a higher resolution.

    photos/train/cat/1.jpg    depth/train/cat/1.png
    photos/test/cat/9.jpg     depth/test/cat/9.png

Files belong together by their path below their folders, whatever the extension. Classes, parts and
what is held out are those of the first folder. The test part may be missing in the second one, as
what taught may not be there where the student is used.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from dsdistill.harness import paths
from dsdistill.harness.data import datasets, folders, mel_images, wav_files
from dsdistill.harness.data.datasets import Splits
from dsdistill.harness.data.labeled_images import DataError, LabeledImages
from dsdistill.harness.data.layout import FolderLayout
from dsdistill.harness.data.mel_images import MelFormat, MelOptions
from dsdistill.harness.data.walk import SkippedFiles, find_images
from dsdistill.harness.runs import progress
from dsdistill.harness.text import abbreviate_names


def load(path: Path, splits: Splits, layout: FolderLayout, image_size: int | None = None) -> Splits:
    """Load the second pictures, in the rows, classes and parts of the first ones.

    Recordings get the length and the bands of the first folder's, where these are recordings too.

    Args:
        path: The second folder.
        splits: Images of the first folder.
        layout: Layout of the first folder.
        image_size: As in `folders.read`, of the second pictures.

    Raises:
        DataError: If files do not belong together one by one, or cannot be read.
    """
    files = _match_files(path, layout)
    mel = _choose_format(path, files, splits.mel)
    store = folders.decode(path, paths.decoded_images(), files, mel or image_size)
    used = [splits.train, splits.validation, *([splits.test] if _has_test(files, layout) else [])]
    rows = np.concatenate([part.rows for part in used if part.rows is not None])
    if damaged := sorted({*rows.tolist()} & store.skipped.keys()):
        reasons = [f"{files[row].relative_to(path)}: {store.skipped[row]}" for row in damaged]
        raise DataError(
            f"{len(damaged)} files of {path} are unreadable ({abbreviate_names(reasons)}): repair "
            "them"
        )

    def paired(part: LabeledImages) -> LabeledImages:
        return replace(part, store=store.images)

    train, validation = paired(splits.train), paired(splits.validation)
    nothing = splits.test.select(np.zeros(0, np.int64))
    test = paired(splits.test if _has_test(files, layout) else nothing)
    digest = datasets.digest(LabeledImages(store.images, splits.train.labels[:0], ()))
    name = path.resolve().stem
    return Splits(name, train, validation, test, digest, splits.brings_validation, mel)


def _has_test(files: list[Path], layout: FolderLayout) -> bool:
    """Whether the second folder has the files of all parts."""
    return len(files) == len(layout.files)


def _match_files(path: Path, layout: FolderLayout) -> list[Path]:
    """The second file of each file of a layout; without those of the test part, if it has none.

    Raises:
        DataError: If a file has no counterpart, or several.
    """
    if not path.is_dir():
        raise DataError(f"no such folder: {path}")
    found: dict[Path, Path] = {}
    for file in sorted(find_images(path, set(), SkippedFiles())):
        name = file.relative_to(path).with_suffix("")
        if name in found:
            raise DataError(
                f"{path} has {found[name].name} and {file.name} in {file.parent}: keep one of them"
            )
        found[name] = file
    wanted = [file.relative_to(layout.root).with_suffix("") for file in layout.files]
    if layout.test and not {*wanted[layout.ends[1] :]} & found.keys():
        wanted = wanted[: layout.ends[1]]
        progress.note(f"{path} has no test part: its images are not judged on the test images")
    missing = [name for name in wanted if name not in found]
    if missing:
        names = abbreviate_names([str(name) for name in missing])
        raise DataError(
            f"{path} has no counterpart of {len(missing):,} of {len(wanted):,} files of "
            f"{layout.root} ({names}): the paths below the two folders must be the same, up to "
            "extensions"
        )
    if unused := len(found) - len(wanted):
        progress.note(f"{path}: {unused:,} files without a counterpart are left out")
    return [found[name] for name in wanted]


def _choose_format(path: Path, files: list[Path], first: MelFormat | None) -> MelFormat | None:
    """Format of the second folder's recordings; None of images."""
    recordings = sum(map(wav_files.is_wav, files))
    if recordings not in (0, len(files)):
        raise DataError(
            f"{path} holds {recordings:,} recordings and {len(files) - recordings:,} images: a "
            "data set is of one kind"
        )
    if not recordings:
        return None
    headers = mel_images.read_headers(files)
    asked = MelOptions() if first is None else MelOptions(None, first.seconds, first.bands)
    mel = asked.settle(headers)
    progress.note(f"{path}: {mel_images.describe_conversion(mel, headers)}")
    return mel
