"""Copies of a text with words masked or replaced, and with parts of it alone.

A student that has few texts sees few of its teacher's answers. The copies need not be correct
sentences: the teacher answers them too.

Source: Tang et al. (2019), arXiv:1903.12136, section 3.4. Deviation: the paper replaces a word by
one with the same part of speech; here it is one that is about as frequent in the corpus, and a
word, a capitalised word, a number or a punctuation mark as the first is. That needs no tagger and
works in any language.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from kd.data.batching import derive_seed
from kd.data.text import words
from kd.data.text.corpus import TextPart
from kd.data.text.words import SplitText

MASK = "[MASK]"  # of BERT and its kind
BAND_WORDS = 10  # smallest number of words in a band, where there are so many
BAND_FACTOR = 2.0  # by which frequencies within a band differ at most, where it has enough words
_DRAWS = 3  # of a copy beside those of its words: whether an n-gram, its length, its place


@dataclass(frozen=True, eq=False)
class FrequencyBands:
    """The words of a corpus in bands of like frequency.

    A band is an interval of the cumulative counts, so that a uniform number in it draws a word of
    the band with the probability of its count.

    Attributes:
        words: All words, band after band.
        cumulative: Number of occurrences of the words up to and with each.
        band: Interval of the band of a word, by its language and itself.
    """

    words: list[str]
    cumulative: Int[np.ndarray, " words"]
    band: Mapping[tuple[str | None, str], tuple[int, int]]

    def interval(self, word: str, language: str | None) -> tuple[int, int]:
        """Begin and end of the band of a word; an empty one for a word that is not known."""
        return self.band.get((language, word), (0, 0))

    def draw(self, positions: Int[np.ndarray, " n"]) -> list[str]:
        """The words of these occurrences, numbered from 0."""
        return [self.words[i] for i in np.searchsorted(self.cumulative, positions, "right")]


def count_bands(part: TextPart) -> FrequencyBands:
    """Sort the words of a part into bands.

    Each language, and within it words, words with a capital, numbers and punctuation marks, have
    bands of their own.

    Args:
        part: Rows of texts, or of pairs.
    """
    counts: dict[str | None, Counter[str]] = {}
    for column in part.texts:
        languages = part.languages or (None,) * len(column)
        for text, language in zip(column, languages, strict=True):
            counts.setdefault(language, Counter()).update(words.split(text).words)
    ordered, totals, bands = [], [], {}
    end = 0
    for language in sorted(counts, key=str):
        for band in _bands(counts[language]):
            begin, end = end, end + sum(count for _, count in band)
            bands |= {(language, word): (begin, end) for word, _ in band}
            ordered += [word for word, _ in band]
            totals += [count for _, count in band]
    return FrequencyBands(ordered, np.cumsum(totals, dtype=np.int64), bands)


def _bands(counts: Counter[str]) -> Iterator[list[tuple[str, int]]]:
    """Yield words of one kind and of like frequency, with their counts."""
    order = sorted(counts.items(), key=lambda pair: (_kind(pair[0]), -pair[1], pair[0]))
    for _, group in groupby(order, key=lambda pair: _kind(pair[0])):
        bands: list[list[tuple[str, int]]] = []
        for word, count in group:
            full = bands and len(bands[-1]) >= BAND_WORDS
            if not bands or (full and count * BAND_FACTOR < bands[-1][0][1]):
                bands.append([])
            bands[-1].append((word, count))
        if len(bands) > 1 and len(bands[-1]) < BAND_WORDS:
            rest = bands.pop()
            bands[-1] += rest
        yield from bands


def _kind(word: str) -> int:
    """0 for words, 1 for words with a capital, 2 for numbers, 3 for punctuation marks."""
    if any(map(str.isalpha, word)):
        return int(word[0].isupper())
    return 2 if any(map(str.isdigit, word)) else 3


@dataclass(frozen=True, eq=False)
class WordReplacement:
    """Tang's copies of a text: words masked or replaced, then perhaps an n-gram alone.

    Attributes:
        bands: Words that replace others.
        copies: Number of copies of a row.
        seed: Seed of all draws; a copy depends on it, on the number of its row and on its own.
        mask: Text of the mask: that of the tokenizer of those who read the copies (`mask_text`).
        mask_probability: Probability that a word becomes the mask.
        replace_probability: Probability that a word is replaced.
        ngram_probability: Probability that only some consecutive words of a copy are left.
        longest_ngram: Largest number of these; from 1 on all are equally likely.
    """

    bands: FrequencyBands
    copies: int
    seed: int = 0
    mask: str = MASK
    mask_probability: float = 0.1
    replace_probability: float = 0.1
    ngram_probability: float = 0.25
    longest_ngram: int = 5

    def copies_of(
        self, row: int, texts: tuple[str, ...], language: str | None = None
    ) -> list[tuple[str, ...]]:
        """The copies of a row, some of which may be alike; fewer copies are the first of more.

        Args:
            row: Number of the row.
            texts: Its text, or its pair.
            language: Its language, where it is known.
        """
        split = [words.split(text) for text in texts]
        sizes = [2 * len(text.words) + _DRAWS for text in split]
        rng = np.random.default_rng(derive_seed(self.seed, row))
        draws = np.split(rng.random((self.copies, sum(sizes))), np.cumsum(sizes)[:-1], axis=1)
        changed = [self._change(text, x, language) for text, x in zip(split, draws, strict=True)]
        return words.combine(texts, changed, self.copies)

    def _change(
        self, text: SplitText, draws: Float[np.ndarray, "copies draws"], language: str | None
    ) -> list[str]:
        """A changed version of a text for each row of uniform numbers."""
        count = len(text.words)
        action, choice = draws[:, :count], draws[:, count : 2 * count]
        copies = [text.chunks.copy() for _ in range(len(draws))]
        for copy, place in np.argwhere(action < self.mask_probability).tolist():
            copies[copy][2 * place + 1] = self.mask
        intervals = [self.bands.interval(word, language) for word in text.words]
        begin, end = np.array(intervals, np.int64).reshape(-1, 2).T
        both = self.mask_probability + self.replace_probability
        replaced = (action >= self.mask_probability) & (action < both) & (begin < end)
        # A product with a number just below 1 may be rounded up to the end.
        positions = np.minimum(begin + (choice * (end - begin)).astype(np.int64), end - 1)
        others = self.bands.draw(positions[replaced])
        for (copy, place), word in zip(np.argwhere(replaced).tolist(), others, strict=True):
            copies[copy][2 * place + 1] = word
        whether, length, place = draws[:, 2 * count :].T
        for copy in np.flatnonzero(whether < self.ngram_probability) if count else ():
            size = min(1 + int(length[copy] * self.longest_ngram), count)
            first = int(place[copy] * (count - size + 1))
            copies[copy] = copies[copy][2 * first + 1 : 2 * (first + size)]
        return ["".join(chunks) for chunks in copies]

    def record(self) -> dict[str, Any]:
        """All that the copies of given texts depend on, JSON-compatible."""
        return {"method": "words"} | {k: v for k, v in vars(self).items() if k != "bands"}


def mask_text(tokenizers: Sequence[Any]) -> str:
    """The text of the mask for those who read the copies.

    It is the mask that the first of the tokenizers has; where none has one, their token for unknown
    words; and `MASK` where that is missing too.

    Args:
        tokenizers: Tokenizers of those who read the copies, the teacher's first: it has learned
            what its mask means, while a student learns it from the copies.
    """
    ends = {x for tokenizer in tokenizers for x in (tokenizer.bos_token, tokenizer.eos_token)}
    masks = [tokenizer.mask_token for tokenizer in tokenizers]
    unknown = [tokenizer.unk_token for tokenizer in tokenizers if tokenizer.unk_token not in ends]
    return next(filter(None, [*masks, *unknown]), MASK)
