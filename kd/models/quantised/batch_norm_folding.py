"""Batch norms that directly follow a convolution, and their scale and shift as part of it.

In evaluation a batch norm multiplies each channel by k and adds a constant. Rounding a channel's
weights to multiples of its own step s commutes with that: k Q(w) has the codes of Q(w), with their
sign changed where k is negative, and the step |k| s.

Source: Jacob et al. (2018), arXiv:1712.05877, section 3.2, who fold before they round.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Affine:
    """What a batch norm does to a channel in evaluation: factor · x + shift."""

    factor: Float[Tensor, " c"]
    shift: Float[Tensor, " c"]


def find_pairs(network: nn.Module, images: Tensor) -> dict[str, str]:
    """Batch norms that alone read the output of a convolution.

    Args:
        network: Network without quantisers, in evaluation mode.
        images: Two images.

    Returns:
        Name of a convolution -> name of its batch norm; without layers that are called twice.
    """
    with torch.no_grad():
        program = torch.export.export(network, (images,))
    signature = program.graph_signature
    tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def layer(argument: Any) -> str:
        """Name of the layer that a tensor in the graph belongs to."""
        return tensors.get(getattr(argument, "name", ""), "").rpartition(".")[0]

    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    calls = Counter(
        name for node in nodes for name in {layer(argument) for argument in node.all_input_nodes}
    )
    pairs: dict[str, str] = {}
    for node in nodes:
        if node.target != torch.ops.aten.batch_norm.default:
            continue
        source: Any = node.args[0]
        if source.target != torch.ops.aten.conv2d.default or len(source.users) > 1:
            continue
        convolution, norm = layer(source.args[1]), layer(node.args[3])
        if calls[convolution] == calls[norm] == 1:
            pairs[convolution] = norm
    return pairs


def affine(norm: nn.BatchNorm2d) -> Affine:
    """The factor and the shift of a batch norm in evaluation."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.detach()
    shift = -norm.running_mean * factor
    return Affine(factor, shift if norm.bias is None else shift + norm.bias.detach())


def rest(norm: nn.Module) -> nn.Module | None:
    """What is left of a batch norm once it is folded; None for a class that cannot be folded."""
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    activation, drop = getattr(norm, "act", None), getattr(norm, "drop", None)
    # timm's batch norm that ends in an activation.
    known = type(norm).__name__ == "BatchNormAct2d" and isinstance(norm, nn.BatchNorm2d)
    if known and isinstance(activation, nn.Module) and isinstance(drop, nn.Module):
        return nn.Sequential(drop, activation)
    return None
