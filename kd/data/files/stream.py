"""Stream large data from disk: decoded, cropped and augmented by other processes.

The augmentation of an image depends only on (seed, epoch, row, repeat): not on the number of
decoding processes, nor on the batch where an epoch starts. So a killed training resumes bit for
bit, and a teacher's logits can be kept.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from dsdistill.harness.data import image_files
from dsdistill.harness.errors import UserError, one_line
from dsdistill.harness.memory import format_bytes
from dsdistill.harness.runs import progress
from kd.data.batching import (
    MIN_IMAGES_PER_PROCESS,
    Batch,
    check_size,
    derive_seed,
    share_positions,
    split_rows,
)
from kd.data.files.image_files import ImageFiles, UnreadableImage
from kd.data.files.transforms import Transform, Views, preserve_generators, seed_generators

UNREADABLE = -1  # label of a black image in place of one that cannot be read
BLANK_SIZE = (64, 64)  # of such an image, before it takes the size of the others
SHARED_MEMORY = "/dev/shm"  # Linux's file system of shared memory
SEMAPHORE_BYTES_PER_WORKER = 1 << 17  # shared memory for a decoding process's queues, rounded up

ImagesAndLabels = tuple[Tensor, Tensor]
# A batch on its way between processes, or the text of an error.
WorkerBatch = ImagesAndLabels | tuple[np.ndarray, np.ndarray] | str


class Transport(NamedTuple):
    """The way of batches from decoding processes to the training's process.

    Attributes:
        workers: Number of decoding processes; 0 where the training's process decodes.
        piped: Whether batches go through pipes instead of shared memory.
    """

    workers: int
    piped: bool


@dataclass(frozen=True, eq=False)
class FileBatches:
    """Batches of images that are read when they are needed; a `kd.data.batching.BatchSource`.

    Attributes:
        images: The image files.
        views: Views of an image, for training and for evaluation.
        size: Number of images in a batch over all processes; an epoch's last may be smaller.
        device: Device of the batches.
        world: Largest number of processes that share a batch.
        augment: Whether an epoch has training views; else it has evaluation views.
        repeats: Number of views of one image in an epoch. More than 1 is timm's repeated
            augmentation: an epoch has as many views, rounded down to a multiple of 256, and so only
            a part of the images.
        workers: Number of decoding processes; with 0 the training's process decodes.
        prefetch: Number of batches that each worker prepares in advance.
        least: Smallest number of images in a process's share of a batch.
        blank_unreadable: Whether an image that cannot be read is a black one with the label
            `UNREADABLE`; otherwise it is an error.
    """

    images: ImageFiles
    views: Views
    size: int
    device: torch.device
    world: int = 1
    augment: bool = True
    repeats: int = 1
    workers: int = 0
    prefetch: int = 2
    least: int = MIN_IMAGES_PER_PROCESS
    blank_unreadable: bool = False
    _idle: list["_WorkerPool"] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("size", "world", "repeats", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_size(min(self.size, len(self.images)), self.world, self.least)
        _ = self._dataset  # raises for a wrong augmentation here, not later in a worker

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in label order."""
        return self.images.classes

    @property
    def digest(self) -> str:
        """SHA-256 that changes with the images."""
        return self.images.digest

    @cached_property
    def labels(self) -> Int[Tensor, " N"] | None:
        """Class indices of all images, where they are known without reading them."""
        known = self.images.labels
        return None if known is None else torch.from_numpy(known).to(self.device)

    @property
    def sizes(self) -> list[int]:
        """Number of images of each batch of an epoch, over all processes."""
        return self._sizes

    @cached_property
    def _sizes(self) -> list[int]:
        n = len(self.images)
        views = n if self.repeats == 1 or n < 256 else n // 256 * 256
        return [
            len(part) for part in split_rows(np.arange(views), self.size, self.world, self.least)
        ]

    def __len__(self) -> int:
        return len(self.sizes)

    def epoch(
        self, seed: int, epoch: int, *, first: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Yield an epoch from its batch `first` on; of each batch, the share of process `rank`.

        Raises:
            UserError: If an image cannot be read; the message has its path.
        """
        rows = epoch_rows(len(self.images), self.repeats, seed, epoch)
        key = (seed, epoch) if self.augment else None
        parts = split_rows(np.arange(len(rows)), self.size, self.world, self.least)[first:]
        places = [part[share_positions(len(part), rank, world)] for part in parts]
        shares = [_BatchShare(rows[place], place % self.repeats, key) for place in places]
        for part, batch in zip(parts, self._batches(shares), strict=True):
            yield replace(batch, total_images=len(part))

    def in_order(self, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Yield every `world`-th batch of evaluation views from batch `rank` on, in data order.

        Raises:
            UserError: If an image cannot be read; the message has its path.
        """
        yield from self.of_rows(split_rows(np.arange(len(self.images)), self.size)[rank::world])

    def of_rows(
        self, parts: Sequence[Int[np.ndarray, " n"]], key: tuple[int, int] | None = None
    ) -> Iterator[Batch]:
        """Yield a batch for each part of the rows: evaluation views, or random ones.

        Args:
            parts: Rows of each batch.
            key: Seed and epoch of training views, which are a function of these and of the row.

        Raises:
            UserError: If an image cannot be read; the message has its path.
        """
        yield from self._batches([_BatchShare(part, np.zeros_like(part), key) for part in parts])

    def _batches(self, shares: list["_BatchShare"]) -> Iterator[Batch]:
        pool = self._idle.pop() if self._idle else self._start_pool()
        pool.shares[:] = shares
        try:
            for share, answer in zip(shares, receive(pool.loader), strict=True):
                images, labels = deliver(answer, self.views, self.device)
                index = torch.from_numpy(share.rows).to(self.device)
                yield Batch(images, labels, index=index)
        finally:
            self._idle.append(pool)

    def _start_pool(self) -> "_WorkerPool":
        shares: list[_BatchShare] = []
        workers = self._transport.workers
        return _WorkerPool(
            build_loader(self._dataset, self.device, workers, self.prefetch, shares), shares
        )

    @cached_property
    def _transport(self) -> Transport:
        return choose_transport(self.views, self.size // self.world, self.workers, self.prefetch)

    @cached_property
    def _dataset(self) -> "_WorkerDataset":
        transforms = self.views.transform(False), self.views.transform(True)
        channels, piped = len(self.views.mean), self._transport.piped
        return _WorkerDataset(self.images, channels, *transforms, piped, self.blank_unreadable)


def epoch_rows(n: int, repeats: int, seed: int, epoch: int) -> Int[np.ndarray, " views"]:
    """Rows of an epoch, a function of (seed, epoch); repeats of an image are adjacent.

    Source: Hoffer et al. (2020), arXiv:1901.09335, as in timm's `RepeatAugSampler`: the first n
    rows of the repeated order, rounded down to whole blocks of 256.
    """
    epoch_seed = derive_seed(seed, epoch)
    if repeats == 1:
        return torch.randperm(n, generator=torch.Generator().manual_seed(epoch_seed)).numpy()
    from timm.data.distributed_sampler import RepeatAugSampler

    sampler = RepeatAugSampler(range(n), num_replicas=1, rank=0, num_repeats=repeats)
    sampler.set_epoch(epoch_seed)
    return np.fromiter(sampler, np.int64)


def build_loader(
    source: Any,
    device: torch.device,
    workers: int,
    prefetch: int,
    work: list[Any] | None = None,
    seed: int = 0,
) -> DataLoader:
    """Build a loader whose items are whole batches.

    Args:
        source: Data set that maps each item of `work` to a batch; without `work`, an iterable of
            batches.
        device, workers, prefetch: As in `FileBatches`.
        work: Items of an iteration, read at its start; the workers then live as long as the loader.
        seed: Seed of the base seed that torch gives to the workers.
    """
    collate_fn: Any = _identity
    return DataLoader(
        source,
        batch_size=None,
        sampler=work,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=workers > 0 and work is not None,
        pin_memory=device.type == "cuda",
        collate_fn=collate_fn,
        # Without a generator, the loader would draw from torch's global one.
        generator=torch.Generator().manual_seed(seed),
    )


def choose_transport(views: Views, size: int, workers: int, prefetch: int) -> Transport:
    """Choose how batches reach the training with the free shared memory; say so if it is scarce.

    A container often has 64 MB of it, and a process that writes beyond it is killed. Through a pipe
    a batch is copied once more. The semaphores of the pipes are in shared memory too.

    Args:
        views: Views of the images.
        size: Number of images in a process's batch.
        workers, prefetch: As in `FileBatches`.
    """
    if workers == 0 or not os.path.isdir(SHARED_MEMORY):
        return Transport(workers, False)
    status = os.statvfs(SHARED_MEMORY)
    free = status.f_bavail * status.f_frsize
    image = math.prod(views.size) * len(views.mean) * (4 if views.random_erase else 1)
    # Twice the prefetched batches: those of training and of validation may be in flight at once.
    needed = 2 * (workers * prefetch + 1) * size * image
    if needed <= free:
        return Transport(workers, False)
    possible = free >= SEMAPHORE_BYTES_PER_WORKER * (workers + 1)
    instead = "they go through pipes" if possible else "they are read without further processes"
    progress.say(
        f"note: {SHARED_MEMORY} has {format_bytes(free)} free of {format_bytes(needed)} that "
        f"batches of images would take: {instead}, which is slower; a container gets more with "
        "--shm-size"
    )
    return Transport(workers if possible else 0, True)


def receive(answers: DataLoader) -> Iterator[WorkerBatch]:
    """Yield the batches of decoding processes.

    Raises:
        UserError: If a decoding process has died.
    """
    try:
        yield from answers
    except RuntimeError as error:
        text = one_line(error)
        if "DataLoader worker" not in text and "shared memory" not in text:
            raise
        raise UserError(
            f"a process that reads images has died ({text}): it may have run out of memory; use "
            "fewer --workers, or --workers 0 for none"
        ) from error


def deliver(answer: WorkerBatch, views: Views, device: torch.device) -> ImagesAndLabels:
    """Move a received batch to its device.

    Raises:
        UserError: If the decoding process has sent an error instead.
    """
    if isinstance(answer, str):
        raise UserError(answer)
    parts = (torch.from_numpy(p) if isinstance(p, np.ndarray) else p for p in answer)
    images, labels = (part.to(device, non_blocking=True) for part in parts)
    return views.finish(images), labels


def collate(images: Sequence[Tensor], labels: Sequence[int], piped: bool = False) -> WorkerBatch:
    """Collate a batch in shared memory; if `piped`, as arrays for a pipe."""
    if piped:
        return np.stack([image.numpy() for image in images]), np.array(labels)
    return default_collate(list(images)), torch.tensor(labels)


class _BatchShare(NamedTuple):
    """A process's share of one batch: rows and repeats of its images."""

    rows: Int[np.ndarray, " n"]
    repeats: Int[np.ndarray, " n"]
    key: tuple[int, int] | None  # seed and epoch; None for evaluation views


class _WorkerPool(NamedTuple):
    """Decoding processes, and the list of shares that they work through."""

    loader: DataLoader
    shares: list[_BatchShare]


@dataclass(frozen=True, eq=False)
class _WorkerDataset:
    """The data set of a decoding process: maps shares to batches."""

    images: ImageFiles
    channels: int
    evaluation: Transform
    training: Transform
    piped: bool
    blank_unreadable: bool

    def __getitem__(self, share: _BatchShare) -> WorkerBatch:
        try:
            with preserve_generators():
                places = zip(*share[:2], strict=True)
                examples = [self._read(*place, share.key) for place in places]
        except UserError as error:
            return str(error)  # raised here, it would arrive wrapped in a traceback
        images, labels = zip(*examples, strict=True)
        return collate(images, labels, self.piped)

    def _read(self, row: int, repeat: int, key: tuple[int, int] | None) -> tuple[Tensor, int]:
        image, label = self._read_or_blank(row)
        if key is None:
            return self.evaluation(image), label
        seed_generators(*key, row, repeat)
        return self.training(image), label

    def _read_or_blank(self, row: int) -> tuple[Image.Image, int]:
        try:
            return self.images.read(row, self.channels)
        except UnreadableImage:
            if not self.blank_unreadable:
                raise
        return Image.new(image_files.PILLOW_MODES[self.channels], BLANK_SIZE), UNREADABLE


def _identity(answer: WorkerBatch) -> WorkerBatch:
    return answer
