"""How good a student is: outputs, figures, latency. Reads, never trains."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from dsdistill.harness.evaluation import majority, metrics
from kd.data.batching import EvaluationBatches
from kd.losses import response
from kd.losses.ensemble import combined_logits
from kd.models.networks import Shape
from kd.parallel.engine import Engine

LATENCY_BATCH = 64


def outputs(
    network: nn.Module, batches: EvaluationBatches, tick: Callable[[int], None] | None = None
) -> Float[np.ndarray, "n k"]:
    """Outputs in evaluation mode, in the order of the data; the mode is left as it was."""
    return outputs_and_labels(network, batches, tick)[0]


def outputs_and_labels(
    network: nn.Module, batches: EvaluationBatches, tick: Callable[[int], None] | None = None
) -> tuple[Float[np.ndarray, "n k"], Int[np.ndarray, " n"]]:
    """Outputs, as `outputs`, with the labels of the images.

    Args:
        network: Takes images (n, c, h, w).
        batches: The images.
        tick: Called with the number of batches done.
    """
    was, parts, labels = network.training, [], []
    network.eval()
    with torch.inference_mode():
        for done, batch in enumerate(batches.in_order(), start=1):
            parts.append(network(batch.images).float().cpu().numpy())
            labels.append(batch.labels.cpu().numpy())
            if tick:
                tick(done)
    network.train(was)
    return np.concatenate(parts), np.concatenate(labels)


def evaluate(
    network: nn.Module,
    batches: EvaluationBatches,
    teachers: Mapping[str, nn.Module] | None = None,
    *,
    temperature: float = 1.0,
    classes: Sequence[str] = (),
) -> dict[str, Any]:
    """Accuracy, NLL in nats and calibration error (15 bins); with teachers, agreement with them.

    Args:
        network: Takes images (n, c, h, w).
        batches: The images.
        teachers: By name; they take the same images. Of several, `teacher_agreement` and
            `teacher_accuracy` are those of the mean of their probabilities, and `teachers` holds
            each one's `agreement` and `accuracy`.
        temperature: softmax(outputs / this) are the network's probabilities.
        classes: Names, in label order.

    Returns:
        The figures, and the number of `images` that they are of; with `classes` also `notes`,
        sentences on an accuracy that only repeats how common a class is.
    """
    scores, labels = outputs_and_labels(network, batches)
    probabilities = metrics.softmax(scores, temperature)
    found: dict[str, Any] = {
        "images": len(labels),
        "accuracy": metrics.accuracy(scores, labels),
        "nll": metrics.nll(probabilities, labels),
        "calibration_error": metrics.expected_calibration_error(probabilities, labels),
    }
    if classes:
        given = np.unique(scores.argmax(1)).tolist()
        constant = majority.constant_answer("the student", given, labels, classes)
        found["notes"] = [n for n in (majority.common_class(labels, classes), constant) if n]
    if teachers:
        answers = {name: outputs(teacher, batches) for name, teacher in teachers.items()}
        logits = [torch.from_numpy(each) for each in answers.values()]
        together = logits[0] if len(logits) == 1 else combined_logits(logits, temperature=1.0)
        found["teacher_agreement"] = metrics.agreement(scores, together.numpy())
        found["teacher_accuracy"] = metrics.accuracy(together.numpy(), labels)
        if len(answers) > 1:
            found["teachers"] = {
                name: {
                    "agreement": metrics.agreement(scores, each),
                    "accuracy": metrics.accuracy(each, labels),
                }
                for name, each in answers.items()
            }
    return found


def validate(
    network: nn.Module, batches: EvaluationBatches, on: Engine, *, logits: bool
) -> dict[str, float]:
    """Accuracy, and NLL in nats of a network that gives logits; each process counts a share.

    Args:
        network: In any mode, which is left as it was.
        batches: All images; every process has them.
        on: The processes.
        logits: Whether the outputs are logits, or estimates of centred labels.
    """
    was, sums = network.training, torch.zeros(3, dtype=torch.float64, device=on.device)
    network.eval()
    with torch.inference_mode():
        for batch in batches.in_order(on.process_index, on.num_processes):
            scores = network(batch.images).float()
            right = (scores.argmax(1) == batch.labels).sum()
            nll = response.cross_entropy(scores, batch.labels) * len(batch)
            sums += torch.stack([right, nll, torch.ones_like(nll) * len(batch)]).double()
    network.train(was)
    totals: Any = on.reduce(sums)
    accuracy, nll, _ = (totals / totals[2]).tolist()
    return {"accuracy": accuracy, **({"nll": nll} if logits else {})}


def latency(classifier: nn.Module, shape: Shape) -> dict[str, float]:
    """Median milliseconds of one image and of a batch of 64 on the CPU, after warm-up."""
    on_cpu = copy.deepcopy(classifier).cpu().eval()
    h, w, c = shape
    return {
        f"latency_ms_batch_{n}": _median_ms(on_cpu, torch.zeros(n, c, h, w))
        for n in (1, LATENCY_BATCH)
    }


def _median_ms(network: nn.Module, images: torch.Tensor, budget: float = 1.0) -> float:
    """Of at least 5 and at most 100 calls, fewer if they take longer than `budget` seconds."""
    times: list[float] = []
    with torch.inference_mode():
        for _ in range(3):
            network(images)
        while len(times) < 5 or (len(times) < 100 and sum(times) < budget):
            began = time.perf_counter()
            network(images)
            times.append(time.perf_counter() - began)
    return 1e3 * float(np.median(times))
