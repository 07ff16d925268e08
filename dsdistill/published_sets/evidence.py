"""Tell from the numbers of a published set, beside the real images, how its pixels were made.

Only an exact fit is proof. Images that were clipped to [0, 1] before they were standardised reach
both ends of that range in every channel once the right constants are undone; 8-bit images then lie
on multiples of 1/255. Distilled pixels that were never clipped fit nothing exactly, and neither do
whitened ones: such a set does not tell what it is.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from dsdistill.harness.data.labeled_images import LabeledImages, draw_balanced
from dsdistill.harness.data.preprocess import Preprocess, unit_range
from dsdistill.harness.text import abbreviate_names, quote

MeanAndStd = tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]

RANGE_TOLERANCE = 2e-3  # distance from an end of [0, 1]: half precision and rounded constants
LEVEL_TOLERANCE = 0.05  # distance from a multiple of 1/255, as a fraction of 1/255
MAX_CONTRAST_RATIO = 5.0  # between the contrasts of two sets of the same data
MIN_SEAM_RATIO = 2.0  # step across the middle of an image, relative to its neighbours, in tiles
MIN_LIKE_CORRELATION = 0.6  # of images with the mean real image that they resemble
MAX_UNLIKE_CORRELATION = 0.5  # of images with a mean real image that they do not resemble
MIN_IMAGES_PER_CLASS = 5  # with fewer the order of classes cannot be told
MIN_PERMUTED_SHARE = 0.5  # of images that fit another order of classes
MIN_PERMUTED_GAIN = 0.3  # of that share over the share that fits the order as labelled
SAMPLE = 1000  # real images for comparison


def match_constants(
    images: Float[np.ndarray, "n h w c"], constants: Mapping[str, MeanAndStd]
) -> tuple[str | None, float]:
    """Find the constants by which images in [0, 1] were standardised, if they are proven.

    Args:
        images: Images standardised by unknown constants.
        constants: Mean and deviation by name, one value per channel. If several fit within the
            tolerance, the smallest misfit decides.

    Returns:
        The name of the constants, or None if none fit; the smallest misfit.
    """
    misfits = {name: _misfit(images, *pair) for name, pair in constants.items()}
    best = min(misfits, key=misfits.__getitem__)
    return (best if misfits[best] <= RANGE_TOLERANCE else None), misfits[best]


def _misfit(
    images: Float[np.ndarray, "n h w c"],
    mean: Float[np.ndarray, " c"],
    std: Float[np.ndarray, " c"],
) -> float:
    """Distance of the images from filling [0, 1] in every channel, or from 8-bit levels in it."""
    pixels = images * std + mean
    low, high = pixels.min((0, 1, 2)), pixels.max((0, 1, 2))
    if (low < -RANGE_TOLERANCE).any() or (high > 1 + RANGE_TOLERANCE).any():
        return float(max(-low.min(), high.max() - 1))
    gap = float(max(np.abs(low).max(), np.abs(high - 1).max()))
    levels = pixels * 255
    level_error = float(np.abs(levels - np.rint(levels)).max()) / LEVEL_TOLERANCE * RANGE_TOLERANCE
    return min(gap, level_error)


def contrast(images: Float[np.ndarray, "n h w c"], train: LabeledImages) -> float:
    """Standard deviation of pixels in [0, 1], relative to that of real images."""
    return float(images.std() / max(_sample(train).std(), 1e-6))


def find_tiles(images: Float[np.ndarray, "n h w c"], train: LabeledImages) -> str | None:
    """The reason why images seem to consist of 2 x 2 tiles; None if they do not.

    Where tiles of real-looking images meet, the step is larger than its neighbours; tiles of images
    with an empty border show in the mean image.

    Args:
        images: Images that are not whitened, in any range.
        train: Real images.
    """
    _, h, w, _ = images.shape
    if h % 2 or w % 2 or min(h, w) < 8:
        return None
    ratio = min(_seam(images, 1), _seam(images, 2))
    if ratio >= MIN_SEAM_RATIO:
        return f"the step across the middle is {ratio:.1f} times those beside it"
    real = _sample(train).mean(0)
    whole = _correlation(images.mean(0), real)
    quarters = images.mean(0).reshape(2, h // 2, 2, w // 2, -1).transpose(0, 2, 1, 3, 4)
    small = real.reshape(h // 2, 2, w // 2, 2, -1).mean((1, 3))
    part = min(_correlation(quarter, small) for quarter in quarters.reshape(4, *small.shape))
    if whole < MAX_UNLIKE_CORRELATION and part > MIN_LIKE_CORRELATION:
        return f"every quarter resembles the mean real image ({part:.2f}), the whole {whole:.2f}"
    return None


def find_other_order(
    images: Float[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, " n"],
    train: LabeledImages,
    fitted: Preprocess,
) -> str | None:
    """Describe which real classes the images of each class look like, if others; else None.

    Images are classified by the mean real image that they resemble most. A permutation is reported
    only if most images are right under it and few as labelled, with at least
    `MIN_IMAGES_PER_CLASS` images per class: fewer agree with some permutation by chance.

    Args:
        images: Preprocessed images of the set.
        labels: Their class indices.
        train: Real images.
        fitted: The preprocessing of the set.
    """
    from scipy.optimize import linear_sum_assignment

    k = len(train.classes)
    if len(images) < MIN_IMAGES_PER_CLASS * k:
        return None
    rows = _sample_rows(train)
    real, known = fitted.apply(train.images(rows)).reshape(len(rows), -1), train.labels[rows]
    means = np.stack([real[known == label].mean(0) for label in range(k)])
    means -= means.mean(0)
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    predicted = (images.reshape(len(images), -1) @ means.T).argmax(1)
    counts = np.zeros((k, k), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    _, order = linear_sum_assignment(-counts)
    as_is, permuted = (counts[range(k), column].sum() / len(images) for column in (range(k), order))
    if permuted < MIN_PERMUTED_SHARE or as_is > permuted - MIN_PERMUTED_GAIN:
        return None
    moved = [label for label in range(k) if order[label] != label]
    pairs = [
        f"{quote(train.classes[label])} like {quote(train.classes[order[label]])}"
        for label in moved
    ]
    return (
        f"the classes seem to be in another order than the data's: images labelled "
        f"{abbreviate_names(pairs)} ({permuted:.0%} fit so, {as_is:.0%} as they are)"
    )


def _seam(images: Float[np.ndarray, "n h w c"], axis: int) -> float:
    """Mean step across the middle of an axis, relative to the two steps on either side of it."""
    steps = np.abs(np.diff(images, axis=axis)).mean((0, 3))
    steps = steps.mean(1 if axis == 1 else 0)
    middle = len(steps) // 2
    beside = steps[[middle - 2, middle - 1, middle + 1, middle + 2]]
    return float(steps[middle] / max(beside.max(), 1e-6))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel() - a.mean(), b.ravel() - b.mean()
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length else 0.0


def _sample(train: LabeledImages) -> Float[np.ndarray, "n h w c"]:
    return unit_range(train.images(_sample_rows(train)))


def _sample_rows(train: LabeledImages) -> Int[np.ndarray, " n"]:
    return np.sort(draw_balanced(train.labels, SAMPLE, np.random.default_rng(0)))
