"""Pixels of a published set: layout, range, and the constants that they were standardised by."""

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
_MTT = CONDENSATION | {"CIFAR100": CONDENSATION["CIFAR10"]}
# Source: yongchaoz/FRePo, `lib/dataset/dataloader.py`, `data_stats`.
_FREPO = CONDENSATION | {"CIFAR10": (CONDENSATION["CIFAR10"][0], (0.2470, 0.2435, 0.2616))}
CONSTANTS = {"DC": CONDENSATION, "MTT": _MTT, "FRePo": _FREPO}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

WHITENED_KINDS = {  # kind of pixels: whose ZCA it is
    "zca": "as the KIP paper does",
    "zca-mtt": "as MTT does",
    "zca-rfad": "as RFAD does for CIFAR",
    "zca-frepo": "as FRePo does",
}
STANDARDISED_KINDS = ("standardised", "imagenet", "signed")  # by a mean and a deviation a channel
MAX_FREPO_SIDE = 64  # FRePo whitens larger images in interleaved blocks
MAX_OVERSHOOT = 0.5  # by which [0, 1] may be left by pixels that were never clipped
MAX_DEVIATIONS = 100.0  # no distilled image reaches this many deviations


def to_nhwc(
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
            "its --image-size and --channels, and --layout"
        )
    if len(fits) > 1 and c > 1:
        raise UserError(f"{path}: images of shape {images.shape} fit both layouts: give --layout")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
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
    own: Preprocess,
    data: str = "",
    constants: bool = False,
) -> tuple[str, str]:
    """What the pixels are, of `STANDARDISED_KINDS`, `unit`, `bytes` or a kind of `WHITENED_KINDS`, and why.

    Args:
        path: Of the set, for messages.
        images: Of the set, as numbers in whatever range.
        raw: What the kind of file says.
        stated: One of these, or `auto`.
        train: Real images, beside which pixels in [0, 1] and bytes must not look empty.
        own: The data's own standardisation.
        data: The data's name, or empty.
        constants: Whether mean and deviation are stated, as only standardised pixels have them.

    Raises:
        UserError: If nothing tells, or the numbers contradict what is stated.
    """
    low, high = float(images.min()), float(images.max())
    ranged = f"from {low:.3g} to {high:.3g}"
    project, unclear = _project(raw, _data_name(path, raw, data), images.shape[1:])
    if raw.pixels in WHITENED_KINDS and stated not in ("auto", raw.pixels):
        raise UserError(
            f"{path} is whitened by ZCA, by its name or its neighbours: say --pixels {raw.pixels}"
        )
    seen = _detect_kind(path, images, low, high, raw, own, data)
    if constants and seen in ("unit", "bytes"):
        raise UserError(
            f"{path}: pixels are {seen} ({ranged}), --mean and --std standardised ones'"
        )
    if constants and _plausible("standardised", low, high):
        return "standardised", ranged
    if raw.pixels == "auto" and seen in ("unit", "bytes") and project == "standardised":
        project = "auto"  # the file has the project's form, but not its pixels
    if stated == "auto" and project != "auto":
        if project in WHITENED_KINDS and not _plausible(project, low, high):
            raise UserError(
                f"{path}: pixels run {ranged}, but {raw.kind} has {project} ones: say --pixels "
                f"{seen}"
            )
        return project, "the kind of file" if raw.pixels != "auto" else f"{ranged}, as {raw.kind}'s"
    if stated == "auto" and seen not in ("unit", "bytes") and unclear:
        raise UserError(
            f"{path} does not say what its pixels, {ranged}, are, and {unclear[0]}: state "
            f"--pixels {unclear[1]}"
        )
    if stated == "auto" and seen == "unclear":
        raise UserError(
            f"{path} does not say what its pixels, {ranged}, are, and they fit no range exactly: "
            f"state --pixels {_choices(low, images.shape[-1])}"
        )
    kind = seen if stated == "auto" else stated
    if not _plausible(kind, low, high):
        raise UserError(
            f"{path}: pixels run {ranged}, which {kind} ones do not: "
            f"{_remedy(seen, kind, low, images.shape[-1])}"
        )
    if stated == "auto" and kind in ("unit", "bytes"):
        scale = 255 if kind == "bytes" else 1
        times = evidence.contrast(images / np.float32(scale), train)
        if not 1 / evidence.MAX_CONTRAST_RATIO < times < evidence.MAX_CONTRAST_RATIO:
            raise UserError(
                f"{path}: pixels run {ranged}; as {kind} ones they have {times:.2g} times the "
                f"contrast of the data: state --pixels {kind} if they are, or scale them"
            )
    if stated in STANDARDISED_KINDS and seen in STANDARDISED_KINDS and seen != stated:
        raise UserError(
            f"{path}: pixels, {ranged}, are {seen} ones to the last digit, not {stated} ones: say "
            f"--pixels {seen}"
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
    """The map by which standardised pixels were made, and whose constants it has.

    Args:
        path: Of the set, whose name may tell the data.
        raw: May hold the constants.
        stated: Mean and deviation, one value a channel.
        fitted: On the data; its constants are the last resort.
        data: The data's name, or empty.
        kind: Of `STANDARDISED_KINDS`.

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
            raise UserError(f"{path}: --pixels imagenet is for colour: give --mean and --std")
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
        raise UserError(f"{path}: --mean and --std must be {channels} values, one a channel")
    said = f"mean {_format_values(mean)}, deviation {_format_values(std)}"
    if not ((mean >= 0) & (mean <= 1) & (std > 0) & (std <= 1)).all():
        raise UserError(f"{path}: {said} are not of images in [0, 1]: divide those of bytes by 255")
    return Preprocess("standardise", mean, std), f"{said}: {whose}"


def whitening(
    kind: str, chunks: Chunks, shape: tuple[int, int, int], *, path: Path, raw: RawSet, data: str
) -> tuple[Preprocess, str]:
    """The ZCA of `WHITENED_KINDS` by which images were whitened, and what to note of it.

    Args:
        kind: Of `WHITENED_KINDS`.
        chunks, shape: Of all training images; the whitening is fitted on them again.
        path, raw, data: As for `standardisation`.

    Raises:
        UserError: If the whitening of such large images is not known.
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
            f"{path}: FRePo whitens images above {MAX_FREPO_SIDE} pixels in blocks, unread here"
        )
    known = _FREPO.get(_published_name(path, raw.kind, data))
    if known is None or len(known[0]) != shape[-1]:
        return preprocess.fit_frepo(chunks, shape), note
    mean, std = (np.asarray(values, np.float32) for values in known)
    return preprocess.fit_frepo(chunks, shape, (mean, std)), note


def decode_tiles(
    path: Path, images: Float[np.ndarray, "n h w c"], tiles: int
) -> Float[np.ndarray, "m h w c"]:
    """Every tile of each image as an image of full size, the first tiles of all images first.

    Args:
        path: Of the set, for messages.
        images: As published, of `tiles` x `tiles` smaller ones each.
        tiles: IDC's factor.

    Source: Kim et al. (2022), arXiv:2205.14959; `test.py` of the program, `decode_zoom`.
    """
    _, h, w, channels = images.shape
    if h % tiles or w % tiles:
        raise UserError(f"{path}: images of {h}x{w} pixels do not part into {tiles}x{tiles} tiles")

    def enlarged(tile: np.ndarray) -> np.ndarray:
        # PIL resizes float images one channel at a time; enlarging, it interpolates as torch does.
        planes = [Image.fromarray(tile[..., c]) for c in range(channels)]
        large = [plane.resize((w, h), Image.Resampling.BILINEAR) for plane in planes]
        return np.stack([np.asarray(plane) for plane in large], -1)

    small = images.reshape(len(images), tiles, h // tiles, tiles, w // tiles, channels)
    parts = small.transpose(1, 3, 0, 2, 4, 5).reshape(-1, h // tiles, w // tiles, channels)
    return np.stack([enlarged(np.ascontiguousarray(part, np.float32)) for part in parts])


def _require_sound(path: Path, flat: Float[np.ndarray, "n d"]) -> None:
    if len(bad := np.flatnonzero(~np.isfinite(flat).all(1))):
        raise UserError(f"{path}: image {bad[0]} has NaN or infinite values: take another file")
    if len(bad := np.flatnonzero(flat.min(1) == flat.max(1))):
        raise UserError(f"{path}: image {bad[0]} is constant: the file seems not to be whole")


def _project(raw: RawSet, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[str, str] | None]:
    """What the project of a file does to pixels, or what is unclear about it and the choices."""
    colour = shape[-1] == 3
    if raw.pixels != "auto":
        return raw.pixels, None
    if raw.kind == "IDC":
        return "unit", None
    if raw.kind == "DC" or (raw.kind == "MTT" and not raw.unclear):
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
    if raw.unclear:
        return "auto", (raw.unclear, "zca-mtt or --pixels standardised")
    return "auto", None


def _detect_kind(
    path: Path,
    images: Float[np.ndarray, "n h w c"],
    low: float,
    high: float,
    raw: RawSet,
    own: Preprocess,
    data: str,
) -> str:
    """What the numbers alone prove: a kind of pixels, or `unclear`."""
    if low < 0:
        if max(-low, high) > MAX_DEVIATIONS:
            return "standardised"  # which is then refused
        proven, _ = evidence.match_constants(images, _candidates(path, raw, own, data))
        return "unclear" if proven is None else proven.split()[0]
    if high <= 1:
        return "unit"
    whole = (np.rint(images) == images).all()
    if high <= 255 and (whole or high > MAX_DEVIATIONS):
        return "bytes"
    return "standardised" if high > 255 else "unclear"


def _candidates(path: Path, raw: RawSet, own: Preprocess, data: str) -> dict[str, MeanAndStd]:
    """Constants that a set of this data may have been standardised by."""
    channels, name = len(own.mean), _published_name(path, raw.kind, data)
    pairs = {"signed": ((0.5,) * channels, (0.5,) * channels)}
    if channels == len(IMAGENET[0]):
        pairs["imagenet"] = IMAGENET
    for project, constants in CONSTANTS.items():
        if name in constants and len(constants[name][0]) == channels:
            pairs[f"standardised {project}"] = constants[name]
    found = {
        kind: (np.asarray(mean, np.float32), np.asarray(std, np.float32))
        for kind, (mean, std) in pairs.items()
    }
    return {"standardised": (own.mean, own.std)} | found


def _choices(low: float, channels: int) -> str:
    """What `--pixels` may be, for a message."""
    if low >= 0:
        return "unit or bytes"
    mapped = "standardised (by the data's own constants, or with --mean and --std), signed"
    imagenet = ", imagenet" if channels == len(IMAGENET[0]) else ""
    unit = ", unit" if low >= -MAX_OVERSHOOT else ""
    return f"{mapped}{imagenet}{unit}, {', '.join(list(WHITENED_KINDS)[:-1])} or {list(WHITENED_KINDS)[-1]}"


def _remedy(seen: str, kind: str, low: float, channels: int) -> str:
    """What to do where pixels are not of the kind that they should be."""
    if seen == "unclear":
        return f"say --pixels {_choices(low, channels)}"
    return f"say --pixels {seen}" if seen != kind else "no --pixels fits, take another file"


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
    """`cifar` or `svhn`, by the name of the data or else by the folders of an RFAD file."""
    folders = [part.name for part in path.resolve().parents[:3]]
    texts = [text.lower() for text in (data, *folders)] if raw.kind == "RFAD" else []
    return next((name for text in texts for name in ("cifar", "svhn") if name in text), "")


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


def _format_values(values: Float[np.ndarray, " c"]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
