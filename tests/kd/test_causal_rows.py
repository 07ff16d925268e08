"""Rows of causal models: which tokens are targets, at which positions, and what is cut."""

import json
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from dsdistill.harness.errors import UserError
from kd.data.text import causal_rows, corpus
from kd.data.text.corpus import TextPart
from kd.models.token_inputs import IGNORED

LINES = ["5+5=10, and 5 + 6 = 11.", "the cat sat on the mat, the cat sat"] * 5
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_pairs(size: int = 300, **special: str):
    """A byte-level tokenizer with merges, such as `5+` and ` cat`."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(LINES, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def sentence_pieces():
    """A tokenizer that puts a space before each text, as Llama's does."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", *SPECIAL]
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=special, show_progress=False)
    inner.train_from_iterator(LINES, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>"
    )


BARE = byte_pairs()
BYTES = byte_pairs(bos_token="<s>", eos_token="</s>")
CHAT = byte_pairs(eos_token="<|im_end|>")
CHAT.chat_template = CHATML
PIECES = sentence_pieces()


def rows(part) -> list[tuple[list[int], list[int]]]:
    ends = part.offsets
    return [(part.ids[a:b].tolist(), part.targets[a:b].tolist()) for a, b in pairwise(ends)]


def learned(tokenizer, targets) -> str:
    return tokenizer.decode([i for i in targets if i != IGNORED])


def pairs(*given_pairs: tuple[str, str]) -> TextPart:
    return TextPart(tuple(list(column) for column in zip(*given_pairs, strict=True)))


def test_targets_of_a_completion_by_hand():
    ids, targets = rows(causal_rows.encode(pairs(("the cat", " sat")), BYTES, 64))[0]
    tokens = [BYTES.decode([i]) for i in ids]
    assert (tokens[0], tokens[-1]) == ("<s>", "</s>")
    prompt = BYTES("the cat", add_special_tokens=False)["input_ids"]
    assert ids[1 : 1 + len(prompt)] == prompt
    # The last token of the prompt predicts the first of the completion, the last token nothing.
    first = len(prompt)
    assert targets == [IGNORED] * first + ids[first + 1 :] + [IGNORED]
    assert learned(BYTES, targets) == " sat</s>"


@given(prompt=st.text("5+= 1catseo\n\u00e9", max_size=12), answer=st.text("5+= 1catseo\n\u00e9"))
@settings(max_examples=60, deadline=None)
def test_the_targets_are_the_completion_and_the_prompt_is_as_in_generation(prompt, answer):
    ids, targets = rows(causal_rows.encode(pairs((prompt, answer)), BYTES, 10_000))[0]
    assert learned(BYTES, targets) == answer + "</s>"
    alone = causal_rows.prompt_ids(prompt, BYTES).tolist()
    assert ids[: len(alone)] == alone
    assert sum(i != IGNORED for i in targets) == len(ids) - len(alone)


@pytest.mark.parametrize(
    ("prompt", "answer"), [("5", "+5"), ("5+5=10, a", "nd 5 + 6 = 11. the cat")]
)
def test_a_token_across_the_boundary_is_divided(prompt, answer):
    alone, whole = (
        BARE(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + answer)
    )
    assert whole[: len(alone)] != alone
    ids, targets = rows(causal_rows.encode(pairs((prompt, answer)), BARE, 64))[0]
    assert ids[: len(alone)] == alone
    assert learned(BARE, targets) == answer


def test_no_space_is_put_between_prompt_and_completion():
    for prompt, answer in (("the cat", " sat on"), ("5 + 6", " = 11."), ("the c", "at sat")):
        ids, _ = rows(causal_rows.encode(pairs((prompt, answer)), PIECES, 64))[0]
        alone = causal_rows.prompt_ids(prompt, PIECES).tolist()
        assert ids[: len(alone)] == alone
        if answer[0] == " ":
            assert PIECES.decode(ids, skip_special_tokens=True) == prompt + answer


def test_rows_are_cut_at_their_end_and_counted():
    data = pairs(("the cat", " sat on the mat"), ("the cat sat on the mat, " * 4, "no"), ("a", "b"))
    part = causal_rows.encode(data, BYTES, 5)
    assert (len(part), part.truncated, part.left_out) == (2, 2, 1)
    ids, targets = rows(part)[0]
    assert len(ids) == 5
    assert " sat on the mat".startswith(learned(BYTES, targets))
    assert learned(BYTES, rows(part)[1][1]) == "b</s>"
    with pytest.raises(UserError, match="no row has anything to learn within 5 tokens"):
        causal_rows.encode(pairs(("the cat sat on the mat" * 9, "a")), BYTES, 5)


def test_an_answer_that_did_not_end_is_not_ended():
    part = causal_rows.encode(
        pairs(("a", "b"), ("a", "c")), BYTES, 9, complete=np.array([True, False])
    )
    assert [learned(BYTES, targets) for _, targets in rows(part)] == ["b</s>", "c"]
    closed = causal_rows.encode(pairs(("a", "b</s>")), BYTES, 9)
    assert learned(BYTES, rows(closed)[0][1]) == "b</s>"


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_targets_of_a_conversation_by_hand():
    conversation = turns("cat?", "the cat", "mat?", "on the mat")
    part = causal_rows.encode(TextPart(([conversation],)), CHAT, 500)
    ids, targets = rows(part)[0]
    assert CHAT.decode(ids) == CHAT.apply_chat_template(conversation, tokenize=False)
    assert learned(CHAT, targets) == "the cat<|im_end|>on the mat<|im_end|>"
    last = CHAT.convert_tokens_to_ids("<|im_end|>")
    assert [ids[i + 1] for i, x in enumerate(targets) if x == last] == [last, last]
    prompt = causal_rows.prompt_ids(conversation[:3], CHAT).tolist()
    assert ids[: len(prompt)] == prompt
    assert targets[len(prompt) - 1] == ids[len(prompt)] != IGNORED


def test_a_last_turn_that_did_not_end_is_not_ended():
    talks = [turns("cat?", "the cat", "mat?", " on the mat ")] * 2
    part = causal_rows.encode(TextPart((talks,)), CHAT, 500, complete=np.array([True, False]))
    ended, cut = (learned(CHAT, targets) for _, targets in rows(part))
    assert ended == "the cat<|im_end|> on the mat <|im_end|>"
    assert cut == "the cat<|im_end|> on the mat"
    whole = CHAT.apply_chat_template(talks[0], tokenize=False)
    assert [CHAT.decode(ids) for ids, _ in rows(part)] == [whole, whole]
    empty = causal_rows.segments(turns("cat?", ""), CHAT, complete=False)
    assert not any(piece.text for piece in empty if piece.is_target)


def test_a_file_of_conversations_and_one_of_completions(tmp_path):
    path = tmp_path / "chat.jsonl"
    for row, answer in (
        ({"messages": turns("cat?", "the cat")}, "the cat<|im_end|>"),
        ({"prompt": "5 + 5 = ", "completion": "10"}, "10<|im_end|>"),
        ({"text": "zebra"}, "ebra<|im_end|>"),  # there is no beginning-of-sequence token
    ):
        path.write_text((json.dumps(row) + "\n") * 3)
        data = corpus.load(path, task="causal", validation_fraction=0.34)
        assert (len(data.train), len(data.validation)) == (2, 1)
        encoded = rows(causal_rows.encode(data.train, CHAT, 99))
        assert [learned(CHAT, targets) for _, targets in encoded] == [answer] * 2


def test_a_tokenizer_without_template_gets_a_plain_one():
    tokenizer = byte_pairs(bos_token="<s>", eos_token="</s>")
    assert "User: and Assistant:" in causal_rows.add_chat_template(tokenizer)
    assert causal_rows.add_chat_template(tokenizer) is None
    part = causal_rows.encode(TextPart(([turns("Hi", "Hello", "Bye", "So long")],)), tokenizer, 99)
    ids, targets = rows(part)[0]
    assert tokenizer.decode(ids) == (
        "<s>User: Hi\nAssistant: Hello</s>\nUser: Bye\nAssistant: So long</s>\n"
    )
    assert learned(tokenizer, targets) == " Hello</s> So long</s>"


def test_a_template_that_writes_the_last_turn_otherwise():
    """As Qwen3's, which puts reasoning into the last turn alone."""
    tokenizer = byte_pairs(eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML.replace(
        "{{ m['content'] }}",
        "{% if loop.last and m['role'] == 'assistant' %}<think>{% endif %}{{ m['content'] }}",
    )
    conversation = turns("cat?", "the cat", "mat?", "on")
    _, targets = rows(causal_rows.encode(TextPart(([conversation],)), tokenizer, 500))[0]
    assert learned(tokenizer, targets) == "the cat<|im_end|><think>on<|im_end|>"


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (turns("cat?"), "needs a turn of the assistant"),
        ([{"role": "assistant"}], "must be a text"),
        ([{"content": "a"}], "a role and a content"),
        (["Hello"], "a role and a content"),
        ([], "has no turn"),
    ],
)
def test_conversations_that_are_none(conversation, message):
    with pytest.raises(UserError, match=message) as error:
        causal_rows.encode(TextPart(([conversation],)), CHAT, 50)
    assert "\n" not in str(error.value)


def test_errors_and_changes_of_a_template_are_one_line():
    tokenizer = byte_pairs(eos_token="</s>")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"does not take .*: roles must alternate"):
        causal_rows.encode(TextPart(([turns("a", "b")],)), tokenizer, 50)
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UserError, match="writes a turn"):
        causal_rows.encode(TextPart(([turns("a", "b")],)), tokenizer, 50)


@pytest.mark.parametrize("tokenizer", [BYTES, BARE, PIECES])
@pytest.mark.parametrize("length", [3, 7, 1000])
def test_nothing_of_a_long_text_is_lost(tokenizer, length):
    text = " ".join(LINES)
    part = causal_rows.encode(TextPart(([text],)), tokenizer, length)
    assert part.lengths.max() <= length
    content = tokenizer(text, add_special_tokens=False)["input_ids"]
    targets = [i for _, row in rows(part) for i in row if i != IGNORED]
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    ends = [] if last is None else [last]
    assert targets == content[first is None :] + ends
    for ids, own in rows(part):
        assert own == [*ids[1:], IGNORED]
        assert first is None or ids[0] == first
    unpredicted = len(tokenizer.decode(content[:1])) if first is None else 0
    assert part.text_bytes == len(text.encode()) - unpredicted


def test_long_texts_are_tokenised_in_blocks_of_lines(monkeypatch):
    texts = ["a\n", "\n".join([*LINES, "", "  an indented line", "no line"]) * 3, "b", "cat" * 40]
    whole = causal_rows.encode_texts(texts, BYTES, 20)
    monkeypatch.setattr(causal_rows, "BLOCK", 50)
    monkeypatch.setattr(causal_rows, "BLOCKS_PER_CALL", 3)
    blocks = causal_rows._blocks(texts[1])
    assert "".join(blocks) == texts[1]
    assert len(blocks) > 8
    assert not any(block[0].isspace() for block in blocks)
    parts = causal_rows.encode_texts(texts, BYTES, 20)
    np.testing.assert_array_equal(whole.ids, parts.ids)
    np.testing.assert_array_equal(whole.offsets, parts.offsets)


def test_bytes_are_counted_only_where_a_tokenizer_gives_texts_back():
    text = "na\u00efve cat"
    assert causal_rows.encode_texts([text, text], BYTES, 9).text_bytes == 2 * len(text.encode())
    assert causal_rows.encode_texts([text], PIECES, 9).text_bytes is None
    assert causal_rows.encode(pairs(("a", "b")), BYTES, 9).text_bytes is None


@pytest.mark.parametrize("text", ["\u201ccat\u201d", "\u4e2d cat", "cat"])
def test_a_token_that_is_a_part_of_a_character_has_its_own_bytes(text):
    part = causal_rows.encode_texts([text] * 3, BARE, 99)
    first = BARE.convert_ids_to_tokens(int(part.ids[0]))  # a character for each byte
    assert part.text_bytes == 3 * (len(text.encode()) - len(first))


def test_rows_of_masked_models_have_their_special_tokens():
    vocabulary = {
        x: i for i, x in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abc"])
    }
    bert = transformers.BertTokenizer(vocab=vocabulary)
    part = causal_rows.encode_texts(["a b c a b", "", "c"], bert, 5, causal=False)
    decoded = [bert.decode(part.ids[a:b]) for a, b in pairwise(part.offsets)]
    assert decoded == ["[CLS] a b c [SEP]", "[CLS] a b [SEP]", "[CLS] c [SEP]"]
    assert (part.targets, part.left_out, part.text_bytes) == (None, 1, None)
    with pytest.raises(UserError, match="more than the 2 tokens"):
        causal_rows.encode_texts(["a"], bert, 2, causal=False)


def test_texts_without_anything_are_refused_and_none_are_not():
    with pytest.raises(UserError, match="none of 2 texts"):
        causal_rows.encode_texts(["", ""], BYTES, 9)
    assert len(causal_rows.encode(TextPart(([],)), BYTES, 9)) == 0
