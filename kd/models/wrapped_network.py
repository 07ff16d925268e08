"""A network with what is done to its inputs and outputs, so that a training sees only batches."""

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn


class WrappedNetwork(nn.Module):
    """A network that takes the inputs of a batch, whatever it was built for.

    What stands around the network has neither weights nor buffers that are trained.

    Attributes:
        network: The module that is trained and saved; returns logits, or an object or a mapping
            with `logits`.
        config: Values needed beside the name to build the network again.
        notes: Lines about decisions made when the network was built.
        frozen_elsewhere: Whether the weights that are not trained have a source, from which they
            are loaded again, so that a checkpoint need not hold them.
    """

    def __init__(self, network: nn.Module, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.notes: tuple[str, ...] = ()
        self.frozen_elsewhere = False

    def with_network(self, network: nn.Module) -> Self:
        """Return a copy around another network of this architecture, such as averaged weights."""
        raise NotImplementedError


def logits(answer: Any) -> Tensor:
    """The tensor of logits in what a network returns."""
    if isinstance(answer, Tensor):
        return answer
    return answer["logits"] if isinstance(answer, Mapping) else answer.logits
