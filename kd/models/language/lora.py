"""Low-rank adapters: a large student of which only small matrices in its blocks are trained.

Needs peft, an optional extra. The adapters are put into the network itself, whose class, names of
blocks and configuration stay, and are merged into its weights before it is saved or exported.

Source: Hu et al. (2022), arXiv:2106.09685. They adapt two matrices of the attention; here all
linear layers of the blocks, as Dettmers et al. (2023), arXiv:2305.14314, found to be needed.
"""

import copy
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dsdistill.harness.errors import UserError, first_line
from kd.models.language import blocks
from kd.models.language.language_model import LanguageModel

SCALE = 2.0  # of the adapters' product, whatever their rank: alpha is twice the rank


def add(
    model: LanguageModel, rank: int, *, scale: float = SCALE, dropout: float = 0.0, seed: int = 0
) -> LanguageModel:
    """Put adapters into the blocks of a transformer, and freeze all of it but them and its head.

    A head of classes, and a pooler in front of it, are trained as a whole. Of models that predict
    tokens only the adapters are: their head is the vocabulary, often the embedding itself. New
    adapters change no output.

    Args:
        model: Transformer with its weights; changed in place.
        rank: Rank of the adapters.
        scale: Factor of what the adapters add; in LoRA's terms alpha divided by the rank.
        dropout: Share of an adapter's inputs that are zero in training.
        seed: Seed of the adapters' weights.

    Returns:
        The model.

    Raises:
        UserError: If peft is not installed, the rank is not positive, or the network is no
            transformer whose blocks have linear layers.
    """
    if rank < 1:
        raise UserError(f"--lora must be a rank of at least 1, got {rank}")
    peft = import_peft()
    network: Any = model.network
    layers = _linear_layers(network)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        lora_dropout=dropout,
        target_modules=layers,
        fan_in_fan_out=not isinstance(network.get_submodule(layers[0]), nn.Linear),
    )
    trainable = {name for name, weight in network.named_parameters() if weight.requires_grad}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, network)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"no adapters can be put into {type(network).__name__}: {first_line(error)}"
        ) from error
    if model.vocabulary is None:
        for name, weight in network.named_parameters():
            in_head = not name.startswith(f"{network.base_model_prefix}.") or ".pooler." in name
            if in_head and name in trainable:
                weight.requires_grad_(True)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    total = sum(p.numel() for p in network.parameters())
    model.frozen_elsewhere = True
    model.notes = (*model.notes, f"LoRA: {trained:,} of {total:,} parameters are trained")
    return model


def merge(model: LanguageModel) -> LanguageModel:
    """A copy without adapters, whose weights hold what these have learned.

    Args:
        model: Model from `add`; not changed.

    Returns:
        A model of the original architecture and names, as it was before `add`.

    Raises:
        UserError: If peft is not installed, or a merged weight is not finite.
    """
    import_peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    network = copy.deepcopy(model.network)
    adapted: list[tuple[str, Any]] = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
    for name, module in adapted:
        try:
            module.merge(safe_merge=True)
        except ValueError as error:  # of a training that diverged
            raise UserError(f"the adapters cannot be merged: {first_line(error)}") from error
        network.set_submodule(name, module.get_base_layer())
    return model.with_network(network.requires_grad_(True))


def import_peft() -> ModuleType:
    """Import peft, an optional extra.

    Raises:
        UserError: If it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("--lora needs peft: pip install 'dsdistill[lora]'") from error
    return peft


def _linear_layers(network: nn.Module) -> list[str]:
    """Names of the linear layers of the blocks."""
    if not hasattr(network, "base_model_prefix"):
        raise UserError(f"--lora needs a transformer as student, got {type(network).__name__}")
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    name, _ = blocks.find(network)
    layers = [
        path
        for path, module in network.named_modules()
        if path.startswith(f"{name}.") and isinstance(module, nn.Linear | Conv1D)
    ]
    if not layers:
        raise UserError(f"the blocks of {type(network).__name__} have no linear layers for --lora")
    return layers
