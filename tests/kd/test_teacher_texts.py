"""A teacher's completions as training texts: cached, resumed after a kill, mended."""

import json

import numpy as np
import pytest
import tokenizers
import transformers
from language_support import causal_model, characters

from dsdistill.harness.errors import UserError
from kd.data.text import causal_rows, generation, teacher_texts
from kd.data.text.corpus import TextPart
from kd.data.text.generation import Decoding
from kd.models.token_inputs import IGNORED
from kd.parallel import engine

TOKENIZER = characters("abcdefgh UserAint:\n")
PROMPTS = ["ab", "cde", "f", "gh", "a b"]
PAIRS = TextPart((PROMPTS, [""] * 5))
SETTINGS = {"decoding": Decoding(6, beams=2), "batch_size": 2}


@pytest.fixture(autouse=True)
def shards_of_two_rows(monkeypatch):
    monkeypatch.setattr(teacher_texts, "SHARD", 2)


@pytest.fixture(scope="module")
def teacher():
    return causal_model(TOKENIZER)


def write(folder, teacher, part=PAIRS, **options) -> teacher_texts.TeacherTexts:
    with engine.temporary() as on:
        return teacher_texts.write(part, teacher, TOKENIZER, folder, on, **SETTINGS | options)


def test_completions_are_those_of_the_teachers_beams(tmp_path, teacher):
    answers = write(tmp_path, teacher)
    expected = [
        generation.generate(teacher, TOKENIZER, [prompt], Decoding(6, beams=2))
        for prompt in PROMPTS
    ]
    assert answers.part.texts == (PROMPTS, [one.texts[0] for one in expected])
    assert answers.complete.tolist() == [bool(one.complete[0]) for one in expected]


def test_a_killed_run_goes_on_and_a_finished_one_is_read(tmp_path, teacher, monkeypatch):
    whole = write(tmp_path / "whole", teacher)
    generate, calls = generation.generate, []

    def dies_at_the_third(*args, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args[2])
        return generate(*args, **options)

    monkeypatch.setattr(generation, "generate", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "b", teacher)
    calls[:] = [None]  # one more shard may be written
    answers = write(tmp_path / "b", teacher)
    assert calls[1:] == [PROMPTS[4:]]
    assert answers.part.texts == whole.part.texts
    assert write(tmp_path / "b", teacher).part.texts == whole.part.texts  # nothing more is written


def test_damaged_shards_are_written_anew(tmp_path, teacher, capfd):
    whole = write(tmp_path, teacher)
    first, second, third = sorted(tmp_path.glob("*/0*.json"))
    first.write_bytes(first.read_bytes()[:-20])
    stored = json.loads(second.read_text())
    stored["rows"][0][0] += "x"
    second.write_text(json.dumps(stored))
    third.write_text("[]")
    assert write(tmp_path, teacher).part.texts == whole.part.texts
    assert capfd.readouterr().err.count("is not used") == 3
    assert json.loads(second.read_text())["rows"] != stored["rows"]


@pytest.mark.parametrize(
    "change",
    [
        {"decoding": Decoding(5, beams=2)},
        {"seed": 1},
        {"batch_size": 3},
        {"part": TextPart((["ab"], [""]))},
    ],
)
def test_other_settings_and_prompts_are_another_entry(tmp_path, teacher, change):
    write(tmp_path, teacher)
    write(tmp_path, teacher, **change)
    write(tmp_path, causal_model(TOKENIZER, seed=9))
    assert len(list(tmp_path.iterdir())) == 3


def test_another_tokenizer_of_the_same_vocabulary_is_another_entry(tmp_path, teacher):
    other = characters("abcdefgh UserAint:\n")
    other(["a b"] * 2, padding=True, truncation=True, max_length=1)  # leaves no trace
    lower = characters("abcdefgh UserAint:\n")
    lower.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    with engine.temporary() as on:
        for tokenizer in (TOKENIZER, other, lower):
            teacher_texts.write(PAIRS, teacher, tokenizer, tmp_path, on, **SETTINGS)
    assert len(list(tmp_path.iterdir())) == 2


class _Process:
    """One of two processes, of which the other does nothing."""

    num_processes, device = 2, "cpu"

    def __init__(self, number: int) -> None:
        self.process_index = number

    def wait_for_everyone(self) -> None:
        pass


def test_processes_share_the_shards(tmp_path, teacher):
    def run(number):
        on = _Process(number)
        return teacher_texts.write(PAIRS, teacher, TOKENIZER, tmp_path, on, **SETTINGS)

    with pytest.raises(UserError, match="was changed while it was written"):
        run(0)
    assert [path.name for path in sorted(tmp_path.glob("*/0*"))] == ["00000.json", "00002.json"]
    assert run(1).part.texts == write(tmp_path / "one", teacher).part.texts


def test_the_last_answer_of_a_conversation_is_the_teachers(tmp_path, teacher):
    user, answer = {"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}
    talks = [[user, answer, user, answer], [user]]
    answers = write(tmp_path, teacher, TextPart((talks,)))
    first, second = answers.part.texts[0]
    assert first[:3] == talks[0][:3]
    assert second[:1] == [user]
    assert {first[3]["role"], second[1]["role"]} == {"assistant"}
    assert first[3]["content"] != "cd"
    encoded = causal_rows.encode(answers.part, TOKENIZER, 500)
    assert len(encoded) == 2


def test_answers_in_a_conversation_have_no_space_of_the_template_and_no_end_of_their_own(
    tmp_path, teacher, monkeypatch
):
    def write_as_the_template_does(*_arguments, **_options):
        return generation.Continuations((" cd", " ab"), np.array([True, False]))

    monkeypatch.setattr(generation, "generate", write_as_the_template_does)
    talks = [[{"role": "user", "content": text}] for text in ("a", "b")]
    answers = write(tmp_path, teacher, TextPart((talks,)))
    assert [talk[-1]["content"] for talk in answers.part.texts[0]] == ["cd", "ab"]
    part = causal_rows.encode(answers.part, TOKENIZER, 500, complete=answers.complete)
    bounds = zip(part.offsets[:-1], part.offsets[1:], strict=True)
    taught = [TOKENIZER.decode([x for x in part.targets[a:b] if x != IGNORED]) for a, b in bounds]
    assert taught == [" cd[EOS]", " ab"]


def test_plain_texts_are_begun_by_their_chunks(tmp_path, teacher):
    text = "abcdefgh" * 3
    answers = write(tmp_path, teacher, TextPart(([text],)), max_length=10, prompt_tokens=4)
    assert answers.part.texts[0] == ["abc", "bcd", "cde"]  # chunks of nine, each after [BOS]
    part = causal_rows.encode(answers.part, TOKENIZER, 50, complete=answers.complete)
    for i, (start, stop) in enumerate(zip(part.offsets[:-1], part.offsets[1:], strict=True)):
        learned = [x for x in part.targets[start:stop] if x != IGNORED]
        ends = "[EOS]" if answers.complete[i] else ""
        assert TOKENIZER.decode(learned) == answers.part.texts[1][i] + ends


def test_prompts_of_plain_texts_are_whole_characters():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    each_byte = transformers.GPT2Tokenizer(vocab=vocabulary, merges=[])
    each_byte.bos_token = each_byte.eos_token = each_byte.unk_token = None
    part = TextPart((["\u4e2d\u56fd", "ab"],))
    prompts = teacher_texts._prompts(part, each_byte, 5, 2)
    assert prompts == ["a"]  # of two bytes and of one


@pytest.mark.parametrize(
    ("part", "length"),
    [(TextPart((["a" * 30],)), 4), (TextPart((["abc"], ["d"])), 7)],
)
def test_the_teacher_writes_no_more_than_a_row_of_the_student_holds(
    tmp_path, teacher, monkeypatch, part, length
):
    decodings, generate = [], generation.generate

    def record(model, tokenizer, prompts, decoding, **options):
        decodings.append(decoding)
        return generate(model, tokenizer, prompts, decoding, **options)

    monkeypatch.setattr(generation, "generate", record)
    write(tmp_path, teacher, part, max_length=7, prompt_tokens=4, decoding=Decoding(20))
    assert decodings[0].max_new_tokens == length


def test_a_share_without_end_is_said():
    part = TextPart((["a"] * 8, ["b"] * 8))
    all_ended = teacher_texts.TeacherTexts(part, np.ones(8, bool))
    assert all_ended.described == "the teacher wrote 8 completions"
    some = teacher_texts.TeacherTexts(part, np.arange(8) > 0)
    assert "12.5% did not end" in some.described


def test_a_folder_that_is_a_file(tmp_path, teacher):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        write(tmp_path / "file", teacher)
