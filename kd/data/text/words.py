"""Words of a text for augmentation: where they begin and end, so that some can be exchanged."""

import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass

# Marks that end or enclose a sentence; others, as in `don't` and `well-made`, are part of words.
_MARKS = r""".,;:!?()\[\]{}"“”„«»…¿¡।،؟、。！？，；：（）「」"""
_ALONE = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Chinese characters
_INNER = rf"[^\s{_MARKS}{_ALONE}]+"
_WORD = re.compile(rf"([{_ALONE}]|{_INNER}(?:(?:[.:]|,(?=\d)){_INNER})*|[{_MARKS}]+)")
PAIR_CYCLE = ((True, False), (False, True), (True, True))  # which texts of a pair a copy changes


@dataclass(frozen=True)
class SplitText:
    """A text as words and what stands between them.

    Attributes:
        chunks: The text before the first word, the first word, the text before the second, and so
            on; the last is the text behind the last word. Joined they are the text.
    """

    chunks: list[str]

    @property
    def words(self) -> list[str]:
        """The words in their order; runs of punctuation marks are words too."""
        return self.chunks[1::2]

    def replace(self, place: int, word: str) -> str:
        """The text with another word at a place."""
        chunks = self.chunks.copy()
        chunks[2 * place + 1] = word
        return "".join(chunks)


def split(text: str) -> SplitText:
    """Split a text at white space and at punctuation.

    Numbers, abbreviations and addresses stay whole (`3.5`, `U.S`, `http://a.b`). Chinese characters
    and kana, which no spaces part, are words of their own.
    """
    return SplitText(_WORD.split(text))


def is_alphabetic(word: str) -> bool:
    """Whether a word has letters alone, with the marks that belong to letters as in Hindi."""
    if word.isalpha():
        return True
    return word[:1].isalpha() and all(
        character.isalpha() or unicodedata.category(character)[0] == "M" for character in word
    )


def changed_texts(count: int, copy: int) -> tuple[bool, ...]:
    """Which of `count` texts of a row a copy changes.

    Of pairs the first alone, the second alone and both, in turn: Tang et al. (2019),
    arXiv:1903.12136, section 3.4.
    """
    return (True,) if count == 1 else PAIR_CYCLE[copy % len(PAIR_CYCLE)]


def combine(
    texts: tuple[str, ...], changed: Sequence[Sequence[str]], copies: int
) -> list[tuple[str, ...]]:
    """Copies of a row, in each of which the texts of its turn are changed.

    Args:
        texts: The texts of the row.
        changed: For each text its changed versions, one for each copy.
        copies: Number of copies.
    """
    return [
        tuple(
            changed[i][copy] if turn else texts[i]
            for i, turn in enumerate(changed_texts(len(texts), copy))
        )
        for copy in range(copies)
    ]


def english_stop_words() -> Collection[str]:
    """English words without a content of their own, as scikit-learn lists them."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS  # takes a second to import

    return ENGLISH_STOP_WORDS
