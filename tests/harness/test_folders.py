"""Folders of images: any mode, size and layout, decoded once, and one line for what is wrong."""

import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from PIL import Image

from dsdistill.commands import cache
from dsdistill.harness import paths
from dsdistill.harness.data import datasets, folder_part, folders, labeled_images
from dsdistill.harness.data.labeled_images import DataError
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import locks


def _pixels(h=6, w=6, c=3, seed=0):
    shape = (h, w) if c == 1 else (h, w, c)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _save(file, pixels, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, **options)
    return file


def _classes(folder, counts, **shape):
    for name, count in counts.items():
        for i in range(count):
            _save(folder / name / f"{i:03}.png", _pixels(seed=zlib.crc32(f"{name}{i}".encode())))
    return folder


def _read(path, tmp_path, size=None):
    splits = folders.read(path, tmp_path / "cache", size)
    assert splits.validation is None
    return splits.train, splits.test


def _refused(path, tmp_path, match, size=None):
    with pytest.raises(DataError, match=match) as caught:
        _read(path, tmp_path, size)
    assert "\n" not in str(caught.value)
    if (tmp_path / "cache").exists():
        assert not list((tmp_path / "cache").iterdir())


def _one(tmp_path, image, size=None, name="x.png", **options):
    """The image as it is read, beside a plain one of its own kind."""
    data = tmp_path / "one"
    file = _save(data / "train" / "a" / name, image, **options)
    with Image.open(file) as opened:
        gray = opened.mode in ("1", "L", "LA", "I;16")
    shape = image.shape if isinstance(image, np.ndarray) else (*image.size[::-1],)
    _save(
        data / "train" / "b" / "y.png", _pixels(*(size or s for s in shape[:2]), 1 if gray else 3)
    )
    return folders.read(data, tmp_path / "cache", size).train.images()[0]


def test_train_and_val_are_read_in_class_order(tmp_path):
    data = tmp_path / "data"
    _classes(data / "train", {"b": 3, "a": 2})
    _classes(data / "val", {"a": 1, "b": 1})
    train, test = _read(data, tmp_path)
    assert train.classes == test.classes == ("a", "b")
    assert train.labels.tolist() == [0, 0, 1, 1, 1]
    assert test.labels.tolist() == [0, 1]
    files = sorted((data / "train").rglob("*.png")) + sorted((data / "val").rglob("*.png"))
    got = np.concatenate([train.images(), test.images()])
    np.testing.assert_array_equal(got, [np.asarray(Image.open(file)) for file in files])
    assert isinstance(train.store, np.memmap)


@pytest.mark.parametrize("name", sorted({*folder_part.PART_BY_KEYWORD} - {"train", "training"}))
def test_names_of_the_test_part(name, tmp_path):
    _classes(tmp_path / "data" / "train", {"a": 2, "b": 2})
    _classes(tmp_path / "data" / name, {"a": 1, "b": 3})
    train, test = _read(tmp_path / "data", tmp_path)
    assert (len(train), len(test)) == (4, 4)


@pytest.mark.parametrize("inside", ["", "train"])
def test_a_folder_without_test_part_is_split(inside, tmp_path):
    data = tmp_path / "data"
    _classes(data / inside, {"a": 10, "b": 20})
    train, test = _read(data, tmp_path)
    kept, held = labeled_images.split_by_class(np.repeat([0, 1], [10, 20]), datasets.TEST_FRACTION)
    np.testing.assert_array_equal(train.rows, kept)
    np.testing.assert_array_equal(test.rows, held)
    assert np.bincount(test.labels).tolist() == [2, 4]


def test_datasets_load_reads_folders(tmp_path):
    _classes(tmp_path / "pets", {"a": 20, "b": 20})
    cache = tmp_path / "own"
    splits = datasets.load(str(tmp_path / "pets"), root=tmp_path, image_size=4, cache=cache)
    assert splits.name == "pets"
    assert splits.train.shape == (4, 4, 3)
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [28, 4, 8]
    assert len(list(cache.iterdir())) == 1


def test_nested_hidden_and_foreign_files(tmp_path):
    data = _classes(tmp_path / "data", {"a": 2, "b": 2})
    _save(data / "a" / "images" / "deep.PNG", _pixels())
    _save(data / "a" / ".hidden.png", _pixels())
    _save(data / "a" / ".thumbnails" / "0.png", _pixels())
    _save(data / ".git" / "0.png", _pixels())
    (data / "a" / "boxes.txt").write_text("0 0 1 1")
    (data / "notes.txt").write_text("two classes")
    train, test = _read(data, tmp_path)
    assert train.classes == ("a", "b")
    assert np.bincount(np.concatenate([train.labels, test.labels])).tolist() == [3, 2]


# Modes


def test_palette_and_transparency_become_colour(tmp_path):
    colours = _pixels(c=3)
    palette = Image.fromarray(colours).quantize(256)
    np.testing.assert_array_equal(_one(tmp_path / "p", palette), palette.convert("RGB"))
    clear = np.dstack([colours, np.full((6, 6), 255, np.uint8)])
    clear[0, 0] = (10, 20, 30, 0)
    got = _one(tmp_path / "rgba", clear)
    assert got[0, 0].tolist() == [255, 255, 255]  # laid on white
    np.testing.assert_array_equal(got[1:], colours[1:])


def test_cmyk_becomes_colour(tmp_path):
    image = Image.new("CMYK", (6, 6), (0, 255, 255, 0))  # red
    red = _one(tmp_path, image, name="x.tif")
    assert red.shape == (6, 6, 3)
    assert red[0, 0].tolist() == [255, 0, 0]


def test_sixteen_bits_become_eight(tmp_path):
    values = np.linspace(0, 65535, 36).astype(np.uint16).reshape(6, 6)
    got = _one(tmp_path, values)
    np.testing.assert_array_equal(got[..., 0], np.rint(values / 65535 * 255))


def test_bits_and_gray_with_alpha_stay_gray(tmp_path):
    bits = Image.fromarray(_pixels(c=1) > 128)
    assert set(np.unique(_one(tmp_path / "1", bits))) == {0, 255}
    gray = np.dstack([_pixels(c=1), np.full((6, 6), 255, np.uint8)])
    np.testing.assert_array_equal(_one(tmp_path / "la", gray)[..., 0], gray[..., 0])


# Sizes


def test_different_sizes_need_image_size(tmp_path):
    data = _classes(tmp_path / "data", {"a": 2, "b": 2})
    _save(data / "b" / "wide.png", _pixels(6, 9))
    _refused(data, tmp_path, r"a/000\.png is 6x6, b/wide\.png is 9x6 .*--image-size")
    assert _read(data, tmp_path, 5)[0].shape == (5, 5, 3)


def test_resize_shortens_the_shorter_side_and_crops_the_longer(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255  # the centre square, and nothing else
    got = _one(tmp_path, wide, size=10)
    assert got.shape == (10, 10, 3)
    assert (got[:, 1:-1] == 255).all()


def test_shrinking_averages(tmp_path):
    """Without antialiasing a fine checkerboard would come out black, white or striped."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    got = _one(tmp_path, board, size=8).astype(int)
    assert abs(got - 127).max() < 10


def test_an_image_of_the_asked_size_is_unchanged(tmp_path):
    pixels = _pixels(7, 7)
    np.testing.assert_array_equal(_one(tmp_path, pixels, size=7), pixels)


def test_a_large_jpeg_is_decoded_whole_and_then_shrunk(tmp_path):
    """The decoder's own shrinking changes pixels by tens of levels."""
    pixels = _pixels(400, 320)
    got = _one(tmp_path, pixels, size=40, name="x.jpg", quality=95)
    with Image.open(tmp_path / "one" / "train" / "a" / "x.jpg") as image:
        square = image.resize((40, 40), Image.Resampling.BILINEAR, box=(0, 40, 320, 360))
    np.testing.assert_array_equal(got, np.asarray(square))


def test_exif_orientation_is_applied(tmp_path):
    pixels = _pixels(4, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    data = tmp_path / "data"
    _save(data / "a" / "turned.png", pixels, exif=exif)
    _save(data / "b" / "upright.png", _pixels(8, 4))
    train, _ = _read(data, tmp_path)
    np.testing.assert_array_equal(train.images()[0], np.rot90(pixels, -1))


# Refusals


def test_missing_and_empty_folders(tmp_path):
    _refused(tmp_path / "none", tmp_path, "no such folder")
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", tmp_path, "no class folders")


def test_flat_folder_single_class_and_class_without_images(tmp_path):
    _save(tmp_path / "flat" / "0.png", _pixels())
    _refused(tmp_path / "flat", tmp_path, "flat has no class folders")
    _refused(_classes(tmp_path / "single", {"a": 3}), tmp_path, "one class folder, 'a'")
    data = _classes(tmp_path / "data", {"a": 3, "b": 3})
    (data / "c").mkdir()
    (data / "c" / "readme.txt").write_text("to come")
    _refused(data, tmp_path, "data/c has no images")


def test_train_and_val_of_different_classes(tmp_path):
    _classes(tmp_path / "data" / "train", {"a": 2, "b": 2, "c": 2})
    _classes(tmp_path / "data" / "val", {"a": 2, "b": 2, "d": 2})
    _refused(tmp_path / "data", tmp_path, "data/val lacks c; .*data/train lacks d")


def _spoil(data, count):
    """Damage in four ways: truncated, not an image, empty, unreadable format."""
    files = sorted(data.rglob("*.png"))[:: max(len(list(data.rglob("*.png"))) // count, 1)][:count]
    for i, file in enumerate(files):
        content = file.read_bytes()
        file.write_bytes([content[: len(content) - 40], b"no image", b"", content[:20]][i % 4])
    return files


def test_a_few_unreadable_images_are_skipped_counted_and_named(tmp_path, caplog):
    data = _classes(tmp_path / "data", {"a": 150, "b": 150})
    bad = _spoil(data, 3)
    for _ in range(2):  # decoded, then from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            train, test = _read(data, tmp_path)
        (record,) = caplog.records
        assert "3 of 300 images" in record.getMessage()
        for file in bad:
            assert str(file.relative_to(data)) in record.getMessage()
        rows = np.sort(np.concatenate([train.rows, test.rows]))
        files = [f for f in sorted(data.rglob("*.png")) if f not in bad]
        store = train.store[rows]
        np.testing.assert_array_equal(store, [np.asarray(Image.open(f)) for f in files])


def test_the_first_and_last_images_may_be_the_unreadable_ones(tmp_path):
    data = _classes(tmp_path / "data", {"a": 100, "b": 100})
    files = sorted(data.rglob("*.png"))
    files[0].write_bytes(b"")
    files[-1].write_bytes(b"")
    train, test = _read(data, tmp_path)
    assert len(train) + len(test) == 198
    assert len(train.store) == 200


def test_too_many_unreadable_images_are_refused(tmp_path):
    data = _classes(tmp_path / "data", {"a": 100, "b": 100})
    _spoil(data, 7)
    _refused(data, tmp_path, r"7 of 200 images .* unreadable .* and 2 more\); at most 3 of")


def test_no_readable_image_at_all(tmp_path):
    data = _classes(tmp_path / "data", {"a": 2, "b": 2})
    _spoil(data, 4)
    _refused(data, tmp_path, "4 of 4 images")


def test_a_decompression_bomb_counts_as_unreadable(tmp_path, monkeypatch):
    data = _classes(tmp_path / "data", {"a": 2, "b": 2})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    _refused(data, tmp_path, "4 of 4 images .*decompression bomb")


def test_no_program_is_run_on_the_files(tmp_path):
    """Pillow hands PostScript to Ghostscript, whatever the file's name says."""
    data = _classes(tmp_path / "data", {"a": 2, "b": 2})
    _save(data / "a" / "x.eps", _pixels())
    (data / "a" / "y.png").write_bytes((data / "a" / "x.eps").read_bytes())
    _refused(data, tmp_path, r"1 of 5 images .*a/y\.png: not an image")


def test_a_full_disk_is_refused_with_figures_before_decoding(tmp_path, monkeypatch):
    data = _classes(tmp_path / "data", {"a": 2, "b": 2})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1024))
    _refused(data, tmp_path, r"need 6\.8 KiB .* 1\.0 KiB is free.*--image-size", size=24)


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    data = _classes(tmp_path / "data", {"a": 2, "b": 2})

    def fail(_):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        _read(data, tmp_path)
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written(tmp_path):
    data = _classes(tmp_path / "data", {"a": 2, "b": 2})
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be kept in .*file.*DSDISTILL_CACHE"):
        folders.read(data, tmp_path / "file" / "cache", None)


# The cache


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded, in any order."""
    files, decode = [], folders._decode

    def spy(file, **options):
        files.append(file)
        return decode(file, **options)

    monkeypatch.setattr(folders, "_decode", spy)
    return files


def test_a_second_load_decodes_nothing(tmp_path, decoded):
    data = _classes(tmp_path / "data", {"a": 3, "b": 3})
    first, _ = _read(data, tmp_path)
    assert len(decoded) == 6
    second, _ = _read(data, tmp_path)
    assert len(decoded) == 6
    np.testing.assert_array_equal(first.images(), second.images())
    _read(data, tmp_path, 4)  # another size is another entry
    assert len(decoded) == 12


def test_channels_that_the_images_have_anyway_are_no_further_entry(tmp_path, decoded):
    data = _classes(tmp_path / "data", {"a": 3, "b": 3})
    first = folders.read(data, tmp_path / "cache", None).train
    again = folders.read(data, tmp_path / "cache", None, channels=3).train
    assert len(decoded) == 6
    np.testing.assert_array_equal(first.images(), again.images())
    assert folders.read(data, tmp_path / "cache", None, channels=1).train.shape == (6, 6, 1)
    assert len(decoded) == 12


def test_the_size_that_the_images_have_anyway_is_no_further_entry(tmp_path, decoded):
    data = _classes(tmp_path / "data", {"a": 3, "b": 3})
    first, _ = _read(data, tmp_path)
    again = folders.read(data, tmp_path / "cache", 6, channels=3).train
    assert len(decoded) == 6
    np.testing.assert_array_equal(first.images(), again.images())
    fresh = folders.read(data, tmp_path / "other", 6).train
    np.testing.assert_array_equal(first.images(), fresh.images())


def test_any_change_of_the_folder_is_seen(tmp_path, decoded):
    data = _classes(tmp_path / "data", {"a": 3, "b": 3})
    changes = [
        lambda: _save(data / "a" / "000.png", _pixels(seed=99)),
        lambda: os.utime(data / "b" / "001.png", (1, 1)),
        lambda: _save(data / "a" / "new.png", _pixels()),
        lambda: (data / "a" / "new.png").rename(data / "b" / "new.png"),
        lambda: (data / "b" / "002.png").unlink(),
    ]
    _read(data, tmp_path)
    for change in changes:
        change()
        decoded.clear()
        train, test = _read(data, tmp_path)
        assert len(decoded) == len(train) + len(test)
    np.testing.assert_array_equal(train.store[0], _pixels(seed=99))


def _cut(file):
    file.write_bytes(file.read_bytes()[:-1])


DAMAGE = {
    "images missing": lambda entry: (entry / "images.npy").unlink(),
    "images cut": lambda entry: _cut(entry / "images.npy"),
    "images empty": lambda entry: (entry / "images.npy").write_bytes(b""),
    "images foreign": lambda entry: np.save(entry / "images.npy", np.zeros(6)),
    "images of another count": lambda entry: np.save(
        entry / "images.npy", np.zeros((5, 6, 6, 3), np.uint8)
    ),
    "index missing": lambda entry: (entry / "index.json").unlink(),
    "index cut": lambda entry: (entry / "index.json").write_text('{"shape": [6'),
    "index nested": lambda entry: (entry / "index.json").write_text("[" * 100_000),
    "index foreign": lambda entry: (entry / "index.json").write_text(json.dumps([1, 2])),
    "all gone": lambda entry: [file.unlink() for file in entry.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_decoded_anew(damage, tmp_path, decoded):
    data = _classes(tmp_path / "data", {"a": 3, "b": 3})
    expected = np.array(_read(data, tmp_path)[0].images())
    (entry,) = (tmp_path / "cache").iterdir()
    DAMAGE[damage](entry)
    np.testing.assert_array_equal(_read(data, tmp_path)[0].images(), expected)
    assert len(decoded) == 12
    assert list((tmp_path / "cache").iterdir()) == [entry]


def test_a_killed_decode_leaves_nothing_that_is_used(tmp_path):
    data = _classes(tmp_path / "data", {"a": 300, "b": 300})
    script = """
import os, pathlib, signal, sys
from dsdistill.harness.data import folders
decode = folders._decode
def die(file, **options):
    if file.name == "100.png" and file.parent.name == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(file, **options)
folders._decode = die
folders.read(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), None)
"""
    cache = tmp_path / "cache"
    done = subprocess.run([sys.executable, "-c", script, str(data), str(cache)])
    assert done.returncode == -9
    (half,) = cache.iterdir()
    train, test = _read(data, tmp_path)
    assert len(train) + len(test) == 600
    assert train.images().any((1, 2, 3)).all()  # no black slot of an image never written
    assert half.exists()  # it may belong to a living process
    for file in (half, *half.rglob("*")):
        os.utime(file, (time.time() - 2 * folders.MAX_SECONDS_WITHOUT_WRITE,) * 2)
    _read(data, tmp_path, 4)
    assert not half.exists()


def _checksum(data, cache):
    splits = folders.read(data, cache, 16)
    return zlib.crc32(splits.train.images()), zlib.crc32(splits.test.images())


def test_processes_may_decode_at_once(tmp_path):
    data = _classes(tmp_path / "data", {"a": 100, "b": 100})
    # Spawned: a fork of a process in which JAX or torch has threads may hang.
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        sums = [pool.submit(_checksum, data, tmp_path / "cache") for _ in range(6)]
        assert len({job.result() for job in sums}) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_only_chunks_are_held(tmp_path, monkeypatch):
    """Files are not decoded ahead of the chunk that is being written."""
    data = _classes(tmp_path / "data", {"a": 30, "b": 30})
    monkeypatch.setattr(folders, "IMAGES_PER_CHUNK", 8)
    decode, done, lead = folders._decode, [], []

    def spy(file, **options):
        done.append(file)
        return decode(file, **options)

    monkeypatch.setattr(folders, "_decode", spy)
    files = sorted(data.rglob("*.png"))
    for written, _ in enumerate(folders._decode_all(files, None)):
        lead.append(len(done) - written)
    assert len(done) == 60
    assert max(lead) <= 8


def _flip(file, place, bit):
    with file.open("r+b") as opened:
        opened.seek(place)
        byte = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([byte ^ (1 << bit)]))


def test_every_flipped_bit_of_the_cache_is_seen_and_said(tmp_path, capsys):
    data = _classes(tmp_path / "data", {"a": 3, "b": 3})
    expected = np.array(_read(data, tmp_path)[0].images())
    (entry,) = (tmp_path / "cache").iterdir()
    rng = np.random.default_rng(0)
    for name in ("images.npy", "index.json"):
        for _ in range(20):
            place = int(rng.integers((entry / name).stat().st_size))
            _flip(entry / name, place, int(rng.integers(8)))
            np.testing.assert_array_equal(_read(data, tmp_path)[0].images(), expected)
    said = [line for line in capsys.readouterr().err.splitlines() if "are damaged" in line]
    assert len(said) >= 38  # white space of the index is no content
    assert str(entry) in said[0]


def test_each_part_of_a_large_cache_has_a_checksum(tmp_path, monkeypatch):
    data = _classes(tmp_path / "data", {"a": 3, "b": 3})
    monkeypatch.setattr(folders, "BYTES_PER_CHECKSUM", 100)
    _read(data, tmp_path)
    (entry,) = (tmp_path / "cache").iterdir()
    content = (entry / "images.npy").read_bytes()
    parts = [content[start : start + 100] for start in range(0, len(content), 100)]
    index = folders.read_index(entry)
    assert index is not None
    assert index["checksums"] == [zlib.crc32(part) for part in parts]
    assert len(parts) > 6


def test_the_cache_has_a_folder_of_its_own_and_its_size_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DSDISTILL_CACHE", str(tmp_path / "kept"))
    data, root = _classes(tmp_path / "data", {"a": 20, "b": 20}), tmp_path / "root"
    datasets.load(str(data), root=root)
    datasets.load(str(data), root=root)
    assert not root.exists()
    (entry,) = (tmp_path / "kept" / "decoded").iterdir()
    said = [line for line in capsys.readouterr().err.splitlines() if str(entry) in line]
    assert said == [
        f"{data}: its decoded images are kept in {entry} (4.3 KiB); "
        "`dsdistill cache` lists and clears them"
    ]
    monkeypatch.delenv("DSDISTILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert paths.decoded_images() == tmp_path / "xdg" / "dsdistill" / "decoded"


def _kept_things(root):
    """One entry of each kind, and what belongs to others."""
    data = _classes(root / "photos", {"a": 3, "b": 3})
    folders.read(data, root / "kept" / "decoded", 4)
    ours = [*(root / "kept" / "decoded").iterdir()]
    (root / "kept" / "decoded" / ".half-x").mkdir()
    (root / "kept" / "evaluations").mkdir()
    (root / "kept" / "evaluations" / f"{'1' * 32}.json").write_text("{}")
    answers = root / "kept" / "answers" / ("2" * 64)
    (answers / "chunks").mkdir(parents=True)
    (answers / "key.json").write_text("{}")
    (answers / "chunks" / "x.safetensors").write_bytes(b"x" * 3000)
    old = root / "data" / "folders" / ("3" * 32)
    old.mkdir(parents=True)
    np.save(old / "images.npy", np.zeros((2, 4, 4, 3), np.uint8))
    (old / "index.json").write_text('{"shape": [2, 4, 4, 3], "skipped": {}}')
    ours += [root / "kept" / "decoded" / ".half-x", answers, old]
    ours += [root / "kept" / "evaluations" / f"{'1' * 32}.json"]
    others = [
        root / "kept" / "decoded" / "notes" / "images.npy",
        root / "kept" / "decoded" / ("4" * 32) / "mine.txt",
        root / "kept" / "evaluations" / "mine.json",
        root / "kept" / "MNIST" / "raw" / "labels",
        root / "data" / "folders" / "cat" / "0.png",
    ]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return data, ours, others


def test_the_cache_is_listed_and_cleared_and_nothing_else_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DSDISTILL_CACHE", str(tmp_path / "kept"))
    monkeypatch.setenv("DSDISTILL_DATA", str(tmp_path / "data"))
    data, ours, others = _kept_things(tmp_path)
    month = time.time() - 30 * 24 * 3600
    os.utime(ours[0] / "index.json", (month, month))
    os.utime(ours[0] / "images.npy", (month, month))
    cache.run(clear=False, older_than=None)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ours) + 1
    for path in ours[:-1]:
        assert sum(str(path) in line for line in lines) == 1
    assert any(f"{data} at 4 pixels" in line for line in lines)
    assert any("1 results of evaluations" in line for line in lines)
    assert any("earlier version" in line for line in lines)
    cache.run(clear=True, older_than=7)
    assert [path.exists() for path in ours] == [False] + [True] * (len(ours) - 1)
    cache.run(clear=True, older_than=None)
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in others)
    capsys.readouterr()
    cache.run(clear=False, older_than=None)
    assert capsys.readouterr().out.split()[:2] == ["0", "B"]
    with pytest.raises(UserError, match="--older-than must be 0 days or more, got -1"):
        cache.run(clear=True, older_than=-1)


def test_what_a_living_process_decodes_is_not_cleared(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DSDISTILL_CACHE", str(tmp_path / "kept"))
    monkeypatch.setenv("DSDISTILL_DATA", str(tmp_path / "data"))
    kept = tmp_path / "kept" / "decoded"
    dead = kept / ".half-dead"
    dead.mkdir(parents=True)
    (dead / locks.LOCK_FILE).write_text("1 elsewhere\n")  # as a kill leaves it
    data = _classes(tmp_path / "photos", {"a": 4, "b": 4})
    decode, cleared = folders._decode, []

    def clearing(file, **options):
        if not cleared:
            cleared.append(True)
            cache.run(clear=True, older_than=None)
        return decode(file, **options)

    monkeypatch.setattr(folders, "_decode", clearing)
    splits = datasets.load(str(data), root=tmp_path)
    assert cleared
    said = capsys.readouterr()
    assert "is kept, since another run of this process is writing it" in said.err
    assert "unfinished decoding" in said.out  # the dead one
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 8
    (entry,) = kept.iterdir()
    assert {path.name for path in entry.iterdir()} == {"images.npy", "index.json"}
    cache.run(clear=True, older_than=None)
    assert not list(kept.iterdir())
    assert "is left" not in capsys.readouterr().err


def test_reading_the_cache_renews_its_last_use(tmp_path):
    data = _classes(tmp_path / "data", {"a": 3, "b": 3})
    _read(data, tmp_path)
    (entry,) = (tmp_path / "cache").iterdir()
    os.utime(entry / "index.json", (1, 1))
    _read(data, tmp_path)
    assert time.time() - (entry / "index.json").stat().st_mtime < 100
