"""Read distilled sets that other projects published as sets of our data_preprocess.

A published file holds images and labels, but seldom states their range, layout or encoding. The
user may state them; otherwise evidence decides, and every decision is noted in the provenance of
the set. Whatever contradicts the evidence is refused before anything is trained, since on a misread
set every learner stays at chance, as on a bad set.
"""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from dsdistill.published_sets.stated_format import StatedFormat

MAX_TILES_PER_SIDE = 8
CHANCE_STANDARD_ERRORS = 3.0  # an accuracy within this distance of chance counts as chance


def is_published_set(path: Path) -> bool:
    """Whether a path holds a published set, which `load` reads or refuses, and not one of ours."""
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
    constants. Whitened pixels stay as published too, and their whitening is fitted again. Pixels in
    [0, 1] and bytes are preprocessed by `preprocess`. Tiles become separate images.

    Args:
        path: A `.pt`, `.pth`, `.npz` or `.npy` file; a folder with MTT's two files, or with
            `images.npy` and `labels.npy`; a folder of class folders with image files.
        train: Training images of the data that the set was distilled from.
        stated: Format of the set as the user states it.
        preprocess: The standardisation fitted on `train`.
        data: Name of the data, one of `datasets.NAMES`; it selects the constants of the set's
            project. If it is empty, the path of the set may name the data.
        chunks: All training images, those held out for validation included, to fit a whitening on;
            None: those of `train`.

    Returns:
        The set; `provenance["notes"]` lists every decision.

    Raises:
        UserError: If the set cannot be read, or the evidence contradicts the stated format.
    """
    _check_statement(stated)
    raw = _read(path, train)
    images, layout = pixels.to_nhwc(path, raw.images, train.shape, stated.layout)
    all_chunks = chunks or train.chunks
    data_preprocess = (
        _fit_standardisation(preprocess, all_chunks, train.shape)
        if images.min() < 0
        else preprocess
    )
    constants = None if stated.mean is None or stated.std is None else (stated.mean, stated.std)
    kind, why = pixels.decide_kind(
        path,
        images,
        raw,
        stated.pixels,
        train,
        data_preprocess=data_preprocess,
        data=data,
        constants=constants is not None,
    )
    fitted, whose = preprocess, "the preprocessing is this data's own"
    if kind in pixels.STANDARDISED_KINDS:
        fitted, whose = pixels.standardisation(path, raw, constants, data_preprocess, data, kind)
    elif kind in pixels.WHITENED_KINDS:
        fitted, whose = pixels.whitening(
            kind, all_chunks, train.shape, path=path, raw=raw, data=data
        )
    images, tile_notes = _split_tiles(path, raw, images, kind, stated.tiles, train)
    if kind in ("unit", "bytes"):
        images = preprocess.apply(images / np.float32(255) if kind == "bytes" else images)
    encoding, targets, order = labels.encode(path, raw, stated.labels, train.classes)
    targets = np.tile(targets, (len(images) // len(targets), 1))
    notes = [
        *raw.notes,
        f"layout: {layout}",
        f"pixels: {kind} ({why}); {whose}",
        *tile_notes,
        f"labels: {encoding}{' (stated)' if stated.labels == encoding else ''}",
        f"classes: {order}",
        *labels.imbalance_notes(targets.argmax(1), len(train.classes)),
    ]
    if other := evidence.find_other_order(images, targets.argmax(1), train, fitted):
        notes.append(other)
    if raw.ridge is not None:
        notes.append(f"ridge: {raw.ridge:g}, as in the file")
    provenance = _provenance(path, raw, stated, notes)
    return DistilledSet(np.ascontiguousarray(images), targets, fitted, train.classes, provenance)


def chance_hint(accuracy: float, chance: float, test_images: int) -> str | None:
    """What to check if the best learner on a published set is no better than chance; else None.

    Args:
        accuracy: The best accuracy, as a fraction.
        chance: Accuracy of always answering the commonest class, as a fraction.
        test_images: Number of test images, which determines the standard error.
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
    """Fit a standardisation on all training images, as the projects do."""
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
    """Split images that consist of tiles; return all images and notes.

    Each image of an IDC file consists of four small ones, which the file does not state; RDED's
    images are mosaics that its program trains on as they are.
    """
    why = None if kind in pixels.WHITENED_KINDS else evidence.find_tiles(images, train)
    tiles = stated or 1
    if stated is None and raw.kind == "folder":
        note = f"the pictures look like mosaics ({why}) and are taken whole, as RDED does"
        return images, [f"{note}; --tiles 2 parts them"] if why else []
    if stated is None and raw.kind == "IDC" and why:
        tiles = 2
    elif stated is None and (why or raw.kind == "IDC"):
        doubt = f"images look like 2x2 tiles: {why}" if why else "IDC may keep 2x2 tiles per image"
        raise UserError(f"{path}: {doubt}: use --tiles 2 to split them, or --tiles 1")
    if tiles == 1:
        return images, []
    split = pixels.decode_tiles(path, images, tiles)
    reason = "stated" if stated else f"IDC's; {why}"
    return split, [f"tiles: {tiles}x{tiles} images in one, now {len(split)} images ({reason})"]


def _read(path: Path, train: LabeledImages) -> RawSet:
    if path.is_dir() and not files.holds_pair(path):
        raw = class_folders.read(path, train.classes, train.shape)
    else:
        raw = files.read(path)
    for name, array in (("images", raw.images), ("labels", raw.labels)):
        if array.dtype.kind not in "fiub":
            raise UserError(f"{path}: {name} must be numbers, got {array.dtype}")
        if 0 in array.shape or array.ndim == 0:
            raise UserError(
                f"{path} must hold at least one image, got {name} of shape {array.shape}"
            )
    if len(raw.images) != len(raw.labels):
        raise UserError(f"{path} has {len(raw.images)} images but {len(raw.labels)} labels")
    return raw


def _provenance(path: Path, raw: RawSet, stated: StatedFormat, notes: list[str]) -> dict[str, Any]:
    format_ = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(stated).items()}
    return {
        "method": "published",
        "file": str(path),
        "sha256": raw.digest,
        "seconds": None,
        "kernel": None,
        "metrics": {},
        "notes": notes,
        "stated": format_,
    } | ({} if raw.ridge is None else {"evaluation_ridge": raw.ridge})
