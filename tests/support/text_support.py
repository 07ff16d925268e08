"""Tiny models of texts, in folders as Hugging Face's are."""

from pathlib import Path
from typing import Any

import torch
import transformers

LETTERS = tuple("abcdefghij")
PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS)
TEXTS = ("a b c", "j i", "a a h g f e d", "c", "b d f", "e e e e e")


def pieces(**options: Any) -> Any:
    """A word-piece tokenizer of ten letters."""
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    return transformers.BertTokenizer(vocab=vocabulary, **options)


def bert_folder(path: Path, kind: str, *, seed: int = 0, **config: Any) -> str:
    """A folder with a BERT of two blocks, its vocabulary padded to 24, and its tokenizer.

    Args:
        path: The folder.
        kind: End of its class, as `ForMaskedLM`.
        seed: Seed of its weights, all unlike their usual initial values.
        config: Further entries of its configuration.
    """
    torch.manual_seed(seed)
    sizes = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 16}
    network = getattr(transformers, f"Bert{kind}")(transformers.BertConfig(**sizes, **config))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    network.save_pretrained(path)
    pieces().save_pretrained(path)
    return str(path)
