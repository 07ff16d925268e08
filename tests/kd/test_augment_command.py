"""`kd augment` as a user meets it: previews, files, continued work, and what is refused."""

import json

import pytest
import transformers
from kd_support import main, refused

from dsdistill.commands import cache
from kd.data.text import corpus

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "good",
    "bad",
    "film",
    "plot",
    "un",
    "##like",
]
ROWS = [f"a {'good' if i % 2 else 'bad'} film , number {i}\t{i % 2}" for i in range(20)]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a small data set of sentences and one of pairs, and with a cache of its own."""
    for name, header, rows in (
        ("single", "sentence\tlabel", ROWS),
        ("pairs", "sentence1\tsentence2\tscore", [f"a man\t{x[:-1]}2.5" for x in ROWS]),
    ):
        (tmp_path / name).mkdir()
        for part in ("train", "dev"):
            (tmp_path / name / f"{part}.tsv").write_text("\n".join([header, *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path


def save_mlm(folder, auto=transformers.AutoModelForMaskedLM):
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=40,
    )  # fmt: skip
    auto.from_config(config).save_pretrained(folder)
    transformers.BertTokenizer(vocab={x: i for i, x in enumerate(WORDS)}).save_pretrained(folder)


def test_a_preview_shows_originals_above_copies_and_writes_nothing(work, monkeypatch, capsys):
    main(monkeypatch, "augment", "single", "--by", "words", "--preview", 2, "--copies", 4)
    lines = capsys.readouterr().out.splitlines()
    originals = [line for line in lines if not line.startswith(" ")]
    assert originals == ["0  a bad film , number 0", "1  a good film , number 1"]
    assert 4 <= len(lines) <= 10
    assert {path.name for path in work.iterdir()} == {"single", "pairs"}


@pytest.mark.parametrize("suffix", ["jsonl", "tsv"])
@pytest.mark.parametrize("data", ["single", "pairs"])
def test_a_file_has_originals_and_copies_and_is_read_as_a_table(work, monkeypatch, data, suffix):
    out = work / f"copies.{suffix}"
    main(monkeypatch, "augment", data, "--by", "words", "--out", out)
    table = corpus.load(out, task="embed", validation_fraction=0.0)
    original = corpus.load(work / data)
    assert [x[:20] for x in table.train.texts] == [list(x) for x in original.train.texts]
    assert 100 < len(table.train) <= 20 * (21 if data == "single" else 11)
    assert table.train.labels is None
    names = ["text"] if data == "single" else ["text1", "text2"]
    first, last = (out.read_text().splitlines()[i] for i in (0, -1))
    if suffix == "jsonl":
        assert list(json.loads(first)) == [*names, "original_row"]
        assert json.loads(last)["original_row"] == 19
    else:
        assert first.split("\t") == [*names, "original_row"]
        assert last.endswith("\t19")


def test_a_named_data_set_is_found(work, monkeypatch, capsys):
    (work / "sets" / "text").mkdir(parents=True)
    (work / "single").rename(work / "sets" / "text" / "single")
    monkeypatch.setenv("DSDISTILL_DATA", str(work / "sets"))
    main(monkeypatch, "augment", "single", "--by", "words", "--preview", 1)
    assert capsys.readouterr().out.startswith("0  a bad film")


def test_a_language_model_gives_the_words(work, monkeypatch, capsys):
    save_mlm(work / "mlm")
    options = ("--by", "masked", "--mlm", "hf:mlm", "--replace-probability", 1, "--device", "cpu")
    main(monkeypatch, "augment", "single", *options)
    out = work / "augmented-single-masked.jsonl"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert f"file                                  {out.name}" in capsys.readouterr().out
    copies = [row["text"].split() for row in rows[20:]]
    assert len(copies) > 60
    for copy in copies:
        assert copy[0] == "a"
        assert copy[2] in {"good", "bad", "plot", "un"}  # in place of film
    out.rename(work / "first")
    main(monkeypatch, "augment", "single", *options)
    assert out.read_bytes() == (work / "first").read_bytes()
    assert [entry.description for entry in cache.entries()] == ["copies of texts"]


def test_texts_without_labels_have_copies_too(work, monkeypatch):
    (work / "plain.txt").write_text("one film\nanother film\na third one\n")
    main(monkeypatch, "augment", "plain.txt", "--by", "words", "--task", "mlm", "--out", "o.tsv")
    assert (work / "o.tsv").read_text().startswith("text\toriginal_row\none film\t0\n")


def test_a_language_is_kept(work, monkeypatch):
    rows = [f"film {i} ist gut\tde\t{i % 2}" for i in range(6)]
    (work / "train.tsv").write_text("\n".join(["text\tlanguage\tlabel", *rows]) + "\n")
    main(monkeypatch, "augment", "train.tsv", "--by", "words", "--out", "o.jsonl")
    assert json.loads((work / "o.jsonl").read_text().splitlines()[-1])["language"] == "de"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--by", "words", "--copies", 0], "--copies must be at least 1, got 0"),
        (["--by", "words", "--preview", 0], "--preview must be at least 1, got 0"),
        (["--by", "words", "--seed", -1], "--seed must be 0 or more, got -1"),
        (["--by", "masked"], "--by masked needs a masked language model: --mlm hf:NAME"),
        (["--by", "words", "--mlm", "x"], "--mlm needs --by masked"),
        (["--by", "masked", "--mlm", "x", "--mask", "X"], "--mask needs --by words"),
        (["--by", "words", "--mask-probability", 1.5], "--mask-probability must be in [0, 1]"),
        (["--by", "words", "--mask-probability", 0.95], "must be at most 1 together, got 1.05"),
        (["--by", "words", "--ngram-probability", -1], "--ngram-probability must be in [0, 1]"),
        (["--by", "words", "--validation-fraction", 1], "--validation-fraction must be in [0, 1)"),
        (["--by", "words", "--out", "o.csv"], "--out must end in .jsonl or .tsv, got o.csv"),
        (["--by", "words", "--out", "single/dev.tsv"], "single/dev.tsv exists: choose another"),
        (["--by", "words", "--out", "o.tsv", "--preview", 1], "--preview writes nothing"),
        (["--by", "words", "--text", "nothing"], "--text nothing is no column"),
        (["--by", "masked", "--mlm", "hf:./gone"], "there is no folder ./gone"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(work, monkeypatch, words, message):
    before = sorted(path.name for path in work.rglob("*"))
    assert message in refused(monkeypatch, "augment", "single", *words)
    assert sorted(path.name for path in work.rglob("*")) == before


def test_data_without_texts_of_which_copies_could_be_made_are_refused(work, monkeypatch):
    def refusal(data, *options):
        return refused(monkeypatch, "augment", data, "--by", "words", *options)

    assert "there is no file or folder gone" in refusal("gone")
    (work / "tags.jsonl").write_text('{"tokens": ["a", "b"], "tags": ["X", "Y"]}\n' * 3)
    assert "has tagged tokens" in refusal("tags.jsonl")
    (work / "lines.jsonl").write_text(
        '{"text": "a\\nb", "label": "x"}\n{"text": "c", "label": "y"}\n'
    )
    assert "does not fit into TSV" in refusal("lines.jsonl", "--out", "o.tsv")
    (work / "two.tsv").write_text("text\tlabel\na\t0\nb\t1\n")
    assert "leaves none of so few rows" in refusal(
        "two.tsv", "--task", "embed", "--validation-fraction", 0.9
    )


def test_a_model_without_a_head_is_refused(work, monkeypatch):
    save_mlm(work / "body", transformers.AutoModel)
    options = ("--by", "masked", "--mlm", "hf:body", "--device", "cpu")
    line = refused(monkeypatch, "augment", "single", *options)
    assert "hf:body has no head that predicts hidden words" in line
