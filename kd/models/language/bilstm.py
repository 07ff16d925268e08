"""The bidirectional LSTM that BERT is distilled into."""

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd.models.language.language_model import LanguageModel

EMBEDDING = 300  # values of a word, as of word2vec
HIDDEN = 150
MODEL_TYPE = "bilstm"  # in its configuration, where transformers have theirs


class BiLstm(nn.Module):
    """Embedding, one LSTM in each direction, a layer of ReLUs, and a linear layer.

    The last states of both directions represent a text; two texts share the LSTM and are
    represented by their states, the product and the distance of these. The LSTM backwards runs on
    the text turned round, without its padding, so that padding changes nothing and no packed
    sequences are needed, which other programs cannot run.

    Attributes:
        embedding: Vectors of the tokens.
        forwards, backwards: The two directions.
        hidden: Layer of ReLUs, 4/3 as wide as the LSTM: 200 for 150.
        classifier: Linear layer to the outputs.
        normalise: Whether the outputs are embeddings of length 1, or of any; None: they are logits.
        output: The last step, which changes nothing: its input are the outputs.

    Source: Tang et al. (2019), arXiv:1903.12136, section 3.1: 150 or 300 hidden units and 200 or
    400 ReLUs. The embeddings are random here, not word2vec's.
    """

    def __init__(
        self,
        vocabulary: int,
        outputs: int,
        hidden: int = HIDDEN,
        *,
        pairs: bool,
        normalise: bool | None = None,
    ) -> None:
        """Make a network with random weights.

        Args:
            vocabulary: Number of tokens.
            outputs: Number of outputs.
            hidden: Hidden units of each direction.
            pairs: Whether it sees pairs of texts.
            normalise: Whether its outputs are embeddings of length 1, or of any; None: logits.
        """
        super().__init__()
        self.pairs, self.normalise = pairs, normalise
        self.embedding = nn.Embedding(vocabulary, EMBEDDING)
        self.forwards = nn.LSTM(EMBEDDING, hidden, batch_first=True)
        self.backwards = nn.LSTM(EMBEDDING, hidden, batch_first=True)
        width = 4 * hidden // 3
        self.hidden = nn.Linear((8 if pairs else 2) * hidden, width)
        self.classifier = nn.Linear(width, outputs)
        self.output = nn.Identity()

    def get_classifier(self) -> nn.Module:
        """The module whose input represents a text, for losses that read it."""
        return self.classifier if self.normalise is None else self.output

    def forward(
        self,
        input_ids: Int[Tensor, "n l"],
        attention_mask: Int[Tensor, "n l"],
        token_type_ids: Int[Tensor, "n l"] | None = None,
    ) -> Float[Tensor, "n k"]:
        """Compute the outputs.

        Args:
            input_ids: Token ids.
            attention_mask: 1 at real tokens.
            token_type_ids: 1 at tokens of the second of two texts.
        """
        mask = attention_mask.bool()
        if not self.pairs:
            return self._outputs(self._represent(input_ids, mask))
        assert token_type_ids is not None, "pairs need token_type_ids"
        second = token_type_ids.bool()
        a, b = (self._represent(input_ids, mask & part) for part in (~second, second))
        return self._outputs(torch.cat([a, b, a * b, (a - b).abs()], dim=-1))

    def _outputs(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        outputs = self.classifier(F.relu(self.hidden(features)))
        return self.output(F.normalize(outputs.float(), dim=-1) if self.normalise else outputs)

    def _represent(
        self, ids: Int[Tensor, "n l"], mask: Int[Tensor, "n l"]
    ) -> Float[Tensor, "n 2h"]:
        """The last states of both directions, over the tokens of the mask, which are contiguous."""
        lengths = mask.sum(-1, keepdim=True).clamp_min(1)
        begin = mask.int().argmax(-1, keepdim=True)
        steps = torch.arange(ids.shape[1], device=ids.device)[None]
        last = ids.shape[1] - 1
        ahead = (begin + steps).clamp_max(last)
        back = (begin + lengths - 1 - steps).clamp_min(0)
        states = [
            _state_at(lstm(self.embedding(ids.gather(1, order)))[0], lengths - 1)
            for lstm, order in ((self.forwards, ahead), (self.backwards, back))
        ]
        return torch.cat(states, dim=-1)


class ScannedLstm(nn.Module):
    """An LSTM in one direction as a scan over its steps, which can be traced for any length.

    The library's own is unrolled when it is traced: a program of one length only. As fast in
    onnxruntime as its LSTM operator within a tenth for batches, and half slower for one text.
    """

    def __init__(self, lstm: nn.LSTM) -> None:
        """Take the weights of an LSTM of one layer."""
        super().__init__()
        self.lstm = lstm

    def forward(self, x: Float[Tensor, "n l d"]) -> tuple[Float[Tensor, "n l h"], None]:
        """The state at each step, as the library's LSTM gives it first."""
        from torch._higher_order_ops.scan import scan

        weights: dict[str, Tensor] = dict(self.lstm.named_parameters())
        recurrent = weights["weight_hh_l0"].T
        inputs = x @ weights["weight_ih_l0"].T + weights["bias_ih_l0"] + weights["bias_hh_l0"]
        zero = x.new_zeros(x.shape[0], self.lstm.hidden_size)

        def step(carry: tuple[Tensor, Tensor], now: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
            state, cell = carry
            i, f, g, o = (now + state @ recurrent).chunk(4, dim=-1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            state = torch.sigmoid(o) * torch.tanh(cell)
            return (state, cell), state.clone()  # a scan refuses aliases

        _, states = scan(step, (zero, zero.clone()), inputs.transpose(0, 1))
        return states.transpose(0, 1), None


def with_scans(network: BiLstm) -> BiLstm:
    """A copy of a network that can be traced for any length."""
    other = copy.deepcopy(network)
    other.forwards, other.backwards = (
        cast(nn.LSTM, ScannedLstm(lstm)) for lstm in (other.forwards, other.backwards)
    )
    return other


def build(
    vocabulary: int,
    outputs: int,
    hidden: int = HIDDEN,
    *,
    pairs: bool,
    normalise: bool | None = None,
    seed: int = 0,
) -> LanguageModel:
    """Build a BiLSTM with random weights; its configuration says how it is built again.

    Args:
        vocabulary, outputs, hidden, pairs, normalise: As for `BiLstm`.
        seed: Seed of the weights.
    """
    config = {"vocabulary": vocabulary, "outputs": outputs, "hidden": hidden, "pairs": pairs}
    config |= {} if normalise is None else {"normalise": normalise}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = BiLstm(vocabulary, outputs, hidden, pairs=pairs, normalise=normalise)
    return LanguageModel(network, config={"model_type": MODEL_TYPE, **config})


def rebuild(config: Mapping[str, Any]) -> LanguageModel:
    """Build a BiLSTM from a `LanguageModel.config`, to load weights into."""
    return build(**{key: value for key, value in config.items() if key != "model_type"})


def _state_at(states: Float[Tensor, "n l h"], step: Int[Tensor, "n 1"]) -> Float[Tensor, "n h"]:
    index = step[..., None].expand(-1, -1, states.shape[-1])
    return states.gather(1, index)[:, 0]
