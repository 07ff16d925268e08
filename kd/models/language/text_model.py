"""A network of texts with everything needed to use it: tokenizer, classes and length."""

from dataclasses import dataclass
from typing import Any

from dsdistill.harness.errors import UserError
from kd.models.language import transformer
from kd.models.language.bilstm import BiLstm
from kd.models.language.language_model import LanguageModel
from kd.models.language.sentence_encoder import SentenceEncoder
from kd.models.language.task import Task

DEFAULT_LENGTH = 128  # tokens of a text, where neither the user nor an earlier run says it


@dataclass(frozen=True, eq=False)
class TextModel:
    """A network of texts with everything needed to use it.

    Attributes:
        network: Network of token ids.
        name: Name that it was built from: `hf:ID`, `bilstm:150`, `bert:4x312`; of a copy with some
            of the blocks also their numbers.
        task: What it is for.
        classes: Names of the classes or tags in the order of the outputs; empty for other tasks.
        tokenizer: Its tokenizer, of transformers.
        max_length: Largest number of tokens of a text, special ones included.
        pairs: Whether it was built for pairs of texts.
    """

    network: LanguageModel
    name: str
    task: Task
    classes: tuple[str, ...]
    tokenizer: Any
    max_length: int
    pairs: bool

    @property
    def positions(self) -> int | None:
        """Largest number of tokens that the network takes; None where it takes any."""
        return positions(self.network)

    @property
    def embedding_width(self) -> int:
        """Number of values of an embedding, of a model for the task `embed`."""
        network = self.network.network
        if isinstance(network, BiLstm):
            return network.classifier.out_features
        assert isinstance(network, SentenceEncoder), "the model gives no embeddings"
        return network.width


def positions(network: LanguageModel) -> int | None:
    """Largest number of tokens that a network takes; None where it takes any."""
    is_bilstm = isinstance(network.network, BiLstm)
    return None if is_bilstm else transformer.positions(network.network)


def require_same_pairs(who: str, model: TextModel, pairs: bool) -> None:
    """Refuse a BiLSTM for pairs of texts where the data are single ones, and the reverse.

    Args:
        who: Name of the model in messages.
        model: The model.
        pairs: Whether the data are pairs.

    Raises:
        UserError: If it is such a BiLSTM; a transformer takes both.
    """
    if isinstance(model.network.network, BiLstm) and model.pairs != pairs:
        other, these = ("pairs of texts" if x else "single texts" for x in (model.pairs, pairs))
        raise UserError(f"{who} is a {model.name} for {other}, and the data are {these}")


def choose_length(who: str, max_length: int | None, positions: int | None) -> int:
    """The largest number of tokens of a text, by default 128 or as many as the network takes.

    Args:
        who: Name of the model in messages.
        max_length: The user's choice; None without.
        positions: Largest number of tokens that the network takes; None where it takes any.

    Raises:
        UserError: If the choice is more than that.
    """
    if max_length is None:
        return DEFAULT_LENGTH if positions is None else min(DEFAULT_LENGTH, positions)
    if positions is not None and max_length > positions:
        raise UserError(
            f"--max-length {max_length} is more than the {positions} tokens that {who} takes: "
            f"--max-length {positions}"
        )
    return max_length
