"""Augment batches on the device: shifts and flips, SpecAugment, mixup and CutMix.

Each function takes a batch and the batch's seed, so that the same batch of the same epoch is always
changed in the same way: a killed training resumes bit for bit, and a teacher's logits can be kept.
Where teachers have images of their own, these are changed alike, in proportion to their size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt64
from torch import Tensor

from kd.data.batching import Batch, BatchSource, ChangedBatches
from kd.recipe import Recipe

Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def augment_batches(
    source: BatchSource,
    recipe: Recipe,
    classes: int,
    silence: Sequence[Float[Tensor, "c h w"]] = (),
) -> BatchSource:
    """Add the recipe's augmentations to a source of batches.

    Args:
        source: Source of batches; streamed images have been cropped already.
        recipe: Recipe; `augment` of `crop-flip` and `specaugment`, mixup and CutMix are applied.
        classes: Number of classes.
        silence: Image of a silent recording, which `specaugment` needs, and the teachers' one where
            they have images of their own.
    """
    if recipe.augment == "crop-flip":
        options = {"padding": recipe.crop_padding, "hflip": recipe.hflip}
        source = ChangedBatches(source, partial(crop_flip, **options))
    if recipe.augment == "specaugment":
        assert silence
        change = partial(
            specaugment,
            shift=recipe.time_shift,
            bands=recipe.hide_bands,
            time=recipe.hide_time,
            silence=silence,
        )
        source = ChangedBatches(source, change)
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
    draws = row_uniforms(batch.index.cpu().numpy(), seed)
    top, left = (np.floor(draws[:, i] * (2 * padding + 1)).astype(np.int64) for i in (0, 1))
    flipped, others = draws[:, 2:] < hflip, batch.teacher_images
    images = _shift_flip(batch.images, top, left, flipped, (padding, padding))
    if others is None:
        return batch.with_images(images, None)
    up, across = (a / b for a, b in zip(others.shape[-2:], images.shape[-2:], strict=True))
    theirs = round(padding * up), round(padding * across)
    # From the middle, so that no shift stays no shift.
    down = theirs[0] + np.rint((top - padding) * up).astype(np.int64)
    right = theirs[1] + np.rint((left - padding) * across).astype(np.int64)
    return batch.with_images(images, _shift_flip(others, down, right, flipped, theirs))


def _shift_flip(
    images: Float[Tensor, "n c h w"],
    top: Int[np.ndarray, " n"],
    left: Int[np.ndarray, " n"],
    flipped: Bool[np.ndarray, "n 1"],
    padding: tuple[int, int],
) -> Float[Tensor, "n c h w"]:
    """Pad images with zeros, cut their size out again from `top` and `left` on, and flip some."""
    h, w = images.shape[-2:]
    x = left[:, None] + np.arange(w)
    x = np.where(flipped, x[:, ::-1], x)
    y = top[:, None] + np.arange(h)
    padded = F.pad(images, [padding[1]] * 2 + [padding[0]] * 2)
    number = np.arange(len(images))[:, None, None]
    indices = (number, y[:, :, None], x[:, None])
    arrays = [torch.from_numpy(np.ascontiguousarray(a)) for a in indices]
    n, rows, columns = (a.to(padded.device) for a in arrays)
    shifted = padded[n, :, rows, columns]  # (n, h, w, c)
    return shifted.permute(0, 3, 1, 2).contiguous()


def specaugment(
    batch: Batch,
    seed: int,
    *,
    shift: float,
    bands: float,
    time: float,
    silence: Sequence[Float[Tensor, "c h w"]],
) -> Batch:
    """Shift each recording's image in time, then hide some adjacent bands and some adjacent frames.

    What is hidden becomes 0, the mean of standardised images. Widths are uniform from 0 to their
    largest, places uniform among those where the width fits. The draws for an image depend only on
    the seed and on its row, as those of `crop_flip`.

    Args:
        batch: Batch of n images with known rows.
        seed: Seed of the batch.
        shift: Largest shift in either direction, as a share of the width.
        bands: Largest share of the height that is hidden.
        time: Largest share of the width that is hidden.
        silence: Image of a silent recording, which fills what a shift leaves empty; another one
            for the teachers' images, where they have their own.

    Source: Park et al. (2019), arXiv:1904.08779, with one mask of each kind, widths as shares, and
    a shift in place of the time warp, which they find to matter least.
    """
    assert batch.index is not None
    draws = row_uniforms(batch.index.cpu().numpy(), seed, draws=5)
    images, others = batch.images, batch.teacher_images
    images = _specaugment(images, draws, shift, bands, time, silence[0])
    if others is not None:
        others = _specaugment(others, draws, shift, bands, time, silence[1])
    return batch.with_images(images, others)


def _specaugment(
    images: Float[Tensor, "n c h w"],
    draws: Float[np.ndarray, "n 5"],
    shift: float,
    bands: float,
    time: float,
    silence: Float[Tensor, "c h w"],
) -> Float[Tensor, "n c h w"]:
    """Change images by their draws: of the shift, and of width and start of both masks."""
    _, h, w = images.shape[1:]
    largest = round(shift * w)
    source = np.arange(w) + np.floor(draws[:, :1] * (2 * largest + 1)).astype(np.int64) - largest
    hidden_bands = _hidden_range(draws[:, 1:3], round(bands * h), h)[:, None, :, None]
    hidden_time = _hidden_range(draws[:, 3:5], round(time * w), w)[:, None, None, :]
    device = images.device
    inside = torch.from_numpy((source >= 0) & (source < w)).to(device)[:, None, None, :]
    columns = torch.from_numpy(source.clip(0, w - 1)).to(device)[:, None, None, :]
    shifted = images.gather(3, columns.expand_as(images))  # (n, c, h, w)
    shifted = torch.where(inside, shifted, silence.to(device))
    hidden = torch.from_numpy(hidden_bands | hidden_time).to(device)
    return shifted.masked_fill(hidden, 0.0)


def _hidden_range(
    draws: Float[np.ndarray, "n 2"], largest: int, length: int
) -> Bool[np.ndarray, "n length"]:
    """Which of `length` positions are in a range of a drawn width and a drawn start."""
    width = np.floor(draws[:, :1] * (largest + 1))
    start = np.floor(draws[:, 1:] * (length - width + 1))
    positions = np.arange(length)
    return (positions >= start) & (positions < start + width)


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
    once = torch.arange(n, device=twice.device)
    once[n // 2 + 1 :] += n % 2

    def mix(images: Tensor) -> tuple[Tensor, Tensor]:
        with temporary_numpy_seed(seed):  # every time the same draws
            mixed, shares = mixer(images[twice], batch.labels[twice])
        return (mixed[once], shares[once]) if n % 2 else (mixed, shares)

    images, shares = mix(batch.images)
    others = batch.teacher_images
    mixed = batch.with_images(images, None if others is None else mix(others)[0])
    return replace(mixed, class_shares=shares)


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
