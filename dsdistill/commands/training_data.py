"""Training data of an evaluation: the distilled set with each kind of labels, and controls."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float

from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.evaluation import controls, metrics
from dsdistill.harness.evaluation.protocol import Arm


@dataclass(frozen=True)
class LabelSolver:
    """Label Solve on the training images of an evaluation.

    Attributes:
        solve: Function from drawn images to their solved labels.
        identity: All that the labels depend on besides the images, JSON-compatible; None if that
            is not known.
    """

    solve: controls.Relabel
    identity: Any


LogitFunction = Callable[[Float[np.ndarray, "n h w c"]], Float[np.ndarray, "n k"]]


def arms(
    distilled: DistilledSet,
    train: Examples,
    names: Sequence[str],
    *,
    data: Any,
    teacher: LogitFunction | None = None,
    teacher_identity: Any = None,
    solver: LabelSolver | None = None,
    further: Mapping[str, DistilledSet] = MappingProxyType({}),
) -> list[Arm]:
    """All arms of an evaluation, those of the distilled set first, then those of further sets.

    Args:
        distilled: The set; its stored labels, their arg-max and the teacher's labels give one arm
            each.
        train: All training images, in the set's preprocessing.
        names: Controls, of `controls.CONTROLS` and `controls.RELABELLED`.
        data: Identity of the training images, JSON-compatible.
        teacher: Logits of preprocessed images; None: no arm with a teacher's labels.
        teacher_identity: Identity of the teacher, JSON-compatible.
        solver: Label Solve on the training images, for the control with solved labels.
        further: Further sets of the same data by the name of their arm.
    """
    stored = distilled.examples()
    hard = replace(stored, targets=None)
    same = np.array_equal(hard.labels(), stored.labels())
    per_class = images_per_class(distilled)
    distilled_arms = [
        _fixed_arm("distilled", stored, {"set": digest(distilled)}),
        replace(
            _fixed_arm("distilled-hard", hard, {"set": digest(distilled)}),
            duplicate_of="distilled" if same else None,
        ),
    ]
    if teacher is not None:
        relabelled = replace(stored, targets=_answers(teacher, stored))
        key = {"set": digest(distilled), "teacher": teacher_identity}
        distilled_arms.append(_fixed_arm("distilled-teacher", relabelled, key))
    for name, other in further.items():
        distilled_arms += _further_arms(name, other, distilled.preprocess)
    relabel: dict[str, controls.Relabel] = {}
    dependencies: dict[str, Any] = {}  # what else the results of a control depend on
    if teacher is not None:
        relabel[controls.SOFT] = functools.partial(_answers, teacher)
        dependencies[controls.SOFT] = {"teacher": teacher_identity}
    if solver is not None:
        relabel[controls.SOLVED] = solver.solve
        dependencies[controls.SOLVED] = {"solver": solver.identity}

    def control(name: str) -> Arm:
        drawn = controls.arm(name, train, per_class, relabel.get(name))
        count = len(train) if name == "full" else per_class * len(distilled.classes)
        identity = {"data": data} | ({} if name == "full" else {"images_per_class": per_class})
        known = dependencies.get(name, {})
        whole = None if None in known.values() else identity | known
        return replace(drawn, identity=whole, images=count)

    return distilled_arms + [control(name) for name in names]


def images_per_class(distilled: DistilledSet) -> int:
    """Images per class of the controls: the size of the set, divided evenly; at least 1."""
    return max(len(distilled) // len(distilled.classes), 1)


def digest(distilled: DistilledSet) -> str:
    """SHA-256 of a set's images, labels and preprocessing."""
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


def _further_arms(name: str, other: DistilledSet, preprocess: Preprocess) -> list[Arm]:
    """The arms of a further set: its labels as stored, and hard ones where these differ.

    Args:
        name: Name of the first arm.
        other: The set.
        preprocess: Preprocessing to which its images are brought.
    """
    stored = other.examples()
    if not other.preprocess.same_as(preprocess):
        images = preprocess.apply(other.preprocess.invert(other.images))
        stored = replace(stored, data=replace(stored.data, store=images), preprocess=preprocess)
    hard, identity = replace(stored, targets=None), {"set": digest(other)}
    further = [_fixed_arm(name, stored, identity)]
    if not np.array_equal(hard.labels(), stored.labels()):
        further.append(_fixed_arm(f"{name}-hard", hard, identity))
    return further


def _fixed_arm(name: str, examples: Examples, identity: dict[str, Any]) -> Arm:
    return Arm(name, lambda seed: examples, fixed=True, identity=identity, images=len(examples))


def _answers(teacher: LogitFunction, examples: Examples) -> Float[np.ndarray, "n k"]:
    """The teacher's probabilities minus 1/k, the encoding of the stored labels."""
    logits = np.concatenate([teacher(examples.images(rows)) for rows in examples.batches()])
    return (metrics.softmax(logits) - 1 / logits.shape[1]).astype(np.float32)
