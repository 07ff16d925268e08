"""Tang's copies of texts: which words are exchanged for which, how often, and by what seed."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from kd.data.text import word_replacement, words
from kd.data.text.corpus import TextPart
from kd.data.text.word_replacement import WordReplacement

FREQUENT = [f"f{letter}" for letter in "abcdefghijkl"]
RARE = [f"r{letter}" for letter in "abcdefghijkl"]
TEXT = " ".join([*FREQUENT, *RARE])
# Twelve words of 100 occurrences, of which one has 150, and twelve of 10.
PART = TextPart(([" ".join(FREQUENT)] * 90 + [TEXT] * 10 + ["fa"] * 50,))
BANDS = word_replacement.count_bands(PART)
NONE = {"mask_probability": 0.0, "replace_probability": 0.0, "ngram_probability": 0.0}


def copies(text: str | tuple[str, ...], count: int = 200, row: int = 0, **numbers):
    texts = (text,) if isinstance(text, str) else text
    method = WordReplacement(BANDS, count, **{**NONE, **numbers})
    rows = method.copies_of(row, texts)
    return [x[0] for x in rows] if isinstance(text, str) else rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("it 's  n't well-made.", ["it", "'s", "n't", "well-made", "."]),
        ("(U.S.) paid «3.5», 10,000!", ["(", "U.S", ".)", "paid", "«", "3.5", "»,", "10,000", "!"]),
        ("see http://a.b/c, now", ["see", "http://a.b/c", ",", "now"]),
        ("हिन्दी में।", ["हिन्दी", "में", "।"]),
        ("我爱ab电影。", ["我", "爱", "ab", "电", "影", "。"]),
        ("  ", []),
        ("", []),
    ],
)
def test_words_and_what_is_between_them_are_the_text(text, expected):
    split = words.split(text)
    assert split.words == expected
    assert "".join(split.chunks) == text
    if expected:
        assert split.replace(0, "X") == text.replace(expected[0], "X", 1)


@pytest.mark.parametrize(
    ("word", "is_one"),
    [("film", True), ("हिन्दी", True), ("l'été", False), ("3.5", False), (",", False), ("", False)],
)
def test_words_of_letters_alone(word, is_one):
    assert words.is_alphabetic(word) == is_one


def test_a_word_is_replaced_by_one_of_its_frequency():
    drawn = [copy.split() for copy in copies(TEXT, 400, replace_probability=1.0)]
    frequent = [word for copy in drawn for word in copy[:12]]
    assert set(frequent) == set(FREQUENT)
    assert {word for copy in drawn for word in copy[12:]} == set(RARE)
    # Of 1250 occurrences in the band 150 are of one word; 4800 draws.
    assert frequent.count("fa") / 4800 == pytest.approx(0.12, abs=4 * 0.0047)


def test_words_numbers_marks_and_languages_stay_among_themselves():
    many = [f"{kind}{i}" for kind in ("w", "W", "") for i in range(1, 13)]
    text = f"{' '.join(many)} ! ? ;"
    part = TextPart(([text, "eins zwei drei"],), None, ("english", "german"))
    method = WordReplacement(
        word_replacement.count_bands(part), 100, **NONE | {"replace_probability": 1.0}
    )
    drawn = np.array([copy[0].split() for copy in method.copies_of(0, (text,), "english")])
    for first, last in ((0, 12), (12, 24), (24, 36), (36, 39)):
        assert set(drawn[:, first:last].ravel()) == set([*many, "!", "?", ";"][first:last])
    german = method.copies_of(1, ("eins zwei drei",), "german")
    assert {word for copy in german for word in copy[0].split()} == {"eins", "zwei", "drei"}


def test_an_unknown_word_stays():
    assert set(copies("fa other", replace_probability=1.0)) >= {"fb other"}
    assert all(copy.endswith(" other") for copy in copies("fa other", replace_probability=1.0))


def test_words_are_masked_and_replaced_with_their_probabilities():
    text = " ".join(RARE * 10)
    drawn = copies(text, 200, mask_probability=0.1, replace_probability=0.2, mask="<mask>")
    tokens = np.array([copy.split() for copy in drawn])
    masked = tokens == "<mask>"
    changed = (tokens != np.array(text.split())) & ~masked
    deviation = (0.1 / 24000) ** 0.5
    assert masked.mean() == pytest.approx(0.1, abs=4 * deviation)
    # One in twelve draws is the word itself.
    assert changed.mean() == pytest.approx(0.2 * 11 / 12, abs=8 * deviation)


def test_an_ngram_is_one_to_five_consecutive_words():
    text = " ".join(FREQUENT)
    drawn = copies(text, 1000, ngram_probability=1.0)
    sizes = np.bincount([len(copy.split()) for copy in drawn])
    assert len(sizes) == 6
    assert sizes[1:] / 1000 == pytest.approx([0.2] * 5, abs=4 * 0.0127)
    assert all(copy in text for copy in drawn)
    starts = {copy.split()[0] for copy in drawn if len(copy.split()) == 2}
    assert starts == set(FREQUENT[:-1])
    whole = sum(copy == text for copy in copies(text, 1000, ngram_probability=0.25))
    assert whole / 1000 == pytest.approx(0.75, abs=4 * 0.0137)


def test_of_pairs_the_first_the_second_and_both_are_changed_in_turn():
    drawn = copies(("fa fb", "ra rb"), 7, mask_probability=1.0)
    masked = "[MASK] [MASK]"
    cycle = [(masked, "ra rb"), ("fa fb", masked), (masked, masked)]
    assert drawn == [*cycle, *cycle, cycle[0]]


def test_a_copy_is_a_function_of_seed_row_and_number():
    numbers = {"mask_probability": 0.3, "replace_probability": 0.3, "ngram_probability": 0.3}
    twenty = copies(TEXT, 20, **numbers)
    copies(TEXT, 20, row=5, **numbers)
    assert copies(TEXT, 3, **numbers) == twenty[:3]
    assert copies(TEXT, 20, **numbers) == twenty
    assert copies(TEXT, 20, row=1, **numbers) != twenty
    assert copies(TEXT, 20, seed=1, **numbers) != twenty
    assert len(set(twenty)) == 20


def test_a_text_without_words_has_only_itself_as_copy():
    numbers = {"mask_probability": 0.5, "replace_probability": 0.5, "ngram_probability": 1.0}
    assert copies(" ", 3, **numbers) == [" "] * 3


@pytest.mark.parametrize(
    ("tokenizers", "expected"),
    [
        ([("[MASK]", "[UNK]", None), ("<mask>", "<unk>", "</s>")], "[MASK]"),
        ([(None, "<|end|>", "<|end|>"), ("<mask>", "<unk>", "</s>")], "<mask>"),
        ([(None, "[UNK]", None)], "[UNK]"),
        ([(None, "<|end|>", "<|end|>")], "[MASK]"),
        ([], "[MASK]"),
    ],
)
def test_the_mask_is_that_of_the_tokenizers(tokenizers, expected):
    names = ("mask_token", "unk_token", "eos_token")
    known = [
        SimpleNamespace(bos_token=None, **dict(zip(names, x, strict=True))) for x in tokenizers
    ]
    assert word_replacement.mask_text(known) == expected


def test_every_word_is_in_one_band() -> None:
    """Rare words at the end of a kind join the band before them, which loses none of its own."""
    counts = Counter({f"w{i:03}": 2 ** (12 - i // 40) for i in range(300)})
    bands = list(word_replacement._bands(counts))
    assert sorted(word for band in bands for word, _ in band) == sorted(counts)
    assert len(bands) > 2
    assert min(map(len, bands)) >= word_replacement.BAND_WORDS
