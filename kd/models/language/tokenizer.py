"""Tokenizers: any of Hugging Face, and those of words or characters for students from scratch."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dsdistill.harness.errors import UserError, first_line
from kd.models.zoo.huggingface import import_transformers

SAMPLE = 200  # texts on which two tokenizers are compared
PAD, UNKNOWN, MASK, BEGIN, END = "[PAD]", "[UNK]", "[MASK]", "[BOS]", "[EOS]"


def load(name: str) -> Any:
    """Load a tokenizer from a folder or by a model's name; its code is never run.

    Raises:
        UserError: If there is none, or it has no padding and nothing that can pad.
    """
    auto = import_transformers().AutoTokenizer
    try:
        tokenizer = auto.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # hub, network, file and format errors share no base class
        raise UserError(f"cannot get the tokenizer of {name}: {first_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # the library invents one of these alone
        raise UserError(f"{name} has no tokenizer: its vocabulary is missing")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {name} has no token for padding, and none for ends")
        tokenizer.pad_token = tokenizer.eos_token  # of causal models; what is padding says the mask
    return tokenizer


def train_on_words(texts: Iterable[str], *, size: int = 30_000, least: int = 2) -> Any:
    """Make a tokenizer of lower-case words and punctuation marks.

    Args:
        texts: Training texts.
        size: Largest number of words, the most frequent ones; the others are unknown.
        least: Smallest number of times that a word occurs.
    """
    import tokenizers

    library = import_transformers()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token=UNKNOWN))
    normalise = [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase()]
    words.normalizer = tokenizers.normalizers.Sequence(normalise)  # pyright: ignore
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # pyright: ignore
    trainer = tokenizers.trainers.WordLevelTrainer(
        vocab_size=size,
        min_frequency=least,
        special_tokens=[PAD, UNKNOWN, MASK],
        show_progress=False,
    )
    words.train_from_iterator(texts, trainer)
    return library.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        unk_token=UNKNOWN,
        mask_token=MASK,
        padding_side="right",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def train_on_characters(texts: Iterable[str]) -> Any:
    """Make a tokenizer of single characters, for causal models from scratch.

    Args:
        texts: Training texts; characters that they lack are unknown.
    """
    import tokenizers

    library = import_transformers()
    special = [PAD, UNKNOWN, BEGIN, END]
    alphabet = sorted(set().union(*texts))
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    characters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    each = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    characters.pre_tokenizer = each  # pyright: ignore
    characters.decoder = tokenizers.decoders.Fuse()  # pyright: ignore
    return library.PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
    )


def same_ids(one: Any, other: Any, texts: Sequence[str]) -> bool:
    """Whether two tokenizers give the same ids: by their vocabularies and on texts.

    Equal vocabularies are not enough, since one may lower the case; nor is their size, which models
    pad to round numbers.

    Args:
        one, other: Tokenizers.
        texts: Texts of the data; the first `SAMPLE` are compared.
    """
    if one.get_vocab() != other.get_vocab():
        return False
    sample = list(texts[:SAMPLE])
    if not sample:
        return True
    ids, other_ids = (each(sample, verbose=False)["input_ids"] for each in (one, other))
    return ids == other_ids


def marks_second_text(tokenizer: Any) -> bool:
    """Whether a tokenizer tells the tokens of the second of two texts from those of the first."""
    return any(tokenizer("a", "b").get("token_type_ids") or [])


def describe(tokenizer: Any) -> str:
    """All that a tokenizer does, as JSON for a key; of one that Python computes its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inner = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    # How the last call has padded and cut is no part of it.
    kept = {key: x for key, x in inner.items() if key not in ("padding", "truncation")}
    parts = [kept, tokenizer.special_tokens_map, tokenizer.chat_template]
    return json.dumps(parts, sort_keys=True, default=str)


def save(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer where `load` finds it."""
    tokenizer.save_pretrained(folder)
