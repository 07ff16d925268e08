"""Scoring of networks: outputs, accuracy and calibration, agreement with teachers, latency."""

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
from kd.models.language.language_model import LanguageModel
from kd.models.networks import Shape
from kd.models.token_inputs import TokenInputs
from kd.parallel.engine import Engine

# Figures in which every class counts as much as any other.
BY_CLASS: Mapping[str, Callable[[np.ndarray], float]] = {
    "macro_f1": metrics.macro_f1,
    "balanced_accuracy": metrics.balanced_accuracy,
}
LATENCY_BATCH = 64  # images of the larger batch whose latency is measured
WARM_UP, CALLS = 3, 60  # calls of each of several networks that are compared
# Of `_median_ms` at the end of a training, which a large network must not make much longer.
QUICK: Mapping[str, Any] = {"budget": 0.3, "warm_up": 1, "least": 1}


def outputs(
    network: nn.Module, batches: EvaluationBatches, tick: Callable[[int], None] | None = None
) -> Float[np.ndarray, "n k"]:
    """Outputs in evaluation mode, in the order of the data; the network's mode is restored."""
    return outputs_and_labels(network, batches, tick)[0]


def outputs_and_labels(
    network: nn.Module, batches: EvaluationBatches, tick: Callable[[int], None] | None = None
) -> tuple[Float[np.ndarray, "n k"], Int[np.ndarray, " n"]]:
    """Outputs, as in `outputs`, and the labels of the images.

    Args:
        network: Network of images (n, c, h, w).
        batches: Images with labels.
        tick: Called after each batch with the number of batches done.
    """
    was_training, parts, labels = network.training, [], []
    network.eval()
    with torch.inference_mode():
        for done, batch in enumerate(batches.in_order(), start=1):
            parts.append(network(batch.inputs).float().cpu().numpy())
            labels.append(batch.labels.cpu().numpy())
            if tick:
                tick(done)
    network.train(was_training)
    return np.concatenate(parts), np.concatenate(labels)


def evaluate(
    network: nn.Module,
    batches: EvaluationBatches,
    teachers: Mapping[str, nn.Module] | None = None,
    *,
    temperature: float = 1.0,
    classes: Sequence[str] = (),
    teacher_batches: EvaluationBatches | None = None,
) -> dict[str, Any]:
    """Measure accuracy, NLL in nats and calibration error (15 bins), and agreement with teachers.

    Beside the accuracy stand macro F1 and balanced accuracy, in which rare classes count as much.

    Args:
        network: Network of images (n, c, h, w).
        batches: Images with labels.
        teachers: Teachers of the same images, by name. With several, `teacher_agreement` and
            `teacher_accuracy` are those of the mean of their probabilities, and `teachers` holds
            the `agreement` and `accuracy` of each.
        temperature: T > 0; softmax(outputs / T) are the network's probabilities.
        classes: Class names, in label order; without them there are no `notes`.
        teacher_batches: The teachers' own pictures of the images, in their order; None where the
            teachers see the images.

    Returns:
        The figures and the number of `images`; with `classes` also `notes`, sentences on an
        accuracy that only repeats how common a class is.
    """
    scores, labels = outputs_and_labels(network, batches)
    probabilities = metrics.softmax(scores, temperature)
    counts = metrics.class_counts(scores.argmax(1), labels, scores.shape[1])
    figures: dict[str, Any] = {
        "images": len(labels),
        "accuracy": metrics.accuracy(scores, labels),
        **{name: measure(counts) for name, measure in BY_CLASS.items()},
        "nll": metrics.nll(probabilities, labels),
        "calibration_error": metrics.expected_calibration_error(probabilities, labels),
    }
    if classes:
        predicted = np.unique(scores.argmax(1)).tolist()
        constant = majority.constant_answer("the student", predicted, labels, classes)
        figures["notes"] = [n for n in (majority.common_class(labels, classes), constant) if n]
    if teachers:
        seen = batches if teacher_batches is None else teacher_batches
        logits = {name: outputs(teacher, seen) for name, teacher in teachers.items()}
        tensors = [torch.from_numpy(array) for array in logits.values()]
        mean = tensors[0] if len(tensors) == 1 else combined_logits(tensors, temperature=1.0)
        figures["teacher_agreement"] = metrics.agreement(scores, mean.numpy())
        figures["teacher_accuracy"] = metrics.accuracy(mean.numpy(), labels)
        if len(logits) > 1:
            figures["teachers"] = {
                name: {
                    "agreement": metrics.agreement(scores, array),
                    "accuracy": metrics.accuracy(array, labels),
                }
                for name, array in logits.items()
            }
    return figures


def validate(
    network: nn.Module,
    batches: EvaluationBatches,
    on: Engine,
    *,
    logits: bool,
    classes: int | None = None,
) -> dict[str, float]:
    """Measure accuracy, and for logits NLL in nats; each process scores its share of the batches.

    Args:
        network: Network of images (n, c, h, w), whose mode is restored.
        batches: All images, the same in every process.
        on: The processes.
        logits: Whether the outputs are logits, or estimates of centred labels, which have no NLL.
        classes: Number of classes, where the figures of `BY_CLASS` are measured too; else None.
    """
    was_training = network.training
    sums = torch.zeros(3, dtype=torch.float64, device=on.device)
    counts = np.zeros((3, classes or 0), np.int64)
    network.eval()
    with torch.inference_mode():
        for batch in batches.in_order(on.process_index, on.num_processes):
            scores = network(batch.inputs).float()
            right = (scores.argmax(1) == batch.labels).sum()
            nll = response.cross_entropy(scores, batch.labels) * len(batch)
            sums += torch.stack([right, nll, torch.ones_like(nll) * len(batch)]).double()
            if classes is not None:
                answered, labels = scores.argmax(1).cpu().numpy(), batch.labels.cpu().numpy()
                counts += metrics.class_counts(answered, labels, classes)
    network.train(was_training)
    totals: Any = on.reduce(torch.cat([sums, torch.from_numpy(counts).flatten().to(sums)]))
    accuracy, nll, _ = (totals[:3] / totals[2]).tolist()
    figures = {"accuracy": accuracy, **({"nll": nll} if logits else {})}
    if classes is None:
        return figures
    of_all = totals[3:].reshape(3, classes).cpu().numpy()
    return figures | {name: measure(of_all) for name, measure in BY_CLASS.items()}


def latency(classifier: nn.Module, shape: Shape, *, quick: bool = False) -> dict[str, float]:
    """Median milliseconds of one image and of a batch of 64 on the CPU, after warm-up.

    Args:
        classifier: The network.
        shape: Height, width and channels of its images.
        quick: Whether one image alone is measured, in a second or less for most networks.
    """
    on_cpu = copy.deepcopy(classifier).cpu().eval()
    h, w, c = shape
    options = QUICK if quick else {}
    return {
        f"latency_ms_batch_{n}": _median_ms(on_cpu, torch.zeros(n, c, h, w), **options)
        for n in ((1,) if quick else (1, LATENCY_BATCH))
    }


def latencies_in_turn(networks: Mapping[str, nn.Module], shape: Shape) -> dict[str, float]:
    """Median milliseconds of one image for each of several networks on the CPU.

    They take turns, so that all meet the same load of the machine.

    Args:
        networks: The networks in evaluation mode, by name.
        shape: Height, width and channels of their images.
    """
    h, w, c = shape
    image = torch.rand(1, c, h, w, generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {name: [] for name in networks}
    with torch.no_grad():
        for call in range(WARM_UP + CALLS):
            for name, network in networks.items():
                start = time.perf_counter()
                network(image)
                if call >= WARM_UP:
                    times[name].append(time.perf_counter() - start)
    return {name: 1e3 * float(np.median(values)) for name, values in times.items()}


def text_latency(
    network: LanguageModel, tokens: int, length: int, *, quick: bool = False
) -> dict[str, float]:
    """Median milliseconds of one text and of a batch of 64 on the CPU, after warm-up.

    Args:
        network: The network.
        tokens: Number of ids of its tokenizer.
        length: Number of tokens of each text, special ones included.
        quick: As for `latency`.
    """
    on_cpu = copy.deepcopy(network).cpu().eval()
    generator = torch.Generator().manual_seed(0)
    # A batch of long texts takes a large network seconds: fewer calls are enough.
    options = QUICK if quick else {"warm_up": 1, "least": 3}
    figures: dict[str, float] = {}
    for n in (1,) if quick else (1, LATENCY_BATCH):
        ids = torch.randint(tokens, (n, length), generator=generator)
        inputs = TokenInputs(ids, torch.ones_like(ids).bool(), torch.zeros_like(ids))
        figures[f"latency_ms_batch_{n}"] = _median_ms(on_cpu, inputs, **options)
    return figures


def _median_ms(
    network: nn.Module,
    inputs: torch.Tensor | TokenInputs,
    budget: float = 1.0,
    *,
    warm_up: int = 3,
    least: int = 5,
) -> float:
    """Median milliseconds of `least` to 100 calls, as many as `budget` seconds allow."""
    times: list[float] = []
    with torch.inference_mode():
        for _ in range(warm_up):
            network(inputs)
        while len(times) < least or (len(times) < 100 and sum(times) < budget):
            start = time.perf_counter()
            network(inputs)
            times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))
