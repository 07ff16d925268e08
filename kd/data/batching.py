"""Batches on the device; the only module where NHWC becomes NCHW.

Small data are preprocessed once and stay on the device; larger data are converted batch by batch.
Everything random is a function of (seed, epoch, batch): an epoch can start at any batch, and
several processes share a batch without communication.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsdistill.harness import memory
from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.errors import UserError
from kd.models.token_inputs import IGNORED, TokenInputs

# What a term of a loss is the mean over: images or texts, real tokens, tokens with a target.
Unit = Literal["rows", "tokens", "targets"]
MIN_IMAGES_PER_PROCESS = 2  # in its share of a batch: batch norm of 1x1 maps needs 2
MAX_RESIDENT_BYTES = 1 << 30  # CIFAR-10 in float32 is 0.6 GiB; ImageNet at 64 pixels is 63 GiB
# Number of images in a batch without training. Larger batches leave a CPU's cache: on two cores
# `convnet` takes 9.8 s for 10,000 images of 28x28 in batches of 32 or 64, 13.6 s in 128 or 256.
SCORE_BATCH = 64


class LayerVector(NamedTuple):
    """A vector that a term takes from a layer of a teacher, for each image or text.

    Attributes:
        layer: Name of the layer.
        place: `mean` over all positions or real tokens, or the `first` token.
    """

    layer: str
    place: Literal["mean", "first"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Images or texts with their labels, rows and teachers' logits.

    Attributes:
        inputs: Images in the space of the data's `Preprocess`, or the tokens of texts.
        labels: Class indices; for mixed images, that of the first of the two; of texts also scores;
            of images with several labels, for each class whether the image has it (n, k).
        targets: Real-valued labels, where the data have them (a distilled set).
        class_shares: For mixed images, the share of each class; rows sum to 1.
        teacher_logits: The teachers' logits for these images or texts, (n, l, k) where they answer
            for tokens, where they are known already.
        teacher_vectors: Vectors of each teacher's layers, where they are known already; with them
            no teacher is called.
        index: Rows of the images in their data set, where they are known.
        total_images: Number of images, or texts, of the batch over all processes, if this is the
            share of one.
        teacher_inputs: The inputs of each teacher, where they differ from the student's.
        token_targets: Target of each token, `IGNORED` where it has none, for losses on tokens.
        totals: Number of tokens and of targets of the batch over all processes, if this is the
            share of one.
        counts: Number of tokens and of targets of this batch, counted before it was moved to its
            device, on which to count is to wait for it; None where that was not done.
    """

    inputs: Float[Tensor, "n c h w"] | TokenInputs
    labels: Int[Tensor, " n"] | Float[Tensor, "n k"]
    targets: Float[Tensor, "n k"] | None = None
    class_shares: Float[Tensor, "n k"] | None = None
    teacher_logits: tuple[Float[Tensor, "n *l k"], ...] | None = None
    teacher_vectors: tuple[Mapping[LayerVector, Float[Tensor, "n d"]], ...] | None = None
    index: Int[Tensor, " n"] | None = None
    total_images: int | None = None
    teacher_inputs: tuple[Float[Tensor, "n c h w"] | TokenInputs, ...] | None = None
    token_targets: Int[Tensor, "n l"] | None = None
    totals: Mapping[Unit, int] | None = None
    counts: Mapping[Unit, int] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def teacher_images(self) -> Float[Tensor, "n C H W"] | None:
        """The images that all teachers see, where they differ from the student's."""
        if self.teacher_inputs is None or not isinstance(self.teacher_inputs[0], Tensor):
            return None
        return self.teacher_inputs[0]

    def with_images(
        self, images: Float[Tensor, "n c h w"], teacher_images: Float[Tensor, "n C H W"] | None
    ) -> "Batch":
        """The same batch with other images, and where teachers have their own, with other ones."""
        if teacher_images is None:
            return replace(self, inputs=images)
        assert self.teacher_inputs is not None
        return replace(
            self, inputs=images, teacher_inputs=(teacher_images,) * len(self.teacher_inputs)
        )

    @property
    def images(self) -> Float[Tensor, "n c h w"]:
        """The inputs of a batch of images."""
        assert isinstance(self.inputs, Tensor), "the batch holds texts"
        return self.inputs

    def inputs_of(self, teacher: int) -> Float[Tensor, "n c h w"] | TokenInputs:
        """The inputs of the teacher with this number."""
        return self.inputs if self.teacher_inputs is None else self.teacher_inputs[teacher]

    def count(self, unit: Unit) -> int:
        """Number of images or texts, of real tokens, or of tokens with a target."""
        if self.counts is not None and unit in self.counts:
            return self.counts[unit]
        if unit == "tokens" and isinstance(self.inputs, TokenInputs):
            return int(self.inputs.mask.sum())
        if unit == "targets" and self.token_targets is not None:
            return int((self.token_targets != IGNORED).sum())
        return len(self)

    def total(self, unit: Unit) -> int:
        """The same over all processes."""
        if self.totals is not None and unit in self.totals:
            return self.totals[unit]
        return self.total_images or len(self) if unit == "rows" else self.count(unit)

    @property
    def labels_or_shares(self) -> Int[Tensor, " n"] | Float[Tensor, "n k"]:
        """Class indices; the shares of the classes where images are mixed."""
        return self.labels if self.class_shares is None else self.class_shares


class EvaluationBatches(Protocol):
    """Batches of images to evaluate on: resident or streamed."""

    def in_order(self, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Yield every `world`-th batch from batch `rank` on, in the order of the data."""
        ...


class BatchSource(Protocol):
    """A source of batches: resident or streamed, or another source with changes."""

    @property
    def device(self) -> torch.device: ...

    @property
    def sizes(self) -> list[int]:
        """Number of images of each batch of an epoch, over all processes."""
        ...

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        ...

    def epoch(
        self, seed: int, epoch: int, *, first: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Yield an epoch from its batch `first` on; of each batch, the share of process `rank`."""
        ...


@dataclass(frozen=True, eq=False)
class ResidentBatches:
    """Batches of a data set in memory; created by `prepare_resident`.

    Attributes:
        examples: The data set of N images.
        size: Number of images in a batch over all processes; the last of an epoch may be smaller.
        device: Device of the batches.
        labels, targets, teacher_logits: As in `Batch`, for all images.
        images: All images, if they are kept on the device.
        world: Largest number of processes that share a batch.
        least: Smallest number of images in a process's share of a batch.
    """

    examples: Examples
    size: int
    device: torch.device
    labels: Int[Tensor, " N"] | Float[Tensor, "N k"]
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
        """Yield every image once, in an order that depends only on `seed` and `epoch`."""
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
        order = torch.randperm(len(self.examples), generator=generator).numpy()
        for rows in split_rows(order, self.size, self.world, self.least)[first:]:
            yield replace(
                self.batch(rows[share_positions(len(rows), rank, world)]), total_images=len(rows)
            )

    def in_order(self, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Yield every `world`-th batch from batch `rank` on, in the order of the data."""
        yield from map(
            self.batch, split_rows(np.arange(len(self.examples)), self.size)[rank::world]
        )

    def batch(self, rows: Int[np.ndarray, " n"]) -> Batch:
        """Build the batch of these rows."""
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
    """The batches of a source, changed by a function: augmentation, mixing, teachers' logits.

    Attributes:
        source: Source of the batches.
        change: Function of a batch and the batch's seed, which is the same in every process.
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
        """Yield the source's epoch, each batch changed."""
        stream = self.source.epoch(seed, epoch, first=first, rank=rank, world=world)
        for number, batch in enumerate(stream, first):
            yield self.change(batch, derive_seed(seed, epoch, number))


def move(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to a device; from pinned memory without waiting for a GPU.

    Its tokens are counted where it comes from.
    """
    gpu = device.type == "cuda"
    moved: dict[str, Any] = {
        name: value.to(device, non_blocking=gpu and _is_pinned(value))
        for name, value in vars(batch).items()
        if isinstance(value, Tensor | TokenInputs)
    }
    if batch.teacher_inputs is not None:
        moved["teacher_inputs"] = tuple(x.to(device) for x in batch.teacher_inputs)
    return replace(batch, **moved, counts=batch.counts or _count_tokens(batch))


def _count_tokens(batch: Batch) -> dict[Unit, int]:
    """Numbers of tokens and of targets of texts; empty for images."""
    if not isinstance(batch.inputs, TokenInputs):
        return {}
    units: tuple[Unit, ...] = ("tokens",) if batch.token_targets is None else ("tokens", "targets")
    return {unit: batch.count(unit) for unit in units}


def _is_pinned(value: Tensor | TokenInputs) -> bool:
    return (value.ids if isinstance(value, TokenInputs) else value).is_pinned()


def _move_tensor(x: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to the device, without waiting for a GPU."""
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
        examples: The data set.
        size: Number of images in a batch over all processes.
        device: Device of the batches.
        world: Number of processes that share a batch.
        least: Smallest number of images in a process's share.

    Raises:
        UserError: If there are too few images for the processes.
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
        labels=label_tensor(examples.data.labels).to(device),
        images=_all_images(examples).to(device) if small else None,
        targets=None if targets is None else torch.tensor(targets, device=device),
        world=world,
        least=least,
    )


def _all_images(examples: Examples) -> Float[Tensor, "n c h w"]:
    """All images, preprocessed a batch at a time, so that they are in memory once.

    Those that are whitened are preprocessed at once: the last digits of a product of matrices
    depend on the number of its rows.
    """
    if examples.preprocess.whiten is not None:
        return to_nchw(examples.images())
    n, (h, w, c) = len(examples), examples.data.shape
    images = torch.empty(n, c, h, w)
    for part in examples.batches():
        images[part] = to_nchw(examples.images(part))
    return images


def label_tensor(
    labels: Int[np.ndarray, " n"] | Int[np.ndarray, "n k"],
) -> Int[Tensor, " n"] | Float[Tensor, "n k"]:
    """Class indices as int64; several labels of each image as 0 and 1 in float32."""
    return torch.from_numpy(labels.astype(np.int64 if labels.ndim == 1 else np.float32))


def check_size(size: int, world: int, least: int = MIN_IMAGES_PER_PROCESS) -> None:
    """Refuse batches that are too small for the processes that share them.

    Args:
        size: Number of images in a batch over all processes.
        world: Number of processes that share it.
        least: Smallest number of images in a process's share.

    Raises:
        UserError: If a batch is too small; the message has the number that is needed.
    """
    needed = min_shared_size(world, least)
    if size >= needed or (world == 1 and least <= MIN_IMAGES_PER_PROCESS):
        return
    if world == 1:
        raise UserError(
            f"this loss compares images: it needs {needed} in a batch, got {size}: raise "
            "--batch-size, or train on more images"
        )
    share = "two" if least == MIN_IMAGES_PER_PROCESS else str(least)
    raise UserError(
        f"{world} processes need {share} images each of every batch, so {needed} in all, got "
        f"{size} images: use fewer processes, or more images"
    )


def to_nchw(images: Float[np.ndarray, "n h w c"]) -> Float[Tensor, "n c h w"]:
    """Convert images to a contiguous float32 tensor with the channels first."""
    nchw = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
    return torch.from_numpy(nchw if nchw.flags.writeable else nchw.copy())


def split_rows(
    order: Int[np.ndarray, " n"], size: int, world: int = 1, least: int = MIN_IMAGES_PER_PROCESS
) -> list[np.ndarray]:
    """Split rows into parts of `size`; a last part that is too small joins the part before it.

    So every image is in every epoch, and the last batch exceeds `size` by a few at most.

    Args:
        order: Rows of an epoch.
        size: Number of rows in a part.
        world: Number of processes that share a part.
        least: Smallest number of rows in a process's share.
    """
    starts = list(range(size, len(order), size))
    if starts and size > 1 and len(order) - starts[-1] < min_shared_size(world, least):
        starts.pop()
    return np.split(order, starts)


def min_shared_size(world: int, least: int = MIN_IMAGES_PER_PROCESS) -> int:
    """Size of a batch from which every share, see `share_positions`, has `least` images or more."""
    return least if world == 1 else 2 * world * math.ceil(least / 2)


def share_positions(n: int, rank: int, world: int) -> Int[np.ndarray, " m"]:
    """Positions in a batch of n images that process `rank` of `world` gets.

    The i-th from the front and the i-th from the back stay together, since mixing pairs them.
    """
    positions = np.arange(n)
    return positions[np.minimum(positions, n - 1 - positions) % world == rank]


def derive_seed(*numbers: int) -> int:
    """Derive one 63-bit seed from several numbers, without the collisions of a sum."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's global generators; `torch.manual_seed` is slow where CUDA is not in use."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
