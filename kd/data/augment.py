"""Augment batches on the device: shifts and flips, mixup and CutMix.

Each function takes a batch and the batch's seed, so that the same batch of the same epoch is always
changed in the same way: a killed training resumes bit for bit, and a teacher's logits can be kept.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt64
from torch import Tensor

from kd.data.batching import Batch, BatchSource, ChangedBatches
from kd.recipe import Recipe

Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def augment_batches(source: BatchSource, recipe: Recipe, classes: int) -> BatchSource:
    """Add the recipe's augmentations to a source of batches.

    Args:
        source: Source of batches; streamed images have been cropped already.
        recipe: Recipe; `augment` of `crop-flip`, mixup and CutMix are applied.
        classes: Number of classes.
    """
    if recipe.augment == "crop-flip":
        options = {"padding": recipe.crop_padding, "hflip": recipe.hflip}
        source = ChangedBatches(source, partial(crop_flip, **options))
    if recipe.mixup or recipe.cutmix:
        source = ChangedBatches(source, partial(mix_images, mixer=_timm_mixup(recipe, classes)))
    return source


def crop_flip(batch: Batch, seed: int, *, padding: int, hflip: float) -> Batch:
    """Shift each image by up to `padding` pixels, filled with zeros, and flip it at random.

    The draws for an image depend only on the seed and on its row: processes that share a batch
    draw what one process would.

    Args:
        batch: Batch with known rows.
        seed: Seed of the batch.
        padding: Largest shift in pixels.
        hflip: Probability of a flip.
    """
    assert batch.index is not None
    h, w = batch.images.shape[-2:]
    draws = row_uniforms(batch.index.cpu().numpy(), seed)
    top, left = (np.floor(draws[:, i] * (2 * padding + 1)).astype(np.int64) for i in (0, 1))
    x = left[:, None] + np.arange(w)
    x = np.where(draws[:, 2:] < hflip, x[:, ::-1], x)
    y = top[:, None] + np.arange(h)
    padded = F.pad(batch.images, [padding] * 4)
    number = np.arange(len(batch))[:, None, None]
    indices = (number, y[:, :, None], x[:, None])
    arrays = [torch.from_numpy(np.ascontiguousarray(a)) for a in indices]
    n, rows, columns = (a.to(padded.device) for a in arrays)
    shifted = padded[n, :, rows, columns]  # (n, h, w, c)
    return replace(batch, inputs=shifted.permute(0, 3, 1, 2).contiguous())


def mix_images(batch: Batch, seed: int, *, mixer: Mixer) -> Batch:
    """Apply mixup or CutMix to image i and image n - 1 - i of a batch.

    In a batch of odd size, such as an epoch's last may have, the middle image stays.

    Args:
        batch: Batch of n images.
        seed: Seed of the batch.
        mixer: timm's mixup: images and labels to mixed images and class shares.

    Source: Zhang et al. (2018), arXiv:1710.09412; Yun et al. (2019), arXiv:1905.04899. timm's
    implementation takes even numbers, changes its input and draws from NumPy's global generator:
    it gets a copy, the middle image twice, and a generator seeded for the batch.
    """
    n = len(batch)
    twice = torch.arange(n + n % 2, device=batch.images.device)
    if n % 2:
        twice[n // 2 + 1 :] -= 1
    with temporary_numpy_seed(seed):
        images, shares = mixer(batch.images[twice], batch.labels[twice])
    if n % 2:
        once = torch.arange(n, device=twice.device)
        once[n // 2 + 1 :] += 1
        images, shares = images[once], shares[once]
    return replace(batch, inputs=images, class_shares=shares)


@contextmanager
def temporary_numpy_seed(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator inside the block, and restore it afterwards."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed % (1 << 32))  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


def row_uniforms(rows: np.ndarray, seed: int, draws: int = 3) -> Float[np.ndarray, "n draws"]:
    """Numbers in [0, 1) that are a function of (seed, row) only.

    Source: SplitMix64, Steele, Lea and Flood (2014), "Fast splittable pseudorandom number
    generators".
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):  # arithmetic is modulo 2^64
        start = _splitmix64(rows.astype(np.uint64) * golden + np.uint64(seed))[:, None]
        bits = _splitmix64(start + golden * np.arange(1, draws + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)) * 2.0**-53


def _splitmix64(z: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _timm_mixup(recipe: Recipe, classes: int) -> Mixer:
    from timm.data.mixup import Mixup  # slow to import, and seldom needed

    return Mixup(
        recipe.mixup,
        recipe.cutmix,
        prob=recipe.mix_probability,
        switch_prob=recipe.mix_switch,
        label_smoothing=0.0,  # the term `ce` smooths both whole and mixed labels
        num_classes=classes,
    )
