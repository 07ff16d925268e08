"""Pixels of a published set: layout, range, and the constants that they were standardised by."""

import functools
from pathlib import Path

import numpy as np
from jaxtyping import Float, Num

from dsdistill.foreign_sets.files import Raw
from dsdistill.harness import preprocess
from dsdistill.harness.datasets import TORCHVISION
from dsdistill.harness.errors import UserError
from dsdistill.harness.preprocess import Chunks, Preprocess

# Mean and deviation by which DC, DSA and DM standardise, under the names that their files bear.
# Those of CIFAR-100 changed in 2022; before, they were CIFAR-10's.
# Source: VICO-UoE/DatasetCondensation, `utils.py`, `get_dataset`, as of its last version.
CONDENSATION = {
    "MNIST": ((0.1307,), (0.3081,)),
    "FashionMNIST": ((0.2861,), (0.3530,)),
    "SVHN": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "CIFAR10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "CIFAR100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
}
# MTT took them over before that change.
# Source: GeorgeCazenavette/mtt-distillation, `utils.py`, `get_dataset`.
CONSTANTS = {"DC": CONDENSATION, "MTT": CONDENSATION | {"CIFAR100": CONDENSATION["CIFAR10"]}}

WHITENED = {  # kind of pixels: whose ZCA it is, and how it is fitted
    "zca": ("as the KIP paper does", functools.partial(preprocess.fit, "zca")),
    "zca-mtt": ("as MTT does", preprocess.fit_mtt),
}
BEYOND = 0.5  # by which [0, 1] may be left by pixels that were never clipped
EXTREME = 100.0  # no distilled image reaches this many deviations


def arranged(
    path: Path, images: Num[np.ndarray, "n ..."], shape: tuple[int, int, int], layout: str
) -> tuple[Float[np.ndarray, "n h w c"], str]:
    """float32 images in our layout, and the layout that they were in.

    Args:
        path: Of the set, for messages.
        images: As published; grayscale ones may lack the axis of channels.
        shape: Height, width and channels of the data.
        layout: `nchw`, `nhwc`, or `auto`, which takes the one that fits.

    Raises:
        UserError: If the shape does not fit, or fits both layouts, or an image is constant or
            not finite.
    """
    h, w, c = shape
    shapes = {"nchw": (c, h, w), "nhwc": (h, w, c)}
    if c == 1 and images.shape[1:] == (h, w):
        images = images.reshape(-1, *shapes["nhwc" if layout == "auto" else layout])
    fits = [name for name in shapes if shapes[name] == images.shape[1:]]
    fits = [name for name in fits if layout in ("auto", name)]
    if not fits:
        wanted = " or ".join(f"(n, {', '.join(map(str, axes))})" for axes in shapes.values())
        raise UserError(
            f"{path}: images have shape {images.shape}, those of the data {wanted}: check --data, "
            "its --image-size, and --layout"
        )
    if len(fits) > 1 and c > 1:
        raise UserError(f"{path}: images of shape {images.shape} fit both layouts: give --layout")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
        x = np.asarray(images, np.float32)
    _require_sound(path, x.reshape(len(x), -1))
    return x.transpose(0, 2, 3, 1) if fits[0] == "nchw" else x, fits[0]


def decided(
    path: Path, images: Float[np.ndarray, "n h w c"], raw: Raw, stated: str
) -> tuple[str, str]:
    """What the pixels are, `standardised`, `unit`, `bytes` or a kind of `WHITENED`, and why.

    Args:
        path: Of the set, for messages.
        images: Of the set, as numbers in whatever range.
        raw: What the kind of file says.
        stated: One of these, or `auto`.

    Raises:
        UserError: If nothing tells, or the range contradicts what is stated.
    """
    low, high = float(images.min()), float(images.max())
    ranged = f"from {low:.3g} to {high:.3g}"
    seen = _evidence(images, low, high)
    if raw.pixels in WHITENED and stated not in ("auto", raw.pixels):
        raise UserError(
            f"{path} is whitened by ZCA, by its name or its neighbours: say --pixels {raw.pixels}"
        )
    if stated == "auto" and raw.pixels != "auto":
        return raw.pixels, "the kind of file"
    if stated == "auto" and seen == "standardised" and raw.unclear:
        raise UserError(
            f"{path} does not say what its pixels, {ranged}, are, and {raw.unclear}: state "
            "--pixels zca-mtt or --pixels standardised"
        )
    found = seen if stated == "auto" else stated
    if not _plausible(found, low, high):
        remedy = f"say --pixels {seen}" if seen != found else "no --pixels fits, take another file"
        raise UserError(f"{path}: pixels run {ranged}, which {found} ones do not: {remedy}")
    return found, f"{'stated; ' if stated == found else ''}{ranged}"


def standardisation(
    path: Path,
    raw: Raw,
    stated: tuple[tuple[float, ...], tuple[float, ...]] | None,
    fitted: Preprocess,
    data: str,
) -> tuple[Preprocess, str]:
    """The map by which standardised pixels were made, and whose constants it has.

    Args:
        path: Of the set, whose name may tell the data.
        raw: May hold the constants.
        stated: Mean and deviation, one value a channel.
        fitted: On the data; its constants are the last resort.
        data: The data's name, or empty.

    Raises:
        UserError: If the constants are not those of images in [0, 1] with as many channels, or
            if the file is named after other data.
    """
    channels, name = len(fitted.mean), _published_name(path, raw.kind, data)
    known = CONSTANTS.get(raw.kind, {}).get(name)
    if stated is not None:
        (mean, std), whose = stated, "as stated"
    elif raw.mean is not None and raw.std is not None:
        mean, std, whose = raw.mean, raw.std, "from the file"
    elif known is not None and len(known[0]) == channels:
        (mean, std), whose = known, f"those of {raw.kind} for {name}"
    else:
        mean, std, whose = fitted.mean, fitted.std, "this data's own, since none are known"
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if mean.shape != (channels,) or std.shape != (channels,):
        raise UserError(f"{path}: --mean and --std must be {channels} values, one a channel")
    said = f"mean {_short(mean)}, deviation {_short(std)}"
    if not ((mean >= 0) & (mean <= 1) & (std > 0) & (std <= 1)).all():
        raise UserError(f"{path}: {said} are not of images in [0, 1]: divide those of bytes by 255")
    return Preprocess("standardise", mean, std), f"{said}: {whose}"


def whitening(kind: str, chunks: Chunks, shape: tuple[int, int, int]) -> tuple[Preprocess, str]:
    """The ZCA of `WHITENED` by which images were whitened, and what to note of it.

    Args:
        kind: Of `WHITENED`.
        chunks, shape: Of all training images; the whitening is fitted on them again.
    """
    how, fit = WHITENED[kind]
    return fit(chunks, shape), f"ZCA {how}, fitted again on the training images"


def _require_sound(path: Path, flat: Float[np.ndarray, "n d"]) -> None:
    if len(bad := np.flatnonzero(~np.isfinite(flat).all(1))):
        raise UserError(f"{path}: image {bad[0]} has NaN or infinite values: take another file")
    if len(bad := np.flatnonzero(flat.min(1) == flat.max(1))):
        raise UserError(f"{path}: image {bad[0]} is constant: the file seems not to be whole")


def _evidence(images: Float[np.ndarray, "n h w c"], low: float, high: float) -> str:
    if low < 0:
        return "standardised"
    if high <= 1:
        return "unit"
    return "bytes" if high <= 255 and (np.rint(images) == images).all() else "standardised"


def _plausible(pixels: str, low: float, high: float) -> bool:
    if pixels == "standardised" or pixels in WHITENED:  # some pixels are darker than the mean
        return low < 0 and max(-low, high) <= EXTREME
    if pixels == "unit":
        return low >= -BEYOND and high <= 1 + BEYOND
    return low >= 0 and 1 < high <= 255


def _published_name(path: Path, kind: str, data: str) -> str:
    """The data's name as DC and MTT spell it; empty where it is not known."""
    ours = {TORCHVISION[name][0]: name for name in TORCHVISION}
    given = next((theirs for theirs in ours if ours[theirs] == data), "")
    # MTT writes logged_files/CIFAR10/<name of the run>/images_best.pt.
    folders = [folder.name for folder in (path.resolve() / "file").parents[:3]]
    named = path.stem.split("_") if kind == "DC" else folders
    found = next((part for part in named if part in ours), "")
    if kind == "DC" and given and found and found != given:
        raise UserError(f"{path} is named after {found}: give --data {ours[found]}, or rename it")
    return given or found


def _short(values: Float[np.ndarray, " c"]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
