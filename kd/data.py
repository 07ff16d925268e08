"""Batches on the device. The only place where NHWC becomes NCHW.

Small data are preprocessed once and stay on the device; larger data are converted batch by batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsdistill.harness import memory
from dsdistill.harness.labeled import Examples

RESIDENT_BYTES = 1 << 30  # CIFAR-10 in float32 is 0.6 GiB; ImageNet at 64 pixels is 63 GiB


@dataclass(frozen=True, eq=False)
class Batch:
    """Some images with what is known about them.

    Attributes:
        images: In the space of the data's `Preprocess`.
        labels: Class indices.
        targets: Real-valued labels, where the data have them (a distilled set).
        teacher_logits: The teacher's answer to these very images, where it is known already.
    """

    images: Float[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    targets: Float[Tensor, "n k"] | None = None
    teacher_logits: Float[Tensor, "n k"] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Batches:
    """A data set as a source of batches; made by `batches`.

    Attributes:
        examples: The data.
        size: Images in a batch; the last of an epoch may be smaller.
        device: Where the batches appear.
        resident: All images, if they are kept on the device.
        labels, targets, teacher_logits: As in `Batch`, of all images.
    """

    examples: Examples
    size: int
    device: torch.device
    labels: Int[Tensor, " N"]
    resident: Float[Tensor, "N c h w"] | None = None
    targets: Float[Tensor, "N k"] | None = None
    teacher_logits: Float[Tensor, "N k"] | None = None

    def __len__(self) -> int:
        return len(split(np.arange(len(self.examples)), self.size))

    def shuffled(self, seed: int, epoch: int) -> Iterator[Batch]:
        """Every image once, in an order that depends on `seed` and `epoch` alone."""
        generator = torch.Generator().manual_seed(derive(seed, epoch))
        order = torch.randperm(len(self.examples), generator=generator).numpy()
        yield from map(self._batch, split(order, self.size))

    def in_order(self) -> Iterator[Batch]:
        """Every image once, in the order of the data."""
        yield from map(self._batch, split(np.arange(len(self.examples)), self.size))

    def _batch(self, indices: Int[np.ndarray, " n"]) -> Batch:
        where = torch.from_numpy(indices).to(self.device)
        if self.resident is None:
            images = to_nchw(self.examples.images(indices)).to(self.device)
        else:
            images = self.resident[where]
        return Batch(
            images,
            self.labels[where],
            None if self.targets is None else self.targets[where],
            None if self.teacher_logits is None else self.teacher_logits[where],
        )


def batches(examples: Examples, size: int, device: torch.device) -> Batches:
    """Prepare a data set for a device."""
    n, (h, w, c) = len(examples), examples.data.shape
    needed = 4 * n * h * w * c
    small = needed <= min(RESIDENT_BYTES, memory.available() // 4)
    targets = examples.targets
    return Batches(
        examples,
        size,
        device,
        labels=torch.from_numpy(examples.data.labels.astype(np.int64)).to(device),
        resident=to_nchw(examples.images()).to(device) if small else None,
        targets=None if targets is None else torch.tensor(targets, device=device),
    )


def to_nchw(images: Float[np.ndarray, "n h w c"]) -> Float[Tensor, "n c h w"]:
    """A contiguous float32 tensor with the channels first."""
    nchw = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
    return torch.from_numpy(nchw if nchw.flags.writeable else nchw.copy())


def split(order: Int[np.ndarray, " n"], size: int) -> list[np.ndarray]:
    """Consecutive parts of `size`; a last part of one joins the part before it.

    Batch norm of 1x1 maps cannot be trained on a single image.
    """
    starts = list(range(size, len(order), size))
    if starts and size > 1 and len(order) - starts[-1] == 1:
        starts.pop()
    return np.split(order, starts)


def derive(seed: int, epoch: int) -> int:
    """One 63-bit seed from two numbers, without the collisions of a sum."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)
