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
from jaxtyping import Float

from dsdistill.harness.data import distilled_set
from dsdistill.harness.data import preprocess as preprocess_module
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.data.labeled_images import LabeledImages
from dsdistill.harness.data.preprocess import Chunks, Preprocess
from dsdistill.harness.errors import UserError
from dsdistill.published_sets import class_folders, evidence, files, labels, pixels
from dsdistill.published_sets.files import RawSet

MAX_TILES_PER_SIDE = 8  # in a row, that an image may be made of
CHANCE_STANDARD_ERRORS = 3.0  # standard errors within which an accuracy is that of chance


@dataclass(frozen=True)
class StatedFormat:
    """What the user says of a published set; `auto` is decided from evidence.

    Attributes:
        pixels: Mean 0 and deviation 1 by `mean` and `std`, the same by ImageNet's, in [-1, 1], in
            [0, 1], 0 to 255, or whitened.
        labels: Class numbers, one-hot rows, rows that sum to 0, rows that sum to 1, or any rows.
        mean, std: Of the training images in [0, 1], one a channel, for standardised pixels.
        layout: Order of the images' axes.
        tiles: Smaller images that a published one is made of, in a row and in a column.
    """

    pixels: Literal[
        "auto",
        "standardised",
        "imagenet",
        "signed",
        "unit",
        "bytes",
        "zca",
        "zca-mtt",
        "zca-rfad",
        "zca-frepo",
    ] = "auto"
    labels: Literal["auto", "index", "one-hot", "centred", "probabilities", "logits"] = "auto"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    layout: Literal["auto", "nchw", "nhwc"] = "auto"
    tiles: int | None = None


def is_published_set(path: Path) -> bool:
    """Whether a path is for `load` to read, or to refuse, and is no set of our own."""
    if not path.is_dir():
        known = path.suffix.lower() in files.SUFFIXES
        return known or (path.is_file() and path.suffix != ".safetensors")
    ours = (path / distilled_set.FILE_NAME).exists()
    return not ours and (files.holds_pair(path) or class_folders.holds_classes(path))


def load(
    path: Path,
    train: LabeledImages,
    stated: StatedFormat,
    *,
    preprocess: Preprocess,
    data: str = "",
    chunks: Chunks | None = None,
) -> DistilledSet:
    """Read a published set.

    Standardised pixels stay as published, and test images will be standardised by the same
    constants; so do whitened ones, with a whitening that is fitted again. Pixels in [0, 1] or bytes
    are mapped by `preprocess`. Tiles become images of their own.

    Args:
        path: A `.pt`, `.pth`, `.npz` or `.npy` file; a folder with MTT's two files, or with
            `images.npy` and `labels.npy`; a folder of class folders with pictures.
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
    images, layout = pixels.to_nhwc(path, raw.images, train.shape, stated.layout)
    every = chunks or train.chunks
    own = _fit_standardisation(preprocess, every, train.shape) if images.min() < 0 else preprocess
    constants = None if stated.mean is None or stated.std is None else (stated.mean, stated.std)
    kind, why = pixels.decide_kind(
        path,
        images,
        raw,
        stated.pixels,
        train,
        own=own,
        data=data,
        constants=constants is not None,
    )
    fitted, whose = preprocess, "the preprocessing is this data's own"
    if kind in pixels.STANDARDISED_KINDS:
        fitted, whose = pixels.standardisation(path, raw, constants, own, data, kind)
    elif kind in pixels.WHITENED_KINDS:
        fitted, whose = pixels.whitening(kind, every, train.shape, path=path, raw=raw, data=data)
    images, tiled = _split_tiles(path, raw, images, kind, stated.tiles, train)
    if kind in ("unit", "bytes"):
        images = preprocess.apply(images / np.float32(255) if kind == "bytes" else images)
    encoding, targets, order = labels.encode(path, raw, stated.labels, train.classes)
    targets = np.tile(targets, (len(images) // len(targets), 1))
    notes = [
        *raw.notes,
        f"layout: {layout}",
        f"pixels: {kind} ({why}); {whose}",
        *tiled,
        f"labels: {encoding}{' (stated)' if stated.labels == encoding else ''}",
        f"classes: {order}",
        *labels.imbalance_notes(targets.argmax(1), len(train.classes)),
    ]
    if other := evidence.find_other_order(images, targets.argmax(1), train, fitted):
        notes.append(other)
    if raw.ridge is not None:
        notes.append(f"ridge: {raw.ridge:g}, as in the file")
    made = _provenance(path, raw, stated, notes)
    return DistilledSet(np.ascontiguousarray(images), targets, fitted, train.classes, made)


def chance_hint(accuracy: float, chance: float, test_images: int) -> str | None:
    """What to check where the best learner on a published set is no better than chance.

    Args:
        accuracy: The best, as a fraction.
        chance: Accuracy of always answering the commonest class.
        test_images: On which the accuracy was measured; they set its standard error.
    """
    if accuracy > chance + CHANCE_STANDARD_ERRORS * math.sqrt(chance * (1 - chance) / test_images):
        return None
    return (
        f"No learner is better than chance ({accuracy:.3f} of {test_images} test images, chance "
        f"{chance:.3f}): check --pixels, --mean and --std, --labels, --layout, and that the "
        "set's classes are in the order of the data's."
    )


def _check_statement(stated: StatedFormat) -> None:
    if (stated.mean is None) != (stated.std is None):
        raise UserError("--mean and --std go together: give both, or neither")
    if stated.mean is not None and stated.pixels not in ("auto", "standardised"):
        raise UserError(f"--mean and --std are for --pixels standardised, not {stated.pixels}")
    if stated.tiles is not None and not 1 <= stated.tiles <= MAX_TILES_PER_SIDE:
        raise UserError(f"--tiles must be from 1 to {MAX_TILES_PER_SIDE}, got {stated.tiles}")


def _fit_standardisation(
    fitted: Preprocess, chunks: Chunks, shape: tuple[int, int, int]
) -> Preprocess:
    """The standardisation by all training images, as projects fit it."""
    if fitted.kind != "standardise":
        return fitted
    return preprocess_module.fit("standardise", chunks, shape)


def _split_tiles(
    path: Path,
    raw: RawSet,
    images: Float[np.ndarray, "n h w c"],
    kind: str,
    stated: int | None,
    train: LabeledImages,
) -> tuple[Float[np.ndarray, "m h w c"], list[str]]:
    """The images, taken out of their tiles where they have some, and what to note of it.

    IDC's files hold four small images each, and do not say so; RDED's pictures are mosaics that
    its program trains on as they are.
    """
    why = None if kind in pixels.WHITENED_KINDS else evidence.find_tiles(images, train)
    tiles = stated or 1
    if stated is None and raw.kind == "folder":
        note = f"the pictures look like mosaics ({why}) and are taken whole, as RDED does"
        return images, [f"{note}; --tiles 2 parts them"] if why else []
    if stated is None and raw.kind == "IDC" and why:
        tiles = 2
    elif stated is None and (why or raw.kind == "IDC"):
        doubt = f"images look like 2x2 tiles: {why}" if why else "IDC may keep 2x2 tiles an image"
        raise UserError(f"{path}: {doubt}: state --tiles 2 to part them, or --tiles 1")
    if tiles == 1:
        return images, []
    parted = pixels.decode_tiles(path, images, tiles)
    said = "stated" if stated else f"IDC's; {why}"
    return parted, [f"tiles: {tiles}x{tiles} images in one, now {len(parted)} images ({said})"]


def _read(path: Path, train: LabeledImages) -> RawSet:
    if path.is_dir() and not files.holds_pair(path):
        raw = class_folders.read(path, train.classes, train.shape)
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


def _provenance(path: Path, raw: RawSet, stated: StatedFormat, notes: list[str]) -> dict[str, Any]:
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
    } | ({} if raw.ridge is None else {"evaluation_ridge": raw.ridge})
