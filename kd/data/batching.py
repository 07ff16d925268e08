"""Batches on the device. The only place where NHWC becomes NCHW.

Small data are preprocessed once and stay on the device; larger data are converted batch by batch.
Everything random is a function of (seed, epoch, batch): an epoch can be entered at any batch, and
several processes share a batch without a word between them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsdistill.harness import memory
from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.errors import UserError

# Images of a process's share of a batch: batch norm of 1x1 maps needs as many.
MIN_IMAGES_PER_PROCESS = 2
MAX_RESIDENT_BYTES = 1 << 30  # CIFAR-10 in float32 is 0.6 GiB; ImageNet at 64 pixels is 63 GiB


# Images at once where nothing is trained. More leave the cache of a CPU: `convnet` at 28x28 takes
# 9.8 s for 10,000 images by 32 or 64 on two cores, 13.6 s by 128 or 256.
SCORE_BATCH = 64


@dataclass(frozen=True, eq=False)
class Batch:
    """Some images with what is known about them.

    Attributes:
        images: In the space of the data's `Preprocess`.
        labels: Class indices; of mixed images, of the first of two.
        targets: Real-valued labels, where the data have them (a distilled set).
        shares: Of mixed images, the share of each class; rows sum to 1.
        teacher_logits: The teachers' answers to these very images, where they are known already.
        index: Rows of the images in their data set.
        whole: Images of the batch over all processes, where this is one's share of it.
    """

    images: Float[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    targets: Float[Tensor, "n k"] | None = None
    shares: Float[Tensor, "n k"] | None = None
    teacher_logits: tuple[Float[Tensor, "n k"], ...] | None = None
    index: Int[Tensor, " n"] | None = None
    whole: int | None = None

    def __len__(self) -> int:
        return len(self.labels)


class EvaluationBatches(Protocol):
    """Images to score: resident or streamed."""

    def in_order(self, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Every image once, in the order of the data; every `world`-th batch."""
        ...


class BatchSource(Protocol):
    """A source of batches: resident or streamed, and what changes them on the way."""

    @property
    def device(self) -> torch.device: ...

    @property
    def sizes(self) -> list[int]:
        """Images of each batch of an epoch, over all processes."""
        ...

    def __len__(self) -> int:
        """Batches an epoch."""
        ...

    def epoch(
        self, seed: int, epoch: int, *, first: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """An epoch from its batch `first` on; of each batch the share of process `rank`."""
        ...


@dataclass(frozen=True, eq=False)
class ResidentBatches:
    """A data set that stays as it is; made by `prepare_resident`.

    Attributes:
        examples: The data.
        size: Images in a batch over all processes; the last of an epoch may be smaller.
        device: Where the batches appear.
        world: Processes that share a batch, at most.
        least: Images that each of them gets of a batch, at least.
        images: All of them, if they are kept on the device.
        labels, targets, teacher_logits: As in `Batch`, of all images.
    """

    examples: Examples
    size: int
    device: torch.device
    labels: Int[Tensor, " N"]
    images: Float[Tensor, "N c h w"] | None = None
    targets: Float[Tensor, "N k"] | None = None
    teacher_logits: tuple[Float[Tensor, "N k"], ...] | None = None
    world: int = 1
    least: int = MIN_IMAGES_PER_PROCESS

    @property
    def sizes(self) -> list[int]:
        parts = split_rows(np.arange(len(self.examples)), self.size, self.world, self.least)
        return [len(part) for part in parts]

    def __len__(self) -> int:
        return len(self.sizes)

    def epoch(
        self, seed: int, epoch: int, *, first: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Every image once, in an order that depends on `seed` and `epoch` alone."""
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
        order = torch.randperm(len(self.examples), generator=generator).numpy()
        for rows in split_rows(order, self.size, self.world, self.least)[first:]:
            yield replace(
                self.batch(rows[share_positions(len(rows), rank, world)]), whole=len(rows)
            )

    def in_order(self, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Every image once, in the order of the data; every `world`-th batch."""
        yield from map(
            self.batch, split_rows(np.arange(len(self.examples)), self.size)[rank::world]
        )

    def batch(self, rows: Int[np.ndarray, " n"]) -> Batch:
        """The images of these rows."""
        index = _move_tensor(torch.from_numpy(rows), self.device)
        if self.images is None:
            images = _move_tensor(to_nchw(self.examples.images(rows)), self.device)
        else:
            images = self.images[index]
        return Batch(
            images,
            self.labels[index],
            None if self.targets is None else self.targets[index],
            teacher_logits=self.teacher_logits and tuple(t[index] for t in self.teacher_logits),
            index=index,
        )


@dataclass(frozen=True, eq=False)
class ChangedBatches:
    """Batches that a function changes on their way: augmentation, mixing, a teacher's answers.

    Attributes:
        source: Of the batches.
        change: Called with a batch and a seed that is its own, the same in every process.
    """

    source: BatchSource
    change: Callable[[Batch, int], Batch]

    @property
    def device(self) -> torch.device:
        return self.source.device

    @property
    def sizes(self) -> list[int]:
        return self.source.sizes

    def __len__(self) -> int:
        return len(self.source)

    def epoch(
        self, seed: int, epoch: int, *, first: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """The source's epoch, changed."""
        stream = self.source.epoch(seed, epoch, first=first, rank=rank, world=world)
        for number, batch in enumerate(stream, first):
            yield self.change(batch, derive_seed(seed, epoch, number))


def move(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device."""
    moved = {
        name: value.to(device) for name, value in vars(batch).items() if isinstance(value, Tensor)
    }
    return replace(batch, **moved)


def _move_tensor(x: Tensor, device: torch.device) -> Tensor:
    """On the device; a GPU is not waited for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def prepare_resident(
    examples: Examples,
    size: int,
    device: torch.device,
    world: int = 1,
    least: int = MIN_IMAGES_PER_PROCESS,
) -> ResidentBatches:
    """Prepare a data set for a device.

    Args:
        examples: The data.
        size: Images in a batch over all processes.
        device: Where the batches appear.
        world: Processes that share a batch.
        least: Images that each of them needs.

    Raises:
        UserError: If there are too few images for so many processes.
    """
    n, (h, w, c) = len(examples), examples.data.shape
    check_size(min(size, n), world, least)
    needed = 4 * n * h * w * c
    small = needed <= min(MAX_RESIDENT_BYTES, memory.available() // 4)
    targets = examples.targets
    return ResidentBatches(
        examples,
        size,
        device,
        labels=torch.from_numpy(examples.data.labels.astype(np.int64)).to(device),
        images=to_nchw(examples.images()).to(device) if small else None,
        targets=None if targets is None else torch.tensor(targets, device=device),
        world=world,
        least=least,
    )


def check_size(size: int, world: int, least: int = MIN_IMAGES_PER_PROCESS) -> None:
    """Refuse batches that are too small for the processes that share them.

    Raises:
        UserError: With the number that it takes.
    """
    needed = min_shared_size(world, least)
    if size >= needed or (world == 1 and least <= MIN_IMAGES_PER_PROCESS):
        return
    if world == 1:
        raise UserError(
            f"this loss compares images: it needs {needed} in a batch, got {size}: raise "
            "--batch-size, or train on more images"
        )
    each = "two" if least == MIN_IMAGES_PER_PROCESS else str(least)
    raise UserError(
        f"{world} processes need {each} images each of every batch, so {needed} in all, got {size} "
        "images"
    )


def to_nchw(images: Float[np.ndarray, "n h w c"]) -> Float[Tensor, "n c h w"]:
    """A contiguous float32 tensor with the channels first."""
    nchw = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
    return torch.from_numpy(nchw if nchw.flags.writeable else nchw.copy())


def split_rows(
    order: Int[np.ndarray, " n"], size: int, world: int = 1, least: int = MIN_IMAGES_PER_PROCESS
) -> list[np.ndarray]:
    """Consecutive parts of `size`; a last part that is too small joins the part before it.

    So every image is seen in every epoch, and no batch is larger than `size` by more than a few.

    Args:
        order: Rows.
        size: Of a part.
        world: Processes that share it.
        least: Images that each of them needs.
    """
    starts = list(range(size, len(order), size))
    if starts and size > 1 and len(order) - starts[-1] < min_shared_size(world, least):
        starts.pop()
    return np.split(order, starts)


def min_shared_size(world: int, least: int = MIN_IMAGES_PER_PROCESS) -> int:
    """The number of images from which on every process's share, see `share_positions`, is at least `least`."""
    return least if world == 1 else 2 * world * math.ceil(least / 2)


def share_positions(n: int, rank: int, world: int) -> Int[np.ndarray, " m"]:
    """Positions of a batch of n that are this process's.

    The i-th from the front and the i-th from the back stay together: mixing pairs them.
    """
    positions = np.arange(n)
    return positions[np.minimum(positions, n - 1 - positions) % world == rank]


def derive_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, without the collisions of a sum."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
