"""Texts as the ids of their tokens, one row after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int

from dsdistill.harness.errors import UserError
from kd.data.text.corpus import TextPart
from kd.models.token_inputs import IGNORED

ROWS_PER_CALL = 1000  # bounds the memory of the library's own objects


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

    def first(self, count: int) -> "EncodedPart":
        """The first rows."""
        end = self.offsets[count]
        arrays = {"ids": self.ids, "types": self.types, "targets": self.targets}
        cut = {name: None if array is None else array[:end] for name, array in arrays.items()}
        return replace(self, offsets=self.offsets[: count + 1], text_bytes=None, **cut)


def encode(part: TextPart, tokenizer: Any, max_length: int) -> EncodedPart:
    """Encode the texts, or pairs of texts, of a part.

    Args:
        part: Rows of texts. Lists of tokens, for tags, are encoded as they are, and the tag of a
            token is the target of its first piece.
        tokenizer: Tokenizer of the model.
        max_length: Largest number of tokens of a row, special tokens included; of pairs the longer
            text is cut first. A row without any token becomes one unknown token.

    Raises:
        UserError: If `max_length` has no room for a text beside the special tokens.
    """
    tagged = bool(len(part)) and not isinstance(part.texts[0][0], str)
    special = tokenizer.num_special_tokens_to_add(pair=len(part.texts) == 2)
    if max_length <= special:
        raise UserError(f"--max-length must be more than the {special} special tokens of a row")
    # Without special tokens an empty text has no token at all, and networks need one.
    empty = tokenizer.pad_token_id if tokenizer.unk_token_id is None else tokenizer.unk_token_id
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
        ids += [row or [empty] for row in cut["input_ids"]]
        types += [row or [0] for row in cut.get("token_type_ids") or []]
        if tagged and part.labels is not None:
            tags = part.labels[rows]
            targets += [
                _first_pieces(cut.word_ids(i), own) or [IGNORED] for i, own in enumerate(tags)
            ]
    lengths = np.array([len(row) for row in ids], np.int64)
    return EncodedPart(
        _flat(ids, np.int32),
        np.concatenate([[0], np.cumsum(lengths)]),
        _flat(types, np.int8) if types else None,
        _flat(targets, np.int32) if targets else None,
        truncated,
    )


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
