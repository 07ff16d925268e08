"""Texts as token ids: any tokenizer of Hugging Face, and one of words for students from scratch."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from dsdistill.harness.errors import UserError, first_line
from kd.data.text.corpus import TextPart
from kd.models.token_inputs import IGNORED
from kd.models.zoo.huggingface import import_transformers

ROWS_PER_CALL = 1000  # bounds the memory of the library's own objects
SAMPLE = 200  # texts on which two tokenizers are compared
PAD, UNKNOWN, BEGIN, END = "[PAD]", "[UNK]", "[BOS]", "[EOS]"


@dataclass(frozen=True, eq=False)
class EncodedPart:
    """Token ids of the rows of a part, one row after the other.

    Attributes:
        ids: Ids of all N tokens.
        offsets: Begin of each of n rows in `ids`, and the end of the last.
        types: 0 for tokens of the first text and 1 for those of the second; None where the
            tokenizer has none.
        targets: Label of each token for tasks that have one, `IGNORED` where it has none; for
            causal models the token after it.
        truncated: Number of rows that were cut to the largest length.
        left_out: Number of rows that are not here, since nothing of them would be learned.
        text_bytes: Number of UTF-8 bytes that the targets spell; None where they spell no text, or
            not exactly.
    """

    ids: Int[np.ndarray, " N"]
    offsets: Int[np.ndarray, " n+1"]
    types: Int[np.ndarray, " N"] | None = None
    targets: Int[np.ndarray, " N"] | None = None
    truncated: int = 0
    left_out: int = 0
    text_bytes: int | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        """Number of tokens of each row."""
        return np.diff(self.offsets)


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
        vocab_size=size, min_frequency=least, special_tokens=[PAD, UNKNOWN], show_progress=False
    )
    words.train_from_iterator(texts, trainer)
    return library.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, unk_token=UNKNOWN, padding_side="right"
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


def encode(part: TextPart, tokenizer: Any, max_length: int) -> EncodedPart:
    """Encode the texts, or pairs of texts, of a part.

    Args:
        part: Rows of texts. Lists of tokens, for tags, are encoded as they are, and the tag of a
            token is the target of its first piece.
        tokenizer: Tokenizer of the model.
        max_length: Largest number of tokens of a row, special tokens included; of pairs the longer
            text is cut first.

    Raises:
        UserError: If `max_length` has no room for a text beside the special tokens.
    """
    tagged = bool(len(part)) and not isinstance(part.texts[0][0], str)
    special = tokenizer.num_special_tokens_to_add(pair=len(part.texts) == 2)
    if max_length <= special:
        raise UserError(f"--max-length must be more than the {special} special tokens of a row")
    ids: list[list[int]] = []
    types: list[list[int]] = []
    targets: list[Sequence[int]] = []
    truncated = 0
    for rows in _chunks(len(part)):
        columns = [list(column[rows]) for column in part.texts]
        options: dict[str, Any] = {"is_split_into_words": True} if tagged else {}
        whole = _call(tokenizer, columns, **options)
        truncated += sum(len(row) > max_length for row in whole["input_ids"])
        cut = _call(tokenizer, columns, truncation=True, max_length=max_length, **options)
        ids += cut["input_ids"]
        types += cut.get("token_type_ids") or []
        if tagged and part.labels is not None:
            tags = part.labels[rows]
            targets += [_first_pieces(cut.word_ids(i), own) for i, own in enumerate(tags)]
    lengths = np.array([len(row) for row in ids], np.int64)
    return EncodedPart(
        _flat(ids, np.int32),
        np.concatenate([[0], np.cumsum(lengths)]),
        _flat(types, np.int8) if types else None,
        _flat(targets, np.int32) if targets else None,
        truncated,
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
    return not sample or one(sample)["input_ids"] == other(sample)["input_ids"]


def _call(tokenizer: Any, columns: list[list[Any]], **options: Any) -> Any:
    # Lengths are this module's concern, not the library's warnings.
    return tokenizer(*columns, verbose=False, padding=False, **options)


def _first_pieces(words: Sequence[int | None], tags: Int[np.ndarray, " l"]) -> list[int]:
    previous, targets = None, []
    for word in words:
        first = word is not None and word != previous
        targets.append(int(tags[word]) if first else IGNORED)
        previous = word
    return targets


def _chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, ROWS_PER_CALL):
        yield slice(start, min(start + ROWS_PER_CALL, count))


def _flat(rows: Sequence[Sequence[int]], kind: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, kind), *(np.asarray(row, kind) for row in rows)])


def save(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer where `load` finds it."""
    tokenizer.save_pretrained(folder)
