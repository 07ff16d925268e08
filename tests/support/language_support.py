"""Tiny causal models and their tokenizers."""

import torch
import transformers

from kd.models.language import tokenizer as tokenizers
from kd.models.language.language_model import LanguageModel


def characters(text: str, *, bos: bool = True, eos: bool = True):
    """A tokenizer whose tokens are the characters of a text, after the special ones."""
    tokenizer = tokenizers.train_on_characters([text])
    if not bos:
        tokenizer.bos_token = None
    if not eos:
        tokenizer.eos_token = None
    return tokenizer


def causal_model(
    tokenizer, kind: str = "llama", *, seed: int = 0, positions: int = 64, dropout: float = 0.0
) -> LanguageModel:
    """A random model of two blocks of 32 values, whose vocabulary is padded by five ids."""
    size = len(tokenizer) + 5
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=size,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=positions,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
        )
    else:
        config = transformers.LlamaConfig(
            vocab_size=size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=positions,
            attention_dropout=dropout,
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = transformers.AutoModelForCausalLM.from_config(config)
        for weight in network.parameters():  # sharper than new models, so that samples differ
            if weight.ndim > 1:
                weight.data.mul_(8)
    return LanguageModel(network, vocabulary=len(tokenizer))
