"""Scoring of networks on images with any number of labels: each class is a question of its own.

A class counts as answered where its probability, the sigmoid of its logit, exceeds 0.5. Average
precision needs no such threshold: it is the area under the curve of precision over recall, by the
ranking of all images. A class that no image has is left out of means, for it has none.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import nn

from dsdistill.harness.errors import UserError
from kd.data.batching import EvaluationBatches
from kd.evaluation import scoring
from kd.losses.ensemble import combined_binary_logits
from kd.losses.multi_label import binary_cross_entropy
from kd.models.teachers import Teacher
from kd.parallel.engine import Engine
from kd.recipe import Metric

METRICS: tuple[Metric, ...] = ("mean_average_precision", "micro_f1", "macro_f1")


def figures(scores: Float[np.ndarray, "n k"], labels: Float[np.ndarray, "n k"]) -> dict[str, float]:
    """Mean average precision, micro and macro F1, and cross-entropy in nats, mean over classes.

    Args:
        scores: Logits of the classes.
        labels: For each class whether the image has it, 0 or 1.
    """
    from sklearn.metrics import f1_score

    known = labels.any(0)
    answers, truth = (scores > 0).astype(np.int64), labels.astype(np.int64)
    micro, macro = (
        float(f1_score(truth[:, known], answers[:, known], average=kind, zero_division=0.0))  # pyright: ignore
        for kind in ("micro", "macro")
    )
    precisions = average_precisions(scores, labels)
    return {
        "mean_average_precision": float(np.nanmean(precisions)) if known.any() else 0.0,
        "micro_f1": micro,
        "macro_f1": macro,
        "bce": float(binary_cross_entropy(torch.from_numpy(scores), torch.from_numpy(labels))),
    }


def average_precisions(
    scores: Float[np.ndarray, "n k"], labels: Float[np.ndarray, "n k"]
) -> Float[np.ndarray, " k"]:
    """Average precision of each class; NaN of a class that no image has.

    Args:
        scores, labels: As in `figures`.
    """
    from sklearn.metrics import average_precision_score

    return np.array(
        [
            average_precision_score(labels[:, k], scores[:, k]) if labels[:, k].any() else np.nan
            for k in range(labels.shape[1])
        ]
    )


def validate(network: nn.Module, batches: EvaluationBatches, on: Engine) -> dict[str, float]:
    """Measure `figures`; each process computes its share of the batches.

    Args:
        network: Network of images, whose mode is restored.
        batches: All images, the same in every process.
        on: The processes.
    """
    was_training, parts = network.training, []
    network.eval()
    with torch.inference_mode():
        for number, batch in enumerate(batches.in_order(on.process_index, on.num_processes)):
            scores = network(batch.inputs).float().cpu().numpy()
            place = number * on.num_processes + on.process_index
            parts.append((place, scores, batch.labels.cpu().numpy()))
    network.train(was_training)
    if on.num_processes > 1:
        parts = gather_object(parts)
    parts.sort(key=lambda part: part[0])  # sums of floats depend on their order
    return figures(*(np.concatenate([part[i] for part in parts]) for i in (1, 2)))


def evaluate(
    network: nn.Module,
    batches: EvaluationBatches,
    classes: Sequence[str],
    teachers: Mapping[str, nn.Module] | None = None,
) -> dict[str, Any]:
    """Measure all figures of a student, beside those of its teachers.

    Args:
        network: Network of images.
        batches: Images with any number of labels.
        classes: Names of the labels.
        teachers: Teachers of the same images, by name. With several, figures that begin with
            `teacher_` are those of the mean of their probabilities.

    Returns:
        The figures, `average_precision` by class, the number of `images`, `notes` for the user, and
        `teacher_agreement`, the share of all answers of all classes that are the teacher's.
    """
    scores, labels = scoring.outputs_and_labels(network, batches)
    each = average_precisions(scores, labels)
    found: dict[str, Any] = {
        "images": len(labels),
        **figures(scores, labels),
        "average_precision": {
            name: None if np.isnan(value) else float(value)
            for name, value in zip(classes, each, strict=True)
        },
        "notes": _notes(scores),
    }
    if not teachers:
        return found
    logits = {name: scoring.outputs(teacher, batches) for name, teacher in teachers.items()}
    tensors = [torch.from_numpy(array) for array in logits.values()]
    mean = tensors[0] if len(tensors) == 1 else combined_binary_logits(tensors, temperature=1.0)
    theirs = mean.numpy()
    found["teacher_agreement"] = _agreement(scores, theirs)
    of_mean = figures(theirs, labels)
    found |= {f"teacher_{name}": of_mean[name] for name in METRICS}
    if len(logits) > 1:
        found["teachers"] = {
            name: {
                "agreement": _agreement(scores, array),
                **{metric: figures(array, labels)[metric] for metric in METRICS},
            }
            for name, array in logits.items()
        }
    return found


def check_teacher(
    name: str,
    teacher: Teacher,
    batches: EvaluationBatches,
    *,
    minimum: float | None,
    part: str,
    say: Callable[[str], None],
) -> None:
    """Score a teacher before the training, and report how well it ranks the images.

    Args:
        name: Name of the teacher in messages.
        teacher: The teacher, on the device of the batches.
        batches: Images with any number of labels, in the preprocessing that it will be given.
        minimum: Smallest mean average precision, a fraction; None for a mere warning.
        part: Kind of the images, for messages.
        say: Called with each line of the report.

    Raises:
        UserError: If it is below `minimum`.
    """
    scores, labels = scoring.outputs_and_labels(teacher, batches)
    measured, chance = figures(scores, labels), float(labels[:, labels.any(0)].mean())
    precision = measured["mean_average_precision"]
    say(
        f"teacher {name}: mean average precision {precision:.1%} on {len(labels)} {part} images, "
        f"micro F1 {measured['micro_f1']:.1%}"
    )
    suspects = (
        f"its labels and their order (matched {teacher.resolved.matched}; --class-map), and its "
        "normalisation and image size"
    )
    if minimum is not None and precision < minimum:
        raise UserError(
            f"teacher {name} has {part} mean average precision {precision:.1%}, below "
            f"--min-teacher-accuracy {minimum:g}: check {suspects}"
        )
    if precision < 1.2 * chance:
        say(
            f"warning: teacher {name} ranks the images hardly better than by chance "
            f"({chance:.1%}): check {suspects}"
        )


def _agreement(a: Float[np.ndarray, "n k"], b: Float[np.ndarray, "n k"]) -> float:
    """Share of the answers of all classes that are the same."""
    return float(((a > 0) == (b > 0)).mean())


def _notes(scores: Float[np.ndarray, "n k"]) -> list[str]:
    if (scores > 0).any():
        return []
    return [
        "the student gives no image any label: no probability exceeds 0.5, so F1 is 0; "
        "--class-weights balanced raises those of rare labels"
    ]
