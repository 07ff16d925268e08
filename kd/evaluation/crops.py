"""Random crops of half the size, as RDED scores and joins them: seen by a network, and cut out.

A crop is a function of the seed, its number and the row of its image, so that one that was scored
is cut again, at any size. The network sees it at half of its input's side, as it will stand in an
image of four, amid the mean colour of the network's preprocessing.

Source: Sun et al. (2024), RDED, arXiv:2312.03526, and its code: `RandomResizedCrop` of torchvision
at half the size with square crops of 8 to 100 % of the area, padded by 0 after normalisation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsdistill.harness.data.labeled_images import LabeledImages
from kd.evaluation import features
from kd.evaluation.backbones import Backbone
from kd.evaluation.features import ArrayBatch, ArrayImages, ViewRows
from kd.models import networks
from kd.models.zoo import class_names

SCALE = (0.08, 1.0)  # share of the image's area, torchvision's default
RATIO = (1.0, 1.0)


@dataclass(frozen=True, eq=False)
class OwnHead:
    """The logits of a backbone's own classifier, in the order of the data's classes.

    Attributes:
        backbone: The network.
        outputs: Its output for each class of the data.
    """

    backbone: Backbone
    outputs: tuple[int, ...]

    def __call__(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.backbone.logits(images)[:, self.outputs]


@dataclass(frozen=True, eq=False)
class PaddedCrops:
    """Random crops of half the size of a network's images, amid its mean colour.

    Attributes:
        images: The images.
        backbone: The network, on its device.
        device: That device.
    """

    images: LabeledImages
    backbone: Backbone
    device: torch.device

    def of_rows(
        self, parts: Sequence[Int[np.ndarray, " n"]], key: tuple[int, int] | None = None
    ) -> Iterator[ArrayBatch]:
        """As `features.OrderedImages.of_rows`."""
        height, width = self.backbone.inputs.size
        half = (height // 2, width // 2)
        top, left = (height - half[0]) // 2, (width - half[1]) // 2
        edges = (left, width - half[1] - left, top, height - half[0] - top)
        fitted = self.backbone.model.preprocess
        colour = torch.from_numpy(fitted.mean.reshape(-1, len(fitted.std)).mean(0))
        channels = self.backbone.model.shape[2]
        for batch in _crops(self.images, half, self.device).of_rows(parts, key):
            # Relative to the colour, whose difference to itself is 0.
            mean = colour.to(self.device)[:, None, None]
            images = networks.repeat_channels(batch.images, channels)
            yield ArrayBatch(F.pad(images - mean, edges) + mean)


def own_head(backbone: Backbone, classes: Sequence[str]) -> OwnHead | None:
    """The classifier of a backbone that has all classes of the data, by name; None where not.

    Names that are numbers say nothing.
    """
    if all(name.isdecimal() for name in classes):
        return None
    outputs = class_names.match_by_name(backbone.model.classes, classes)
    return None if outputs is None else OwnHead(backbone, outputs)


def plan(rows: Int[np.ndarray, " n"], crops: int, size: int) -> list[ViewRows]:
    """Batches of the crops 1 to `crops` of some images, all images for each crop.

    Args:
        rows: Rows of the images.
        crops: Number of crops of each.
        size: Number of images in a batch.
    """
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    return [ViewRows(crop, part) for crop in range(1, crops + 1) for part in parts]


def outputs(
    crops: PaddedCrops, head: OwnHead | None, batches: Sequence[ViewRows], seed: int
) -> Iterator[Float[np.ndarray, "n d"]]:
    """Yield the logits of the head for each batch of crops; without a head, the features.

    Args:
        crops: The crops.
        head: A classifier.
        batches: Some of the batches of `plan`.
        seed: Seed of the crops.
    """
    network = crops.backbone if head is None else head
    return features.extract(network, crops, batches, seed, crops.device)


def cut(
    images: LabeledImages,
    rows: Int[np.ndarray, " n"],
    crops: Int[np.ndarray, " n"],
    size: tuple[int, int],
    seed: int,
) -> Float[np.ndarray, "n h w c"]:
    """Cut crops out of images, in [0, 1].

    Args:
        images: The images.
        rows: Row of each image.
        crops: Number of each crop, as in `plan`.
        size: Height and width.
        seed: Seed of the crops.
    """
    tiles = np.empty((len(rows), *size, images.shape[2]), np.float32)
    source = _crops(images, size, torch.device("cpu"))
    for crop in np.unique(crops):
        places = np.flatnonzero(crops == crop)
        for place in places:
            [batch] = source.of_rows([rows[place : place + 1]], (seed, int(crop)))
            tiles[place] = batch.images[0].movedim(0, -1).clamp(0, 1).numpy()
    return tiles


def _crops(images: LabeledImages, size: tuple[int, int], device: torch.device) -> ArrayImages:
    zeros, ones = (0.0,) * images.shape[2], (1.0,) * images.shape[2]
    views = features.Views(size, zeros, ones, scale=SCALE, ratio=RATIO, hflip=0.0)
    return ArrayImages(images, views, device)
