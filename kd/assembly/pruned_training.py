"""What a training with `--prune` adds: fewer channels, and figures before and after."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import metrics
from kd.data.batching import EvaluationBatches
from kd.evaluation import scoring
from kd.models import networks, pruning
from kd.models.saved_models import Model

BEFORE, AFTER = "before", "after"  # keys of the figures in a report


def prune_student(student: Model, share: float, say: Callable[[str], None]) -> tuple[Model, Model]:
    """Prune a student.

    Args:
        student: The student, on the CPU; its network is changed in place.
        share: Share of its multiply-accumulates that is removed.
        say: Called with a line about what was removed.

    Returns:
        A copy of the student as it was, and the pruned student.

    Raises:
        UserError: If the student cannot be pruned.
    """
    if student.classifier.initial is not None:
        raise UserError(
            "the student is centred, and the network that it subtracts keeps all channels: prune "
            "another student"
        )
    unpruned = replace(student, classifier=copy.deepcopy(student.classifier))
    removed = pruning.prune(student.name, student.classifier, student.shape, share)
    count = networks.parameter_count
    kept = count(student.classifier) / count(unpruned.classifier)
    say(
        f"pruned: {100 * removed.share:.1f} % of the multiply-accumulates and "
        f"{100 * (1 - kept):.1f} % of the parameters are gone, in {len(removed.channels)} layers"
    )
    return unpruned, replace(student, layer_channels={**student.layer_channels, **removed.channels})


def figures(
    unpruned: Model, student: Model, share: float, batches: EvaluationBatches | None
) -> dict[str, Any]:
    """Size, latency and accuracy of the student before it was pruned, and after its training.

    Args:
        unpruned: The student before, on the CPU.
        student: The finished student.
        share: Share that was asked for.
        batches: Test images, if there are any and the student was trained on their classes before.
    """
    both = {BEFORE: unpruned.classifier, AFTER: student.classifier}
    latencies = scoring.latencies_in_turn(
        {name: copy.deepcopy(network).cpu().eval() for name, network in both.items()},
        student.shape,
    )
    described: dict[str, Any] = {"share": share}
    device = next(student.classifier.parameters()).device
    for name, network in both.items():
        network.to(device)
        accuracy = None
        if batches is not None:
            accuracy = metrics.accuracy(*scoring.outputs_and_labels(network, batches))
        described[name] = {
            "macs": pruning.count_macs(network, student.shape),
            "parameters": networks.parameter_count(network),
            "latency_ms_batch_1": latencies[name],
            "test_accuracy": accuracy,
        }
    return described
