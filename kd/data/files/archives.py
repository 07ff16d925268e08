"""Data sets by timm's names, `hfds/NAME`, `tfds/NAME` and `wds/DIR`.

The first are read in any order, as folders are. The others are read from front to back, and give
up some of what `kd.data.files.stream` promises:

- An epoch is what timm's reader makes of it: each decoding process of each rank reads its own
  shards, over again where they are too few, until its even share of full batches is there. So some
  images may come twice and others not, and what cannot be decoded is left out with a warning.
- An epoch is a function of (seed, epoch), but also of the number of ranks and of decoding
  processes. To enter it in the middle, all that comes before is read and thrown away.
- Rows have no numbers: a batch has no `index`, repeated augmentation is refused, nothing can be
  held out for validation, and labels are known only as they come.

Evaluation is exact: there every rank reads everything, and keeps its own batches.
"""

import hashlib
import importlib.util
import itertools
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from dsdistill.harness.errors import UserError, one_line, unknown_name
from kd.data.batching import MIN_IMAGES_PER_PROCESS, Batch, check_size, derive_seed
from kd.data.files.image_files import ImageFiles
from kd.data.files.stream import (
    SHARED_MEMORY,
    FileBatches,
    ImagesAndLabels,
    WorkerBatch,
    build_loader,
    choose_transport,
    collate,
    deliver,
    receive,
)
from kd.data.files.transforms import Transform, Views, temporary_seed

PACKAGES = {"hfds": "datasets", "tfds": "tensorflow_datasets", "wds": "webdataset"}
CLASSES_FILE = "classes.txt"  # beside the shards of `wds/`, which name no classes: one a line


@dataclass(frozen=True)
class ArchiveSplit:
    """A part of a data set that is read from front to back.

    Attributes:
        name: timm's, such as `wds/DIR`.
        root: Where it lies, if the name does not say so.
        split: Such as `train`, or the shards themselves: `train-{0000..0009}.tar|9000`.
        classes: Names, in label order.
        folder: Of its files; None where they are not known.
    """

    name: str
    root: Path | None
    split: str
    classes: tuple[str, ...]
    folder: Path | None = None

    @property
    def digest(self) -> str:
        """SHA-256 over the classes and which files there are, with their sizes and times."""
        sha = hashlib.sha256(repr((self.name, self.split, self.classes)).encode())
        files = [] if self.folder is None else sorted(self.folder.rglob("*"))
        for path in files:
            if path.is_file():
                found = path.stat()
                name = os.fsencode(path.relative_to(self.folder or path))
                sha.update(repr((name, found.st_size, found.st_mtime_ns)).encode())
        return sha.hexdigest()


def is_timm_name(data: str) -> bool:
    """Whether DATA is one of timm's names, and not a path."""
    return data.partition("/")[0].lower() in PACKAGES and not Path(data).exists()


def open_split(
    name: str, split: str, *, root: Path | None = None, classes: tuple[str, ...] = ()
) -> ImageFiles | ArchiveSplit:
    """A part of a data set by timm's name.

    Args:
        name: `hfds/NAME`, `tfds/NAME` or `wds/DIR`.
        split: As the data set calls it.
        root: Where data sets lie; not for `wds/`, whose name is its folder.
        classes: Names, where the data set has none of its own.

    Raises:
        UserError: If the name is unknown, a package is missing, or timm cannot open it.
    """
    prefix, _, rest = name.partition("/")
    kind = prefix.lower()
    if kind not in PACKAGES:
        raise unknown_name("kind of data set", prefix, PACKAGES)
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        package = PACKAGES[kind].replace("_", "-")
        raise UserError(f"{name} needs the package {package}: pip install {package}")
    if kind == "wds":
        root = Path(rest).expanduser()
        classes = classes or _read_classes_file(root)
    dataset = _create_dataset(name, root, split)
    classes = classes or _reader_classes(dataset.reader)
    if len(classes) < 2:
        raise UserError(
            f"{name} does not name its classes: put {CLASSES_FILE}, one a line, beside it"
        )
    if kind == "hfds":
        return _list_hugging_face(name, split, dataset.reader, classes)
    builder = getattr(dataset.reader, "builder", None)  # of tfds
    folder = root if kind == "wds" else builder and Path(builder.data_dir)
    return ArchiveSplit(name, root, split, classes, folder)


def stream_split(
    source: ImageFiles | ArchiveSplit,
    views: Views,
    size: int,
    device: torch.device,
    *,
    world: int = 1,
    augment: bool = True,
    repeats: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    least: int = MIN_IMAGES_PER_PROCESS,
) -> "FileBatches | SequentialBatches":
    """Batches of either kind of data set; the arguments are those of `Stream`.

    Raises:
        UserError: If the data set cannot be read as asked.
    """
    if isinstance(source, ImageFiles):
        options = (world, augment, repeats, workers, prefetch, least)
        return FileBatches(source, views, size, device, *options)
    if augment:  # the processes' shares are equal, and all batches of one size
        check_size(size // world, 1, least)
    if repeats > 1:
        raise UserError(
            f"--repeats {repeats} needs images that can be read in any order, and {source.name} "
            "is read from front to back: leave it out, or use a folder"
        )
    return SequentialBatches(source, views, size, device, world, augment, max(1, workers), prefetch)


@dataclass(frozen=True, eq=False)
class SequentialBatches:
    """Batches of a data set that is read from front to back; a `kd.data.batching.BatchSource`.

    Attributes:
        archive: The data set.
        views, size, device, augment, prefetch: As in `Stream`.
        world: Processes that share a batch, each an equal part; an epoch is read by as many.
        workers: Processes that decode, at least 1: timm's readers share out shards among them.
    """

    archive: ArchiveSplit
    views: Views
    size: int
    device: torch.device
    world: int = 1
    augment: bool = True
    workers: int = 1
    prefetch: int = 2

    def __post_init__(self) -> None:
        if self.size % self.world:
            raise UserError(
                f"{self.archive.name} gives each of {self.world} processes as many images of a "
                f"batch: its size must be a multiple of {self.world}, got {self.size}"
            )
        self.views.transform(True)  # a wrong augmentation is said now

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in label order."""
        return self.archive.classes

    @property
    def digest(self) -> str:
        """SHA-256 of what the order of an epoch depends on; not of the images."""
        order = (self.archive.digest, self.workers, self.world)
        return hashlib.sha256(repr(order).encode()).hexdigest()

    @property
    def labels(self) -> None:
        """Not known."""

    @property
    def sizes(self) -> list[int]:
        """Images of each batch of an epoch, over all processes; all are whole."""
        return self._sizes

    @cached_property
    def _sizes(self) -> list[int]:
        share = self.size // self.world
        dataset = self._dataset(training=True, rank=0, world=self.world)
        return [self.size] * (len(dataset) // share)

    @cached_property
    def _piped(self) -> bool:
        """Whether batches go through pipes.

        Raises:
            UserError: If not even that can be done: an epoch depends on the number of processes.
        """
        found = choose_transport(self.views, self.size, self.workers, self.prefetch)
        if found.workers < self.workers:
            raise UserError(
                f"{self.archive.name} is read by {self.workers} processes, for which there is not "
                f"enough shared memory ({SHARED_MEMORY}): give the container more with --shm-size"
            )
        return found.piped

    def __len__(self) -> int:
        return len(self.sizes)

    def epoch(
        self, seed: int, epoch: int, *, first: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """An epoch from its batch `first` on; of each batch the share of process `rank`.

        Raises:
            UserError: If it cannot be read, or ends early.
        """
        dataset = self._dataset(training=True, rank=rank, world=world, seed=seed, epoch=epoch)
        key = (seed, epoch, rank) if self.augment else None
        done = 0
        answers = self._answers(dataset, self.size // world, key, derive_seed(seed, epoch, rank))
        for batch in itertools.islice(answers, first, None):
            yield Batch(*batch, whole=self.size)
            done += 1
        if done + first < len(self):
            raise UserError(
                f"{self.archive.name} ended after {done + first} of {len(self)} batches: "
                "fewer shards than decoding processes need fewer --workers"
            )

    def in_order(self, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Evaluation views, every image once; every `world`-th batch.

        Raises:
            UserError: If it cannot be read.
        """
        dataset = self._dataset(training=False, rank=0, world=1)
        answers = self._answers(dataset, self.size, None, 0)
        yield from itertools.starmap(Batch, itertools.islice(answers, rank, None, world))

    def _dataset(self, *, training: bool, rank: int, world: int, seed: int = 0, epoch: int = 0):
        dataset = _create_dataset(
            self.archive.name,
            self.archive.root,
            self.archive.split,
            is_training=training,
            batch_size=self.size // world,
            seed=derive_seed(seed, epoch) >> 32,  # readers add to it within 32 bits
            input_img_mode=self.views.mode,
        )
        # It asked torch.distributed; what the caller says counts.
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = rank, world
        dataset.set_loader_cfg(num_workers=self.workers)
        return dataset

    def _answers(
        self, dataset: Any, share: int, key: tuple[int, ...] | None, seed: int
    ) -> Iterator[ImagesAndLabels]:
        transform = self.views.transform(key is not None)
        source = _ShardDataset(self.archive.name, dataset, share, transform, key, self._piped)
        answers = build_loader(source, self.device, self.workers, self.prefetch, seed=seed)
        for answer in receive(answers):
            yield deliver(answer, self.views, self.device)


@dataclass(frozen=True, eq=False)
class _ShardDataset(IterableDataset):
    """What a decoding process has: its part of the images in, batches out.

    A view is a function of the key, of the process's number and of the image's place in what that
    process reads.
    """

    name: str
    dataset: Any
    share: int
    transform: Transform
    key: tuple[int, ...] | None
    piped: bool

    def __iter__(self) -> Iterator[WorkerBatch]:
        images, labels = [], []
        try:
            for image, label in self._views():
                images.append(image)
                labels.append(label)
                if len(labels) == self.share:
                    yield collate(images, labels, self.piped)
                    images, labels = [], []
        except Exception as error:  # raised here, it would arrive wrapped in a traceback
            yield f"{self.name} cannot be read ({one_line(error)})"
            return
        if labels:
            yield collate(images, labels, self.piped)

    def _views(self) -> Iterator[tuple[torch.Tensor, int]]:
        worker = get_worker_info()
        number = 0 if worker is None else worker.id
        for place, (image, label) in enumerate(self.dataset):
            with nullcontext() if self.key is None else temporary_seed(*self.key, number, place):
                view = self.transform(image)
            yield view, int(label)


def _create_dataset(name: str, root: Path | None, split: str, **options: Any) -> Any:
    from timm.data.dataset_factory import create_dataset

    try:
        return create_dataset(name, root and str(root), split, **options)
    except Exception as error:  # each kind of data set has errors of its own
        raise UserError(f"cannot open the {split!r} part of {name} ({one_line(error)})") from error


def _list_hugging_face(name: str, split: str, reader: Any, classes: tuple[str, ...]) -> ImageFiles:
    """Hugging Face data sets know all labels beforehand."""
    labels = np.asarray(reader.dataset[reader.label_key][:], np.int64)
    stamp = f"{name} {split} {reader.dataset._fingerprint}"
    return ImageFiles(reader, classes, lambda: stamp, np.arange(len(labels)), labels)


def _reader_classes(reader: Any) -> tuple[str, ...]:
    """The class names that a data set brings, in label order."""
    by_name: dict[str, int] = reader.class_to_idx or {}
    return tuple(sorted(by_name, key=by_name.__getitem__))


def _read_classes_file(root: Path) -> tuple[str, ...]:
    path = root / CLASSES_FILE
    return tuple(path.read_text().splitlines()) if path.is_file() else ()
