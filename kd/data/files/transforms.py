"""Turn images into a network's input with timm's transforms, seeded for each image.

timm's transforms draw from three global generators, Python's, NumPy's and torch's. `temporary_seed`
sets all three for one image and restores them, so that a view is a function of its seeds only.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dsdistill.harness.errors import UserError

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Views:
    """The views of an image for training and evaluation, with timm's names and meanings.

    Attributes:
        size: Height and width.
        mean, std: One value per channel, for images in [0, 1]; with one channel, images are
            grayscale.
        interpolation: Interpolation in evaluation: bilinear, bicubic and so on.
        train_interpolation: Interpolation in training; `random` draws bilinear or bicubic.
        scale: Smallest and largest share of the image's area in a random crop.
        ratio: Smallest and largest width over height of a random crop.
        hflip: Probability of a horizontal flip.
        color_jitter: Strength of changes of brightness, contrast and saturation; timm turns it off
            where `auto_augment` is set.
        auto_augment: Policy, such as `rand-m7-mstd0.5`.
        random_erase: Probability that a rectangle is erased.
        erase_mode: Content of the rectangle: `pixel` (noise), `rand` (colour) or `const` (mean).
        crop_pct: Side of the central crop as a share of the resized image, in evaluation: 224
            pixels are cut from a shorter side of 256.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    train_interpolation: str = "random"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: float | None = None
    auto_augment: str | None = None
    random_erase: float = 0.0
    erase_mode: str = "pixel"
    crop_pct: float = 0.875

    @property
    def mode(self) -> str:
        """Pillow's mode of the images."""
        return "L" if len(self.mean) == 1 else "RGB"

    def transform(self, training: bool) -> Transform:
        """Build timm's transform of one image, for training or for evaluation.

        It returns uint8, a quarter of the bytes between processes, which `finish` normalises; with
        random erasing, which follows normalisation, it returns normalised float32.

        Raises:
            UserError: If timm knows no such augmentation or interpolation.
        """
        from timm.data.transforms_factory import create_transform

        erase = self.random_erase if training else 0.0
        try:
            transform: Any = create_transform(
                self.size,
                is_training=training,
                use_prefetcher=erase == 0,
                mean=self.mean,
                std=self.std,
                interpolation=self.train_interpolation if training else self.interpolation,
                scale=self.scale,
                ratio=self.ratio,
                hflip=self.hflip,
                color_jitter=self.color_jitter,  # pyright: ignore[reportArgumentType]
                auto_augment=self.auto_augment,
                re_prob=erase,
                re_mode=self.erase_mode,
                crop_pct=self.crop_pct,
            )
            return transform
        except (AssertionError, KeyError, ValueError) as error:
            raise UserError(
                f"timm cannot make this augmentation ({error or 'unknown name'}): "
                f"--auto-augment {self.auto_augment}, --interpolation {self.train_interpolation}, "
                f"{self.interpolation} in evaluation"
            ) from error

    def finish(self, images: Tensor) -> Float[Tensor, "n c h w"]:
        """Normalise a batch of images from `transform`, on its device."""
        if images.dtype != torch.uint8:
            return images
        moments = torch.tensor([self.mean, self.std], device=images.device)
        mean, std = moments[:, :, None, None]  # each (c, 1, 1)
        return images.float().div_(255).sub_(mean).div_(std)


@contextmanager
def temporary_seed(*numbers: int) -> Iterator[None]:
    """Seed the global generators inside the block, and restore them afterwards."""
    with preserve_generators():
        seed_generators(*numbers)
        yield


@contextmanager
def preserve_generators() -> Iterator[None]:
    """Restore Python's, NumPy's and torch's CPU generators after the block; takes 0.1 ms."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def seed_generators(*numbers: int) -> None:
    """Seed the three generators independently from these numbers.

    `torch.manual_seed` would seed a GPU too, so it is not used.
    """
    words = np.random.SeedSequence(numbers).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) >> 32)  # noqa: NPY002
    torch.default_generator.manual_seed(int(words[2]) >> 1)
