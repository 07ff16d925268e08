"""Labels of a published set: what they are, and as rows in the project's encoding."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from dsdistill.harness.data.labeled_images import centred_one_hot
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import metrics
from dsdistill.harness.text import abbreviate_names
from dsdistill.published_sets.files import RawSet

# By which the sum of a row may be off: labels are often stored in half precision.
ROW_SUM_TOLERANCE = 5e-3
# By which the mean sum of learned rows may be off: Adam does not keep it at 0.
MAX_MEAN_ROW_SUM = 0.5
MAX_LEARNED_LABEL = 5.0  # rows that sum to 0 and reach farther may as well be logits

# What each kind of label may look like. Logits and learned labels may have any sum.
_COMPATIBLE_KINDS: Mapping[str, tuple[str, ...]] = {
    "index": ("index",),
    "one-hot": ("one-hot",),
    "probabilities": ("one-hot", "probabilities"),
    "centred": ("centred", "unclear"),
    "logits": ("centred", "unclear"),
}


def encode(
    path: Path, raw: RawSet, stated: str, classes: tuple[str, ...]
) -> tuple[str, Float[np.ndarray, "n k"], str]:
    """The kind of the labels, the labels as rows, and the order of classes that was taken.

    Args:
        path: Of the set, for messages.
        raw: Its arrays.
        stated: A key of the kinds above, or `auto`.
        classes: Of the data.

    Returns:
        The kind, and float32 rows: an integer label gives one-hot minus 1/k, probabilities and
        the softmax of logits lose 1/k, centred ones stay as they are, but FRePo's are scaled back.
        Rows are in the data's order of classes: those of a file that names its classes are matched
        by name, others are taken to have it.

    Raises:
        UserError: If they are of other classes, not of the stated kind, or of no clear kind.
    """
    if raw.classes is not None and sorted(raw.classes) != sorted(classes):
        raise UserError(
            f"{path} is of the classes {abbreviate_names(raw.classes)}, the data of {abbreviate_names(classes)}: --data "
            "must have the same ones"
        )
    labels = _rows(path, raw.labels, len(classes))
    seen = _detect_kind(labels)
    kind = next(name for name in (stated, raw.labels_as, seen) if name != "auto")
    if kind == "unclear":
        raise UserError(
            f"{path}: labels run from {labels.min():.3g} to {labels.max():.3g} and could be logits "
            "or learned: say --labels logits, or --labels centred"
        )
    if seen not in _COMPATIBLE_KINDS[kind]:
        remedy = "logits or --labels centred" if seen == "unclear" else seen
        raise UserError(f"{path}: labels do not look {kind}: say --labels {remedy}")
    if stated == "centred" and abs(mean := labels.sum(1).mean()) > MAX_MEAN_ROW_SUM:
        raise UserError(f"{path}: rows of labels sum to {mean:.3g}, centred ones to about 0")
    rows = _encode_kind(path, labels, kind, len(classes)).astype(np.float32)
    if raw.kind == "FRePo":  # which divides centred labels by this
        rows = rows * np.float32(math.sqrt(len(classes) / 10))
    if raw.kind == "folder":
        return kind, rows, "those of the folders"
    if raw.classes is None:
        return (
            kind,
            rows,
            f"not named, so in the data's order: 0 is {classes[0]!r}, 1 {classes[1]!r}",
        )
    order = [raw.classes.index(name) for name in classes]
    return kind, rows[:, order], "matched by name"


def imbalance_notes(labels: Int[np.ndarray, " n"], k: int) -> list[str]:
    """A note if the classes have different numbers of images."""
    counts = np.bincount(labels, minlength=k)
    few, many = int(counts.min()), int(counts.max())
    return [f"images per class are unequal: {few} to {many}"] if few < many else []


def _rows(path: Path, raw: np.ndarray, k: int) -> Float[np.ndarray, "n ..."]:
    """As float64, one number or one row of k an image."""
    labels = np.asarray(raw, np.float64)
    if labels.shape[1:] == (1,):
        labels = labels[:, 0]
    if labels.ndim > 2 or not np.isfinite(labels).all() or np.abs(labels).max() > 1e6:
        raise UserError(f"{path}: labels must be finite, one number or one row an image")
    if labels.ndim == 2 and labels.shape[1] != k:
        raise UserError(
            f"{path} has labels of {labels.shape[1]} classes, the data has {k}: check --data"
        )
    return labels


def _detect_kind(labels: Float[np.ndarray, "n ..."]) -> str:
    """What labels look like: a kind, or `unclear`."""
    if labels.ndim == 1:
        return "index"
    sums, largest = labels.sum(1), np.abs(labels).max(1)
    if np.isin(labels, (0, 1)).all() and (sums == 1).all():
        return "one-hot"
    if labels.min() >= 0 and np.abs(sums - 1).max() <= ROW_SUM_TOLERANCE:
        return "probabilities"
    if (
        largest.max() <= MAX_LEARNED_LABEL
        and (np.abs(sums) <= ROW_SUM_TOLERANCE * np.maximum(largest, 1e-6)).all()
    ):
        return "centred"
    return "unclear"


def _encode_kind(
    path: Path, labels: Float[np.ndarray, "n ..."], kind: str, k: int
) -> Float[np.ndarray, "n k"]:
    if kind == "index":
        return centred_one_hot(_indices(path, labels, k), k)
    if kind == "logits":
        return metrics.softmax(labels) - 1 / k
    return labels if kind == "centred" else labels - 1 / k


def _indices(path: Path, labels: Float[np.ndarray, " n"], k: int) -> Int[np.ndarray, " n"]:
    found = np.unique(labels)
    if not np.array_equal(found, np.arange(k)):
        raise UserError(
            f"{path}: labels must be the numbers 0 to {k - 1}, each at least once, for the data "
            f"has {k} classes; got {len(found)} from {found[0]:g} to {found[-1]:g}: check --data"
        )
    return labels.astype(np.int64)
