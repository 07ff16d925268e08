"""Extract the features of a data set: image files as a stream, arrays in memory.

A feature is a function of the image, the backbone, the seed and the number of the view, and, to the
last bit, of the images that share its batch. So batches are always the same rows, and an extraction
that was stopped continues with the next whole batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsdistill.harness.data import preprocess
from dsdistill.harness.data.labeled_images import LabeledImages
from kd.data import batching
from kd.data.files.transforms import Views, temporary_seed
from kd.models.networks import resize
from kd.parallel import engine


class OrderedBatch(Protocol):
    """A batch of images in [0, 1]."""

    @property
    def images(self) -> Float[Tensor, "n c h w"]: ...


class OrderedImages(Protocol):
    """Images of a data set, read by row."""

    def of_rows(
        self, parts: Sequence[Int[np.ndarray, " n"]], key: tuple[int, int] | None = None
    ) -> Iterator[OrderedBatch]:
        """Yield a batch for each part of the rows: plain images, or views of (seed, view)."""
        ...


class ViewRows(NamedTuple):
    """The rows of one batch, and the number of their view; 0 is the plain image."""

    view: int
    rows: Int[np.ndarray, " n"]


class ArrayBatch(NamedTuple):
    """A batch of `ArrayImages`."""

    images: Float[Tensor, "n c h w"]


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images of an array, resized without rounding to bytes.

    Attributes:
        data: The images.
        views: Size and random views.
        device: Device of the batches.
    """

    data: LabeledImages
    views: Views
    device: torch.device

    def of_rows(
        self, parts: Sequence[Int[np.ndarray, " n"]], key: tuple[int, int] | None = None
    ) -> Iterator[ArrayBatch]:
        """As `OrderedImages.of_rows`."""
        for rows in parts:
            images = batching.to_nchw(preprocess.unit_range(self.data.images(rows)))
            if key is None:
                batch = resize_plain(images.to(self.device), self.views)
            else:
                views = [
                    self._random_view(image, (*key, int(row)))
                    for image, row in zip(images, rows, strict=True)
                ]
                batch = torch.stack(views).to(self.device)
            yield ArrayBatch(batch)

    def _random_view(self, image: Float[Tensor, "c h w"], seed: tuple[int, ...]) -> Tensor:
        from torchvision.transforms import v2

        crop = v2.RandomResizedCrop(
            self.views.size, self.views.scale, self.views.ratio, antialias=True
        )
        with temporary_seed(*seed):
            return v2.RandomHorizontalFlip(self.views.hflip)(crop(image))


class PlainInput(Protocol):
    """Size of a backbone's images, and the interpolation of the resize."""

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def interpolation(self) -> str: ...


def resize_plain(images: Float[Tensor, "n c h w"], inputs: PlainInput) -> Float[Tensor, "n c H W"]:
    """Resize whole images of an array, without rounding to bytes or a central crop.

    Args:
        images: Images in [0, 1].
        inputs: Size and interpolation; other interpolations than bicubic are bilinear here.
    """
    interpolation = "bicubic" if inputs.interpolation == "bicubic" else "bilinear"
    return resize(images, inputs.size, interpolation)


def plan(plain: int, training: int, views: int, size: int) -> list[ViewRows]:
    """The batches of an extraction: all images plainly, then each further view of the training set.

    Args:
        plain: Number of images, those of the training set first.
        training: Number of training images.
        views: Number of views V; the first is the plain image.
        size: Number of images in a batch.
    """
    counts = (plain, *[training] * (views - 1))
    return [
        ViewRows(view, np.arange(first, min(first + size, count)))
        for view, count in enumerate(counts)
        for first in range(0, count, size)
    ]


def extract(
    backbone: Callable[[Tensor], Tensor],
    images: OrderedImages,
    batches: Sequence[ViewRows],
    seed: int,
    device: torch.device,
) -> Iterator[Float[np.ndarray, "n d"]]:
    """Yield the features of each batch.

    Args:
        backbone: The network, on the device: a `Backbone`, or another function of its images.
        images: The images.
        batches: Some of the batches of `plan`, in order.
        seed: Seed of the random views.
        device: Device of the network.
    """
    for view in sorted({batch.view for batch in batches}):
        parts = [batch.rows for batch in batches if batch.view == view]
        for batch in images.of_rows(parts, (seed, view) if view else None):
            # Not around the loop: the caller's code runs between two batches.
            with torch.inference_mode(), engine.deterministic():
                rows = backbone(batch.images.to(device)).float().cpu().numpy()
            yield rows
