"""Queries, keys and values of the attention of named blocks, at the speed of fused attention.

A fused attention never has the scores that TinyBERT and MiniLM compare, so they are computed from
what goes into it. Hugging Face's transformers call attention through a registry; the function
registered here calls the library's own fused one, whose outputs it leaves as they are to the bit,
and keeps the arguments of the blocks that are tapped.
"""

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.errors import UserError
from kd.models.language import blocks

NAME = "kd"  # of the attention function in the library's registry


@dataclass(frozen=True, eq=False)
class Attention:
    """What went into the attention of a block, with as many key and value heads as queries.

    Attributes:
        query, key, value: Vectors of each head and token, after any rotation by position.
        scaling: Factor of the scores.
    """

    query: Float[Tensor, "n h l d"]
    key: Float[Tensor, "n h l d"]
    value: Float[Tensor, "n h l d"]
    scaling: float

    @property
    def scores(self) -> Float[Tensor, "n h l l"]:
        """Scores before the softmax and without the mask, a row for each query."""
        return self.query @ self.key.transpose(-1, -2) * self.scaling


class AttentionTaps:
    """Reads the attention of some blocks of a network after it has run.

    Attributes:
        numbers: Numbers of the blocks, from 0.
    """

    def __init__(self, network: nn.Module, numbers: Sequence[int]) -> None:
        """Tap a transformer, whose attention becomes the recording one.

        Args:
            network: A network of Hugging Face's transformers.
            numbers: Numbers of blocks; -1 is the last one.

        Raises:
            UserError: If there is no such block, or its attention cannot be chosen.
        """
        name, found = blocks.find(network)
        for number in numbers:
            if not -len(found) <= number < len(found):
                raise UserError(
                    f"attention.{number} is no block of {type(network).__name__}, which has the "
                    f"blocks 0 to {len(found) - 1} in {name}"
                )
        self.numbers = tuple(dict.fromkeys(range(len(found))[number] for number in numbers))
        self._kept: dict[int, Attention] = {}
        _choose_recording_attention(network)
        for number in self.numbers:
            for module in found[number].modules():
                _TAPPED[module] = (weakref.ref(self), number)

    def read(self) -> dict[int, Attention]:
        """The attention of the last forward pass by block, and forget it.

        Raises:
            UserError: If a block gave none: its loss would be silently zero.
        """
        kept, self._kept = self._kept, {}
        for number in self.numbers:
            if number not in kept:
                raise UserError(
                    f"block {number} has an attention that gives no queries, keys and values: "
                    "leave the terms of attention out"
                )
        return kept

    def keep(self, number: int, attention: Attention) -> None:
        """Keep the attention of a block."""
        self._kept[number] = attention


# Module -> its taps and the number of its block; a deep copy of a network is not tapped.
_TAPPED: "weakref.WeakKeyDictionary[nn.Module, tuple[Any, int]]" = weakref.WeakKeyDictionary()


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

    taps, number = _TAPPED.get(module, (lambda: None, 0))
    if (own := taps()) is not None:
        groups = query.shape[1] // key.shape[1]
        factor = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        own.keep(number, Attention(query, _repeat(key, groups), _repeat(value, groups), factor))
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, *args, scaling=scaling, **options
    )


def _repeat(x: Tensor, groups: int) -> Tensor:
    """As many heads as there are queries, where several of these share keys and values."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)
