"""Figures of language models: cross-entropy of a target token, perplexity, bits per byte."""

import math
from typing import Any

import torch
from torch import nn

from dsdistill.harness.errors import UserError
from kd.data.batching import EvaluationBatches
from kd.losses import token
from kd.models.token_inputs import IGNORED
from kd.parallel.engine import Engine


def validate(
    network: nn.Module,
    batches: EvaluationBatches,
    on: Engine | None = None,
    *,
    text_bytes: int | None = None,
) -> dict[str, float]:
    """Measure how well tokens are predicted; each process scores its share of the batches.

    All figures are over tokens with a target, each of which counts once, whatever row or batch it
    is in. Bits per byte compare models of different tokenizers, which perplexities do not.

    Args:
        network: Network that maps token ids to logits of tokens; its mode is restored.
        batches: All texts, the same in every process, with `token_targets`; of masked language
            models the same tokens are hidden each time.
        on: The processes; None for one process.
        text_bytes: `EncodedPart.text_bytes` of the texts; None leaves bits per byte out.

    Returns:
        `accuracy`, the share of targets that are the most probable token; `nll` in nats;
        `perplexity`, its exponential; with `text_bytes` also `bits_per_byte`.

    Raises:
        UserError: If no token has a target.
    """
    right, nats, count = _sums(network, batches, on)
    if not count:
        raise UserError("the texts have no token to predict: all are unknown to the tokenizer")
    figures = {
        "accuracy": right / count,
        "nll": nats / count,
        "perplexity": perplexity(nats / count),
    }
    if text_bytes:
        figures["bits_per_byte"] = nats / math.log(2) / text_bytes
    return figures


def perplexity(nll: float) -> float:
    """The exponential of a mean cross-entropy in nats; infinity where it is too large."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def _sums(network: nn.Module, batches: EvaluationBatches, on: Engine | None) -> list[float]:
    """Number of right predictions, sum of cross-entropies, and number of targets."""
    was_training = network.training
    rank, world = (on.process_index, on.num_processes) if on else (0, 1)
    sums: Any = torch.zeros(3, dtype=torch.float64, device=on.device if on else None)
    network.eval()
    with torch.inference_mode():
        for batch in batches.in_order(rank, world):
            targets = batch.token_targets
            assert targets is not None, "the texts have no targets"
            logits, count = network(batch.inputs), batch.count("targets")
            right = (logits.argmax(-1) == targets)[targets != IGNORED].sum()
            nats = token.token_cross_entropy(logits, targets) * count
            parts = torch.stack([right, nats, torch.full_like(nats, count)]).double()
            sums = sums.to(parts.device) + parts
    network.train(was_training)
    totals: Any = on.reduce(sums) if on else sums
    return totals.tolist()
