"""Pixels of a published set: detect layout, range and preprocessing, and undo tiles."""

from pathlib import Path

import numpy as np
from jaxtyping import Float, Num
from PIL import Image

from dsdistill.harness.data import preprocess
from dsdistill.harness.data.datasets import TORCHVISION
from dsdistill.harness.data.labeled_images import LabeledImages
from dsdistill.harness.data.preprocess import Chunks, Preprocess
from dsdistill.harness.errors import UserError
from dsdistill.published_sets import evidence
from dsdistill.published_sets.evidence import MeanAndStd
from dsdistill.published_sets.files import RawSet

# Mean and deviation by which DC, DSA and DM standardise, under the names in their files' names.
# Those of CIFAR-100 changed in 2022; earlier versions used CIFAR-10's.
# Source: VICO-UoE/DatasetCondensation, `utils.py`, `get_dataset`, as of its last version.
CONDENSATION = {
    "MNIST": ((0.1307,), (0.3081,)),
    "FashionMNIST": ((0.2861,), (0.3530,)),
    "SVHN": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "CIFAR10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "CIFAR100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
}
# MTT copied them before that change.
# Source: GeorgeCazenavette/mtt-distillation, `utils.py`, `get_dataset`.
_MTT = CONDENSATION | {"CIFAR100": CONDENSATION["CIFAR10"]}
# Source: yongchaoz/FRePo, `lib/dataset/dataloader.py`, `data_stats`.
_FREPO = CONDENSATION | {"CIFAR10": (CONDENSATION["CIFAR10"][0], (0.2470, 0.2435, 0.2616))}
CONSTANTS = {"DC": CONDENSATION, "MTT": _MTT, "FRePo": _FREPO}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

WHITENED_KINDS = {  # kind of pixels: which ZCA it is, for notes
    "zca": "as the KIP paper does",
    "zca-mtt": "as MTT does",
    "zca-rfad": "as RFAD does for CIFAR",
    "zca-frepo": "as FRePo does",
}
STANDARDISED_KINDS = ("standardised", "imagenet", "signed")  # by one mean and deviation per channel
MAX_FREPO_SIDE = 64  # pixels; FRePo whitens larger images in interleaved blocks
MAX_OVERSHOOT = 0.5  # beyond [0, 1], of pixels that were never clipped
MAX_DEVIATIONS = 100.0  # of a standardised pixel from the mean; no distilled image reaches it


def to_nhwc(
    path: Path, images: Num[np.ndarray, "n ..."], shape: tuple[int, int, int], layout: str
) -> tuple[Float[np.ndarray, "n h w c"], str]:
    """Convert images to float32 in NHWC; return them with the layout that they had.

    Args:
        path: Path of the set, for messages.
        images: Images as published; grayscale ones may lack the channel axis.
        shape: Height, width and channels of the data.
        layout: `nchw`, `nhwc`, or `auto` for the one that fits.

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
        expected = " or ".join(f"(n, {', '.join(map(str, axes))})" for axes in shapes.values())
        raise UserError(
            f"{path}: images have shape {images.shape}, those of the data {expected}: check "
            "--data, its --image-size and --channels, and --layout"
        )
    if len(fits) > 1 and c > 1:
        raise UserError(f"{path}: images of shape {images.shape} fit both layouts: add --layout")
    with np.errstate(
        over="ignore"
    ):  # values too large for float32 become infinite, which is refused
        x = np.asarray(images, np.float32)
    _require_sound(path, x.reshape(len(x), -1))
    return x.transpose(0, 2, 3, 1) if fits[0] == "nchw" else x, fits[0]


def decide_kind(
    path: Path,
    images: Float[np.ndarray, "n h w c"],
    raw: RawSet,
    stated: str,
    train: LabeledImages,
    *,
    data_preprocess: Preprocess,
    data: str = "",
    constants: bool = False,
) -> tuple[str, str]:
    """Decide the kind of the pixels.

    Args:
        path: Path of the set, for messages.
        images: Images of the set, in any range.
        raw: The set with what its kind of file tells.
        stated: The kind that the user states, or `auto`.
        train: Real images, whose contrast pixels in [0, 1] and bytes must be comparable to.
        data_preprocess: The data's own standardisation.
        data: Name of the data; empty if unknown.
        constants: Whether the user states mean and deviation, which only standardised pixels have.

    Returns:
        The kind: one of `STANDARDISED_KINDS` or `WHITENED_KINDS`, `unit` or `bytes`; and the reason
        for it.

    Raises:
        UserError: If nothing decides, or the numbers contradict what is stated.
    """
    low, high = float(images.min()), float(images.max())
    ranged = f"from {low:.3g} to {high:.3g}"
    project, ambiguity = _project(raw, _data_name(path, raw, data), images.shape[1:])
    if raw.pixels in WHITENED_KINDS and stated not in ("auto", raw.pixels):
        raise UserError(
            f"{path} is whitened by ZCA, as its name or the files beside it tell: use --pixels "
            f"{raw.pixels}"
        )
    detected = _detect_kind(path, images, low, high, raw, data_preprocess, data)
    if constants and detected in ("unit", "bytes"):
        raise UserError(
            f"{path}: pixels are {detected} ({ranged}), but --mean and --std are for standardised "
            "ones: leave both out"
        )
    if constants and _plausible("standardised", low, high):
        return "standardised", ranged
    if raw.pixels == "auto" and detected in ("unit", "bytes") and project == "standardised":
        project = "auto"  # the file has the project's form, but not its pixels
    if stated == "auto" and project != "auto":
        if project in WHITENED_KINDS and not _plausible(project, low, high):
            raise UserError(
                f"{path}: pixels run {ranged}, but {raw.kind} has {project} ones: use --pixels "
                f"{detected}"
            )
        return project, "the kind of file" if raw.pixels != "auto" else f"{ranged}, as {raw.kind}'s"
    if stated == "auto" and detected not in ("unit", "bytes") and ambiguity:
        raise UserError(
            f"{path} does not tell what its pixels, {ranged}, are, and {ambiguity[0]}: use "
            f"--pixels {ambiguity[1]}"
        )
    if stated == "auto" and detected == "unclear":
        raise UserError(
            f"{path} does not tell what its pixels, {ranged}, are, and they fit no range exactly: "
            f"use --pixels {_choices(low, images.shape[-1])}"
        )
    kind = detected if stated == "auto" else stated
    if not _plausible(kind, low, high):
        raise UserError(
            f"{path}: pixels run {ranged}, which {kind} ones do not: "
            f"{_remedy(detected, kind, low, images.shape[-1])}"
        )
    if stated == "auto" and kind in ("unit", "bytes"):
        scale = 255 if kind == "bytes" else 1
        ratio = evidence.contrast(images / np.float32(scale), train)
        if not 1 / evidence.MAX_CONTRAST_RATIO < ratio < evidence.MAX_CONTRAST_RATIO:
            raise UserError(
                f"{path}: pixels run {ranged}; as {kind} ones they have {ratio:.2g} times the "
                f"contrast of the data: use --pixels {kind} if they are such, or scale them"
            )
    if stated in STANDARDISED_KINDS and detected in STANDARDISED_KINDS and detected != stated:
        raise UserError(
            f"{path}: pixels, {ranged}, are {detected} ones to the last digit, not {stated} ones: "
            f"use --pixels {detected}"
        )
    return kind, f"{'stated; ' if stated == kind else ''}{ranged}"


def standardisation(
    path: Path,
    raw: RawSet,
    stated: tuple[tuple[float, ...], tuple[float, ...]] | None,
    fitted: Preprocess,
    data: str,
    kind: str = "standardised",
) -> tuple[Preprocess, str]:
    """Find the standardisation of the pixels.

    Args:
        path: Path of the set, whose name may tell the data.
        raw: The set, which may hold the constants.
        stated: Mean and deviation that the user states, one value per channel.
        fitted: Standardisation fitted on the data; its constants are the last resort.
        data: Name of the data; empty if unknown.
        kind: One of `STANDARDISED_KINDS`.

    Returns:
        The standardisation, and a note on its constants and where they come from.

    Raises:
        UserError: If the constants are not those of images in [0, 1] with as many channels, or
            if the file is named after other data.
    """
    channels, name = len(fitted.mean), _published_name(path, raw.kind, data)
    known = CONSTANTS.get(raw.kind, {}).get(name)
    if kind == "signed":
        (mean, std), whose = ((0.5,) * channels, (0.5,) * channels), "[-1, 1] is [0, 1]"
    elif kind == "imagenet":
        if channels != len(IMAGENET[0]):
            raise UserError(
                f"{path}: --pixels imagenet is for colour images: use --mean and --std instead"
            )
        (mean, std), whose = IMAGENET, "those of ImageNet"
    elif stated is not None:
        (mean, std), whose = stated, "as stated"
    elif raw.mean is not None and raw.std is not None:
        mean, std, whose = raw.mean, raw.std, "from the file"
    elif known is not None and len(known[0]) == channels:
        (mean, std), whose = known, f"those of {raw.kind} for {name}"
    else:
        mean, std, whose = fitted.mean, fitted.std, "this data's own, since none are known"
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if mean.shape != (channels,) or std.shape != (channels,):
        raise UserError(
            f"{path}: --mean and --std must have one value per channel, {channels} each"
        )
    summary = f"mean {_format_values(mean)}, deviation {_format_values(std)}"
    if not ((mean >= 0) & (mean <= 1) & (std > 0) & (std <= 1)).all():
        raise UserError(
            f"{path}: {summary} are not of images in [0, 1]: divide those of bytes by 255"
        )
    return Preprocess("standardise", mean, std), f"{summary}: {whose}"


def whitening(
    kind: str, chunks: Chunks, shape: tuple[int, int, int], *, path: Path, raw: RawSet, data: str
) -> tuple[Preprocess, str]:
    """Fit the whitening of the pixels again.

    Args:
        kind: One of `WHITENED_KINDS`.
        chunks, shape: All training images and their shape, to fit the whitening on.
        path, raw, data: As for `standardisation`.

    Returns:
        The whitening, and a note on it.

    Raises:
        UserError: If the images are too large for FRePo's whitening as it is implemented here.
    """
    note = f"ZCA {WHITENED_KINDS[kind]}, fitted again on the training images"
    if kind == "zca":
        return preprocess.fit("zca", chunks, shape), note
    if kind == "zca-mtt":
        return preprocess.fit_mtt(chunks, shape), note
    if kind == "zca-rfad":
        return preprocess.fit_rfad(chunks, shape), note
    if max(shape[:2]) > MAX_FREPO_SIDE:
        raise UserError(
            f"{path}: FRePo's whitening is supported up to {MAX_FREPO_SIDE} pixels, got {shape[0]}x"
            f"{shape[1]}: larger images are whitened in blocks, which cannot be read"
        )
    known = _FREPO.get(_published_name(path, raw.kind, data))
    if known is None or len(known[0]) != shape[-1]:
        return preprocess.fit_frepo(chunks, shape), note
    mean, std = (np.asarray(values, np.float32) for values in known)
    return preprocess.fit_frepo(chunks, shape, (mean, std)), note


def decode_tiles(
    path: Path, images: Float[np.ndarray, "n h w c"], tiles: int
) -> Float[np.ndarray, "m h w c"]:
    """Enlarge every tile to an image of full size, the first tiles of all images first.

    Args:
        path: Path of the set, for messages.
        images: Images as published, each of `tiles` x `tiles` smaller ones.
        tiles: Tiles in a row and in a column, IDC's factor.

    Source: Kim et al. (2022), arXiv:2205.14959; `test.py` of the program, `decode_zoom`.
    """
    _, h, w, channels = images.shape
    if h % tiles or w % tiles:
        raise UserError(
            f"{path}: images of {h}x{w} pixels cannot be split into {tiles}x{tiles} tiles: choose "
            "--tiles that divides both"
        )

    def enlarge(tile: np.ndarray) -> np.ndarray:
        # PIL resizes float images one channel at a time, and enlarges them as torch interpolates.
        planes = [Image.fromarray(tile[..., c]) for c in range(channels)]
        large = [plane.resize((w, h), Image.Resampling.BILINEAR) for plane in planes]
        return np.stack([np.asarray(plane) for plane in large], -1)

    small = images.reshape(len(images), tiles, h // tiles, tiles, w // tiles, channels)
    parts = small.transpose(1, 3, 0, 2, 4, 5).reshape(-1, h // tiles, w // tiles, channels)
    return np.stack([enlarge(np.ascontiguousarray(part, np.float32)) for part in parts])


def _require_sound(path: Path, flat: Float[np.ndarray, "n d"]) -> None:
    if len(bad := np.flatnonzero(~np.isfinite(flat).all(1))):
        raise UserError(f"{path}: image {bad[0]} has NaN or infinite values: take another file")
    if len(bad := np.flatnonzero(flat.min(1) == flat.max(1))):
        raise UserError(f"{path}: image {bad[0]} is constant: the file seems damaged")


def _project(raw: RawSet, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[str, str] | None]:
    """The kind of pixels that a file's project makes; or why it is ambiguous, and the choices."""
    colour = shape[-1] == 3
    if raw.pixels != "auto":
        return raw.pixels, None
    if raw.kind == "IDC":
        return "unit", None
    if raw.kind == "DC" or (raw.kind == "MTT" and not raw.ambiguity):
        return "standardised", None
    if raw.kind in ("RFAD", "FRePo") and not colour:
        return "standardised", None
    if raw.kind == "FRePo":
        return "zca-frepo", None
    if raw.kind == "RFAD" and name == "cifar":
        return "zca-rfad", None
    if raw.kind == "RFAD" and name == "svhn":
        return "zca", None
    if raw.kind == "RFAD":
        return "auto", (
            "RFAD whitens CIFAR in one way and SVHN, as KIP does, in another",
            "zca-rfad, --pixels zca or --pixels standardised",
        )
    if raw.ambiguity:
        return "auto", (raw.ambiguity, "zca-mtt or --pixels standardised")
    return "auto", None


def _detect_kind(
    path: Path,
    images: Float[np.ndarray, "n h w c"],
    low: float,
    high: float,
    raw: RawSet,
    data_preprocess: Preprocess,
    data: str,
) -> str:
    """The kind of pixels that the numbers alone prove, or `unclear`."""
    if low < 0:
        if max(-low, high) > MAX_DEVIATIONS:
            return "standardised"  # refused later as implausible
        proven, _ = evidence.match_constants(images, _candidates(path, raw, data_preprocess, data))
        return "unclear" if proven is None else proven.split()[0]
    if high <= 1:
        return "unit"
    whole = (np.rint(images) == images).all()
    if high <= 255 and (whole or high > MAX_DEVIATIONS):
        return "bytes"
    return "standardised" if high > 255 else "unclear"


def _candidates(
    path: Path, raw: RawSet, data_preprocess: Preprocess, data: str
) -> dict[str, MeanAndStd]:
    """Constants by which a set of this data may have been standardised, by kind."""
    channels, name = len(data_preprocess.mean), _published_name(path, raw.kind, data)
    pairs = {"signed": ((0.5,) * channels, (0.5,) * channels)}
    if channels == len(IMAGENET[0]):
        pairs["imagenet"] = IMAGENET
    for project, constants in CONSTANTS.items():
        if name in constants and len(constants[name][0]) == channels:
            pairs[f"standardised {project}"] = constants[name]
    arrays = {
        kind: (np.asarray(mean, np.float32), np.asarray(std, np.float32))
        for kind, (mean, std) in pairs.items()
    }
    return {"standardised": (data_preprocess.mean, data_preprocess.std)} | arrays


def _choices(low: float, channels: int) -> str:
    """The possible values of `--pixels`, for a message."""
    if low >= 0:
        return "unit or bytes"
    mapped = "standardised (by the data's own constants, or with --mean and --std), signed"
    imagenet = ", imagenet" if channels == len(IMAGENET[0]) else ""
    unit = ", unit" if low >= -MAX_OVERSHOOT else ""
    *others, last = WHITENED_KINDS
    return f"{mapped}{imagenet}{unit}, {', '.join(others)} or {last}"


def _remedy(detected: str, kind: str, low: float, channels: int) -> str:
    """The remedy if pixels are not of the expected kind."""
    if detected == "unclear":
        return f"use --pixels {_choices(low, channels)}"
    return f"use --pixels {detected}" if detected != kind else "no --pixels fits, take another file"


def _plausible(kind: str, low: float, high: float) -> bool:
    if kind == "signed":
        return low < 0 and max(-low, high) <= 1 + 2 * MAX_OVERSHOOT
    if kind in STANDARDISED_KINDS or kind in WHITENED_KINDS:  # some pixels are darker than the mean
        return low < 0 and max(-low, high) <= MAX_DEVIATIONS
    if kind == "unit":
        return low >= -MAX_OVERSHOOT and high <= 1 + MAX_OVERSHOOT
    least = 1 if low >= 0 else MAX_DEVIATIONS
    return low >= -255 * MAX_OVERSHOOT and least < high <= 255 * (1 + MAX_OVERSHOOT)


def _data_name(path: Path, raw: RawSet, data: str) -> str:
    """`cifar` or `svhn`, from the name of the data or the folders of an RFAD file; else empty."""
    folders = [part.name for part in path.resolve().parents[:3]]
    texts = [text.lower() for text in (data, *folders)] if raw.kind == "RFAD" else []
    return next((name for text in texts for name in ("cifar", "svhn") if name in text), "")


def _published_name(path: Path, kind: str, data: str) -> str:
    """The data's name as DC and MTT spell it; empty if unknown."""
    ours = {TORCHVISION[name][0]: name for name in TORCHVISION}
    expected = next((theirs for theirs in ours if ours[theirs] == data), "")
    # MTT writes logged_files/CIFAR10/<name of the run>/images_best.pt.
    folders = [folder.name for folder in (path.resolve() / "file").parents[:3]]
    parts = path.stem.split("_") if kind == "DC" else folders
    in_path = next((part for part in parts if part in ours), "")
    if kind == "DC" and expected and in_path and in_path != expected:
        raise UserError(
            f"{path} is named after {in_path}: use --data {ours[in_path]}, or rename the file"
        )
    return expected or in_path


def _format_values(values: Float[np.ndarray, " c"]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
