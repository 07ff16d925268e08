"""Folders of images, decoded once into a memory-mapped cache.

    photos/train/cat/1.jpg        or, split here,    photos/cat/1.jpg
    photos/val/cat/7.jpg                             photos/dog/2.png

`layout` decides which files are read and for which part; `image_files` decodes them. Decoding costs
far more than anything done with the pixels afterwards, so it happens once: the images are stored as
uint8 under a key derived from every file's name, size and time, and a second load only maps them
into memory, after comparing checksums. Recordings become images on the same way (`mel_images`).
"""

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from dsdistill.harness import memory
from dsdistill.harness.checksums import json_digest
from dsdistill.harness.data import image_files, mel_images, wav_files
from dsdistill.harness.data.folder_part import part_name
from dsdistill.harness.data.labeled_images import (
    TEST_FRACTION,
    DataError,
    LabeledImages,
    split_by_class,
)
from dsdistill.harness.data.layout import FolderLayout, list_folder
from dsdistill.harness.data.mel_images import MelFormat, MelOptions
from dsdistill.harness.errors import UserError
from dsdistill.harness.files import write_json
from dsdistill.harness.memory import format_bytes
from dsdistill.harness.runs import locks, progress
from dsdistill.harness.text import abbreviate_names, printable

IMAGES_PER_CHUNK = 256  # images decoded between two writes
INDEX_FILE = "index.json"
DECODER_VERSION = 2  # part of the key: raise it when the same files would be decoded differently
MAX_SECONDS_WITHOUT_WRITE = 24 * 3600  # after which an incomplete cache entry counts as abandoned
BYTES_PER_CHECKSUM = 1 << 24  # bytes that one checksum covers
MAX_PROBED_FILES = 64  # files whose headers are read to detect colour

Pixels = UInt8[np.ndarray, "h w c"]
# Length of the shorter side of an image, None for images as they are; or a format of recordings.
Size = int | MelFormat | None


class DecodedImage(NamedTuple):
    """An image, and whether its file has only one channel."""

    pixels: Pixels
    is_gray: bool


@dataclass(frozen=True, eq=False)
class FolderSplits:
    """The images of a folder by part.

    Attributes:
        train: Training images; if the folder has no validation part, all that are not for testing.
        validation: The folder's validation images; None if some of `train` are to be held out.
        test: The folder's test images, or a fixed share of every class.
        layout: Which folder serves as which part.
        mel: Format of the images of recordings; None for images.
        conversion: What became of recordings on the way, for a note; None for images.
    """

    train: LabeledImages
    validation: LabeledImages | None
    test: LabeledImages
    layout: FolderLayout
    mel: MelFormat | None = None
    conversion: str | None = None


@dataclass(frozen=True, eq=False)
class DecodedFolder:
    """Decoded images of a folder.

    Attributes:
        images: Pixels, one slot per file: (files, h, w, c), uint8.
        skipped: For each empty slot, why its file could not be read.
        gray: Number of files with one channel, where the images have three.
    """

    images: np.ndarray
    skipped: dict[int, str]
    gray: int


class _UnexpectedColour(Exception):
    """Colour after grayscale images only: the array being written has too few channels."""


def read(
    path: Path,
    cache: Path,
    image_size: int | None,
    *,
    channels: int | None = None,
    classes: Sequence[str] | None = None,
    sound: MelOptions | None = None,
) -> FolderSplits:
    """Load the images of a folder, decoding them if they are not in the cache.

    Args:
        path: Folder for `layout.list_folder`, which finds its parts; if it has none, a fixed share
            of every class becomes the test part.
        cache: Folder for decoded images; created with its parents.
        image_size: Length that the shorter side is resized to, in pixels; the longer side is
            cropped around its centre. None requires that all images have the same size.
        channels: 1 or 3; None means 3 if any image has colour.
        classes: Order of the classes, as in `layout.list_folder`.
        sound: What is asked of the images of recordings.

    Raises:
        DataError: If the folders are not a data set, if the images differ in size, if too many are
            unreadable, or if the cache cannot be created or would not fit on its disk.
        UserError: If an option is for the other kind of data, images or recordings.
        OSError: If the cache cannot be written.
    """
    layout = list_folder(path, classes)
    files = layout.files
    mel, conversion = _choose_format(path, layout, image_size, sound)
    images, readable = read_files(path, cache, files, mel or image_size, channels)
    everything = LabeledImages(
        images, np.array(layout.labels)[readable], layout.train.classes, rows=readable
    )
    first, second = np.searchsorted(readable, layout.ends)
    rows = np.arange(len(readable))
    validation = everything.select(rows[first:second]) if layout.validation else None
    if layout.test:
        train, test = rows[:first], rows[second:]
    else:
        train, test = split_by_class(everything.labels, TEST_FRACTION, layout.draw_order)
    train, test = everything.select(train), everything.select(test)
    return FolderSplits(train, validation, test, layout, mel, conversion)


def read_files(
    path: Path, cache: Path, files: list[Path], size: Size, channels: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Decode files of a folder, or open them in the cache; say which cannot be read.

    Args:
        path: The folder.
        cache, channels: As in `read`.
        files: Paths below the folder, one for each slot of the result.
        size: As `image_size` in `read`, or the format of recordings.

    Returns:
        The images, and the slots that could be read.

    Raises:
        DataError, OSError: As `read`.
    """
    store = _open_or_decode(path, cache, files, size, channels)
    if store.skipped:
        line = _describe_unreadable(path, files, store.skipped)
        logging.getLogger(__name__).warning("%s; skipped", printable(line))
    if store.gray and channels is None:
        progress.note(
            f"{path}: {store.gray:,} of {len(files):,} images are grayscale and are read as "
            "colour, since others have colour; --channels 1 converts all to grayscale"
        )
    return store.images, np.setdiff1d(np.arange(len(files)), list(store.skipped))


def read_unlabelled(
    path: Path, cache: Path, image_size: int | None, channels: int | None = None
) -> LabeledImages:
    """Load all images below a folder, whatever classes it has; of a split one its training part.

    Args:
        path: Folder of image files, at any depth.
        cache, image_size, channels: As in `read`.

    Returns:
        The images in the order of their paths, all labelled 0, without class names.

    Raises:
        DataError: As `read`, or if there are no images.
        OSError: If the cache cannot be written.
    """
    parts = [child for child in path.iterdir() if child.is_dir() and part_name(child.name)]
    train = [child for child in parts if part_name(child.name) == "train"]
    files = sorted(
        file
        for folder in train or [path]
        for file in folder.rglob("*")
        if file.suffix.lower() in image_files.extensions()
        and not any(name.startswith(".") for name in file.relative_to(path).parts)
        and file.is_file()
    )
    if not files:
        raise DataError(f"{path} holds no images")
    store = _open_or_decode(path, cache, files, image_size, channels)
    if store.skipped:
        line = _describe_unreadable(path, files, store.skipped)
        logging.getLogger(__name__).warning("%s; skipped", printable(line))
    readable = np.setdiff1d(np.arange(len(files)), list(store.skipped))
    return LabeledImages(store.images, np.zeros(len(readable), np.int64), (), rows=readable)


def decode(path: Path, cache: Path, files: list[Path], size: Size) -> DecodedFolder:
    """Decode files of a folder, or open them in the cache.

    Args:
        path: The folder.
        cache: As in `read`.
        files: Paths below the folder, one for each slot of the result.
        size: As `image_size` in `read`, or the format of recordings.

    Raises:
        DataError, OSError: As `read`.
    """
    return _open_or_decode(path, cache, files, size, None)


def _choose_format(
    path: Path, layout: FolderLayout, image_size: int | None, sound: MelOptions | None
) -> tuple[MelFormat | None, str | None]:
    """Choose the format of recordings by those of the training part; None of images.

    Returns:
        The format, and what becomes of all recordings on the way.

    Raises:
        UserError: If an option is for the other kind of data or out of range, or no recording can
            be read.
    """
    if not layout.holds_recordings:
        if sound is not None:
            raise UserError(
                f"{path} holds images, and --seconds, --mel-bands and --sample-rate are for "
                "recordings: leave them out"
            )
        return None, None
    if image_size is not None:
        raise UserError(
            f"{path} holds recordings, whose images are as large as --seconds and --mel-bands make "
            "them: leave --image-size out"
        )
    train = len(layout.train.files)
    headers = mel_images.read_headers(layout.files[:train])
    mel = (sound or MelOptions()).settle(headers)
    headers += mel_images.read_headers(layout.files[train:])
    return mel, mel_images.describe_conversion(mel, headers)


def _open_or_decode(
    path: Path, cache: Path, files: list[Path], size: Size, channels: int | None
) -> DecodedFolder:
    """Open the images in the cache, decoding them if the entry is missing or damaged."""
    fingerprint = _fingerprint(path, files)
    size, channels = _find_equal_entry(cache, fingerprint, size, channels)
    folder = cache / _cache_key(fingerprint, size, channels)
    if folder.exists():
        if store := _open_entry(folder, len(files)):
            with suppress(OSError):  # a cache that another user owns
                os.utime(folder / INDEX_FILE)  # records the last use
            return store
        progress.say(f"the decoded images in {folder} are damaged: decoding {path} again")
    return _decode_into_cache(path, folder, files, size, channels)


def _find_equal_entry(
    cache: Path, fingerprint: bytes, size: Size, channels: int | None
) -> tuple[Size, int | None]:
    """Find the size and channels under which the requested pixels are in the cache already.

    Images that are decoded as they are may have the requested size or channels; resizing to their
    own size and converting to their own channels changes no pixel.

    Returns:
        `size` and `channels` of that entry, those that were requested if there is none.
    """
    for entry in product((size, None), (channels, None)):
        if index := read_index(cache / _cache_key(fingerprint, *entry)):
            _, height, width, depth = index["shape"]
            same_size = entry[0] == size or height == width == size
            if same_size and (entry[1] == channels or depth == channels):
                return entry
    return size, channels


def _fingerprint(path: Path, files: list[Path]) -> bytes:
    """Hash of the folder's path and of every file's name, size and time."""
    sha = hashlib.sha256(repr((DECODER_VERSION, os.fsencode(path.resolve()))).encode())
    for file in files:
        stat = file.stat()
        name = os.fsencode(file.relative_to(path))
        sha.update(repr((name, stat.st_size, stat.st_mtime_ns)).encode())
    return sha.digest()


def _cache_key(fingerprint: bytes, size: Size, channels: int | None) -> str:
    return hashlib.sha256(repr((fingerprint, size, channels)).encode()).hexdigest()[:32]


def _open_entry(folder: Path, count: int) -> DecodedFolder | None:
    """Map the images of a cache entry; None if missing, or not byte for byte as written."""
    try:
        index = read_index(folder)
        assert index is not None
        skipped = {int(slot): str(why) for slot, why in index["skipped"].items()}
        if _checksums(folder / "images.npy") != index["checksums"]:
            return None
        store = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        is_complete = list(store.shape) == index["shape"] and store.dtype == np.uint8
        gray = int(index["gray"])
    except Exception:  # damage shows in many ways; decoding again repairs all of them
        return None
    return DecodedFolder(store, skipped, gray) if is_complete and len(store) == count else None


def read_index(folder: Path) -> dict[str, Any] | None:
    """Read the index of a cache entry; None if it is missing or damaged."""
    try:
        stored = json.loads((folder / INDEX_FILE).read_text())
        index = stored["index"]
        return index if stored["sha256"] == json_digest(index) else None
    except Exception:  # damage shows in many ways, such as endless nested brackets
        return None


def _checksums(file: Path) -> list[int]:
    """CRC-32 of each `BYTES_PER_CHECKSUM` bytes of a file, including the `.npy` header.

    It detects errors of disks and memory, at several GB/s per core; it does not protect against
    deliberate changes.
    """

    def checksum(start: int) -> int:
        with file.open("rb") as opened:
            opened.seek(start)
            return zlib.crc32(opened.read(BYTES_PER_CHECKSUM))

    with ThreadPoolExecutor() as pool:  # reading and zlib release the GIL
        return list(pool.map(checksum, range(0, file.stat().st_size, BYTES_PER_CHECKSUM)))


def _decode_into_cache(
    path: Path, folder: Path, files: list[Path], size: Size, channels: int | None
) -> DecodedFolder:
    """Decode into a folder of another name, and rename it when it is complete."""
    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        unfinished, lock = _begin(cache)
    except OSError as error:
        raise DataError(
            f"decoded images cannot be kept in {cache} ({error.strerror}): name a folder for them "
            "in the environment variable DSDISTILL_CACHE"
        ) from error
    _remove_abandoned(cache)
    work = unfinished / "entry"
    try:
        work.mkdir()
        shape, skipped, gray = _write_images(work / "images.npy", path, files, size, channels)
        index = {
            "source": printable(str(path.resolve())),
            "image_size": None if isinstance(size, MelFormat) else size,
            "recordings": str(size) if isinstance(size, MelFormat) else None,
            "shape": shape,
            "skipped": {str(slot): reason for slot, reason in skipped.items()},
            "gray": gray,
            "checksums": _checksums(work / "images.npy"),
        }
        index = json.loads(json.dumps(index))
        write_json(work / INDEX_FILE, {"index": index, "sha256": json_digest(index)})
        _publish(work, folder, len(files))
        stored = _open_entry(folder, len(files))
        assert stored is not None, f"{folder} cannot be read back"
        size_on_disk = format_bytes((folder / "images.npy").stat().st_size)
        progress.note(
            f"{path}: its decoded images are kept in {folder} ({size_on_disk}); "
            "`dsdistill cache` lists and clears them"
        )
        return stored
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        lock.release()


def _begin(cache: Path) -> tuple[Path, locks.Lock]:
    """Create a folder for an unfinished entry, locked so that clearing the cache spares it."""
    while True:
        unfinished = Path(tempfile.mkdtemp(dir=cache, prefix=".half-"))
        # Otherwise it was cleared before we locked it: try again.
        with suppress(locks.LockHeld, FileNotFoundError):
            return unfinished, locks.acquire(unfinished, needed=False)


def _write_images(
    file: Path, path: Path, files: list[Path], size: Size, channels: int | None
) -> tuple[tuple[int, ...], dict[int, str], int]:
    """Write the images with as many channels as they need.

    If colour appears after grayscale images only, writing starts over; probing some headers first
    makes that rare.

    Returns:
        Shape of the array, reasons for skipped slots, and the number of grayscale files.
    """
    if channels is None:
        step = max(len(files) // MAX_PROBED_FILES, 1)
        is_gray = [image_files.is_gray(name) for name in files[::step]]
        channels = 3 if False in is_gray else None
    for attempt in (channels, 3):
        with suppress(_UnexpectedColour), file.open("wb") as opened:
            written = _write_slots(opened, path, files, size, attempt)
            opened.flush()
            os.fsync(opened.fileno())
            return written
    raise AssertionError("three channels hold every image")


def _publish(work: Path, folder: Path, count: int) -> None:
    try:
        work.rename(folder)  # fails if another process was faster, or left a damaged entry
    except OSError:
        if _open_entry(folder, count) is None:
            shutil.rmtree(folder, ignore_errors=True)
            work.rename(folder)


def _remove_abandoned(cache: Path) -> None:
    """Remove unfinished entries of killed processes; a running one writes all the time."""
    for unfinished in cache.glob(".half-*"):
        with suppress(FileNotFoundError):  # another process has finished it meanwhile
            last = max(p.stat().st_mtime for p in (unfinished, *unfinished.rglob("*")))
            if time.time() - last > MAX_SECONDS_WITHOUT_WRITE:
                shutil.rmtree(unfinished)


def _write_slots(
    file: BinaryIO, path: Path, files: list[Path], size: Size, channels: int | None
) -> tuple[tuple[int, ...], dict[int, str], int]:
    """Write one `.npy` of all images; an unreadable one leaves its slot black.

    The file is written, not mapped: on a full disk a write raises an error, while a mapped page
    kills the process.
    """
    skipped: dict[int, str] = {}
    first, expected, start, gray = -1, np.empty(0), 0, 0
    with progress.bar(len(files), unit="images") as show:
        for slot, decoded in enumerate(_decode_all(files, size, channels)):
            if isinstance(decoded, str):
                skipped[slot] = decoded
                continue
            pixels, is_gray = decoded
            gray += is_gray
            if first < 0:
                first, expected = slot, pixels
                start = _write_header(file, path, (len(files), *pixels.shape))
            if pixels.shape[-1] < expected.shape[-1]:
                pixels = np.repeat(pixels, 3, axis=-1)
            elif pixels.shape[-1] > expected.shape[-1]:
                raise _UnexpectedColour
            _require_same_size(path, files[first], expected, files[slot], pixels)
            file.seek(start + slot * pixels.nbytes)
            file.write(pixels.data)
            show(slot + 1)
    allowed = image_files.unreadable_allowed(len(files))
    if len(skipped) > allowed:
        raise DataError(
            f"{_describe_unreadable(path, files, skipped)}; at most {allowed} of "
            f"{len(files)} may be: repair or remove them"
        )
    file.truncate(start + len(files) * expected.nbytes)  # the last slot may have been skipped
    coloured = expected.shape[-1] == 3 and gray < len(files) - len(skipped)
    return (len(files), *expected.shape), skipped, gray if coloured else 0


def _decode_all(
    files: list[Path], size: Size, channels: int | None = None
) -> Iterator[DecodedImage | str]:
    """Yield each file's pixels, or why it has none, in order; memory holds one chunk at a time."""
    if isinstance(size, int):
        count = min(IMAGES_PER_CHUNK, len(files))
        # Three channels, and three copies: decoded, resized and as an array.
        needed, name = 3 * 3 * count * size**2, f"{size}x{size}"
        memory.require(needed, f"{count} images of {name} pixels", "use a smaller --image-size")
    decode = partial(_decode, size=size, channels=channels)
    with ThreadPoolExecutor() as pool:  # Pillow releases the GIL to decode and resize
        for start in range(0, len(files), IMAGES_PER_CHUNK):
            yield from pool.map(decode, files[start : start + IMAGES_PER_CHUNK])


def _decode(file: Path, size: Size, channels: int | None) -> DecodedImage | str:
    if isinstance(size, MelFormat):
        return _decode_recording(file, size, channels)
    # Decoded at full size: the JPEG decoder's own shrinking ("draft") would be 2 to 4 times as
    # fast, once, and change pixels by up to 5 levels in photos and 49 in noise, so that a teacher
    # would see other images than it was trained on, and streamed images would differ from cached.
    try:
        plain = image_files.read(file)
        is_gray = plain.mode == "L"
        if size is not None:
            plain = ImageOps.fit(plain, (size, size), Image.Resampling.BILINEAR)
        plain = plain if channels is None else plain.convert(image_files.PILLOW_MODES[channels])
        pixels = np.asarray(plain)
    except Exception as error:  # a damaged file has many ways to fail, SyntaxError among them
        return image_files.describe_error(error, file)
    return DecodedImage(pixels if pixels.ndim == 3 else pixels[..., None], is_gray)


def _decode_recording(file: Path, mel: MelFormat, channels: int | None) -> DecodedImage | str:
    try:
        pixels = mel_images.read(file, mel)[..., None]
    except (ValueError, OSError) as error:
        return image_files.describe_error(error, file)
    return DecodedImage(pixels if channels is None else np.repeat(pixels, channels, -1), True)


def _write_header(file: BinaryIO, path: Path, shape: tuple[int, ...]) -> int:
    """Write the `.npy` header, now that the shape is known; return the offset of the first slot."""
    needed, free = math.prod(shape), shutil.disk_usage(Path(file.name).parent).free
    if needed > free:
        raise DataError(
            f"the decoded images of {path} need {format_bytes(needed)} on the disk of the cache, "
            f"{format_bytes(free)} is free: use a smaller --image-size, or name another folder in "
            "the environment variable DSDISTILL_CACHE"
        )
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def _require_same_size(path: Path, first: Path, expected: Pixels, file: Path, got: Pixels) -> None:
    """Refuse an image whose shape differs from that of the first one."""
    if expected.shape == got.shape:
        return
    name, other = (f.relative_to(path) for f in (first, file))
    (h, w, _), (h2, w2, _) = expected.shape, got.shape
    raise DataError(
        f"{path} has images of different size: {name} is {w}x{h}, {other} is {w2}x{h2} "
        "(width x height): give --image-size"
    )


def _describe_unreadable(path: Path, files: list[Path], skipped: dict[int, str]) -> str:
    reasons = [f"{files[slot].relative_to(path)}: {why}" for slot, why in skipped.items()]
    noun = "recordings" if wav_files.is_wav(files[0]) else "images"
    count = f"{len(skipped)} of {len(files)} {noun} of {path}"
    return f"{count} are unreadable ({abbreviate_names(reasons)})"
