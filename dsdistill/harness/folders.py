"""Folders of class folders, ImageNet style, decoded once into a memory-mapped cache.

    photos/train/cat/1.jpg        or, split here,    photos/cat/1.jpg
    photos/val/cat/7.jpg                             photos/dog/2.png

Decoding costs far more than anything done with the pixels afterwards, so it happens once: the
images lie as uint8 under a key made of every file's name, size and time, and a second load only
maps them into memory.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from dsdistill.harness import memory, progress
from dsdistill.harness.labeled import TEST_FRACTION, DataError, Labeled, stratified
from dsdistill.harness.memory import readable
from dsdistill.harness.runs import write_json

TEST_NAMES = ("val", "valid", "validation", "test")  # beside `train`; the first that exists
MAX_UNREADABLE = 0.01  # share of the images that may be skipped
CHUNK = 256  # images decoded between two writes
LAYOUT = 1  # part of the key: raise it when the same files would be decoded differently
ABANDONED = 24 * 3600  # seconds without a write after which a half-made cache is swept away

Pixels = UInt8[np.ndarray, "h w c"]
Stored = tuple[np.ndarray, dict[int, str]]  # a slot a file, and why some slots are empty


def read(path: Path, cache: Path, image_size: int | None) -> tuple[Labeled, Labeled]:
    """Training and test images of a folder, decoded now if they are not in the cache.

    `train/` and one of `TEST_NAMES` inside give the two parts; without them, a fixed share of
    every class becomes the test part. Transparent pixels are laid on white, and every image is
    turned upright by its EXIF orientation.

    Args:
        path: The folder.
        cache: Where decoded images are kept; created with its parents.
        image_size: The shorter side becomes this long, the longer one is cropped at its centre.
            None asks for images that are all of one size.

    Raises:
        DataError: If the folders do not make a data set, if the images differ in channels or
            size, if too many are unreadable, or if the cache would not fit on its disk.
        OSError: If the cache cannot be written.
    """
    training, test = _parts(path)
    classes, files, labels = _listing(training)
    count = len(files)  # of training images, if there is a test part
    if test is not None:
        names, more, more_labels = _listing(test)
        if different := sorted({*classes} ^ {*names}):
            raise DataError(
                f"{training} and {test} must have the same classes: "
                f"only one of them has {_some(different)}"
            )
        files, labels = files + more, labels + more_labels
    store, good = _cached(path, cache, files, image_size)
    everything = Labeled(store, np.array(labels)[good], classes, rows=good)
    if test is None:
        first, second = stratified(everything.labels, TEST_FRACTION)
    else:
        first, second = np.flatnonzero(good < count), np.flatnonzero(good >= count)
    return everything.select(first), everything.select(second)


def _parts(path: Path) -> tuple[Path, Path | None]:
    """The folder of training images and that of test images, if there are two."""
    if not path.is_dir():
        raise DataError(f"no such folder: {path}")
    if not (path / "train").is_dir():
        return path, None
    test = next((path / name for name in TEST_NAMES if (path / name).is_dir()), None)
    return path / "train", test


def _listing(folder: Path) -> tuple[tuple[str, ...], list[Path], list[int]]:
    """Class names, image files and their labels, in an order that is the same everywhere."""
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    if not classes:
        raise DataError(f"{folder} has no class folders: expected one folder of images a class")
    if len(classes) == 1:
        raise DataError(f"{folder} has one class folder, {classes[0]!r}: expected at least two")
    files, labels = [], []
    for label, name in enumerate(classes):
        images = _images(folder / name)
        if not images:
            raise DataError(f"class folder {folder / name} has no images")
        files += images
        labels += [label] * len(images)
    return tuple(classes), files, labels


def _images(folder: Path) -> list[Path]:
    """The images at any depth, as some data sets nest them; hidden files and folders are not."""
    known, formats, found = Image.registered_extensions().items(), _formats(), []
    extensions = {extension for extension, name in known if name in formats}
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        named = (Path(where, name) for name in files if name[0] != ".")
        found += [file for file in named if file.suffix.lower() in extensions]
    return sorted(found)


def _formats() -> tuple[str, ...]:
    Image.init()  # loads every format Pillow knows
    # Pillow hands EPS to Ghostscript: no external program shall run on a data set's files.
    return tuple(sorted(set(Image.OPEN) - {"EPS"}))


def _cached(
    path: Path, cache: Path, files: list[Path], size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The images, one slot a file, and the slots that hold one; decoded if need be."""
    folder = cache / _key(path, files, size)
    store, skipped = _open(folder, len(files)) or _fill(path, folder, files, size)
    if skipped:
        logging.getLogger(__name__).warning("%s; skipped", _unreadable(path, files, skipped))
    return store, np.setdiff1d(np.arange(len(files)), list(skipped))


def _key(path: Path, files: list[Path], size: int | None) -> str:
    sha = hashlib.sha256(repr((LAYOUT, str(path.resolve()), size)).encode())
    for file in files:
        found = file.stat()
        sha.update(repr((str(file.relative_to(path)), found.st_size, found.st_mtime_ns)).encode())
    return sha.hexdigest()[:32]


def _open(folder: Path, count: int) -> Stored | None:
    """The mapped images and the skipped slots with their reasons; None if missing or damaged."""
    try:
        index = json.loads((folder / "index.json").read_text())
        skipped = {int(slot): str(why) for slot, why in index["skipped"].items()}
        store = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        whole = list(store.shape) == index["shape"] and store.dtype == np.uint8
    except Exception:  # damage shows in many ways, and each is mended by decoding again
        return None
    return (store, skipped) if whole and len(store) == count else None


def _fill(path: Path, folder: Path, files: list[Path], size: int | None) -> Stored:
    """Decode into a folder of another name, renamed when it is whole."""
    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    _sweep(cache)
    work = Path(tempfile.mkdtemp(dir=cache, prefix=".half-"))
    try:
        with (work / "images.npy").open("wb") as file:
            shape, skipped = _write(file, path, files, size)
            file.flush()
            os.fsync(file.fileno())
        write_json(work / "index.json", {"shape": shape, "skipped": skipped})
        work.chmod(0o755)  # mkdtemp makes it private
        _publish(work, folder, len(files))
        stored = _open(folder, len(files))
        assert stored is not None, f"{folder} cannot be read back"
        return stored
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(work: Path, folder: Path, count: int) -> None:
    try:
        work.rename(folder)  # fails where another process was faster, or left a damaged cache
    except OSError:
        if _open(folder, count) is None:
            shutil.rmtree(folder, ignore_errors=True)
            work.rename(folder)


def _sweep(cache: Path) -> None:
    """Remove what killed processes left; a living one writes all the time."""
    for half in cache.glob(".half-*"):
        with suppress(FileNotFoundError):  # another process finished it meanwhile
            last = max(p.stat().st_mtime for p in (half, *half.iterdir()))
            if time.time() - last > ABANDONED:
                shutil.rmtree(half)


def _write(
    file: BinaryIO, path: Path, files: list[Path], size: int | None
) -> tuple[tuple[int, ...], dict[int, str]]:
    """Write one `.npy` of all images; an unreadable one leaves its slot black.

    Written, not mapped: on a full disk a write raises an error, a mapped page kills the process.
    """
    skipped: dict[int, str] = {}
    first, expected, start = -1, np.empty(0), 0
    with progress.bar(len(files), unit="images") as show:
        for slot, pixels in enumerate(_stream(files, size)):
            if isinstance(pixels, str):
                skipped[slot] = pixels
                continue
            if first < 0:
                first, expected = slot, pixels
                start = _header(file, path, (len(files), *pixels.shape))
            _require_alike(path, files[first], expected, files[slot], pixels)
            file.seek(start + slot * pixels.nbytes)
            file.write(pixels.data)
            show(slot + 1)
    if len(skipped) > MAX_UNREADABLE * len(files):
        raise DataError(f"{_unreadable(path, files, skipped)}; at most 1 % may be")
    file.truncate(start + len(files) * expected.nbytes)  # the last slot may be a skipped one
    return (len(files), *expected.shape), skipped


def _stream(files: list[Path], size: int | None) -> Iterator[Pixels | str]:
    """Every file's pixels, or why it has none, in order; a chunk at a time is in memory."""
    if size is not None:
        many = min(CHUNK, len(files))
        # Each is decoded, resized and an array.
        needed, name = 3 * 3 * many * size**2, f"{size}x{size}"
        memory.require(needed, f"{many} images of {name} pixels", "use a smaller --image-size")
    decode = partial(_decode, size=size, formats=_formats())
    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without Python's lock
        for start in range(0, len(files), CHUNK):
            yield from pool.map(decode, files[start : start + CHUNK])


def _decode(file: Path, size: int | None, formats: tuple[str, ...]) -> Pixels | str:
    try:
        with Image.open(file, formats=formats) as image:
            if size is not None:
                image.draft(None, (2 * size, 2 * size))  # a JPEG decodes faster at 1/2, 1/4, 1/8
            plain = _plain(ImageOps.exif_transpose(image))
        if size is not None:
            plain = ImageOps.fit(plain, (size, size), Image.Resampling.BILINEAR)
        pixels = np.asarray(plain)
    except UnidentifiedImageError:
        return "not an image"
    except Exception as error:  # a damaged file has many ways to fail, SyntaxError among them
        return " ".join(f"{type(error).__name__}: {error}".split())
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _plain(image: Image.Image) -> Image.Image:
    """The image as 8-bit grayscale or RGB, whichever its mode is closer to."""
    if image.mode.startswith("I;16"):
        # Pillow's own conversion has clipped at 255 in some releases and shifted in others.
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no known range")
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert(mode)


def _header(file: BinaryIO, path: Path, shape: tuple[int, ...]) -> int:
    """Begin the `.npy`, now that its size is known; returns where the first slot begins."""
    needed, free = math.prod(shape), shutil.disk_usage(Path(file.name).parent).free
    if needed > free:
        raise DataError(
            f"the decoded images of {path} need {readable(needed)} on the disk of the cache, "
            f"{readable(free)} is free: use a smaller --image-size, or another --data-root"
        )
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def _require_alike(path: Path, first: Path, expected: Pixels, file: Path, got: Pixels) -> None:
    """Refuse a file that differs from the first one in channels or size."""
    if expected.shape == got.shape:
        return
    one, other = first.relative_to(path), file.relative_to(path)
    if expected.shape[-1] != got.shape[-1]:
        kinds = {1: "grayscale", 3: "colour"}
        raise DataError(
            f"{path} has images of different channels: {one} is {kinds[expected.shape[-1]]}, "
            f"{other} is {kinds[got.shape[-1]]}: convert them to one kind"
        )
    (h, w, _), (h2, w2, _) = expected.shape, got.shape
    raise DataError(
        f"{path} has images of different size: {one} is {w}x{h}, {other} is {w2}x{h2} "
        "(width x height): give --image-size"
    )


def _unreadable(path: Path, files: list[Path], skipped: dict[int, str]) -> str:
    named = [f"{files[slot].relative_to(path)}: {why}" for slot, why in skipped.items()]
    return f"{len(skipped)} of {len(files)} images of {path} are unreadable ({_some(named)})"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
