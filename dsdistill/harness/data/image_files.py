"""One image file, decoded as people see it: upright, first frame, 8 bits, grayscale or colour.

Both packages decode with `read`, so that an image has the same pixels whether it is cached or
streamed. The pixels are those of Pillow's `convert`, as in torchvision and timm, except where that
would lose the image:

- EXIF orientation is applied.
- Transparent pixels are composited on white. `convert` shows the colour hidden under them.
- 16-bit grayscale is divided by 257, and 12-bit grayscale by 4095/255, so that the declared depth
  of the file maps to 0 to 255. `convert` clips it at 255.
- Grayscale with more bits or with floating-point values has no known range and is unreadable.

Colour profiles (ICC) are not applied, as in torchvision and timm.
"""

from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dsdistill.harness.errors import one_line

PILLOW_MODES = {1: "L", 3: "RGB"}  # by number of channels
# Opened by an external program (EPS, WMF), not images (MPEG), or mere stubs for plugins.
UNSUPPORTED_FORMATS = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "IPTC"}
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
MAX_UNREADABLE_FRACTION = 0.01  # share of the images that may be left out
MAX_UNREADABLE_IN_SMALL_FOLDER = 3  # may be left out of a small folder, up to a tenth of its images
LFS_PREFIX = b"version https://git-lfs"


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the supported formats; none of them starts an external program."""
    Image.init()  # loads every format that Pillow knows
    return tuple(sorted(set(Image.OPEN) - UNSUPPORTED_FORMATS))


@cache
def extensions() -> frozenset[str]:
    """File extensions of the supported formats, in lower case and with the dot."""
    known = Image.registered_extensions().items()
    return frozenset(extension for extension, name in known if name in formats())


def has_image_signature(path: Path | str) -> bool:
    """Whether a file starts with the signature of an image; for names without an extension."""
    try:
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return start.startswith(SIGNATURES) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")


def read(file: BinaryIO | Path, channels: int | None = None) -> Image.Image:
    """Decode an image.

    Args:
        file: A file open for reading, or a path.
        channels: 1 or 3; None keeps the channels of the file.

    Returns:
        An image of mode `L` or `RGB`.

    Raises:
        Exception: Damaged files fail in many ways; `describe_error` turns each into one line.
    """
    with Image.open(file, formats=formats()) as image:
        ImageOps.exif_transpose(image, in_place=True)  # otherwise it copies every image
        plain = _convert_to_8_bits(image)
    mode = PILLOW_MODES[channels] if channels else plain.mode
    return plain if plain.mode == mode else plain.convert(mode)


def is_gray(path: Path) -> bool | None:
    """Whether a file has one channel, according to its header; None if it cannot be read."""
    try:
        with Image.open(path, formats=formats()) as image:
            return _has_one_channel(image)
    except Exception:  # a damaged file has many ways to fail
        return None


def unreadable_allowed(count: int) -> int:
    """How many of a number of images may be unreadable and left out; more are an error."""
    small = min(MAX_UNREADABLE_IN_SMALL_FOLDER, count / 10)
    return int(max(MAX_UNREADABLE_FRACTION * count, small))


def describe_error(error: Exception, path: Path | None = None) -> str:
    """One line, without the path, on why an image could not be read."""
    if isinstance(error, UnidentifiedImageError):
        return _describe_foreign_file(path) if path is not None else "not an image"
    # Of an OSError the reason only: its full text repeats the path.
    reason = getattr(error, "strerror", None)
    return " ".join(reason.split()) if reason else one_line(error)


def _describe_foreign_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_PREFIX))
    except OSError:
        return "not an image"
    if not start:
        return "an empty file"
    return "a Git LFS pointer: run git lfs pull" if start == LFS_PREFIX else "not an image"


def _convert_to_8_bits(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit grayscale or RGB, whichever is closer to its mode."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # Pillow's own conversion has clipped at 255 in some releases and shifted in others.
        values = np.asarray(image).astype(np.float64)
        gray = np.rint(values * (255 / _white_value(image))).astype(np.uint8)
        gray[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(gray)
    if image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits have no known range: convert it to 8 or 16 bits")
    mode = "L" if _has_one_channel(image) else "RGB"
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert(mode)


def _has_one_channel(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16")


def _white_value(image: Image.Image) -> int:
    """Value of white: by the bit depth of a TIFF; Pillow scales other formats to 16 bits."""
    bits = getattr(image, "tag_v2", {}).get(258)
    return 2 ** int(bits[0]) - 1 if bits else 65535
