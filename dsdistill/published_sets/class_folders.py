"""Published sets that are folders of pictures, one folder a class.

    new000/class000_id000.jpg              SRe2L and its successors
    00000/class00000_id00000.jpg           RDED
    n01440764/1.JPEG                       named as the data's own classes

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
from dsdistill.harness.errors import UserError
from dsdistill.harness.text import abbreviate_names
from dsdistill.published_sets.files import RawSet, error_line

SUFFIXES = (".jpg", ".jpeg", ".png")


def holds_classes(folder: Path) -> bool:
    """Whether there are pictures in folders inside."""
    inside = (p for p in folder.iterdir() if p.is_dir())
    return any(_is_picture(file) for p in inside for file in p.iterdir())


def read(path: Path, classes: Sequence[str], shape: tuple[int, int, int]) -> RawSet:
    """Read a folder of class folders.

    Args:
        path: The folder.
        classes: Of the data, to match the names of the class folders.
        shape: Height, width and channels of the data, which pictures are brought to.

    Raises:
        UserError: If the classes do not match, or a picture cannot be read.
    """
    names = sorted(p.name for p in path.iterdir() if p.is_dir() and p.name[0] != ".")
    order, note = _order(path, names, classes)
    files, labels = [], []
    for name, label in zip(names, order, strict=True):
        found = sorted(p for p in (path / name).iterdir() if _is_picture(p))
        if not found:
            raise UserError(f"class folder {path / name} has no images ({', '.join(SUFFIXES)})")
        files += found
        labels += [label] * len(found)
    # As bytes and as two copies in float32.
    memory.require(9 * len(files) * math.prod(shape), str(path), "use a smaller --image-size")
    decoded = [_picture(file, shape) for file in files]
    changed = sum(resized for _, resized in decoded)
    notes = (note, f"{changed} images were resized to {shape[0]}x{shape[1]}")
    images = np.stack([pixels for pixels, _ in decoded])
    return RawSet(
        "folder",
        images,
        np.array(labels),
        tuple(files),
        notes if changed else (note,),
        pixels="bytes",
        labels_as="index",
    )


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and file.name[0] != "."


def _order(path: Path, names: list[str], classes: Sequence[str]) -> tuple[list[int], str]:
    """The label of each class folder, and what it was matched by."""
    for known in (classes, folder_names.from_classes(classes)):  # as `dsdistill export` writes them
        if (place := class_names.match(names, known)) is None:
            continue
        if class_names.are_numbers(names) and set(names) != set(known):
            return list(place), _number_note(names, place, classes)
        return list(place), "class folders were matched by name"
    numbered = [re.fullmatch(r"(\D*)(\d+)", name) for name in names]
    found = [(match[1], int(match[2])) for match in numbered if match]
    order = [index for _, index in found]
    if len({prefix for prefix, _ in found}) == 1 and sorted(order) == list(range(len(classes))):
        return order, _number_note(names, order, classes)
    raise UserError(
        f"{path} must have a folder for each class of the data, by name or numbered from 0: it has "
        f"{len(names)} ({abbreviate_names(names)}), the data has {len(classes)} ({abbreviate_names(classes)})"
    )


def _number_note(names: Sequence[str], order: Sequence[int], classes: Sequence[str]) -> str:
    return f"class folders were matched by number: {names[0]} is {classes[order[0]]!r}"


def _picture(file: Path, shape: tuple[int, int, int]) -> tuple[UInt8[np.ndarray, "h w c"], bool]:
    """Pixels at the data's size and channels, and whether they had another size."""
    h, w, channels = shape
    try:
        with Image.open(file, formats=("JPEG", "PNG")) as image:
            if image.mode[0] in "IF":  # Pillow would clip them at 255
                raise ValueError("more than 8 bits a channel")
            plain = image.convert("L" if channels == 1 else "RGB")
        resized = plain.size != (w, h)
        if resized:  # Pillow's resampling averages over all pixels that one replaces
            plain = ImageOps.fit(plain, (w, h), Image.Resampling.BILINEAR)
    except Exception as error:  # a damaged file has many ways to fail, SyntaxError among them
        raise UserError(f"{file} is not a readable image: {error_line(error)}") from error
    return np.asarray(plain).reshape(shape), resized
