"""Image files of every kind have the pixels written here by hand, kept in a cache or streamed."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsdistill.harness.data import datasets, folders, image_files
from dsdistill.harness.data.labeled_images import DataError
from dsdistill.harness.errors import UserError
from kd.data.files.image_files import open_folder

GRAY = np.array([[0, 77, 200], [255, 1, 128]], np.uint8)
COLOUR = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14


def _bytes(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _png(pixels: np.ndarray, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand: rows of samples without a filter."""
    h, w = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    whole = b"\x89PNG\r\n\x1a\n"
    for name, data in parts:
        whole += struct.pack(">I", len(data)) + name + data
        whole += struct.pack(">I", zlib.crc32(name + data))
    return whole


def _tiff(data: bytes, width: int, bits: int, photometric: int) -> bytes:
    """A TIFF written by hand: two rows of one sample a pixel; photometric 0 has white at 0."""
    fields = {256: width, 257: 2, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 2}
    fields[279] = len(data)
    entries = b"".join(struct.pack("<HHIHH", k, 3, 1, v, 0) for k, v in fields.items())
    header = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return header + data + struct.pack("<H", len(fields)) + entries + struct.pack("<I", 0)


def _over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha / 255
    return colour * share + 255 * (1 - share)


def _cmyk(c: int, m: int, y: int, k: int) -> np.ndarray:
    inks = np.array([c, m, y])
    return np.broadcast_to((255 - inks) * (255 - k) / 255, (2, 3, 3))


ALPHA = np.array([[0, 128, 255], [1, 64, 254]], np.uint8)
RGBA = np.dstack([COLOUR, ALPHA])
DEEP = np.array([[0, 1000, 65535], [257 * 9, 32768, 5]], np.uint16)
FRAMES = [Image.fromarray(COLOUR), Image.fromarray(COLOUR[::-1])]
INK = Image.new("CMYK", (3, 2), (10, 200, 30, 40))
PALETTE = np.zeros((256, 3), np.uint8)
PALETTE[:3] = [[10, 20, 30], [200, 100, 0], [1, 2, 3]]
INDEX = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
PLTE, TRNS = (b"PLTE", PALETTE.tobytes()), (b"tRNS", bytes([255, 0, 128]))

# Name of the file: its bytes, the pixels, and by how many levels they may be off.
KINDS: dict[str, tuple[Callable[[], bytes], np.ndarray, int]] = {
    "gray.png": (lambda: _png(GRAY, 8, 0), GRAY, 0),
    "bits.png": (lambda: _bytes(Image.fromarray(GRAY > 100), "PNG"), (GRAY > 100) * 255, 0),
    "white-is-0.tif": (lambda: _tiff((255 - GRAY).tobytes(), 3, 8, 0), GRAY, 0),
    "deep.png": (lambda: _png(DEEP, 16, 0), np.rint(DEEP / 65535 * 255), 0),
    "deep.tif": (lambda: _bytes(Image.fromarray(DEEP), "TIFF"), np.rint(DEEP / 257), 0),
    "deep-clear.png": (
        lambda: _png(DEEP, 16, 0, (b"tRNS", struct.pack(">H", 1000))),
        np.where(DEEP == 1000, 255, np.rint(DEEP / 257)),
        0,
    ),
    # Of 12 bits two pixels fill three bytes.
    "twelve.tif": (
        lambda: _tiff(bytes.fromhex("000fff800123"), 2, 12, 1),
        np.rint([[0, 255], [0x800 / 4095 * 255, 0x123 / 4095 * 255]]),
        0,
    ),
    "twelve.pgm": (
        lambda: b"P5 3 1 4095\n" + np.array([0, 4095, 2048], ">u2").tobytes(),
        np.rint(np.array([[0, 4095, 2048]]) / 4095 * 255),
        0,
    ),
    "gray-alpha.png": (
        lambda: _png(np.dstack([GRAY, ALPHA]), 8, 4),
        _over_white(GRAY, ALPHA),
        1,
    ),
    "gray-clear.png": (
        lambda: _png(GRAY, 8, 0, (b"tRNS", struct.pack(">H", 77))),
        np.where(GRAY == 77, 255, GRAY),
        0,
    ),
    "colour.png": (lambda: _png(COLOUR, 8, 2), COLOUR, 0),
    "deep-colour.png": (lambda: _png(COLOUR.astype(np.uint16) * 256 + 99, 16, 2), COLOUR, 0),
    "alpha.png": (lambda: _png(RGBA, 8, 6), _over_white(COLOUR, ALPHA[..., None]), 1),
    "alpha.webp": (
        lambda: _bytes(Image.fromarray(RGBA), "WEBP", lossless=True, exact=True),
        _over_white(COLOUR, ALPHA[..., None]),
        1,
    ),
    "palette.png": (lambda: _png(INDEX, 8, 3, PLTE), PALETTE[INDEX], 0),
    "palette-clear.png": (
        lambda: _png(INDEX, 8, 3, PLTE, TRNS),
        _over_white(PALETTE[INDEX], np.array([255, 0, 128])[INDEX][..., None]),
        1,
    ),
    "colour.bmp": (lambda: _bytes(Image.fromarray(COLOUR), "BMP"), COLOUR, 0),
    "colour.ppm": (lambda: b"P6 3 2 255\n" + COLOUR.tobytes(), COLOUR, 0),
    "colour.webp": (lambda: _bytes(Image.fromarray(COLOUR), "WEBP", lossless=True), COLOUR, 0),
    "flat.jpg": (
        lambda: _bytes(Image.new("RGB", (3, 2), (200, 30, 90)), "JPEG", quality=95),
        np.broadcast_to([200, 30, 90], (2, 3, 3)),
        3,
    ),
    "really-png.jpg": (lambda: _png(COLOUR, 8, 2), COLOUR, 0),
    "ink.tif": (lambda: _bytes(INK, "TIFF"), _cmyk(10, 200, 30, 40), 1),
    "ink-inverted.jpg": (lambda: _bytes(INK, "JPEG", quality=100), _cmyk(10, 200, 30, 40), 3),
    "frames.gif": (
        lambda: _bytes(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
        COLOUR,
        0,
    ),
    "pages.tif": (
        lambda: _bytes(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]),
        COLOUR,
        0,
    ),
    "frames.webp": (
        lambda: _bytes(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True),
        COLOUR,
        0,
    ),
    # Pure red of sRGB, of the white D50: L 54.3 of 100, a 80.8, b 69.9.
    "lab.tif": (
        lambda: _bytes(Image.new("LAB", (3, 2), (138, 128 + 81, 128 + 70)), "TIFF"),
        np.broadcast_to([255, 0, 0], (2, 3, 3)),
        6,  # a level of 8-bit a or b is up to three of sRGB
    ),
}


def _two_classes(root: Path, name: str, content: bytes, plain: bytes) -> Path:
    for label, file, data in (("a", name, content), ("b", "plain.png", plain)):
        (root / "train" / label).mkdir(parents=True, exist_ok=True)
        (root / "train" / label / file).write_bytes(data)
        (root / "test" / label).mkdir(parents=True, exist_ok=True)
        (root / "test" / label / file).write_bytes(data)
    return root


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_file_has_its_pixels_in_both_packages(name, tmp_path):
    make, expected, tolerance = KINDS[name]
    content = make()
    if name == "ink-inverted.jpg":
        assert b"Adobe" in content
    expected = expected.reshape(*expected.shape[:2], -1)
    plain = np.zeros(expected.shape, np.uint8)
    plain = _png(plain, 8, 2 if expected.shape[-1] == 3 else 0)
    data = _two_classes(tmp_path / "data", name, content, plain)
    kept = folders.read(data, tmp_path / "cache", None).train.images()[0]
    assert kept.shape == expected.shape
    assert np.abs(kept.astype(float) - expected).max() <= tolerance + 0.5 * (tolerance > 0)
    for channels in (1, 3):
        streamed, _ = open_folder(data, 0).train.read(0, channels)
        given = folders.read(data, tmp_path / "cache", None, channels=channels).train.images()[0]
        assert given.shape[-1] == channels
        assert np.array_equal(np.asarray(streamed).reshape(given.shape), given)
        if channels == 3 or expected.shape[-1] == 1:
            assert np.array_equal(given, np.broadcast_to(kept, given.shape))


TURNED = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_every_orientation_is_turned_upright(orientation, kind):
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :8] = (255, 0, 0)  # a corner and an edge tell all eight apart
    pixels[8:, 16:] = (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = image_files.read(io.BytesIO(_bytes(Image.fromarray(pixels), kind, exif=exif)))
    upright = TURNED[orientation](pixels)
    assert np.asarray(got).shape == upright.shape
    assert np.abs(np.asarray(got).astype(int) - upright).mean() < 12


@pytest.mark.parametrize(
    "image", [Image.fromarray(np.full((2, 3), 0.8, np.float32)), Image.new("I", (3, 2), 70000)]
)
def test_pixels_without_a_known_range_are_refused(image, tmp_path):
    data = _two_classes(tmp_path, "x.tif", _bytes(image, "TIFF"), _png(GRAY, 8, 0))
    with pytest.raises(DataError, match="32 bits have no known range: convert it to 8 or 16 bits"):
        folders.read(data, tmp_path / "cache", None)
    with pytest.raises(DataError, match=r"x\.tif cannot be read \(pixels of 32 bits"):
        open_folder(data, 0).train.read(0, 3)


# Grayscale and colour together


def _mixed(root: Path, gray: int, colour: int) -> Path:
    for label in "ab":
        (root / label).mkdir(parents=True)
        for number in range(gray):
            Image.new("L", (4, 4), 50 + number).save(root / label / f"0{number}.png")
        for number in range(colour):
            pixels = Image.new("RGB", (4, 4), (200, 100, number))
            pixels.save(root / label / f"1{number}.png")
    return root


@pytest.mark.parametrize(("gray", "colour"), [(1, 9), (9, 1)])
def test_gray_images_among_colour_ones_are_colour_and_said(gray, colour, tmp_path, capsys):
    data = _mixed(tmp_path / "data", gray, colour)
    folders.read(data, tmp_path / "cache", None)
    splits = folders.read(data, tmp_path / "cache", None)  # from the cache
    assert splits.train.shape == (4, 4, 3)
    store = splits.train.store
    assert (store[0] == 50).all()
    assert (store[gray, ..., :2] == (200, 100)).all()
    said = [line for line in capsys.readouterr().err.splitlines() if "--channels 1" in line]
    assert len(said) == 1
    assert f"{2 * gray} of 20 images are grayscale and are read as colour" in said[0]


def test_colour_that_no_header_foretold_begins_again(tmp_path, monkeypatch):
    data = _mixed(tmp_path / "data", 9, 1)
    monkeypatch.setattr(folders, "MAX_PROBED_FILES", 1)
    store = folders.read(data, tmp_path / "cache", None).train.store
    assert store.shape == (20, 4, 4, 3)
    assert [int(image[0, 0, 0]) for image in store] == [*range(50, 59), 200] * 2


def test_channels_decide(tmp_path):
    data = _mixed(tmp_path / "data", 5, 5)
    options = {"root": tmp_path, "cache": tmp_path / "cache", "validation_fraction": 0}
    gray = datasets.load(str(data), channels=1, **options).train
    assert gray.shape == (4, 4, 1)
    luma = {round(0.299 * 200 + 0.587 * 100 + 0.114 * number) for number in range(5)}
    assert {int(v) for v in np.unique(gray.images())} <= luma | set(range(50, 55))
    only = _mixed(tmp_path / "only", 5, 0)
    assert datasets.load(str(only), **options).train.shape == (4, 4, 1)
    colour = datasets.load(str(only), channels=3, **options).train
    assert colour.shape == (4, 4, 3)
    assert (colour.images() == colour.images()[..., :1]).all()
    with pytest.raises(UserError, match=r"channels must be 1 \(grayscale\) or 3 \(colour\), got 2"):
        datasets.load(str(only), channels=2, **options)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_channels_of_arrays_are_those_of_pillow(dtype, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 5, 5, 3), dtype=np.uint8)
    stored = images if dtype == np.uint8 else images.astype(dtype) / 255
    np.savez(tmp_path / "a.npz", images=stored, labels=np.arange(20) % 2)
    options = {"root": tmp_path, "validation_fraction": 0}
    plain = datasets.load(str(tmp_path / "a.npz"), **options)
    gray = datasets.load(str(tmp_path / "a.npz"), channels=1, **options)
    rows = plain.train.rows
    expected = np.stack([np.asarray(Image.fromarray(i).convert("L")) for i in images[rows]])
    got = gray.train.images()[..., 0] * (1 if dtype == np.uint8 else 255)
    assert np.abs(got - expected.astype(float)).max() <= (0 if dtype == np.uint8 else 0.51)
    again = datasets.load(str(tmp_path / "a.npz"), channels=3, **options)
    assert np.array_equal(again.train.images(), plain.train.images())


# Damaged files


def _many(root: Path, count: int) -> list[Path]:
    files = []
    for label in "ab":
        (root / label).mkdir(parents=True)
        for number in range(count):
            files.append(root / label / f"{number:03}.png")
            files[-1].write_bytes(_png(COLOUR, 8, 2))
    return files


def test_a_damaged_image_of_a_small_folder_is_skipped_and_named(tmp_path, caplog):
    files = _many(tmp_path / "data", 20)
    files[3].write_bytes(b"")
    files[25].write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    splits = folders.read(tmp_path / "data", tmp_path / "cache", None)
    assert len(splits.train) + len(splits.test) == 38
    message = caplog.records[-1].getMessage()
    assert "2 of 40 images" in message
    assert "a/003.png: an empty file" in message
    assert "b/005.png: a Git LFS pointer: run git lfs pull" in message
    for file in files[:5]:
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"6 of 40 .*; at most 3 of 40 may be"):
        folders.read(tmp_path / "data", tmp_path / "cache", None)


def test_half_of_a_tiny_folder_may_not_be_damaged(tmp_path):
    files = _many(tmp_path / "data", 4)
    files[0].write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 8 .*; at most 0 of 8 may be"):
        folders.read(tmp_path / "data", tmp_path / "cache", None)


def _mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut, flipped, filled or doubled somewhere."""
    place = int(rng.integers(len(content)))
    length = int(rng.integers(1, 40))
    kind = rng.integers(4)
    if kind == 0:
        return content[:place]
    if kind == 1:
        flipped = content[place] ^ (1 << int(rng.integers(8)))
        return content[:place] + bytes([flipped]) + content[place + 1 :]
    if kind == 2:
        return (
            content[:place] + bytes([int(rng.integers(256))]) * length + content[place + length :]
        )
    return content[: place + length] + content[place:]


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it can still read
@pytest.mark.parametrize("name", KINDS)
def test_a_mutated_file_is_an_image_or_one_line(name, tmp_path):
    content, rng = KINDS[name][0](), np.random.default_rng(0)
    file = tmp_path / name
    for _ in range(40):
        file.write_bytes(_mutated(content, rng))
        got = folders._decode(file, size=5, channels=None)
        if isinstance(got, str):
            assert got
            assert "\n" not in got
            assert str(tmp_path) not in got
        else:
            assert got.pixels.dtype == np.uint8
            assert got.pixels.shape in ((5, 5, 1), (5, 5, 3))
        image_files.is_gray(file)
