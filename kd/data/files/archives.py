"""Read data sets by timm's names, `hfds/NAME`, `tfds/NAME` and `wds/DIR`.

`hfds/` data sets are read in any order, as folders are. The others are read from front to back, and
lack some properties of `kd.data.files.stream`:

- timm's reader defines an epoch: each decoding process of each rank reads its own shards, again
  where they are too few, until it has its even share of full batches. So some images may occur
  twice and others not at all, and files that cannot be decoded are left out with a warning.
- An epoch is a function of (seed, epoch), but also of the number of ranks and of decoding
  processes. To start in its middle, everything before is read and discarded.
- Rows have no numbers: a batch has no `index`, repeated augmentation is refused, nothing can be
  held out for validation, and labels are known only when they are read.

Evaluation is exact: every rank reads everything, and keeps its own batches.
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
CLASSES_FILE = "classes.txt"  # class names, one per line, beside shards of `wds/`, which have none


@dataclass(frozen=True)
class ArchiveSplit:
    """A split of a data set that is read from front to back.

    Attributes:
        name: timm's name, such as `wds/DIR`.
        root: Folder of the data set, if the name does not have it.
        split: Name of the split, such as `train`, or its shards: `train-{0000..0009}.tar|9000`.
        classes: Class names, in label order.
        folder: Folder of its files; None if unknown.
    """

    name: str
    root: Path | None
    split: str
    classes: tuple[str, ...]
    folder: Path | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the classes and of the names, sizes and times of the files."""
        sha = hashlib.sha256(repr((self.name, self.split, self.classes)).encode())
        files = [] if self.folder is None else sorted(self.folder.rglob("*"))
        for path in files:
            if path.is_file():
                status = path.stat()
                name = os.fsencode(path.relative_to(self.folder or path))
                sha.update(repr((name, status.st_size, status.st_mtime_ns)).encode())
        return sha.hexdigest()


def is_timm_name(data: str) -> bool:
    """Whether DATA is a name of timm and not a path."""
    return data.partition("/")[0].lower() in PACKAGES and not Path(data).exists()


def open_split(
    name: str, split: str, *, root: Path | None = None, classes: tuple[str, ...] = ()
) -> ImageFiles | ArchiveSplit:
    """Open a split of a data set by timm's name.

    Args:
        name: `hfds/NAME`, `tfds/NAME` or `wds/DIR`.
        split: The data set's name of the split.
        root: Folder of the data sets; ignored for `wds/`, whose name has its folder.
        classes: Class names, where the data set has none.

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
            f"{name} does not name its classes: put {CLASSES_FILE}, one per line, beside it"
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
    """Build the batches of either kind of split; arguments as in `FileBatches`.

    Raises:
        UserError: If the data set cannot be read as asked.
    """
    if isinstance(source, ImageFiles):
        options = (world, augment, repeats, workers, prefetch, least)
        return FileBatches(source, views, size, device, *options)
    if augment:  # all shares and all batches have one size
        check_size(size // world, 1, least)
    if repeats > 1:
        raise UserError(
            f"--repeats {repeats} needs images that can be read in any order, and {source.name} "
            "is read from front to back: leave it out, or use a folder"
        )
    return SequentialBatches(source, views, size, device, world, augment, max(1, workers), prefetch)


@dataclass(frozen=True, eq=False)
class SequentialBatches:
    """Batches of a split that is read from front to back; a `kd.data.batching.BatchSource`.

    Attributes:
        archive: The split.
        views, size, device, augment, prefetch: As in `FileBatches`.
        world: Number of processes that read an epoch and get equal shares of each batch.
        workers: Number of decoding processes, at least 1: timm's readers divide the shards among
            them.
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
                f"{self.archive.name} gives each of {self.world} processes an equal share of "
                f"a batch: its size must be a multiple of {self.world}, got {self.size}"
            )
        self.views.transform(True)  # raises for a wrong augmentation

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in label order."""
        return self.archive.classes

    @property
    def digest(self) -> str:
        """SHA-256 of everything that the order of an epoch depends on, without the images."""
        order = (self.archive.digest, self.workers, self.world)
        return hashlib.sha256(repr(order).encode()).hexdigest()

    @property
    def labels(self) -> None:
        """None: labels are not known before the images are read."""

    @property
    def sizes(self) -> list[int]:
        """Number of images of each batch of an epoch, over all processes; always `size`."""
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
            UserError: If shared memory is too small for all workers, on whose number an epoch
                depends.
        """
        transport = choose_transport(self.views, self.size, self.workers, self.prefetch)
        if transport.workers < self.workers:
            raise UserError(
                f"{self.archive.name} is read by {self.workers} processes, for which there is not "
                f"enough shared memory ({SHARED_MEMORY}): give the container more with --shm-size"
            )
        return transport.piped

    def __len__(self) -> int:
        return len(self.sizes)

    def epoch(
        self, seed: int, epoch: int, *, first: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Yield an epoch from its batch `first` on; of each batch, the share of process `rank`.

        Raises:
            UserError: If it cannot be read, or ends early.
        """
        dataset = self._dataset(training=True, rank=rank, world=world, seed=seed, epoch=epoch)
        key = (seed, epoch, rank) if self.augment else None
        done = 0
        answers = self._answers(dataset, self.size // world, key, derive_seed(seed, epoch, rank))
        for batch in itertools.islice(answers, first, None):
            yield Batch(*batch, total_images=self.size)
            done += 1
        if done + first < len(self):
            raise UserError(
                f"{self.archive.name} ended after {done + first} of {len(self)} batches: "
                "fewer shards than decoding processes need fewer --workers"
            )

    def in_order(self, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Yield every `world`-th batch of evaluation views from batch `rank` on.

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
        # The reader has asked torch.distributed for these; the arguments override them.
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
    """The data set of a decoding process: reads its share of the images, yields batches.

    A view is a function of the key, of the number of the process, and of the image's position among
    those that the process reads.
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
    except Exception as error:  # each kind of data set raises its own errors
        raise UserError(f"cannot open the {split!r} part of {name} ({one_line(error)})") from error


def _list_hugging_face(name: str, split: str, reader: Any, classes: tuple[str, ...]) -> ImageFiles:
    """List the images of a Hugging Face data set, whose labels are all known beforehand."""
    labels = np.asarray(reader.dataset[reader.label_key][:], np.int64)
    stamp = f"{name} {split} {reader.dataset._fingerprint}"
    return ImageFiles(reader, classes, lambda: stamp, np.arange(len(labels)), labels)


def _reader_classes(reader: Any) -> tuple[str, ...]:
    """The class names of timm's reader, in label order."""
    by_name: dict[str, int] = reader.class_to_idx or {}
    return tuple(sorted(by_name, key=by_name.__getitem__))


def _read_classes_file(root: Path) -> tuple[str, ...]:
    path = root / CLASSES_FILE
    return tuple(path.read_text().splitlines()) if path.is_file() else ()
