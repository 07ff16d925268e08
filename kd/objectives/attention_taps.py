"""Queries, keys and values of the attention of named blocks, at the speed of fused attention.

A fused attention never has the scores that TinyBERT and MiniLM compare, so they are computed from
what goes into it. Hugging Face's transformers call attention through a registry; the function
registered here calls the library's own fused one, whose outputs it leaves as they are to the bit,
and keeps the arguments of the blocks that are tapped.

The taps sit as hooks on the modules of these blocks, where the function finds them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.errors import UserError
from kd.models.language import blocks
from kd.objectives.taps import ForwardPass, Hook, StartPass

NAME = "kd"  # of the attention function in the library's registry


@dataclass(frozen=True, eq=False)
class Attention:
    """What went into the attention of a block, with as many key and value heads as queries.

    Attributes:
        query, key, value: Vectors of each head and token, after any rotation by position.
        scaling: Factor of the scores.
        causal: Whether a token sees only itself and those before it.
    """

    query: Float[Tensor, "n h l d"]
    key: Float[Tensor, "n h l d"]
    value: Float[Tensor, "n h l d"]
    scaling: float
    causal: bool = False

    @property
    def scores(self) -> Float[Tensor, "n h l l"]:
        """Scores in float32 before the softmax and without the mask, a row for each query."""
        with torch.autocast(self.query.device.type, enabled=False):
            return self.query.float() @ self.key.float().transpose(-1, -2) * self.scaling


class AttentionTaps:
    """Reads the attention of some blocks of a network after it has run.

    Deep copies are as those of `kd.objectives.taps.Taps`: without the taps they are not tapped, and
    an object with both network and taps has taps of its own.

    Attributes:
        numbers: Numbers of the blocks, from 0, each once.
    """

    def __init__(self, network: nn.Module, numbers: Sequence[int]) -> None:
        """Tap a transformer, whose attention becomes the recording one.

        Args:
            network: A network of Hugging Face's transformers.
            numbers: Numbers of blocks; -1 is the last one.

        Raises:
            UserError: If there is no such block, or its attention cannot be chosen.
        """
        names = dict.fromkeys(blocks.name_of(network, number) for number in numbers)
        self.numbers = tuple(int(name.rpartition(".")[2]) for name in names)
        self._pass = ForwardPass()
        _choose_recording_attention(network)
        network.register_forward_pre_hook(StartPass(self._pass))
        for name, number in zip(names, self.numbers, strict=True):
            for module in network.get_submodule(name).modules():
                module.register_forward_pre_hook(_KeepAttention(self._pass, str(number)))

    def read(self) -> dict[int, Attention]:
        """The attention of the last forward pass by block, and forget it.

        Raises:
            UserError: If a block gave none: its loss would be silently zero.
        """
        features, self._pass.features = self._pass.features, None
        assert features is not None, "the network has not run since the taps were last read"
        kept = {int(name): attention for name, attention in features.items()}
        for number in self.numbers:
            if number not in kept:
                raise UserError(
                    f"block {number} has an attention that gives no queries, keys and values: "
                    "leave the terms of attention out"
                )
        return kept


class _KeepAttention(Hook):
    """Marks a module for the attention function; as a hook it does nothing."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        pass

    def keep(self, attention: Attention) -> None:
        owner = self.owner()
        # With activation checkpointing a block also runs between two passes.
        if owner is not None and owner.features is not None:
            owner.features[self.name] = attention


def _choose_recording_attention(network: nn.Module) -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, _record)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    choose = getattr(network, "set_attn_implementation", None)
    try:
        if choose is None:
            raise ValueError("it is no network of transformers")
        choose(NAME)
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{type(network).__name__} has an attention that cannot be read ({error}): leave the "
            "terms of attention out"
        ) from error


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    scaling: float | None = None,
    **options: Any,
) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    marks = [x for x in module._forward_pre_hooks.values() if isinstance(x, _KeepAttention)]
    if marks:
        groups = query.shape[1] // key.shape[1]
        factor = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        causal = bool(getattr(module, "is_causal", True))  # as the library takes it
        attention = Attention(
            query, _repeat(key, groups), _repeat(value, groups), factor, causal=causal
        )
        for mark in marks:
            mark.keep(attention)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, *args, scaling=scaling, **options
    )


def _repeat(x: Tensor, groups: int) -> Tensor:
    """As many heads as there are queries, where several of these share keys and values."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)
