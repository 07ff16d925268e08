"""Transformers of texts: those of Hugging Face with their weights, and small fresh ones.

hf:ID, hf:DIR      a model from the hub or a folder, with its weights
bert:4x312         BERT with four blocks of 312 values and random weights
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dsdistill.harness.errors import UserError, first_line
from kd.models.language import blocks
from kd.models.language.language_model import LanguageModel
from kd.models.zoo.huggingface import import_transformers

CLASSES = {  # task -> class of the library that has its head
    "classify": "AutoModelForSequenceClassification",
    "regress": "AutoModelForSequenceClassification",
    "tag": "AutoModelForTokenClassification",
    "mlm": "AutoModelForMaskedLM",
    "causal": "AutoModelForCausalLM",
}
OF_TOKENS = ("mlm", "causal")  # tasks whose classes are the vocabulary
BERT_HEADS = 12
_FRESH = re.compile(r"bert:([1-9][0-9]*)x([1-9][0-9]*)")
_MAY_BE_NEW = ("pooler",)  # of a model that was trained to predict hidden tokens


def load(name: str, task: str, classes: Sequence[str], tokenizer: Any) -> LanguageModel:
    """Load a model with its weights; a head for other classes is new.

    Args:
        name: Folder, or name on the hub.
        task: One of `CLASSES`.
        classes: Names of the classes or tags; empty for other tasks.
        tokenizer: Its tokenizer.

    Raises:
        UserError: If it cannot be had, or weights of its blocks are missing.
    """
    auto = getattr(import_transformers(), CLASSES[task])
    options: dict[str, Any] = {}
    if task not in OF_TOKENS:
        options = _labels(task, classes) | {"ignore_mismatched_sizes": True}
    try:
        network, info = auto.from_pretrained(
            name, output_loading_info=True, trust_remote_code=False, **options
        )
    except Exception as error:  # hub, network, file and format errors share no base class
        raise UserError(f"cannot load hf:{name} for {task}: {first_line(error)}") from error
    fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    body = f"{network.base_model_prefix}."
    lacking = sorted(
        key for key in fresh if key.startswith(body) and key.split(".")[1] not in _MAY_BE_NEW
    )
    if lacking:
        raise UserError(
            f"hf:{name} has no weights for {len(lacking)} tensors, such as {lacking[0]}: it is no "
            f"trained {type(network).__name__}"
        )
    model = _wrap(network.float(), task, tokenizer)
    if fresh:
        model.notes = (f"{len(fresh)} new tensors: {', '.join(sorted(fresh)[:4])}",)
    return model


def fresh(
    name: str, task: str, classes: Sequence[str], tokenizer: Any, *, seed: int, positions: int
) -> LanguageModel:
    """Build a BERT with random weights, for the vocabulary of a tokenizer.

    Blocks are as BERT's: four times as wide in between, and twelve heads where these divide the
    width, as in BERT-base, all-MiniLM and TinyBERT; otherwise the largest number below that does.
    TinyBERT's 4x312 is 1200 wide in between, here 1248.

    Args:
        name: `bert:LxD`.
        task, classes, tokenizer: As for `load`.
        seed: Seed of the weights.
        positions: Largest number of tokens of a text.

    Raises:
        UserError: If the name is no such name.
    """
    match = _FRESH.fullmatch(name)
    if match is None:
        raise UserError(f"a fresh BERT is named by blocks and width, as bert:4x312, got {name}")
    depth, width = map(int, match.groups())
    heads = next(h for h in range(min(BERT_HEADS, width), 0, -1) if width % h == 0)
    library = import_transformers()
    config = library.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
        **(_labels(task, classes) if task not in OF_TOKENS else {}),
    )
    return _from_config(config, task, tokenizer, seed)


def rebuild(config: Mapping[str, Any], task: str, tokenizer: Any) -> LanguageModel:
    """Build a model from a `LanguageModel.config`, to load weights into.

    Raises:
        UserError: If the library does not know such a model.
    """
    library = import_transformers()
    try:
        known = library.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "auto_map"})
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"no model can be built from its configuration: {first_line(error)}"
        ) from error
    return _from_config(known, task, tokenizer, 0)


def keep_blocks(
    model: LanguageModel, numbers: Sequence[int], task: str, tokenizer: Any
) -> LanguageModel:
    """A copy with some of the blocks, as `blocks.keep`."""
    return _wrap(blocks.keep(model.network, numbers), task, tokenizer)


def _labels(task: str, classes: Sequence[str]) -> dict[str, Any]:
    if task == "regress":
        return {"num_labels": 1, "problem_type": "regression"}
    names = dict(enumerate(classes))
    return {"id2label": names, "label2id": {name: i for i, name in names.items()}}


def _from_config(config: Any, task: str, tokenizer: Any, seed: int) -> LanguageModel:
    auto = getattr(import_transformers(), CLASSES[task])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _wrap(auto.from_config(config, trust_remote_code=False), task, tokenizer)


def _wrap(network: nn.Module, task: str, tokenizer: Any) -> LanguageModel:
    settings: Any = network.config
    config = json.loads(settings.to_json_string(use_diff=False))
    vocabulary = len(tokenizer) if task in OF_TOKENS else None
    return LanguageModel(network, vocabulary=vocabulary, config=config)
