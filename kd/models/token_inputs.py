"""Token ids of a batch of texts, as a network takes them."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

IGNORED = -100  # target of a token that has none, as in transformers


@dataclass(frozen=True, eq=False)
class TokenInputs:
    """Token ids of n texts, filled up to the length l of the longest.

    Attributes:
        ids: Ids; at padding that of the tokenizer's token for it.
        mask: Whether a position holds a real token.
        types: 0 for tokens of a first text and 1 for those of a second; None where the tokenizer
            has none.
    """

    ids: Int[Tensor, "n l"]
    mask: Bool[Tensor, "n l"]
    types: Int[Tensor, "n l"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "TokenInputs":
        """The same on a device."""
        types = None if self.types is None else self.types.to(device, non_blocking=non_blocking)
        return TokenInputs(
            self.ids.to(device, non_blocking=non_blocking),
            self.mask.to(device, non_blocking=non_blocking),
            types,
        )
