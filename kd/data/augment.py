"""Changes of training images on the device: shifts and flips, mixup and CutMix.

Each takes a batch and a seed of its own, so that the same batch of the same epoch is always changed
in the same way: a killed training goes on bit for bit, and a teacher's answers can be kept.
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
    """The source with what the recipe does to batches.

    Args:
        source: Of whole images; those that are streamed have been cropped already.
        recipe: Its `augment` of `crop-flip`, its mixup and CutMix.
        classes: Their number.
    """
    if recipe.augment == "crop-flip":
        options = {"padding": recipe.crop_padding, "hflip": recipe.hflip}
        source = ChangedBatches(source, partial(crop_flip, **options))
    if recipe.mixup or recipe.cutmix:
        source = ChangedBatches(source, partial(mix_images, mixer=_timm_mixup(recipe, classes)))
    return source


def crop_flip(batch: Batch, seed: int, *, padding: int, hflip: float) -> Batch:
    """Each image shifted by up to `padding` pixels, zeros moving in, and flipped at random.

    What is drawn for an image depends on the seed and on its row alone: processes that share a
    batch draw what one process would.
    """
    assert batch.index is not None
    h, w = batch.images.shape[-2:]
    draws = row_uniforms(batch.index.cpu().numpy(), seed)
    top, left = (np.floor(draws[:, i] * (2 * padding + 1)).astype(np.int64) for i in (0, 1))
    x = left[:, None] + np.arange(w)
    x = np.where(draws[:, 2:] < hflip, x[:, ::-1], x)
    y = top[:, None] + np.arange(h)
    padded = F.pad(batch.images, [padding] * 4)
    each = np.arange(len(batch))[:, None, None]
    where = [torch.from_numpy(np.ascontiguousarray(a)) for a in (each, y[:, :, None], x[:, None])]
    n, rows, columns = (a.to(padded.device) for a in where)
    moved = padded[n, :, rows, columns]  # (n, h, w, c)
    return replace(batch, images=moved.permute(0, 3, 1, 2).contiguous())


def mix_images(batch: Batch, seed: int, *, mixer: Mixer) -> Batch:
    """Mixup or CutMix of each image with the one at the same place from the other end.

    Of an odd number, such as an epoch's last batch may have, the image in the middle stays.

    Source: Zhang et al. (2018), arXiv:1710.09412; Yun et al. (2019), arXiv:1905.04899. It is
    timm's implementation, which takes even numbers, changes its input and draws from NumPy's
    global generator: it gets a copy, the middle image twice, and a generator of the batch's own.
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
    return replace(batch, images=images, shares=shares)


@contextmanager
def temporary_numpy_seed(seed: int) -> Iterator[None]:
    """NumPy's global generator from a seed inside, and as it was afterwards."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed % (1 << 32))  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


def row_uniforms(rows: np.ndarray, seed: int, draws: int = 3) -> Float[np.ndarray, "n draws"]:
    """Numbers in [0, 1) that are a function of (seed, row) alone.

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
        label_smoothing=0.0,  # the term `ce` smooths whole and mixed labels alike
        num_classes=classes,
    )
