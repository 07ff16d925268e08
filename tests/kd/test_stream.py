"""Images streamed from disk: the same views for any number of processes and any way into it."""

import io
import json
import logging
import os
import pickle
import random
import shutil
import signal
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.dataset import ImageDataset, IterableImageDataset
from timm.data.loader import create_loader
from timm.utils.misc import natural_key
from torch import Tensor

from dsdistill.harness.data import class_names, datasets, distilled_set, preprocess
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.data.labeled_images import centred_one_hot
from dsdistill.harness.data.layout import list_folder
from dsdistill.harness.errors import UserError
from kd.data import data_source
from kd.data.batching import Batch, derive_seed, share_positions
from kd.data.files import archives, file_source, image_files
from kd.data.files.archives import (
    ArchiveSplit,
    SequentialBatches,
    is_timm_name,
    open_split,
    stream_split,
)
from kd.data.files.image_files import ImageFiles, open_folder
from kd.data.files.stream import FileBatches, epoch_rows
from kd.data.files.transforms import Views, temporary_seed
from kd.recipe import Recipe

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIEWS = Views((24, 32), MEAN, STD, auto_augment="rand-m7-mstd0.5", random_erase=0.5)
PLAIN = Views((24, 24), MEAN, STD)


def _noise(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 photos of three classes, all of different sizes, under `train`, and 30 under `val`."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, count in (("train", 100), ("val", 10)):
        for label in "abc":
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                w, h = (int(side) for side in rng.integers(20, 70, 2))
                _noise(rng, (w, h)).save(root / part / label / f"{number:03}.jpg")
    return root


@pytest.fixture(scope="module")
def images(folder: Path) -> ImageFiles:
    return open_folder(folder, 0.0).train


def _same(one: Batch, other: Batch) -> bool:
    assert one.index is not None
    assert other.index is not None
    pairs = ((one.images, other.images), (one.labels, other.labels), (one.index, other.index))
    return one.total_images == other.total_images and all(torch.equal(a, b) for a, b in pairs)


def _all_same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) > 0 and all(map(_same, one, other))


def _index(batch: Batch) -> np.ndarray:
    assert batch.index is not None
    return batch.index.numpy()


@pytest.mark.parametrize("repeats", [1, 3])
def test_views_do_not_depend_on_the_workers_or_on_the_way_into_the_epoch(
    images: ImageFiles, repeats: int
) -> None:
    alone = FileBatches(images, VIEWS, 64, CPU, repeats=repeats)
    whole = list(alone.epoch(5, 2))
    assert len(whole) == len(alone)
    for workers in (1, 2):
        stream = FileBatches(images, VIEWS, 64, CPU, repeats=repeats, workers=workers, prefetch=3)
        assert _all_same(list(stream.epoch(5, 2)), whole)
        assert _all_same(list(stream.epoch(5, 2, first=3)), whole[3:])
    assert _all_same(list(alone.epoch(5, 2, first=1)), whole[1:])
    assert list(alone.epoch(5, 2, first=len(alone))) == []


def test_an_epoch_that_was_left_does_not_reach_into_the_next(images: ImageFiles) -> None:
    expected = list(FileBatches(images, VIEWS, 64, CPU).epoch(0, 1))
    stream = FileBatches(images, VIEWS, 64, CPU, workers=2)
    for _ in stream.epoch(0, 0):
        break
    assert _all_same(list(stream.epoch(0, 1)), expected)
    # Two at once, as where training images are judged between two batches.
    one, other = stream.epoch(0, 1), stream.epoch(0, 1)
    assert all(_same(a, b) for a, b in zip(one, other, strict=True))


def test_seed_epoch_and_repeat_change_the_views(images: ImageFiles) -> None:
    views = replace(VIEWS, random_erase=0.0)
    stream = FileBatches(images, views, 300, CPU)
    seen = {}
    for key in ((0, 0), (0, 1), (1, 0)):
        (batch,) = stream.epoch(*key)
        assert sorted(_index(batch)) == list(range(300))
        seen[key] = batch.images[torch.from_numpy(np.argsort(_index(batch)))]
    keys = list(seen)
    for i, a in enumerate(keys):
        for b in keys[:i]:
            same = (seen[a] == seen[b]).flatten(1).all(1)
            assert not same.any()
    thrice = FileBatches(images, views, 3, CPU, repeats=3)
    first = next(iter(thrice.epoch(0, 0)))
    assert len(set(_index(first))) == 1
    assert len({image.numpy().tobytes() for image in first.images}) == 3


@pytest.mark.parametrize("n", [100, 300, 700])
def test_repeated_augmentation_takes_whole_blocks_of_the_repeated_order(n: int) -> None:
    generator = torch.Generator().manual_seed(derive_seed(7, 3))
    shuffled = torch.randperm(n, generator=generator).numpy()
    length = n if n < 256 else n - n % 256
    assert np.array_equal(epoch_rows(n, 3, 7, 3), np.repeat(shuffled, 3)[:length])
    assert np.array_equal(epoch_rows(n, 1, 7, 3), shuffled)


def test_the_global_generators_are_as_they_were(images: ImageFiles) -> None:
    def state() -> tuple[Any, ...]:
        numpy = np.random.get_state()  # noqa: NPY002
        return random.getstate(), numpy[1].tobytes(), torch.get_rng_state().numpy().tobytes()  # type: ignore[union-attr]

    before = state()
    for workers in (0, 2):
        stream = FileBatches(images, VIEWS, 150, CPU, workers=workers)
        for _ in stream.epoch(0, 0):
            assert state() == before
    assert state() == before


def test_the_three_generators_are_seeded_apart() -> None:
    with temporary_seed(1, 2, 3):
        one = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002
    with temporary_seed(1, 2, 3):
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == one  # noqa: NPY002
    with temporary_seed(1, 2, 4):
        other = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002
    assert len({*one, *other}) == 6


def _plain(value: Any) -> Any:
    """A transform as its types and parameters, at any depth."""
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, Tensor):
        return value.tolist()
    if type(value).__module__.startswith(("timm", "torchvision")) and hasattr(value, "__dict__"):
        return [type(value).__qualname__, _plain(vars(value))]
    return value


CONFIGURATIONS = [
    PLAIN,
    VIEWS,
    replace(VIEWS, random_erase=0.0, train_interpolation="bicubic", hflip=0.0),
    replace(PLAIN, color_jitter=0.3, scale=(0.3, 0.9), ratio=(0.5, 2.0)),
    replace(PLAIN, random_erase=0.25, erase_mode="rand", interpolation="bicubic", crop_pct=0.9),
]


def _timm(views: Views, root: Path, training: bool, prefetcher: bool) -> Any:
    return create_loader(
        ImageDataset(root),
        (3, *views.size),
        50,
        is_training=training,
        re_prob=views.random_erase,
        re_mode=views.erase_mode,
        scale=views.scale,
        ratio=views.ratio,
        hflip=views.hflip,
        color_jitter=views.color_jitter,  # type: ignore[arg-type]
        auto_augment=views.auto_augment,
        interpolation=views.train_interpolation if training else views.interpolation,
        mean=views.mean,
        std=views.std,
        crop_pct=views.crop_pct,
        num_workers=0,
        device=CPU,
        use_prefetcher=prefetcher,
        persistent_workers=False,
    )


@pytest.mark.parametrize("views", CONFIGURATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_the_transforms_are_those_of_timms_loader(
    folder: Path, views: Views, training: bool
) -> None:
    # Erasing needs normalised images; without it timm's prefetcher normalises, and `finish` here.
    prefetcher = not training or views.random_erase == 0
    theirs = _timm(views, folder / "train", training, prefetcher).dataset.transform
    assert _plain(views.transform(training)) == _plain(theirs)
    assert len(_plain(theirs)[1]["transforms"]) >= 3


@pytest.mark.parametrize("views", CONFIGURATIONS)
def test_a_training_view_is_timms_transform_of_the_plain_image(
    folder: Path, images: ImageFiles, views: Views
) -> None:
    transform = _timm(views, folder / "train", True, False).dataset.transform
    batch = next(iter(FileBatches(images, views, 8, CPU).epoch(4, 9)))
    for row, label, view in zip(_index(batch), batch.labels, batch.images, strict=True):
        path = folder / "train" / "abc"[row // 100] / f"{row % 100:03}.jpg"
        assert label == row // 100
        with Image.open(path) as image, temporary_seed(4, 9, int(row), 0):
            expected = transform(image.convert("RGB"))
        # Normalised in the same order of operations: bit for bit.
        assert torch.equal(view, expected)


@pytest.mark.parametrize("views", [PLAIN, CONFIGURATIONS[-1], replace(PLAIN, size=(20, 32))])
def test_evaluation_views_are_those_of_timms_loader(
    folder: Path, images: ImageFiles, views: Views
) -> None:
    theirs = list(_timm(views, folder / "train", False, True))
    ours = list(FileBatches(images, views, 50, CPU, workers=2).in_order())
    assert sum(len(batch) for batch in ours) == 300
    for batch, (expected, labels) in zip(ours, theirs, strict=True):
        assert batch.images.is_contiguous()
        assert torch.equal(batch.labels, labels)
        # timm divides by 255 std, and here by 255 and then by std: rounding of values up to 3.
        torch.testing.assert_close(batch.images, expected, rtol=0, atol=2e-6)
    assert np.array_equal(np.concatenate([_index(b) for b in ours]), np.arange(300))


@pytest.mark.parametrize(("world", "repeats"), [(2, 1), (3, 3), (4, 1)])
def test_the_shares_of_the_ranks_make_up_the_batch(
    images: ImageFiles, world: int, repeats: int
) -> None:
    stream = FileBatches(images, VIEWS, 72, CPU, world=world, repeats=repeats)
    together = list(stream.epoch(1, 1))
    ranks = [list(stream.epoch(1, 1, rank=r, world=world)) for r in range(world)]
    assert stream.sizes == [len(batch) for batch in together]
    for number, batch in enumerate(together):
        n, places = len(batch), []
        for rank in range(world):
            share = ranks[rank][number]
            mine_ = np.array([p for p in range(n) if min(p, n - 1 - p) % world == rank])
            assert np.array_equal(mine_, share_positions(n, rank, world))
            assert share.total_images == n
            assert torch.equal(share.images, batch.images[mine_])
            assert np.array_equal(_index(share), _index(batch)[mine_])
            assert set(n - 1 - mine_) == set(mine_)
            places.append(mine_)
        assert np.array_equal(np.sort(np.concatenate(places)), np.arange(n))


def test_a_last_part_too_small_to_be_shared_joins_the_one_before(images: ImageFiles) -> None:
    assert FileBatches(images, PLAIN, 100, CPU).sizes == [100, 100, 100]
    assert FileBatches(images, PLAIN, 99, CPU, world=1).sizes == [99, 99, 99, 3]
    assert FileBatches(images, PLAIN, 99, CPU, world=2).sizes == [99, 99, 102]
    needy = FileBatches(images, PLAIN, 99, CPU, least=4)
    assert needy.sizes == [99, 99, 102]
    assert [len(batch) for batch in needy.epoch(0, 0)] == needy.sizes
    assert [len(batch) for batch in needy.epoch(0, 0, first=1)] == needy.sizes[1:]
    with pytest.raises(UserError, match="it needs 4 in a batch, got 3"):
        FileBatches(images, PLAIN, 3, CPU, least=4)
    assert FileBatches(images, PLAIN, 299, CPU).sizes == [300]
    assert FileBatches(images, PLAIN, 128, CPU, repeats=3).sizes == [128, 128]


def test_every_image_is_validated_once_by_one_of_the_ranks(images: ImageFiles) -> None:
    stream = FileBatches(images, PLAIN, 40, CPU)
    shares = [[_index(b) for b in stream.in_order(rank, 3)] for rank in range(3)]
    assert np.array_equal(
        np.sort(np.concatenate([rows for share in shares for rows in share])), np.arange(300)
    )


class _Counted:
    """A reader that counts the images it has opened."""

    def __init__(self, reader: image_files.ImageReader) -> None:
        self.reader, self.opened = reader, 0

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        self.opened += 1
        return self.reader[index]

    def filename(self, index: int, *, absolute: bool) -> str:
        return self.reader.filename(index, absolute=absolute)


def test_images_are_read_when_their_batch_is_asked_for(images: ImageFiles) -> None:
    reader = _Counted(images.reader)
    stream = FileBatches(replace(images, reader=reader), PLAIN, 20, CPU)
    assert len(stream) == 15
    assert stream.labels is not None
    assert reader.opened == 0
    for done, _ in enumerate(stream.epoch(0, 0, first=5), start=1):
        assert reader.opened == 20 * done
    assert reader.opened == 200


@pytest.mark.parametrize(("free", "words"), [(1 << 20, "through pipes"), (1 << 16, "without")])
def test_batches_are_the_same_where_there_is_little_shared_memory(
    images: ImageFiles,
    free: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As in a container with a small `/dev/shm`, which tells its size as `statvfs` does."""
    expected = list(FileBatches(images, VIEWS, 64, CPU).epoch(0, 1))
    small = SimpleNamespace(f_bavail=free, f_frsize=1)
    monkeypatch.setattr("kd.data.files.stream.SHARED_MEMORY", ".")
    monkeypatch.setattr("kd.data.files.stream.os.statvfs", lambda path: small)
    monkeypatch.setattr("kd.data.files.stream.SEMAPHORE_BYTES_PER_WORKER", 1 << 16)
    stream = FileBatches(images, VIEWS, 64, CPU, workers=2)  # five batches of 0.6 MB
    assert _all_same(list(stream.epoch(0, 1)), expected)
    assert words in capsys.readouterr().err


def test_the_death_of_a_decoding_process_is_one_line(images: ImageFiles) -> None:
    killed = _Killed(images.reader)
    message = _error(
        FileBatches(replace(images, reader=killed), VIEWS, 64, CPU, workers=1).epoch(0, 0)
    )
    assert message.startswith("a process that reads images has died (DataLoader worker")
    assert "\n" not in message


class _Killed:
    """A reader whose process is killed by the system, as where memory runs out."""

    def __init__(self, reader: image_files.ImageReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        os.kill(os.getpid(), signal.SIGKILL)
        return self.reader[index]

    def filename(self, index: int, *, absolute: bool) -> str:
        return self.reader.filename(index, absolute=absolute)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("content", "why"), [(b"no image", "not an image"), (None, "truncat")])
def test_an_unreadable_image_is_one_line_with_its_path(
    tmp_path: Path, folder: Path, workers: int, content: bytes | None, why: str
) -> None:
    shutil.copytree(folder, tmp_path / "photos")
    bad = tmp_path / "photos" / "train" / "b" / "042.jpg"
    bad.write_bytes(bad.read_bytes()[:-200] if content is None else content)
    images = open_folder(tmp_path / "photos", 0.0).train
    for batches in (
        FileBatches(images, VIEWS, 50, CPU, workers=workers).epoch(0, 0),
        FileBatches(images, VIEWS, 50, CPU, workers=workers).in_order(),
    ):
        message = _error(batches)
        assert message.startswith(f"image {bad} cannot be read (")
        assert why in message
        assert "\n" not in message


def _error(batches: Iterator[Batch]) -> str:
    # Unlike `pytest.raises ... as`, this leaves no cycle that keeps the decoding processes alive.
    try:
        list(batches)
    except UserError as error:
        return str(error)
    return "no error"


def test_an_image_that_is_gone_is_one_line_too(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "photos")
    images = open_folder(tmp_path / "photos", 0.0).train
    (tmp_path / "photos" / "train" / "a" / "000.jpg").unlink()
    with pytest.raises(UserError, match=r"a/000\.jpg cannot be read \(No such file"):
        list(FileBatches(images, PLAIN, 50, CPU).in_order())


def _coloured(root: Path, parts: tuple[str, ...]) -> dict[tuple[int, ...], str]:
    """Flat images of a colour each, of two class sizes; returns where each colour is."""
    found: dict[tuple[int, ...], str] = {}
    for part in parts:
        for label, count in (("ape", 23), ("bee", 41), ("cat10", 12), ("cat9", 12)):
            (root / part / label / "deep").mkdir(parents=True)
            for number in range(count):
                code = len(found) * 7 + 1
                colour = (code // 256, code % 256, 99)
                name = f"deep/{number}.png" if number % 5 == 0 else f"{number}.png"
                Image.new("RGB", (9, 9), colour).save(root / part / label / name)
                found[colour] = f"{part}/{label}/{name}"
    return found


@pytest.mark.parametrize("parts", [("",), ("train", "val")])
def test_a_folder_is_split_as_it_is_where_it_is_decoded_once(
    tmp_path: Path, parts: tuple[str, ...]
) -> None:
    _coloured(tmp_path / "photos", parts)
    resident = datasets.load(
        str(tmp_path / "photos"), root=tmp_path / "cache", validation_fraction=0.25
    )
    ours = open_folder(tmp_path / "photos", 0.25)
    assert ours.train.classes == resident.train.classes == ("ape", "bee", "cat10", "cat9")
    pairs = (
        (ours.train, resident.train),
        (ours.validation, resident.validation),
        (ours.test, resident.test),
    )
    for streamed_, kept in pairs:
        assert len(streamed_) == len(kept) > 0
        assert streamed_.labels is not None
        assert np.array_equal(streamed_.labels, kept.labels)
        for row, pixels in enumerate(kept.images()):
            image, label = streamed_.read(row, 3)
            assert np.array_equal(np.asarray(image), pixels)
            assert label == kept.labels[row]


@pytest.mark.parametrize(
    "order", [None, ("0", "1", "10", "2", "9"), ("00", "01", "02", "09", "10")]
)
def test_parts_and_class_orders_are_those_of_images_decoded_once(
    tmp_path: Path, order: tuple[str, ...] | None
) -> None:
    root = tmp_path / "photos"
    code = 0
    for part, count in (("Training", 5), ("valid", 2), ("testing", 3)):
        for label in ("0", "1", "2", "9", "10"):
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                code += 1
                Image.new("RGB", (6, 6), (code, 0, int(label))).save(
                    root / part / label / f"{number}.png"
                )
    resident = datasets.load(str(root), root=tmp_path, cache=tmp_path / "cache", classes=order)
    ours = open_folder(root, 0.3, order)
    expected = order or ("0", "1", "2", "9", "10")
    assert ours.train.classes == resident.train.classes == expected
    for streamed_, kept, count in (
        (ours.train, resident.train, 25),
        (ours.validation, resident.validation, 10),
        (ours.test, resident.test, 15),
    ):
        assert len(streamed_) == len(kept) == count
        assert np.array_equal(streamed_.labels, kept.labels)  # pyright: ignore[reportArgumentType]
        for row, pixels in enumerate(kept.images()):
            image, label = streamed_.read(row, 3)
            assert np.array_equal(np.asarray(image), pixels)
            assert int(expected[label]) == pixels[0, 0, 2]


def test_channels_of_streamed_images(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (9, 9), (250, 0, 0)).save(
                tmp_path / "photos" / label / f"{number}.png"
            )
    options: dict[str, Any] = {"root": tmp_path, "image_size": 8, "validation_fraction": 0.0}
    gray = file_source.resolve(str(tmp_path / "photos"), channels=1, **options)
    assert gray.shape == (8, 8, 1)
    fitted = gray.fit(None)
    (batch,) = gray.test(Recipe(), fitted, CPU).in_order()  # pyright: ignore[reportOptionalMemberAccess]
    assert batch.images.shape[1:] == (1, 8, 8)
    luma = round(0.299 * 250) / 255
    torch.testing.assert_close(
        batch.images * float(fitted.std[0]) + float(fitted.mean[0]),
        torch.full_like(batch.images, luma),
    )
    assert file_source.resolve(str(tmp_path / "photos"), **options).shape == (8, 8, 3)


def test_a_set_in_another_class_order_is_matched_by_its_names(tmp_path: Path) -> None:
    """As sets are that were made when folders of numbers stood in the order of their text."""
    for label in range(12):
        (tmp_path / "photos" / str(label)).mkdir(parents=True)
        for number in range(10):
            Image.new("L", (4, 4), 20 * label + number).save(
                tmp_path / "photos" / str(label) / f"{number}.png"
            )
    stored = tuple(sorted(str(label) for label in range(12)))
    splits = datasets.load(str(tmp_path / "photos"), root=tmp_path, classes=stored)
    fitted = preprocess.fit("standardise", splits.train.chunks, splits.train.shape)
    provenance = {
        "data": {"source": str(tmp_path / "photos"), "sha256": splits.digest},
        "config": {"image_size": None, "validation_fraction": 0.1},
    }
    made = DistilledSet(
        fitted.apply(splits.train.images(np.arange(0, len(splits.train), 7))),
        centred_one_hot(splits.train.labels[::7], 12),
        fitted,
        stored,
        provenance,
    )
    distilled_set.save(tmp_path / "set.safetensors", made)
    source = data_source.resolve(str(tmp_path / "set.safetensors"), root=tmp_path)
    assert source.note is None
    assert source.splits is not None
    assert source.classes == source.splits.test.classes == stored
    for image, label in zip(source.splits.test.images(), source.splits.test.labels, strict=True):
        assert stored[label] == str(image[0, 0, 0] // 20)


def test_images_of_every_kind_become_upright_colours_on_white(tmp_path: Path) -> None:
    made = {
        "grey.png": Image.new("L", (4, 4), 77),
        "deep.png": Image.fromarray(np.full((4, 4), 77 * 257, np.uint16)),
        "clear.png": Image.new("RGBA", (4, 4), (0, 0, 0, 0)),
        "cmyk.jpg": Image.new("CMYK", (4, 4), (0, 0, 0, 0)),
        "palette.gif": Image.new("P", (4, 4), 0),
        "wide.jpg": Image.new("RGB", (8, 4), "white"),
    }
    for label in "ab":
        (tmp_path / label).mkdir()
        for name, image in made.items():
            exif = Image.Exif()
            exif[0x0112] = 6  # turned by a quarter
            image.save(tmp_path / label / name, exif=exif if name == "wide.jpg" else b"")
    listed = image_files._list_images(list_folder(tmp_path))
    names = sorted(made)
    found = {name: listed.read(row, 3)[0] for row, name in enumerate(names)}
    assert {image.mode for image in found.values()} == {"RGB"}
    assert found["grey.png"].getpixel((0, 0)) == (77, 77, 77)
    assert found["deep.png"].getpixel((0, 0)) == (77, 77, 77)
    assert found["clear.png"].getpixel((0, 0)) == (255, 255, 255)
    assert found["cmyk.jpg"].getpixel((0, 0)) == (255, 255, 255)
    assert found["wide.jpg"].size == (4, 8)
    assert listed.read(names.index("wide.jpg"), 1)[0].mode == "L"


def test_grey_images_are_augmented_too(images: ImageFiles) -> None:
    views = Views((20, 20), (0.5,), (0.25,), auto_augment="rand-m9-n3", random_erase=0.5)
    for batch in FileBatches(images, views, 150, CPU).epoch(0, 0):
        assert batch.images.shape == (150, 1, 20, 20)
        assert torch.isfinite(batch.images).all()


def test_without_augmentation_an_epoch_has_evaluation_views(images: ImageFiles) -> None:
    stream = FileBatches(images, VIEWS, 300, CPU, augment=False)
    (still,), (mixed,) = list(stream.in_order()), list(stream.epoch(0, 0))
    assert not np.array_equal(_index(mixed), np.arange(300))
    assert torch.equal(mixed.images, still.images[torch.from_numpy(_index(mixed))])


def test_labels_are_known_before_anything_is_read(images: ImageFiles) -> None:
    stream = FileBatches(images, PLAIN, 64, CPU)
    assert stream.labels is not None
    for batch in stream.epoch(0, 0):
        assert torch.equal(stream.labels[torch.from_numpy(_index(batch))], batch.labels)


def test_a_decoding_process_can_be_given_its_images_by_value(images: ImageFiles) -> None:
    # As on systems that start processes afresh and do not copy them.
    stream = FileBatches(images, VIEWS, 8, CPU)
    copied = pickle.loads(pickle.dumps(stream._dataset))
    other = FileBatches(copied.images, VIEWS, 8, CPU)
    assert _same(next(iter(stream.epoch(0, 0))), next(iter(other.epoch(0, 0))))


def test_the_natural_key_is_timms() -> None:
    names = ["b10", "B2", "a", "Zoo", "b2c10", "b2c9", "x_1", "x_01a", "dog 3", "dog 21"]
    assert sorted(names, key=class_names.natural_key) == sorted(names, key=natural_key)
    assert sorted(["a", "1"], key=class_names.natural_key) == ["1", "a"]


def test_the_digest_changes_with_the_files_and_not_with_their_place(
    tmp_path: Path, folder: Path
) -> None:
    copied = shutil.copytree(folder, tmp_path / "photos")

    def digest(fraction: float = 0.1) -> str:
        return open_folder(copied, fraction).train.digest

    first = digest()
    assert first == open_folder(folder, 0.1).train.digest
    assert first != digest(0.2)
    some = copied / "train" / "a" / "001.jpg"
    before = some.stat()
    some.touch()
    assert digest() != first
    os.utime(some, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digest() == first
    some.rename(some.with_name("999.jpg"))
    assert digest() != first


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"auto_augment": "rand-q7"}, "--auto-augment rand-q7"),
        ({"auto_augment": "nothing"}, "--auto-augment nothing"),
        ({"train_interpolation": "smooth"}, "--interpolation smooth"),
        ({"interpolation": "smooth"}, "smooth in evaluation"),
        ({"random_erase": 0.1, "erase_mode": "hole"}, "cannot make this augmentation"),
    ],
)
def test_an_augmentation_that_timm_does_not_know_is_one_line(
    images: ImageFiles, change: dict[str, Any], why: str
) -> None:
    with pytest.raises(UserError, match=why):
        FileBatches(images, replace(PLAIN, **change), 8, CPU)


def test_processes_that_would_get_no_image_are_refused(images: ImageFiles) -> None:
    few = images.select(np.array([0, 100, 200]))
    for chosen, size in ((images, 3), (few, 64)):
        with pytest.raises(UserError, match="2 processes need two images each"):
            FileBatches(chosen, PLAIN, size, CPU, world=2)


def test_folders_that_make_no_data_set_are_one_line(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        open_folder(tmp_path / "nowhere", 0.1)
    with pytest.raises(UserError, match=r"fraction must be in \[0, 1\), got 1"):
        open_folder(folder, 1.0)
    copied = shutil.copytree(folder, tmp_path / "photos")
    (copied / "val" / "a").rename(copied / "val" / "d")
    with pytest.raises(UserError, match=r"val lacks a; .*train lacks d"):
        open_folder(copied, 0.1)
    for name in ("x", "y"):
        (tmp_path / "two" / "train" / name).mkdir(parents=True)
        _noise(np.random.default_rng(0), (9, 9)).save(tmp_path / "two" / "train" / name / "1.png")
    with pytest.raises(UserError, match="class 'x' has no training image left"):
        open_folder(tmp_path / "two" / "train", 0.9)


class _Shards:
    """A timm reader that reads from front to back: 90 grey images, image i of class i % 3."""

    def __init__(self, seed: int, training: bool, batch: int, count: int = 90) -> None:
        self.dist_rank, self.dist_num_replicas, self.workers = 7, 8, 1
        self.seed, self.training, self.batch, self.count = seed, training, batch, count
        self.class_to_idx = {"c": 2, "a": 0, "b": 1}

    def set_loader_cfg(self, num_workers: int) -> None:
        self.workers = num_workers

    def _each(self) -> int:
        share = 90 / (self.workers * self.dist_num_replicas)
        return int(np.ceil(share / self.batch)) * self.batch

    def __len__(self) -> int:
        return self._each() * self.workers

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        info = torch.utils.data.get_worker_info()
        assert info is not None
        rows = np.arange(self.count)
        if self.training:
            rows = np.random.default_rng(self.seed).permutation(rows)
        rows = rows[
            self.dist_rank * self.workers + info.id :: self.dist_num_replicas * self.workers
        ]
        if self.training:
            rows = np.resize(rows, self._each()) if len(rows) else rows
        for row in rows.tolist():
            if row == 1000:
                raise OSError("shard 3\nis gone")
            yield Image.new("RGB", (30, 30), (row, row, row)), row % 3


ARCHIVE = ArchiveSplit("tfds/greys", None, "train", ("a", "b", "c"))
GREY = Views((16, 16), (0.0,) * 3, (1.0,) * 3, hflip=0.0, random_erase=0.9)


@pytest.fixture
def greys(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    options = {"count": 90}

    def create(name: str, root: str | None, split: str, **given: Any) -> IterableImageDataset:
        reader = _Shards(
            given.get("seed", 0),
            given.get("is_training", False),
            given.get("batch_size", 1),
            options["count"],
        )
        return IterableImageDataset("", reader=reader)  # type: ignore[arg-type]

    monkeypatch.setattr("timm.data.dataset_factory.create_dataset", create)
    return options


def _rows(batch: Batch) -> list[int]:
    """Which grey an image is; a corner may be erased, but not the median of all pixels."""
    return (batch.images.flatten(1).median(1).values * 255).round().int().tolist()


@pytest.mark.usefixtures("greys")
def test_an_archive_is_read_alike_every_time_and_from_any_batch() -> None:
    stream = SequentialBatches(ARCHIVE, GREY, 10, CPU, workers=2)
    whole = list(stream.epoch(3, 1))
    assert len(whole) == len(stream) == 10  # two processes read five batches of ten each
    assert stream.sizes == [10] * 10
    again, late = list(stream.epoch(3, 1)), list(stream.epoch(3, 1, first=4))
    for one, other in zip([*whole, *whole[4:]], [*again, *late], strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.index is None
        assert one.total_images == 10
    for key in ((3, 2), (4, 1)):
        assert [_rows(b) for b in stream.epoch(*key)] != [_rows(b) for b in whole]


@pytest.mark.usefixtures("greys")
def test_ranks_read_different_parts_of_an_archive() -> None:
    stream = SequentialBatches(
        ARCHIVE, replace(GREY, random_erase=0.0), 10, CPU, world=2, workers=1
    )
    ranks = [list(stream.epoch(0, 0, rank=rank, world=2)) for rank in range(2)]
    assert [len(r) for r in ranks] == [len(stream)] * 2
    assert all(len(batch) == 5 and batch.total_images == 10 for r in ranks for batch in r)
    seen = [{row for batch in r for row in _rows(batch)} for r in ranks]
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(range(90))


@pytest.mark.usefixtures("greys")
@pytest.mark.parametrize(("workers", "world"), [(1, 1), (2, 1), (2, 3)])
def test_every_image_of_an_archive_is_validated_once(workers: int, world: int) -> None:
    stream = SequentialBatches(ARCHIVE, GREY, 20, CPU, workers=workers)
    rows: list[int] = []
    for rank in range(world):
        for batch in stream.in_order(rank, world):
            rows += _rows(batch)
            assert batch.labels.tolist() == [row % 3 for row in _rows(batch)]
    assert sorted(rows) == list(range(90))


@pytest.mark.usefixtures("greys")
def test_views_of_an_archive_differ_between_images_epochs_ranks_and_processes() -> None:
    stream = SequentialBatches(ARCHIVE, GREY, 90, CPU, workers=2)
    noise = set()
    for epoch in range(2):
        for rank in range(2):
            for batch in stream.epoch(0, epoch, rank=rank, world=2):
                plain = batch.images.flatten(1).median(1).values[:, None, None, None]
                erased = torch.where(batch.images == plain, 0, batch.images)
                noise |= {image.numpy().tobytes() for image in erased if image.any()}
    # Of 4 x 2 x 45 views 0.9 are erased, each with noise of its own; four deviations are 23.
    assert len(noise) > 324 - 23


def test_an_archive_that_ends_early_or_breaks_is_one_line(greys: dict[str, int]) -> None:
    stream = SequentialBatches(ARCHIVE, GREY, 10, CPU, workers=2)
    greys["count"] = 1  # the second process finds nothing
    with pytest.raises(UserError, match=r"tfds/greys ended after 5 of 10 batches: .*--workers"):
        list(stream.epoch(0, 0))
    greys["count"] = 1001
    with pytest.raises(UserError, match=r"tfds/greys cannot be read \(shard 3 is gone"):
        list(stream.in_order())


def test_what_an_archive_cannot_do_is_refused(images: ImageFiles) -> None:
    with pytest.raises(UserError, match="--repeats 3 needs images that can be read in any order"):
        stream_split(ARCHIVE, GREY, 10, CPU, repeats=3)
    with pytest.raises(UserError, match="must be a multiple of 3, got 10"):
        stream_split(ARCHIVE, GREY, 10, CPU, world=3)
    with pytest.raises(UserError, match="--auto-augment nothing"):
        stream_split(ARCHIVE, replace(GREY, auto_augment="nothing"), 10, CPU)
    both = stream_split(ARCHIVE, GREY, 10, CPU), stream_split(images, VIEWS, 10, CPU, repeats=3)
    assert [type(s) for s in both] == [SequentialBatches, FileBatches]


def test_names_that_timm_cannot_open_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package tensorflow-datasets: pip install"):
        open_split("tfds/mnist", "train")
    with pytest.raises(UserError, match="unknown kind of data set 'wdss'; did you mean 'wds'"):
        open_split("wdss/x", "train")
    monkeypatch.setattr(archives.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="cannot open the 'train' part of wds/"):
        open_split(f"wds/{tmp_path}", "train")


def test_paths_are_not_taken_for_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wds" / "photos").mkdir(parents=True)
    assert is_timm_name("hfds/mnist")
    assert is_timm_name("wds//data/shards")
    for path in ("wds/photos", "photos", "wds", "digits", "/data/wds/x"):
        assert not is_timm_name(path)


@pytest.fixture
def tars(tmp_path: Path, folder: Path) -> Path:
    """Sixty photos in six shards, as `webdataset` reads them."""
    root, names = tmp_path / "shards", [f"train-{i:04}.tar" for i in range(6)]
    root.mkdir()
    for number, name in enumerate(names):
        with tarfile.open(root / name, "w") as tar:
            for i in range(10 * number, 10 * number + 10):
                path = folder / "train" / "abc"[i % 3] / f"{i:03}.jpg"
                for suffix, content in (("jpg", path.read_bytes()), ("cls", str(i % 3).encode())):
                    member = tarfile.TarInfo(f"{i:03}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    part = {
        "name": "train",
        "num_samples": 60,
        "filenames": names,
        "shard_lengths": [10] * 6,
    }
    (root / "_info.json").write_text(json.dumps({"splits": {"train": part}}))
    (root / "classes.txt").write_text("a\nb\nc\n")
    return root


def test_webdataset_shards_are_streamed(tars: Path, images: ImageFiles) -> None:
    source = open_split(f"wds/{tars}", "train")
    assert isinstance(source, ArchiveSplit)
    assert source.classes == ("a", "b", "c")
    stream = stream_split(source, VIEWS, 10, CPU, workers=2)
    whole, late = list(stream.epoch(0, 0)), list(stream.epoch(0, 0, first=2))
    assert [len(batch) for batch in whole] == stream.sizes == [10] * 6
    for one, other in zip(whole[2:], late, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    other = list(stream.epoch(0, 1))
    assert not all(torch.equal(a.labels, b.labels) for a, b in zip(whole, other, strict=True))
    # Validated once each, and as the files are.
    found = torch.cat([batch.images for batch in stream.in_order()])
    rows = np.array([100 * (i % 3) + i for i in range(60)])
    (expected,) = FileBatches(images.select(rows), VIEWS, 60, CPU).in_order()
    assert sorted(x.numpy().tobytes() for x in found) == sorted(
        x.numpy().tobytes() for x in expected.images
    )
    (tars / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"does not name its classes: put classes\.txt"):
        open_split(f"wds/{tars}", "train")
    with pytest.raises(UserError, match="cannot open the 'dev' part"):
        open_split(f"wds/{tars}", "dev")


def test_hugging_face_data_sets_are_read_in_any_order(
    folder: Path, tmp_path: Path, images: ImageFiles, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    source = open_split(f"hfds/{folder}", "train", root=tmp_path)
    assert isinstance(source, ImageFiles)
    assert source.classes == ("a", "b", "c")
    again = open_split(f"hfds/{folder}", "train", root=tmp_path)
    assert isinstance(again, ImageFiles)
    assert source.digest == again.digest
    (ours,) = FileBatches(images, VIEWS, 300, CPU).in_order()
    (theirs,) = stream_split(source, VIEWS, 300, CPU, workers=2).in_order()
    assert _same(ours, theirs)
    assert source.hold_out(0.1)[1].labels is not None
