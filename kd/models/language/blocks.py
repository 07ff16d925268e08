"""The blocks of a transformer, and a copy of it that keeps some of them."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from dsdistill.harness.errors import UserError

# Entries of a configuration that say how many blocks there are.
_COUNTS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")


def find(network: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the blocks: the longest list of modules of one class.

    Args:
        network: A transformer.

    Raises:
        UserError: If there is no such list.
    """
    lists = _lists(network)
    if not lists:
        raise UserError(f"{type(network).__name__} has no list of blocks of which some can be kept")
    return max(lists, key=lambda pair: len(pair[1]))


def exist(network: nn.Module) -> bool:
    """Whether a network has blocks."""
    return bool(_lists(network))


def _lists(network: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    return [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    ]


def name_of(network: nn.Module, number: int) -> str:
    """Name of the block with a number, as in `network.named_modules()`.

    Args:
        network: A transformer.
        number: Number of the block from 0; -1 is the last one.

    Raises:
        UserError: If there is no such block.
    """
    name, blocks = find(network)
    if not -len(blocks) <= number < len(blocks):
        raise UserError(
            f"{type(network).__name__} has no block {number}: its blocks are 0 to "
            f"{len(blocks) - 1}, in {name}"
        )
    return f"{name}.{number % len(blocks)}"


def keep(network: nn.Module, numbers: Sequence[int]) -> nn.Module:
    """A copy of a transformer that has some of its blocks, and all else unchanged.

    Embeddings, positions, the norm at the end and the head are carried over. The copy's
    configuration says how many blocks it has, so that it is built again like any other.

    Args:
        network: The transformer.
        numbers: Numbers of the blocks from 0, in ascending order.

    Raises:
        UserError: If there are no such blocks, or a configuration does not say their number.
    """
    name, blocks = find(network)
    numbers = list(numbers)
    if numbers != sorted(set(numbers)) or not numbers:
        raise UserError(f"--keep-layers must be ascending numbers, got {_listed(numbers)}")
    if numbers[-1] >= len(blocks) or numbers[0] < 0:
        raise UserError(
            f"--keep-layers {_listed(numbers)}: there are the blocks 0 to {len(blocks) - 1}"
        )
    smaller = copy.deepcopy(network)
    kept = nn.ModuleList(smaller.get_submodule(f"{name}.{number}") for number in numbers)
    for number, block in enumerate(kept):
        for module in block.modules():  # causal models keep their keys and values by this number
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", number)  # noqa: B010
    smaller.set_submodule(name, kept)
    config: Any = smaller.config
    counts = [key for key in _COUNTS if getattr(config, key, None) == len(blocks)]
    if not counts:
        raise UserError(
            f"{type(network).__name__} does not say in its configuration how many blocks it has: "
            "its blocks cannot be kept"
        )
    for key in counts:
        setattr(config, key, len(numbers))
    if getattr(config, "layer_types", None):  # of models whose blocks differ in their attention
        config.layer_types = [config.layer_types[number] for number in numbers]
    return smaller


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
