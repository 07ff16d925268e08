"""Compose images of the best random crops, as RDED does, from the scores of the crops.

Of each image the crop with the lowest cross-entropy is kept, of each class the 4 N best of these,
and four of them make one image, 2 x 2: the best four the first, and so on.

Source: Sun et al. (2024), "On the diversity and realism of distilled dataset", RDED,
arXiv:2312.03526; the order of the four in a mosaic is that of the scores.
"""

import numpy as np
from jaxtyping import Float, Int

from dsdistill.harness.data.labeled_images import LabeledImages, draw_balanced
from dsdistill.harness.errors import UserError
from dsdistill.harness.text import quote

TILES = 4  # crops in an image
PUBLISHED_CANDIDATES = 300  # images of each class whose crops are scored
PUBLISHED_CROPS = 5  # of each image


def draw_candidates(
    train: LabeledImages, images_per_class: int, count: int | None, seed: int
) -> Int[np.ndarray, " n"]:
    """Draw the images whose crops are scored; their positions, in class order.

    Args:
        train: All training images.
        images_per_class: Number of images to be composed of each class.
        count: Images of each class; None: as published, or as many as are needed. A class with
            fewer contributes all of them.
        seed: Seed of the draw.

    Raises:
        UserError: If a class has fewer images than crops are needed.
    """
    needed, k = TILES * images_per_class, len(train.classes)
    counts = np.bincount(train.labels, minlength=k)
    scarce = int(counts.argmin())
    if counts[scarce] < needed:
        raise UserError(
            f"{images_per_class} images per class are made of the crops of {needed} images, and "
            f"class {quote(train.classes[scarce])} has {counts[scarce]} training images: lower "
            "--images-per-class"
        )
    if count is not None and count < needed:
        raise UserError(
            f"{images_per_class} images per class are made of the crops of {needed} images: raise "
            f"--candidates, got {count}"
        )
    per_class = max(PUBLISHED_CANDIDATES, needed) if count is None else count
    return draw_balanced(train.labels, per_class * k, np.random.default_rng([seed, 3]))


def choose(
    losses: Float[np.ndarray, "m n"], labels: Int[np.ndarray, " n"], images_per_class: int
) -> tuple[Int[np.ndarray, " t"], Int[np.ndarray, " t"]]:
    """Choose the crops to compose images of.

    Args:
        losses: Cross-entropy of m crops of each of n images.
        labels: Class of each image.
        images_per_class: Number of images to be composed of each class.

    Returns:
        Image and crop number of each tile, in class order, the best first.
    """
    crop, needed = losses.argmin(0), TILES * images_per_class
    best = losses.min(0)
    members = (np.flatnonzero(labels == label) for label in range(int(labels.max()) + 1))
    chosen = np.concatenate([m[np.argsort(best[m], kind="stable")[:needed]] for m in members])
    return chosen, crop[chosen]


def compose(tiles: Float[np.ndarray, "t h w c"]) -> Float[np.ndarray, "n H W c"]:
    """Compose each four tiles in a row to one image: two above, two below."""
    t, h, w, c = tiles.shape
    grid = tiles.reshape(t // TILES, 2, 2, h, w, c).swapaxes(2, 3)
    return grid.reshape(t // TILES, 2 * h, 2 * w, c)


def cross_entropy(
    logits: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Cross-entropy of each row, in nats.

    Args:
        logits: Unnormalised log-probabilities.
        labels: Class of each row.
    """
    z = logits - logits.max(1, keepdims=True)
    return np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels]
