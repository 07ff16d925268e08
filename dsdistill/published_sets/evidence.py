"""What the numbers of a published set prove about its pixels, beside the real images.

Proof is an exact fit alone. Images that were cut off at [0, 1] before they were standardised touch
both ends of that range in every channel once the right constants are undone; pictures of 8 bits
then lie on multiples of 1/255. Distilled pixels that were never cut off fit nothing exactly, and
neither do whitened ones: such a set does not say what it is.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from dsdistill.harness.data.labeled_images import LabeledImages, draw_balanced
from dsdistill.harness.data.preprocess import Preprocess, unit_range
from dsdistill.harness.text import abbreviate_names

MeanAndStd = tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]

# By which an end of [0, 1] may be missed: half precision, and rounded constants.
RANGE_TOLERANCE = 2e-3
LEVEL_TOLERANCE = 0.05  # of a level of 8 bits, by which multiples of 1/255 may be missed
# Factor between the contrasts of two sets of the same data, which no set reaches.
MAX_CONTRAST_RATIO = 5.0
# Steps across the middle of an image, relative to those beside it, that prove tiles.
MIN_SEAM_RATIO = 2.0
LIKE, UNLIKE = 0.6, 0.5  # correlations with the mean real image of what it is, and of what not
MIN_IMAGES_PER_CLASS = 5  # images a class, from which the order of classes is told
MOST, GAP = 0.5, 0.3  # share that fits in another order, and by how much more than as labelled
SAMPLE = 1000  # real images that are compared with


def match_constants(
    images: Float[np.ndarray, "n h w c"], constants: Mapping[str, MeanAndStd]
) -> tuple[str | None, float]:
    """The name of the constants by which images in [0, 1] were standardised, if one is proven.

    Args:
        images: Standardised somehow.
        constants: Mean and deviation by name, one value a channel. Names whose constants fit
            equally well within the tolerance are decided by the smaller misfit.

    Returns:
        The name, or None where none fits; the misfit of the best.
    """
    misfits = {name: _misfit(images, *pair) for name, pair in constants.items()}
    best = min(misfits, key=misfits.__getitem__)
    return (best if misfits[best] <= RANGE_TOLERANCE else None), misfits[best]


def _misfit(
    images: Float[np.ndarray, "n h w c"],
    mean: Float[np.ndarray, " c"],
    std: Float[np.ndarray, " c"],
) -> float:
    """How far the images are from filling [0, 1] in every channel, or from 8 bits inside it."""
    pixels = images * std + mean
    low, high = pixels.min((0, 1, 2)), pixels.max((0, 1, 2))
    if (low < -RANGE_TOLERANCE).any() or (high > 1 + RANGE_TOLERANCE).any():
        return float(max(-low.min(), high.max() - 1))
    touch = float(max(np.abs(low).max(), np.abs(high - 1).max()))
    levels = pixels * 255
    off = float(np.abs(levels - np.rint(levels)).max()) / LEVEL_TOLERANCE * RANGE_TOLERANCE
    return min(touch, off)


def contrast(images: Float[np.ndarray, "n h w c"], train: LabeledImages) -> float:
    """Deviation of pixels in [0, 1] relative to that of real images."""
    return float(images.std() / max(_sample(train).std(), 1e-6))


def find_tiles(images: Float[np.ndarray, "n h w c"], train: LabeledImages) -> str | None:
    """Why images seem to consist of 2 x 2 tiles, or None.

    Tiles of real-looking images meet in a step that is larger than those beside it; tiles of
    images with an empty border show in the mean image.

    Args:
        images: Not whitened, in any range.
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
    if whole < UNLIKE and part > LIKE:
        return f"every quarter resembles the mean real image ({part:.2f}), the whole {whole:.2f}"
    return None


def find_other_order(
    images: Float[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, " n"],
    train: LabeledImages,
    fitted: Preprocess,
) -> str | None:
    """Which real classes the images of each class look like, where those are others; or None.

    Images are told by the mean real image that they resemble most. Said only where that names a
    permutation under which most images are right, while as labelled few are, and of five images
    a class or more: fewer agree with some permutation by chance.

    Args:
        images: As a model sees them.
        labels: Their classes.
        train: Real images.
        fitted: How a model sees those.
    """
    from scipy.optimize import linear_sum_assignment

    k = len(train.classes)
    if len(images) < MIN_IMAGES_PER_CLASS * k:
        return None
    rows = np.sort(draw_balanced(train.labels, SAMPLE, np.random.default_rng(0)))
    real, known = fitted.apply(train.images(rows)).reshape(len(rows), -1), train.labels[rows]
    means = np.stack([real[known == label].mean(0) for label in range(k)])
    means -= means.mean(0)
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    told = (images.reshape(len(images), -1) @ means.T).argmax(1)
    counts = np.zeros((k, k), np.int64)
    np.add.at(counts, (labels, told), 1)
    _, order = linear_sum_assignment(-counts)
    as_is, permuted = (counts[range(k), column].sum() / len(images) for column in (range(k), order))
    if permuted < MOST or as_is > permuted - GAP:
        return None
    moved = [label for label in range(k) if order[label] != label]
    pairs = [f"{train.classes[label]!r} like {train.classes[order[label]]!r}" for label in moved]
    return (
        f"the classes seem to be in another order than the data's: images labelled {abbreviate_names(pairs)} "
        f"({permuted:.0%} fit so, {as_is:.0%} as they are)"
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
    rows = np.sort(draw_balanced(train.labels, SAMPLE, np.random.default_rng(0)))
    return unit_range(train.images(rows))
