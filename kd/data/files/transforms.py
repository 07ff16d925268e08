"""How image files become a network's input: timm's transforms, each image with seeds of its own.

timm's transforms draw from three global generators, Python's, NumPy's and torch's. `temporary_seed` sets
all three for one image and puts them back, so that a view is a function of its numbers alone.
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
    """How images become a network's input, in timm's names and with its meaning.

    Attributes:
        size: Height and width.
        mean, std: One value a channel, of images in [0, 1]; one channel alone makes them grey.
        interpolation: In evaluation: bilinear, bicubic and so on.
        train_interpolation: The same in training; `random` draws bilinear or bicubic.
        scale: Smallest and largest share of the image's area in a random crop.
        ratio: Smallest and largest width over height of a random crop.
        hflip: Probability of a horizontal flip.
        color_jitter: Strength, of brightness, contrast and saturation; timm turns it off where
            `auto_augment` is given.
        auto_augment: Such as `rand-m7-mstd0.5`.
        random_erase: Probability that a rectangle is erased.
        erase_mode: What takes its place: `pixel` (noise), `rand` (one colour) or `const` (mean).
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
        """Pillow's name for the kind of images."""
        return "L" if len(self.mean) == 1 else "RGB"

    def transform(self, training: bool) -> Transform:
        """timm's transform of one image, for training or for evaluation.

        It gives uint8, a quarter of the bytes between processes, which `finish` normalises; except
        where parts are erased, which is done after normalisation.

        Raises:
            UserError: If timm knows no such augmentation or interpolation.
        """
        from timm.data.transforms_factory import create_transform

        erase = self.random_erase if training else 0.0
        try:
            made: Any = create_transform(
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
            return made
        except (AssertionError, KeyError, ValueError) as error:
            raise UserError(
                f"timm cannot make this augmentation ({error or 'unknown name'}): "
                f"--auto-augment {self.auto_augment}, --interpolation {self.train_interpolation}, "
                f"{self.interpolation} in evaluation"
            ) from error

    def finish(self, images: Tensor) -> Float[Tensor, "n c h w"]:
        """Normalised images, of what `transform` gave; on their device."""
        if images.dtype != torch.uint8:
            return images
        moments = torch.tensor([self.mean, self.std], device=images.device)
        mean, std = moments[:, :, None, None]  # each (c, 1, 1)
        return images.float().div_(255).sub_(mean).div_(std)


@contextmanager
def temporary_seed(*numbers: int) -> Iterator[None]:
    """Global generators as `seed_generators` sets them inside, and as they were afterwards."""
    with preserve_generators():
        seed_generators(*numbers)
        yield


@contextmanager
def preserve_generators() -> Iterator[None]:
    """Python's, NumPy's and torch's CPU generators are put back at the end; it takes 0.1 ms."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def seed_generators(*numbers: int) -> None:
    """Start the three generators from these numbers, each apart from the others.

    Not `torch.manual_seed`, which would seed a GPU too.
    """
    words = np.random.SeedSequence(numbers).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) >> 32)  # noqa: NPY002
    torch.default_generator.manual_seed(int(words[2]) >> 1)
