"""Weights of classes, by which the cross-entropy of rare ones counts more.

The weights are scaled so that their mean over the training labels is 1, and a batch's loss is the
sum of its weighted terms divided by the number of its images. So batches, accumulation and several
processes make no difference, and a learning rate found without weights stays a good one. torch's
`weight=` divides by the sum of the weights in the batch instead, which favours images that happen
to share a batch with frequent classes; over all training images the two are the same.

Where an image has any number of labels, a weight is that of the images that have the label, as
torch's `pos_weight`, and is not scaled.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int

from dsdistill.harness import checksums
from dsdistill.harness.errors import UserError
from dsdistill.harness.text import quote
from kd.data import class_table
from kd.numbers import parse

OPTION = "--class-weights"
BALANCED = "balanced"


@dataclass(frozen=True, eq=False)
class ClassWeights:
    """The weight of each class in the cross-entropy of labels.

    Attributes:
        classes: Class names, in label order.
        values: Positive weights whose mean over the training labels is 1; of several labels an
            image those of the images that have the label.
        of_positives: Whether an image has any number of labels.
    """

    classes: tuple[str, ...]
    values: Float[np.ndarray, " k"]
    of_positives: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 of names and weights."""
        return checksums.json_digest(self.by_name)

    @property
    def by_name(self) -> dict[str, float]:
        """The weights by the names of their classes."""
        return dict(zip(self.classes, self.values.tolist(), strict=True))

    def tensor(self, device: torch.device) -> Float[torch.Tensor, " k"]:
        """The weights as float32 on a device."""
        return torch.tensor(self.values, dtype=torch.float32, device=device)

    def describe(self) -> str:
        """One line for people: the smallest and the largest weight."""
        least, most = int(self.values.argmin()), int(self.values.argmax())
        meant = "of the images that have the label"
        if not self.of_positives:
            meant = "their mean over the training labels is 1"
        return (
            f"class weights from {self.values[least]:.3g} ({quote(self.classes[least])}) to "
            f"{self.values[most]:.3g} ({quote(self.classes[most])}), {meant}"
        )


def make(
    text: str, classes: Sequence[str], labels: Int[np.ndarray, " n"] | Int[np.ndarray, "n k"]
) -> ClassWeights:
    """Make the weights that `--class-weights` asks for.

    Args:
        text: `balanced`, or a file for `class_table.read`.
        classes: Class names, in label order.
        labels: Class of each training image or text, or of each tagged word; or any number of
            labels of each image, 0 or 1 for each class.

    Raises:
        UserError: If a class has no label to count, or the file cannot be used.
    """
    several = labels.ndim == 2
    counts = labels.sum(0) if several else np.bincount(labels, minlength=len(classes))
    counts = counts.astype(np.float64)
    if text == BALANCED and not Path(text).exists():
        values = balanced(counts, classes)
        if several:
            values = _balanced_positives(counts, classes, len(labels))
    else:
        path = Path(text).expanduser()
        stored = class_table.read(path, OPTION, "weight")
        given = class_table.align(stored, classes, OPTION, path)
        pairs = zip(classes, given, strict=True)
        values = np.array([_positive(path, name, value) for name, value in pairs])
    if several:
        return ClassWeights(tuple(classes), values, of_positives=True)
    return ClassWeights(tuple(classes), values * counts.sum() / (values @ counts))


def figures(weights: ClassWeights | None) -> dict[str, dict[str, float]]:
    """The weights for a report; empty without any."""
    return {} if weights is None else {"class_weights": weights.by_name}


def balanced(counts: Float[np.ndarray, " k"], classes: Sequence[str]) -> Float[np.ndarray, " k"]:
    """n / (k n_c) for a class of n_c of n labels: every class counts as much as any other.

    Raises:
        UserError: If a class has no label.

    Source: King and Zeng (2001), "Logistic regression in rare events data"; as scikit-learn's
    `compute_class_weight`.
    """
    if not counts.all():
        empty = classes[int(counts.argmin())]
        raise UserError(
            f"{OPTION} {BALANCED} divides by how often a class occurs, and class {quote(empty)} "
            f"has no training label: give a file of weights, {OPTION} FILE"
        )
    return counts.sum() / (len(counts) * counts)


def _balanced_positives(
    counts: Float[np.ndarray, " k"], classes: Sequence[str], images: int
) -> Float[np.ndarray, " k"]:
    """(n - n_c) / n_c for a label of n_c of n images: those with it count as much as those without.

    Raises:
        UserError: If every image has a label.
    """
    if (counts == images).any():
        name = classes[int(counts.argmax())]
        raise UserError(
            f"{OPTION} {BALANCED} compares images with a label and without, and every training "
            f"image has {quote(name)}: give a file of weights, {OPTION} FILE"
        )
    return (images - counts) / counts


def _positive(path: Path, name: str, value: object) -> float:
    """A weight of the file as a number."""
    try:
        number = parse(value) if isinstance(value, str) else float(value)  # pyright: ignore
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise UserError(
            f"{OPTION} {path} gives class {quote(name)} the weight {value!r}: it must be a "
            "positive number"
        )
    return number
