"""Targets of KIP: class-balanced batches of training images, a function of seed and step."""

import numpy as np

from dsdistill.harness import memory
from dsdistill.harness.data.labeled_images import Examples, LabeledImages

MAX_MEMORY_SHARE = 0.25  # of the free memory, for preprocessed images


def load_into_memory(examples: Examples) -> Examples:
    """Preprocess all examples at once if they fit into `MAX_MEMORY_SHARE`; else return them."""
    h, w, c = examples.data.shape
    if (
        examples.is_preprocessed
        or 4 * len(examples) * h * w * c > MAX_MEMORY_SHARE * memory.available()
    ):
        return examples
    images = np.empty((len(examples), h, w, c), np.float32)
    for start in range(0, len(images), 4096):
        rows = slice(start, start + 4096)
        images[rows] = examples.images(rows)
    data = LabeledImages(images, examples.data.labels, examples.data.classes)
    return Examples(data, examples.preprocess, examples.targets, is_preprocessed=True)


class TargetBatches:
    """Class-balanced batches of targets.

    Args:
        train: Images to draw from.
        size: Number of targets per step, rounded down to a multiple of the number of classes; at
            least one per class.
        seed: Seed of all draws.
        raw: Whether images are drawn as they are, to be preprocessed later.

    Attributes:
        size: Number of targets per step. A class with fewer images than its share gives all of
            them.
    """

    def __init__(self, train: Examples, size: int, seed: int, *, raw: bool = False) -> None:
        labels = train.data.labels
        share = max(size // len(train.data.classes), 1)
        self._members = [np.flatnonzero(labels == c) for c in range(len(train.data.classes))]
        self._share = [min(share, len(members)) for members in self._members]
        self._train, self._seed, self._raw = train, seed, raw
        self.size = sum(self._share)

    def draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw images and labels of one step, without replacement within the step."""
        rng = np.random.default_rng([self._seed, 1, step])
        drawn = (
            rng.choice(m, s, replace=False) for m, s in zip(self._members, self._share, strict=True)
        )
        rows = np.concatenate(list(drawn))
        images = self._train.data.images(rows) if self._raw else self._train.images(rows)
        return images, self._train.labels(rows)
