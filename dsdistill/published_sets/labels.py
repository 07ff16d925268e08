"""Labels of a published set: detect their kind and turn them into rows of our own encoding."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from dsdistill.harness.data.labeled_images import centred_one_hot
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import metrics
from dsdistill.harness.text import abbreviate_names, quote
from dsdistill.published_sets.files import RawSet

ROW_SUM_TOLERANCE = 5e-3  # error of a row's sum: labels are often stored in half precision
MAX_MEAN_ROW_SUM = 0.5  # mean sum of learned rows: Adam does not keep it at 0
MAX_LEARNED_LABEL = 5.0  # rows that sum to 0 with larger values may also be logits

# Detected kinds that each kind of label may have. Logits and learned labels may have any sum.
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
    """Turn labels into rows of the project's encoding, one-hot minus 1/k.

    Args:
        path: Path of the set, for messages.
        raw: Arrays of the set.
        stated: A key of `_COMPATIBLE_KINDS`, or `auto`.
        classes: Class names of the data.

    Returns:
        The kind of the labels, float32 rows, and a note on the order of classes. An integer label
        becomes one-hot minus 1/k; 1/k is subtracted from probabilities and from the softmax of
        logits; centred labels stay as they are, except that FRePo's are scaled back. Columns are in
        the data's order of classes: a file that names its classes is matched by name, any other is
        assumed to have that order.

    Raises:
        UserError: If the labels have other classes, are not of the stated kind, or of no clear
            kind.
    """
    if raw.classes is not None and sorted(raw.classes) != sorted(classes):
        raise UserError(
            f"{path} has the classes {abbreviate_names(raw.classes)}, the data "
            f"{abbreviate_names(classes)}: --data must have the same ones"
        )
    labels = _rows(path, raw.labels, len(classes))
    detected = _detect_kind(labels)
    kind = next(name for name in (stated, raw.labels_as, detected) if name != "auto")
    if kind == "unclear":
        raise UserError(
            f"{path}: labels run from {labels.min():.3g} to {labels.max():.3g} and could be logits "
            "or learned: use --labels logits, or --labels centred"
        )
    if detected not in _COMPATIBLE_KINDS[kind]:
        remedy = "logits or --labels centred" if detected == "unclear" else detected
        raise UserError(f"{path}: labels do not look like {kind} labels: use --labels {remedy}")
    if stated == "centred" and abs(mean := labels.sum(1).mean()) > MAX_MEAN_ROW_SUM:
        raise UserError(
            f"{path}: centred labels must have rows that sum to about 0, got a mean sum of "
            f"{mean:.3g}: use --labels logits"
        )
    rows = _encode_kind(path, labels, kind, len(classes)).astype(np.float32)
    if raw.kind == "FRePo":  # divides its centred labels by this factor
        rows = rows * np.float32(math.sqrt(len(classes) / 10))
    if raw.kind == "folder":
        return kind, rows, "those of the folders"
    if raw.classes is None:
        return (
            kind,
            rows,
            f"not named, so in the data's order: 0 is {quote(classes[0])}, 1 {quote(classes[1])}",
        )
    order = [raw.classes.index(name) for name in classes]
    return kind, rows[:, order], "matched by name"


def imbalance_notes(labels: Int[np.ndarray, " n"], k: int) -> list[str]:
    """A note if the classes have different numbers of images."""
    counts = np.bincount(labels, minlength=k)
    few, many = int(counts.min()), int(counts.max())
    return [f"images per class are unequal: {few} to {many}"] if few < many else []


def _rows(path: Path, raw: np.ndarray, k: int) -> Float[np.ndarray, "n ..."]:
    """Labels as float64, one number or one row of k numbers per image."""
    labels = np.asarray(raw, np.float64)
    if labels.shape[1:] == (1,):
        labels = labels[:, 0]
    if labels.ndim > 2 or not np.isfinite(labels).all() or np.abs(labels).max() > 1e6:
        raise UserError(f"{path}: labels must be finite, one number or one row per image")
    if labels.ndim == 2 and labels.shape[1] != k:
        raise UserError(
            f"{path} has labels of {labels.shape[1]} classes, the data has {k}: check --data"
        )
    return labels


def _detect_kind(labels: Float[np.ndarray, "n ..."]) -> str:
    """The kind that labels look like, or `unclear`."""
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
    numbers = np.unique(labels)
    if not np.array_equal(numbers, np.arange(k)):
        raise UserError(
            f"{path}: labels must be the numbers 0 to {k - 1}, each at least once, since the data "
            f"has {k} classes; got {len(numbers)} numbers from {numbers[0]:g} to {numbers[-1]:g}: "
            "check --data"
        )
    return labels.astype(np.int64)
