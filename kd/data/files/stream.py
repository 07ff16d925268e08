"""Large data from disk: decoded, cut and changed by other processes, never whole in memory.

How an image is changed depends on (seed, epoch, row, repeat) alone: not on the number of processes
that decode, nor on the batch where an epoch is entered. So a killed training goes on bit for bit,
and a teacher's answers can be kept.
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
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

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
from kd.data.files.image_files import ImageFiles
from kd.data.files.transforms import Transform, Views, preserve_generators, seed_generators

SHARED_MEMORY = "/dev/shm"  # where Linux keeps the memory that processes share
SEMAPHORE_BYTES_PER_WORKER = (
    1 << 17
)  # bytes of it that the queues of a decoding process take, and some more

ImagesAndLabels = tuple[Tensor, Tensor]  # images and labels
WorkerBatch = (
    ImagesAndLabels | tuple[np.ndarray, np.ndarray] | str
)  # a batch between processes, or an error


class Transport(NamedTuple):
    """How decoding processes hand over what they have made.

    Attributes:
        workers: Processes; 0 where none can be started, and this one decodes.
        piped: Whether batches go through pipes, and not through shared memory.
    """

    workers: int
    piped: bool


@dataclass(frozen=True, eq=False)
class FileBatches:
    """Batches of images that are read when they are needed; a `kd.data.batching.BatchSource`.

    Attributes:
        pictures: The images.
        views: How they are changed.
        size: Images in a batch over all processes of the training; an epoch's last may be smaller.
        device: Where the batches appear.
        world: Processes that share a batch, at most.
        least: Images that each of them gets of a batch, at least.
        augment: Whether an epoch has training views; without, those of evaluation.
        repeats: Views of one image in an epoch. More than 1 is timm's repeated augmentation: an
            epoch stays as long, rounded down to a multiple of 256, and so holds a part of the
            images only.
        workers: Processes that decode; with 0 this one does.
        prefetch: Batches that each of them is ahead.
    """

    pictures: ImageFiles
    views: Views
    size: int
    device: torch.device
    world: int = 1
    augment: bool = True
    repeats: int = 1
    workers: int = 0
    prefetch: int = 2
    least: int = MIN_IMAGES_PER_PROCESS
    _idle: list["_WorkerPool"] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("size", "world", "repeats", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_size(min(self.size, len(self.pictures)), self.world, self.least)
        _ = self._desk  # a wrong augmentation is said now, not by a decoding process later

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in label order."""
        return self.pictures.classes

    @property
    def digest(self) -> str:
        """SHA-256 that changes with the images."""
        return self.pictures.digest

    @cached_property
    def labels(self) -> Int[Tensor, " N"] | None:
        """Class indices of all images, where they are known without reading them."""
        known = self.pictures.labels
        return None if known is None else torch.from_numpy(known).to(self.device)

    @property
    def sizes(self) -> list[int]:
        """Images of each batch of an epoch, over all processes."""
        return self._sizes

    @cached_property
    def _sizes(self) -> list[int]:
        n = len(self.pictures)
        views = n if self.repeats == 1 or n < 256 else n // 256 * 256
        return [
            len(part) for part in split_rows(np.arange(views), self.size, self.world, self.least)
        ]

    def __len__(self) -> int:
        return len(self.sizes)

    def epoch(
        self, seed: int, epoch: int, *, first: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """An epoch from its batch `first` on; of each batch the share of process `rank`.

        Raises:
            UserError: If an image cannot be read; the message has its path.
        """
        rows = epoch_rows(len(self.pictures), self.repeats, seed, epoch)
        key = (seed, epoch) if self.augment else None
        parts = split_rows(np.arange(len(rows)), self.size, self.world, self.least)[first:]
        places = [part[share_positions(len(part), rank, world)] for part in parts]
        shares = [_BatchShare(rows[place], place % self.repeats, key) for place in places]
        for part, batch in zip(parts, self._batches(shares), strict=True):
            yield replace(batch, whole=len(part))

    def in_order(self, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Evaluation views, every image once, in the order of the data; every `world`-th batch.

        Raises:
            UserError: If an image cannot be read; the message has its path.
        """
        parts = split_rows(np.arange(len(self.pictures)), self.size)[rank::world]
        yield from self._batches([_BatchShare(part, np.zeros_like(part), None) for part in parts])

    def _batches(self, shares: list["_BatchShare"]) -> Iterator[Batch]:
        crew = self._idle.pop() if self._idle else self._crew()
        crew.shares[:] = shares
        try:
            for share, answer in zip(shares, receive(crew.loader), strict=True):
                images, labels = deliver(answer, self.views, self.device)
                index = torch.from_numpy(share.rows).to(self.device)
                yield Batch(images, labels, index=index)
        finally:
            self._idle.append(crew)

    def _crew(self) -> "_WorkerPool":
        shares: list[_BatchShare] = []
        workers = self._handover.workers
        return _WorkerPool(
            build_loader(self._desk, self.device, workers, self.prefetch, shares), shares
        )

    @cached_property
    def _handover(self) -> Transport:
        return choose_transport(self.views, self.size // self.world, self.workers, self.prefetch)

    @cached_property
    def _desk(self) -> "_WorkerDataset":
        transforms = self.views.transform(False), self.views.transform(True)
        return _WorkerDataset(
            self.pictures, len(self.views.mean), *transforms, self._handover.piped
        )


def epoch_rows(n: int, repeats: int, seed: int, epoch: int) -> Int[np.ndarray, " views"]:
    """Rows of an epoch, a function of (seed, epoch); repeats of an image stand side by side.

    Source: Hoffer et al. (2020), arXiv:1901.09335, as timm's `RepeatAugSampler` has it: of the
    repeated order, as many are taken as there are images, in whole blocks of 256.
    """
    own = derive_seed(seed, epoch)
    if repeats == 1:
        return torch.randperm(n, generator=torch.Generator().manual_seed(own)).numpy()
    from timm.data.distributed_sampler import RepeatAugSampler

    sampler = RepeatAugSampler(range(n), num_replicas=1, rank=0, num_repeats=repeats)
    sampler.set_epoch(own)
    return np.fromiter(sampler, np.int64)


def build_loader(
    source: Any,
    device: torch.device,
    workers: int,
    prefetch: int,
    work: list[Any] | None = None,
    seed: int = 0,
) -> DataLoader:
    """A loader whose items are whole batches.

    Args:
        source: Makes a batch of each item of `work`; without `work`, an iterable of batches.
        device, workers, prefetch: As in `FileBatches`.
        work: Read anew at each iteration; with it the processes live as long as the loader.
        seed: Of what the processes call their own seeds.
    """
    keep: Any = _identity
    return DataLoader(
        source,
        batch_size=None,
        sampler=work,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=workers > 0 and work is not None,
        pin_memory=device.type == "cuda",
        collate_fn=keep,
        # Its own: the loader would draw a number from torch's global generator.
        generator=torch.Generator().manual_seed(seed),
    )


def choose_transport(views: Views, size: int, workers: int, prefetch: int) -> Transport:
    """How batches can be handed over with the shared memory that there is; said where it is scarce.

    A container has often 64 MB of it, and a process that writes beyond it is killed. Through a pipe
    a batch takes one copy more. The semaphores of the pipes lie in shared memory too.

    Args:
        views: Of the images.
        size: Images of a process's batch.
        workers, prefetch: As in `FileBatches`.
    """
    if workers == 0 or not os.path.isdir(SHARED_MEMORY):
        return Transport(workers, False)
    found = os.statvfs(SHARED_MEMORY)
    free = found.f_bavail * found.f_frsize
    image = math.prod(views.size) * len(views.mean) * (4 if views.random_erase else 1)
    # Twice what is ahead: training and validation images may be on their way at once.
    needed = 2 * (workers * prefetch + 1) * size * image
    if needed <= free:
        return Transport(workers, False)
    possible = free >= SEMAPHORE_BYTES_PER_WORKER * (workers + 1)
    instead = "they go through pipes" if possible else "they are read without further processes"
    progress.say(
        f"note: {SHARED_MEMORY} has {format_bytes(free)} free of {format_bytes(needed)} that batches of images "
        f"would take: {instead}, which is slower; a container gets more with --shm-size"
    )
    return Transport(workers if possible else 0, True)


def receive(answers: DataLoader) -> Iterator[WorkerBatch]:
    """What decoding processes send; the loss of one is one line.

    Raises:
        UserError: If a process has died.
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
    """A batch on its device, or the error that a decoding process met.

    Raises:
        UserError: If that is what came.
    """
    if isinstance(answer, str):
        raise UserError(answer)
    parts = (torch.from_numpy(p) if isinstance(p, np.ndarray) else p for p in answer)
    images, labels = (part.to(device, non_blocking=True) for part in parts)
    return views.finish(images), labels


def collate(images: Sequence[Tensor], labels: Sequence[int], piped: bool = False) -> WorkerBatch:
    """A batch, laid at once where the training's process finds it; or `piped`, for a pipe."""
    if piped:
        return np.stack([image.numpy() for image in images]), np.array(labels)
    return default_collate(list(images)), torch.tensor(labels)


class _BatchShare(NamedTuple):
    """One process's images of one batch."""

    rows: Int[np.ndarray, " n"]
    repeats: Int[np.ndarray, " n"]
    key: tuple[int, int] | None  # seed and epoch; None: evaluation views


class _WorkerPool(NamedTuple):
    """Decoding processes, and the list that gives them their work."""

    loader: DataLoader
    shares: list[_BatchShare]


@dataclass(frozen=True, eq=False)
class _WorkerDataset:
    """What a decoding process has: shares in, batches out."""

    pictures: ImageFiles
    channels: int
    still: Transform
    changed: Transform
    piped: bool

    def __getitem__(self, share: _BatchShare) -> WorkerBatch:
        try:
            with preserve_generators():
                read = [self._read(*place, share.key) for place in zip(*share[:2], strict=True)]
        except UserError as error:
            return str(error)  # raised here, it would arrive wrapped in a traceback
        images, labels = zip(*read, strict=True)
        return collate(images, labels, self.piped)

    def _read(self, row: int, repeat: int, key: tuple[int, int] | None) -> tuple[Tensor, int]:
        image, label = self.pictures.read(row, self.channels)
        if key is None:
            return self.still(image), label
        seed_generators(*key, row, repeat)
        return self.changed(image), label


def _identity(answer: WorkerBatch) -> WorkerBatch:
    return answer
