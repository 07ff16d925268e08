"""Token ids of texts, pairs and tagged sentences."""

import numpy as np
import pytest
import transformers

from dsdistill.harness.errors import UserError
from kd.data.text import tokenization
from kd.data.text.corpus import TextPart
from kd.models.language import tokenizer as tokenizers
from kd.models.token_inputs import IGNORED

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s", "mat", "on"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A word-piece tokenizer of a few words, from its folder."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return tokenizers.load(str(folder))


def row(part: tokenization.EncodedPart, i: int) -> list[str]:
    return [WORDS[j] for j in part.ids[part.offsets[i] : part.offsets[i + 1]]]


def test_texts_become_ids_with_special_tokens(bert):
    part = tokenization.encode(TextPart((["The cats", "cat"],)), bert, 16)
    assert row(part, 0) == ["[CLS]", "the", "cat", "##s", "[SEP]"]
    assert part.lengths.tolist() == [5, 3]
    assert part.truncated == 0
    assert len(part) == 2


def test_pairs_have_types_and_the_longer_text_is_cut(bert):
    part = tokenization.encode(TextPart((["cat"], ["the cat sat on the mat"])), bert, 7)
    assert row(part, 0) == ["[CLS]", "cat", "[SEP]", "the", "cat", "sat", "[SEP]"]
    assert part.types.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert part.truncated == 1


def test_the_first_piece_of_a_token_has_its_tag(bert):
    tags = (np.array([3, 5]), np.array([7]))
    part = tokenization.encode(TextPart(([["the", "cats"], ["mat"]],), tags), bert, 16)
    assert row(part, 0) == ["[CLS]", "the", "cat", "##s", "[SEP]"]
    skip = IGNORED
    assert part.targets.tolist() == [skip, 3, 5, skip, skip, skip, 7, skip]


def test_more_rows_than_one_call_takes(bert, monkeypatch):
    texts = TextPart((["the cat", "mat", "on"] * 5,))
    whole = tokenization.encode(texts, bert, 8)
    monkeypatch.setattr(tokenization, "ROWS_PER_CALL", 4)
    parts = tokenization.encode(texts, bert, 8)
    np.testing.assert_array_equal(whole.ids, parts.ids)
    np.testing.assert_array_equal(whole.offsets, parts.offsets)


def test_no_rows(bert):
    part = tokenization.encode(TextPart(([],)), bert, 8)
    assert len(part) == 0
    assert len(part.ids) == 0


def test_a_length_without_room_is_refused(bert):
    with pytest.raises(UserError, match="more than the 2 special tokens"):
        tokenization.encode(TextPart((["cat"],)), bert, 2)


def test_words_of_the_training_texts(tmp_path):
    texts = ["The cat sat.", "the mat", "a cat"]
    words = tokenizers.train_on_words(texts, least=2)
    assert set(words.get_vocab()) == {"[PAD]", "[UNK]", "[MASK]", "the", "cat"}
    tokenizers.save(words, tmp_path)
    again = tokenizers.load(str(tmp_path))
    assert tokenizers.same_ids(words, again, texts)
    part = tokenization.encode(TextPart((["The dog"],)), again, 8)
    assert again.convert_ids_to_tokens(part.ids.tolist()) == ["the", "[UNK]"]


def test_tokenizers_differ_by_words_and_by_case(bert):
    vocabulary = bert.get_vocab()
    cased = transformers.BertTokenizer(vocab=vocabulary, do_lower_case=False)
    assert tokenizers.same_ids(bert, cased, ["the cat"])
    assert not tokenizers.same_ids(bert, cased, ["The cat"])
    other = transformers.BertTokenizer(vocab=vocabulary | {"dog": len(vocabulary)})
    assert not tokenizers.same_ids(bert, other, [])


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot get the tokenizer") as error:
        tokenizers.load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_characters_of_the_training_texts(tmp_path):
    text = "Oh \u00e9,\n\n  a tab\t."
    tokenizer = tokenizers.train_on_characters([text, "z"])
    tokenizers.save(tokenizer, tmp_path)
    again = tokenizers.load(str(tmp_path))
    assert tokenizers.same_ids(tokenizer, again, [text])
    ids = again(text)["input_ids"]
    assert len(ids) == len(text)
    assert again.decode(ids, clean_up_tokenization_spaces=False) == text
    assert again.convert_ids_to_tokens(again("zq")["input_ids"]) == ["z", "[UNK]"]


def test_a_text_without_tokens_is_one_unknown_token():
    words = tokenizers.train_on_words(["a b a b"])
    encoded = tokenization.encode(TextPart((["a b", "", "  "],)), words, 8)
    assert encoded.lengths.tolist() == [2, 1, 1]
    assert encoded.ids[2:].tolist() == [words.unk_token_id] * 2
    tagged = TextPart(([["a"], []],), (np.array([1]), np.array([], np.int64)))
    encoded = tokenization.encode(tagged, words, 8)
    assert encoded.targets is not None
    assert encoded.targets.tolist() == [1, IGNORED]
