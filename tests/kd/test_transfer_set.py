"""Transfer sets: what is in them, and that a kill, damage or another order change no bit."""

import numpy as np
import pytest

from dsdistill.harness import checksums
from dsdistill.harness.errors import UserError
from kd.data.text import transfer_set, word_replacement
from kd.data.text.corpus import TextPart
from kd.data.text.word_replacement import WordReplacement

TEXTS = [f"text {i} of a few words, and more" for i in range(10)]
LANGUAGES = tuple("en" if i % 2 else "de" for i in range(10))
PART = TextPart((TEXTS,), np.arange(10) % 2, LANGUAGES)
PAIRS = TextPart((TEXTS, [text[::-1] for text in TEXTS]))


class Calls:
    """Tang's method, which notes its rows and stops as a kill does before one of them."""

    def __init__(self, part=PART, stop=None, **numbers):
        bands = word_replacement.count_bands(part)
        self.method = WordReplacement(bands, **{"copies": 6} | numbers)
        self.rows, self.stop = [], stop

    def copies_of(self, row, texts, language=None):
        if row == self.stop:
            raise KeyboardInterrupt
        self.rows.append(row)
        return self.method.copies_of(row, texts, language)

    def record(self):
        return self.method.record()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(transfer_set, "SHARD_ROWS", 4)


def content(folder):
    """The arrays of each shard; the order of a file's header is not fixed."""
    return {
        path.name: {
            name: array.tobytes()
            for name, array in checksums.load(
                path, transfer_set._KEY, kind="a shard"
            ).arrays.items()
        }
        for path in folder.rglob("*.safetensors")
    }


@pytest.mark.parametrize("part", [PART, PAIRS])
def test_it_holds_the_originals_and_then_their_distinct_copies(tmp_path, part):
    made = transfer_set.build(part, Calls(part).method, tmp_path)
    assert made.part.labels is None
    assert made.originals == 10
    assert [list(column[:10]) for column in made.part.texts] == list(part.texts)
    assert made.rows[:10].tolist() == list(range(10))
    method, expected = Calls(part).method, []
    for row, texts in enumerate(zip(*part.texts, strict=True)):
        seen = {texts}
        for copy in method.copies_of(row, texts, part.languages and part.languages[row]):
            if copy not in seen:
                expected.append((row, *copy))
                seen.add(copy)
    columns = (made.rows.tolist(), *made.part.texts)
    assert list(zip(*columns, strict=True))[10:] == expected
    assert len(made) == 10 + len(expected)
    if part.languages:
        assert made.part.languages == tuple(LANGUAGES[row] for row in made.rows)


@pytest.mark.parametrize("texts", ["a", "a b", "\ud800 lone", "日本"])
def test_any_text_comes_back_as_it_was(tmp_path, texts):
    part = TextPart(([texts] * 3,))
    method = Calls(part, mask_probability=1.0, mask="\ud800é").method
    first = transfer_set.build(part, method, tmp_path)
    assert transfer_set.build(part, method, tmp_path).part.texts == first.part.texts
    assert "\ud800é" in first.part.texts[0][-1]


@pytest.mark.parametrize("stop", [0, 3, 4, 9])
def test_a_kill_is_continued_to_the_same_bits(tmp_path, stop):
    whole = transfer_set.build(PART, Calls(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        transfer_set.build(PART, Calls(stop=stop), tmp_path / "stopped")
    rest = Calls()
    made = transfer_set.build(PART, rest, tmp_path / "stopped")
    assert rest.rows == list(range(stop - stop % 4, 10))
    assert made.part.texts == whole.part.texts
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    again = Calls()
    transfer_set.build(PART, again, tmp_path / "stopped")
    assert again.rows == []


def test_a_damaged_or_foreign_shard_is_made_anew(tmp_path, capsys):
    whole = transfer_set.build(PART, Calls(), tmp_path)
    before = content(tmp_path)
    first, second, third = sorted(tmp_path.rglob("copies-*"))
    third.write_bytes(first.read_bytes())
    damaged = bytearray(second.read_bytes())
    damaged[-1] ^= 1
    second.write_bytes(damaged)
    capsys.readouterr()
    made = transfer_set.build(PART, Calls(), tmp_path)
    assert made.part.texts == whole.part.texts
    assert content(tmp_path) == before
    lines = capsys.readouterr().err.splitlines()
    assert [line.endswith("made anew") for line in lines[:2]] == [True, True]
    assert "checksum" in lines[0]
    assert "of another transfer set" in lines[1]


@pytest.mark.parametrize(
    "other",
    [
        Calls(seed=1),
        Calls(copies=5),
        Calls(mask="<mask>"),
        Calls(mask_probability=0.2),
        Calls(replace_probability=0.2),
        Calls(ngram_probability=0.2),
    ],
)
def test_other_options_have_a_folder_of_their_own(tmp_path, other):
    transfer_set.build(PART, Calls(), tmp_path)
    transfer_set.build(PART, other, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_other_texts_have_a_folder_of_their_own(tmp_path):
    transfer_set.build(PART, Calls(), tmp_path)
    for part in (TextPart((TEXTS[::-1],), None, LANGUAGES), TextPart((TEXTS,))):
        transfer_set.build(part, Calls(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (TextPart(([],)), "there are no training texts"),
        (TextPart(([["a", "b"]],)), "not of tagged tokens or conversations"),
    ],
)
def test_what_cannot_be_copied_is_refused(tmp_path, part, message):
    with pytest.raises(UserError, match=message):
        transfer_set.build(part, Calls(), tmp_path)
    assert not any(tmp_path.iterdir())


def test_pairs_have_fewer_copies():
    assert [transfer_set.default_copies(part) for part in (PART, PAIRS)] == [20, 10]
