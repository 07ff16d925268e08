"""The kinds of data of an evaluation: the distilled set with each of its labels, and controls."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.evaluation import controls, metrics
from dsdistill.harness.evaluation.protocol import Arm

LogitFunction = Callable[[Float[np.ndarray, "n h w c"]], Float[np.ndarray, "n k"]]


def arms(
    distilled: DistilledSet,
    train: Examples,
    names: Sequence[str],
    *,
    data: Any,
    teacher: LogitFunction | None = None,
    taught_by: Any = None,
) -> list[Arm]:
    """All arms, the distilled set's first.

    Args:
        distilled: Stored labels, their arg-max, and the teacher's make an arm each.
        train: All training images, in the set's preprocessing.
        names: Of `controls.CONTROLS`.
        data: JSON-compatible: what the training images are.
        teacher: Logits of preprocessed images.
        taught_by: JSON-compatible: what the teacher is.
    """
    stored = distilled.examples()
    hard = replace(stored, targets=None)
    same = np.array_equal(hard.labels(), stored.labels())
    per_class = images_per_class(distilled)
    found = [
        _fixed_arm("distilled", stored, {"set": digest(distilled)}),
        replace(
            _fixed_arm("distilled-hard", hard, {"set": digest(distilled)}),
            duplicate_of="distilled" if same else None,
        ),
    ]
    if teacher is not None:
        relabelled = replace(stored, targets=_answers(teacher, stored))
        key = {"set": digest(distilled), "teacher": taught_by}
        found.append(_fixed_arm("distilled-teacher", relabelled, key))
    return found + [
        replace(
            controls.arm(name, train, per_class),
            identity={"data": data} | ({} if name == "full" else {"images_per_class": per_class}),
            images=len(train) if name == "full" else per_class * len(distilled.classes),
        )
        for name in names
    ]


def images_per_class(distilled: DistilledSet) -> int:
    """Of the controls: as many as the set has in all, shared out evenly."""
    return max(len(distilled) // len(distilled.classes), 1)


def digest(distilled: DistilledSet) -> str:
    """SHA-256 of images, labels and preprocessing."""
    sha = hashlib.sha256(preprocess_digest(distilled.preprocess).encode())
    for array in (distilled.images, distilled.labels):
        sha.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def preprocess_digest(preprocess: Preprocess) -> str:
    """SHA-256 of a preprocessing."""
    sha = hashlib.sha256(f"{preprocess.kind} {preprocess.contrast}".encode())
    for array in (preprocess.mean, preprocess.std, preprocess.whiten):
        sha.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def _fixed_arm(name: str, examples: Examples, identity: dict[str, Any]) -> Arm:
    return Arm(name, lambda seed: examples, fixed=True, identity=identity, images=len(examples))


def _answers(teacher: LogitFunction, examples: Examples) -> Float[np.ndarray, "n k"]:
    """The teacher's probabilities, in the encoding of the stored labels: minus 1/k."""
    logits = np.concatenate([teacher(examples.images(rows)) for rows in examples.batches()])
    return (metrics.softmax(logits) - 1 / logits.shape[1]).astype(np.float32)
