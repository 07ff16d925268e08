"""An encoder of texts: a transformer whose tokens become one vector, the embedding of the text.

The steps after the transformer are those of sentence-transformers: pooling over the real tokens,
linear layers, and division by the length.

Source: Reimers and Gurevych (2019), arXiv:1908.10084, section 3.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Pooling = Literal["mean", "cls", "max"]
Activation = Literal["identity", "tanh"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
MODEL_TYPE = "sentence_encoder"  # in its configuration, where transformers have theirs


@dataclass(frozen=True)
class LinearLayer:
    """Size of a linear layer after the pooling, and the function applied to its outputs."""

    inputs: int
    outputs: int
    bias: bool = True
    activation: Activation = "identity"


@dataclass(frozen=True)
class EmbeddingHead:
    """How the values of tokens become the embedding of a text.

    Attributes:
        pooling: The mean over real tokens, the value of the first one, or the largest of each.
        layers: Linear layers, in order.
        normalise: Whether embeddings have length 1.
    """

    pooling: Pooling = "mean"
    layers: tuple[LinearLayer, ...] = ()
    normalise: bool = False

    def width(self, hidden: int) -> int:
        """Number of values of an embedding, of a transformer with `hidden` values for a token."""
        return self.layers[-1].outputs if self.layers else hidden


class SentenceEncoder(nn.Module):
    """A transformer without head, and the steps from its tokens to the embedding of a text.

    The pooler that some transformers bring for classification has no part in the embedding: it is
    kept, since other programs miss its weights, and is not trained.

    Attributes:
        encoder: The transformer; returns an object with `last_hidden_state`.
        head: The steps.
        layers: The linear layers of the head.
        output: The last step, which changes nothing: its input is the embedding.
    """

    base_model_prefix = "encoder"

    def __init__(self, encoder: nn.Module, head: EmbeddingHead) -> None:
        """Take a transformer; linear layers have random weights.

        Args:
            encoder: The transformer.
            head: The steps after it.
        """
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.layers = nn.ModuleList(nn.Linear(x.inputs, x.outputs, x.bias) for x in head.layers)
        self.output = nn.Identity()
        pooler = getattr(encoder, "pooler", None)
        if isinstance(pooler, nn.Module):
            pooler.requires_grad_(False)

    @property
    def config(self) -> Any:
        """Configuration of the transformer."""
        return self.encoder.config

    @property
    def hidden_size(self) -> int:
        """Number of values of a token."""
        return int(self.config.hidden_size)

    @property
    def width(self) -> int:
        """Number of values of an embedding."""
        return self.head.width(self.hidden_size)

    def get_classifier(self) -> nn.Module:
        """The module whose input is the embedding, for losses that read it."""
        return self.output

    def forward(
        self, input_ids: Int[Tensor, "n l"], attention_mask: Int[Tensor, "n l"]
    ) -> Float[Tensor, "n d"]:
        """Compute the embeddings.

        Args:
            input_ids: Token ids.
            attention_mask: 1 at real tokens.
        """
        states = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        vectors = pool(states.float(), attention_mask.bool(), self.head.pooling)
        for layer, step in zip(self.layers, self.head.layers, strict=True):
            vectors = layer(vectors)
            vectors = vectors.tanh() if step.activation == "tanh" else vectors
        vectors = vectors.float()
        return self.output(F.normalize(vectors, dim=-1) if self.head.normalise else vectors)


def pool(
    states: Float[Tensor, "n l d"], mask: Bool[Tensor, "n l"], pooling: Pooling
) -> Float[Tensor, "n d"]:
    """One vector for the tokens of each text, in which padding never counts.

    Args:
        states: Values of the tokens.
        mask: Which tokens are real; the first one is.
        pooling: How they become one.
    """
    if pooling == "cls":
        return states[:, 0]
    padding = ~mask[..., None]
    if pooling == "max":
        return states.masked_fill(padding, -torch.inf).amax(dim=1)
    return states.masked_fill(padding, 0).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1)


def fit(
    network: SentenceEncoder, *, width: int, normalise: bool, seed: int
) -> tuple[SentenceEncoder, str | None]:
    """An encoder with the same transformer, whose embeddings can be compared with a teacher's.

    Args:
        network: The encoder; it shares its weights with the result.
        width: Number of values of the teacher's embeddings.
        normalise: Whether the teacher's embeddings have length 1.
        seed: Seed of a linear layer that is needed for another width.

    Returns:
        The encoder, and a line about the layer where there is one.
    """
    head, note = replace(network.head, normalise=normalise), None
    if network.width != width:
        layer = LinearLayer(network.width, width)
        head = replace(head, layers=(*head.layers, layer))
        note = f"a linear layer from its {network.width} values to the teacher's {width}"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fitted = SentenceEncoder(network.encoder, head)
    for layer, trained in zip(fitted.layers, network.layers, strict=False):
        layer.load_state_dict(trained.state_dict())
    return fitted, note


def describe(network: SentenceEncoder, encoder: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that `parse` reads.

    Args:
        network: The encoder.
        encoder: Configuration of its transformer.
    """
    return {"model_type": MODEL_TYPE, "encoder": dict(encoder), "head": asdict(network.head)}


def parse(config: Mapping[str, Any]) -> tuple[dict[str, Any], EmbeddingHead]:
    """The configuration of the transformer, and the head, in a configuration from `describe`."""
    head = dict(config["head"])
    layers = tuple(LinearLayer(**layer) for layer in head.pop("layers"))
    return dict(config["encoder"]), EmbeddingHead(layers=layers, **head)


def settings(head: EmbeddingHead) -> list[int]:
    """What of a head changes embeddings beside its weights, as numbers."""
    activations = [ACTIVATIONS.index(layer.activation) for layer in head.layers]
    return [POOLINGS.index(head.pooling), int(head.normalise), *activations]
