"""Tiny language models and a few texts, for the tests of terms on texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from kd.data.batching import Batch
from kd.data.text.token_batches import MaskedTokens, TokenBatches
from kd.data.text.tokenization import EncodedPart
from kd.models.language.bilstm import BiLstm
from kd.models.language.language_model import LanguageModel
from kd.models.token_inputs import IGNORED
from kd.objectives import terms
from kd.objectives.schemes import Distillation

VOCABULARY, CLASSES = 30, 3
LENGTHS = (7, 2, 4, 6, 3, 5, 2, 7)
CPU = torch.device("cpu")
_HEADS = {
    "classify": transformers.AutoModelForSequenceClassification,
    "tag": transformers.AutoModelForTokenClassification,
    "mlm": transformers.AutoModelForMaskedLM,
    "causal": transformers.AutoModelForCausalLM,
}


def bert(
    blocks: int, width: int, heads: int, task: str = "classify", *, seed: int = 0, **changes: Any
) -> LanguageModel:
    """A random BERT without dropout, with large enough weights to differ from others."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY + 2, hidden_size=width, num_hidden_layers=blocks,
        num_attention_heads=heads, intermediate_size=24, max_position_embeddings=16,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0, initializer_range=0.3,
        num_labels=CLASSES, **changes,
    )  # fmt: skip
    return _model(config, task, seed)


def gpt2(blocks: int, width: int, heads: int, task: str, *, seed: int = 0) -> LanguageModel:
    """A random GPT-2 without dropout."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=width, n_head=heads, n_layer=blocks, n_positions=16,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, initializer_range=0.3, num_labels=CLASSES,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return _model(config, task, seed)


def bilstm() -> LanguageModel:
    """A random BiLSTM."""
    torch.manual_seed(0)
    return LanguageModel(BiLstm(VOCABULARY, CLASSES, 12, pairs=False))


def _model(config: Any, task: str, seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    network = _HEADS[task].from_config(config)
    vocabulary = VOCABULARY if task in ("mlm", "causal") else None
    return LanguageModel(network, vocabulary=vocabulary)


def source(
    task: str = "classify", lengths: Sequence[int] = LENGTHS, **changes: Any
) -> TokenBatches:
    """Batches of random texts, all in one unless `size` says otherwise."""
    rng, offsets = np.random.default_rng(0), np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(5, VOCABULARY, offsets[-1]).astype(np.int32)
    targets = rng.integers(0, CLASSES, offsets[-1]).astype(np.int32) if task == "tag" else None
    if task == "causal":
        rows = [np.append(x[1:], IGNORED) for x in np.split(ids, offsets[1:-1])]
        targets = np.concatenate(rows).astype(np.int32)
    # As the tokenizers of causal models, which know no second text.
    types = None if task == "causal" else np.zeros(len(ids), np.int8)
    part = EncodedPart(ids, offsets, types, targets)
    masked = MaskedTokens(0.4, mask=4, special=(), size=VOCABULARY) if task == "mlm" else None
    options = {"size": len(lengths), "masked": masked} | changes
    return TokenBatches((part,), (0,), torch.arange(len(lengths)) % CLASSES, device=CPU, **options)


def batch(task: str = "classify", lengths: Sequence[int] = LENGTHS) -> Batch:
    """All texts, in order."""
    return next(source(task, lengths).in_order())


def objective(
    loss: str, student: LanguageModel, *teachers: LanguageModel, task: str = "classify"
) -> Distillation:
    """The distillation of a loss, in training mode."""
    for teacher in teachers:
        teacher.eval().requires_grad_(False)
    built = terms.build(
        terms.parse(loss), student, teachers,
        sample=source(task).first(2).inputs, classes=CLASSES, images=len(LENGTHS),
    )  # fmt: skip
    return Distillation(student, built, teachers)
