"""Read published sets that consist of image files in one folder per class.

    new000/class000_id000.jpg              SRe2L and its successors
    00000/class00000_id00000.jpg           RDED
    n01440764/1.JPEG                       named like the classes of the data

Source: VILA-Lab/SRe2L (`recover/data_synthesis.py`) and LINs-lab/RDED (`synthesize/main.py`).
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from dsdistill.harness import memory
from dsdistill.harness.data import class_names, folder_names
from dsdistill.harness.errors import UserError, first_line
from dsdistill.harness.text import abbreviate_names, quote
from dsdistill.published_sets.files import RawSet

SUFFIXES = (".jpg", ".jpeg", ".png")


def holds_classes(folder: Path) -> bool:
    """Whether subfolders hold images."""
    subfolders = (p for p in folder.iterdir() if p.is_dir())
    return any(_is_picture(file) for p in subfolders for file in p.iterdir())


def read(path: Path, classes: Sequence[str], shape: tuple[int, int, int]) -> RawSet:
    """Read a folder of class folders.

    Args:
        path: The folder.
        classes: Class names of the data, to match the names of the class folders.
        shape: Height, width and channels of the data, to which images are converted.

    Raises:
        UserError: If the classes do not match, or an image cannot be read.
    """
    names = sorted(p.name for p in path.iterdir() if p.is_dir() and p.name[0] != ".")
    order, note = _order(path, names, classes)
    files, labels = [], []
    for name, label in zip(names, order, strict=True):
        members = sorted(p for p in (path / name).iterdir() if _is_picture(p))
        if not members:
            raise UserError(f"class folder {path / name} has no images ({', '.join(SUFFIXES)})")
        files += members
        labels += [label] * len(members)
    # One copy as bytes and two in float32.
    memory.require(9 * len(files) * math.prod(shape), str(path), "use a smaller --image-size")
    decoded = [_picture(file, shape) for file in files]
    resized = sum(was_resized for _, was_resized in decoded)
    notes = (note, f"{resized} images were resized to {shape[0]}x{shape[1]}")
    images = np.stack([pixels for pixels, _ in decoded])
    return RawSet(
        "folder",
        images,
        np.array(labels),
        tuple(files),
        notes if resized else (note,),
        pixels="bytes",
        labels_as="index",
    )


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and file.name[0] != "."


def _order(path: Path, names: list[str], classes: Sequence[str]) -> tuple[list[int], str]:
    """The label of each class folder, and a note on how folders were matched to classes."""
    for known in (classes, folder_names.from_classes(classes)):  # as `dsdistill export` writes them
        if (labels := class_names.match(names, known)) is None:
            continue
        if class_names.are_numbers(names) and set(names) != set(known):
            return list(labels), _number_note(names, labels, classes)
        return list(labels), "class folders were matched by name"
    matches = [re.fullmatch(r"(\D*)(\d+)", name) for name in names]
    numbered = [(match[1], int(match[2])) for match in matches if match]
    order = [index for _, index in numbered]
    if len({prefix for prefix, _ in numbered}) == 1 and sorted(order) == list(range(len(classes))):
        return order, _number_note(names, order, classes)
    raise UserError(
        f"{path} must have a folder for each class of the data, by name or numbered from 0: it has "
        f"{len(names)} ({abbreviate_names(names)}), the data has {len(classes)} "
        f"({abbreviate_names(classes)})"
    )


def _number_note(names: Sequence[str], order: Sequence[int], classes: Sequence[str]) -> str:
    return f"class folders were matched by number: {names[0]} is {quote(classes[order[0]])}"


def _picture(file: Path, shape: tuple[int, int, int]) -> tuple[UInt8[np.ndarray, "h w c"], bool]:
    """Pixels at the data's size and channels, and whether the image was resized."""
    h, w, channels = shape
    try:
        with Image.open(file, formats=("JPEG", "PNG")) as image:
            if image.mode[0] in "IF":  # Pillow would clip them at 255
                raise ValueError("more than 8 bits per channel")
            plain = image.convert("L" if channels == 1 else "RGB")
        resized = plain.size != (w, h)
        if resized:  # Pillow averages over all pixels that a smaller image's pixel covers
            plain = ImageOps.fit(plain, (w, h), Image.Resampling.BILINEAR)
    except Exception as error:  # a damaged file has many ways to fail, SyntaxError among them
        raise UserError(
            f"{file} is not a readable image: {first_line(error, kind=True)}"
        ) from error
    return np.asarray(plain).reshape(shape), resized
