"""A network of texts, as a training and an evaluation call it."""

import inspect
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from kd.models import wrapped_network
from kd.models.token_inputs import TokenInputs
from kd.models.wrapped_network import WrappedNetwork


class LanguageModel(WrappedNetwork):
    """A network that takes token ids and gives logits of texts or of tokens.

    Attributes:
        network: The module that is trained and saved; takes `input_ids`, `attention_mask` and,
            where it knows them, `token_type_ids`.
        vocabulary: Number of ids of the tokenizer, to which logits of tokens are cut: models pad
            their vocabulary to round numbers, each to its own. None: logits are of classes.
        takes_types: Whether it takes the types of tokens, 1 for those of the second of two texts.
        untrained: Names of the tensors of a new head; empty where all weights are trained ones.
        config, notes: As for any network.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        vocabulary: int | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(network, config)
        self.vocabulary = vocabulary
        self.untrained: tuple[str, ...] = ()
        self.takes_types = _takes_types(network)

    def forward(self, inputs: TokenInputs) -> Float[Tensor, "n *l k"]:
        options: dict[str, Tensor] = {"attention_mask": inputs.mask.long()}
        # A network that knows types gets them: without them a pair would be one long text.
        if self.takes_types and inputs.types is not None:
            options["token_type_ids"] = inputs.types
        outputs = wrapped_network.logits(self.network(inputs.ids, **options))
        return outputs if self.vocabulary is None else outputs[..., : self.vocabulary]

    def with_network(self, network: nn.Module) -> "LanguageModel":
        return LanguageModel(network, vocabulary=self.vocabulary, config=self.config)


def _takes_types(network: nn.Module) -> bool:
    """Whether a network has an embedding for the second of two texts.

    RoBERTa takes types and has an embedding for one only; GPT-2 would take them for words.
    """
    config = getattr(network, "config", None)
    takes = "token_type_ids" in inspect.signature(network.forward).parameters
    return takes and (config is None or getattr(config, "type_vocab_size", 0) > 1)
