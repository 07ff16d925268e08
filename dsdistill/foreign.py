"""Distilled sets that other projects published, read as sets of our own.

A published file holds images and labels, and seldom says in which range, layout or encoding.
The user may state it; otherwise it is decided from evidence, and every decision is noted in the
set's provenance. What contradicts the evidence is refused before anything is trained, since a
set that is misread brings every learner to chance and looks like a bad set.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dsdistill.foreign_sets import files, labels, pictures, pixels
from dsdistill.foreign_sets.files import Raw
from dsdistill.harness import artifact
from dsdistill.harness.artifact import Distilled
from dsdistill.harness.errors import UserError
from dsdistill.harness.labeled import Labeled
from dsdistill.harness.preprocess import Chunks, Preprocess

SIGMAS = 3.0  # standard errors within which an accuracy is that of chance


@dataclass(frozen=True)
class Stated:
    """What the user says of a published set; `auto` is decided from evidence.

    Attributes:
        pixels: Mean 0 and deviation 1 by `mean` and `std`, in [0, 1], 0 to 255, or whitened.
        labels: Class numbers, one-hot rows, rows that sum to 0, rows that sum to 1, or any rows.
        mean, std: Of the training images in [0, 1], one a channel, for standardised pixels.
        layout: Order of the images' axes.
    """

    pixels: Literal["auto", "standardised", "unit", "bytes", "zca", "zca-mtt"] = "auto"
    labels: Literal["auto", "index", "one-hot", "centred", "probabilities", "logits"] = "auto"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    layout: Literal["auto", "nchw", "nhwc"] = "auto"


def is_foreign(path: Path) -> bool:
    """Whether a path is for `load` to read, and is no set of our own."""
    if not path.is_dir():
        return path.suffix in files.SUFFIXES
    ours = (path / artifact.FILE).exists()
    return not ours and (files.holds_pair(path) or pictures.holds_classes(path))


def load(
    path: Path,
    train: Labeled,
    stated: Stated,
    *,
    preprocess: Preprocess,
    data: str = "",
    chunks: Chunks | None = None,
) -> Distilled:
    """Read a published set.

    Standardised pixels stay as published, and test images will be standardised by the same
    constants; so do whitened ones, with a whitening that is fitted again. Pixels in [0, 1] or bytes
    are mapped by `preprocess`.

    Args:
        path: A `.pt`, `.pth` or `.npz` file; a folder with MTT's two files; a folder of class
            folders with pictures.
        train: Training images of the data that the set was distilled from.
        stated: What the user says of the set.
        preprocess: The standardisation fitted on `train`.
        data: The data's name, one of `datasets.NAMES`. Where it is empty, the set's own path may
            name it; the name chooses the constants by which its project standardised.
        chunks: All training images, those held out for validation too, to fit a whitening on;
            those of `train`.

    Returns:
        The set; `provenance["notes"]` tells every decision.

    Raises:
        UserError: If the set cannot be read, or is not plausible as what it is stated to be.
    """
    _check_statement(stated)
    raw = _read(path, train)
    images, layout = pixels.arranged(path, raw.images, train.shape, stated.layout)
    kind, why = pixels.decided(path, images, raw, stated.pixels)
    fitted, whose = preprocess, "the preprocessing is this data's own"
    if kind == "standardised":
        constants = None if stated.mean is None or stated.std is None else (stated.mean, stated.std)
        fitted, whose = pixels.standardisation(path, raw, constants, preprocess, data)
    elif stated.mean is not None:
        raise UserError(f"{path}: pixels are {kind} ({why}), --mean and --std standardised ones'")
    elif kind in pixels.WHITENED:
        fitted, whose = pixels.whitening(kind, chunks or train.chunks, train.shape)
    else:
        images = preprocess.apply(images / np.float32(255) if kind == "bytes" else images)
    encoding, targets = labels.encoded(path, raw, stated.labels, train.classes)
    notes = [
        *raw.notes,
        f"layout: {layout}",
        f"pixels: {kind} ({why}); {whose}",
        f"labels: {encoding}{' (stated)' if stated.labels == encoding else ''}",
        *labels.unequal(targets.argmax(1), len(train.classes)),
    ]
    made = _provenance(path, raw, stated, notes)
    return Distilled(np.ascontiguousarray(images), targets, fitted, train.classes, made)


def hint(accuracy: float, chance: float, test_images: int) -> str | None:
    """What to check where the best learner on a published set is no better than chance.

    Args:
        accuracy: The best, as a fraction.
        chance: Accuracy of always answering the commonest class.
        test_images: On which the accuracy was measured; they set its standard error.
    """
    if accuracy > chance + SIGMAS * math.sqrt(chance * (1 - chance) / test_images):
        return None
    return (
        f"No learner is better than chance ({accuracy:.3f} of {test_images} test images, chance "
        f"{chance:.3f}): check --pixels, --mean and --std, --labels, --layout, and that the "
        "set's classes are in the order of the data's."
    )


def _check_statement(stated: Stated) -> None:
    if (stated.mean is None) != (stated.std is None):
        raise UserError("--mean and --std go together: give both, or neither")
    if stated.mean is not None and stated.pixels not in ("auto", "standardised"):
        raise UserError(f"--mean and --std are for --pixels standardised, not {stated.pixels}")


def _read(path: Path, train: Labeled) -> Raw:
    if path.is_dir() and not files.holds_pair(path):
        raw = pictures.read(path, train.classes, train.shape)
    else:
        raw = files.read(path)
    for name, array in (("images", raw.images), ("labels", raw.labels)):
        if array.dtype.kind not in "fiub":
            raise UserError(f"{path}: {name} must be numbers, got {array.dtype}")
        if 0 in array.shape or array.ndim == 0:
            raise UserError(f"{path}: there are no {name}, their shape is {array.shape}")
    if len(raw.images) != len(raw.labels):
        raise UserError(f"{path} has {len(raw.images)} images but {len(raw.labels)} labels")
    return raw


def _provenance(path: Path, raw: Raw, stated: Stated, notes: list[str]) -> dict[str, Any]:
    said = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(stated).items()}
    return {
        "method": "published",
        "file": str(path),
        "sha256": raw.digest,
        "seconds": None,
        "kernel": None,
        "metrics": {},
        "notes": notes,
        "stated": said,
    }
