"""Corpora from files: parts, labels, and rows that do not fit."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dsdistill.harness.errors import UserError
from kd.data.text import corpus, part_files


def write(folder, **files):
    """Write `train=rows` as train.tsv; rows are lists of fields, the first the header."""
    folder.mkdir(exist_ok=True)
    for part, rows in files.items():
        text = "".join("\t".join(row) + "\n" for row in rows)
        (folder / f"{part}.tsv").write_text(text)
    return folder


def rows(*labels: str, start: int = 0) -> list[list[str]]:
    return [["sentence", "label"], *([f"text {start + i}", x] for i, x in enumerate(labels))]


def test_a_folder_of_three_parts(tmp_path):
    folder = write(tmp_path / "sst", train=rows("1", "0", "1"), dev=rows("0"), test=rows("1", "1"))
    data = corpus.load(folder)
    assert (data.name, data.task, data.classes) == ("sst", "classify", ("0", "1"))
    assert data.train.texts == (["text 0", "text 1", "text 2"],)
    assert data.train.labels.tolist() == [1, 0, 1]
    assert (len(data.validation), len(data.test)) == (1, 2)
    assert data.brings_validation
    assert data.notes == ("sentence, label label: classify",)


def test_validation_is_held_out_of_each_class_where_no_part_is(tmp_path):
    folder = write(tmp_path / "a", train=rows(*["x"] * 20, *["y"] * 10))
    data = corpus.load(folder, validation_fraction=0.2)
    assert np.bincount(data.validation.labels).tolist() == [4, 2]
    assert np.bincount(data.train.labels).tolist() == [16, 8]
    assert not set(data.train.texts[0]) & set(data.validation.texts[0])
    assert not data.brings_validation


def test_labels_of_minus_one_are_no_labels(tmp_path):
    folder = write(tmp_path / "a", train=rows("1", "0"), dev=rows("1"), test=rows("-1", "-1"))
    data = corpus.load(folder)
    assert len(data.test) == 0
    assert "no labels: the student is judged on the validation part" in data.notes[1]


def test_numbers_are_classes_in_the_order_of_their_values(tmp_path):
    data = corpus.load(write(tmp_path / "a", train=rows("10", "9", "9")), validation_fraction=0)
    assert data.classes == ("9", "10")
    assert data.train.labels.tolist() == [1, 0, 0]


def test_a_model_brings_the_order_of_its_classes(tmp_path):
    folder = write(tmp_path / "a", train=rows("neg", "pos", "pos"))
    data = corpus.load(folder, validation_fraction=0, classes=["pos", "neg"])
    assert data.train.labels.tolist() == [1, 0, 0]
    with pytest.raises(UserError, match="the same names"):
        corpus.load(folder, classes=["good", "bad"])


def test_scores_and_pairs(tmp_path):
    pairs = [["sentence1", "sentence2", "score"], ["a", "b", "5.000"], ["c", "d", "0.2"]]
    data = corpus.load(write(tmp_path / "a", train=pairs), validation_fraction=0)
    assert (data.task, data.classes) == ("regress", ())
    assert data.train.texts == (["a", "c"], ["b", "d"])
    np.testing.assert_allclose(data.train.labels, [5, 0.2])


def test_tags_and_languages(tmp_path):
    lines = [
        {"tokens": ["New", "York"], "tags": ["B", "I"], "language": "en"},
        {"tokens": ["Oh"], "tags": ["O"], "language": "de"},
    ]
    path = tmp_path / "ner.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    data = corpus.load(path, validation_fraction=0)
    assert (data.name, data.task, data.classes) == ("ner", "tag", ("B", "I", "O"))
    assert [tags.tolist() for tags in data.train.labels] == [[0, 1], [2]]
    assert data.train.languages == ("en", "de")


def test_plain_text_needs_a_task(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("one line\nanother\n")
    with pytest.raises(UserError, match="say --task mlm"):
        corpus.load(path)
    data = corpus.load(path, task="mlm", validation_fraction=0.5)
    assert len(data.train) == len(data.validation) == 1
    assert data.train.labels is None


def test_a_folder_saved_by_datasets_brings_the_names_of_its_classes(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    datasets.DatasetDict(train=part, validation=part).save_to_disk(str(tmp_path / "d"))
    assert part_files.is_text(tmp_path / "d")
    data = corpus.load(tmp_path / "d")
    assert data.classes == ("neg", "pos")
    assert data.train.labels.tolist() == [1, 0]
    assert data.brings_validation


def test_a_folder_from_the_hub_has_its_parts_in_shards(tmp_path):
    def save(part, name="label", **shards):
        for number, labels in enumerate(shards.values()):
            table = pyarrow.table({"text": [f"{part} {x}" for x in labels], name: labels})
            path = tmp_path / f"{part}-{number:05}-of-{len(shards):05}.parquet"
            pyarrow.parquet.write_table(table, path)

    save("train", a=[0, 1], b=[1])
    save("test", a=[0])
    assert part_files.is_text(tmp_path)
    data = corpus.load(tmp_path, validation_fraction=0)
    assert data.train.texts == (["train 0", "train 1", "train 1"],)
    assert (len(data.test), data.classes) == (1, ("0", "1"))
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a"]}), tmp_path / "train-00001-of-00002.parquet"
    )
    with pytest.raises(UserError, match="must have the columns of"):
        corpus.load(tmp_path)


def test_any_change_of_a_row_changes_the_digest(tmp_path):
    first = corpus.load(write(tmp_path / "a", train=rows("1", "0"))).sha256
    assert corpus.load(write(tmp_path / "b", train=rows("1", "0"))).sha256 == first
    assert corpus.load(write(tmp_path / "a", train=rows("0", "1"))).sha256 != first


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train": rows("1", "0"), "training": rows("1")}, "two files of its train part"),
        ({"dev": rows("1")}, "has no train file"),
        ({"train": rows("1", "1")}, "at least two classes, has 1"),
        ({"train": rows("1", ""), "dev": rows("1")}, "line 3 has no label"),
        ({"train": rows("1", "0"), "dev": rows("2")}, "dev.tsv, line 2: the label '2' is none"),
        ({"train": rows("1", "0"), "dev": [["text", "label"], ["a", "1"]]}, "no column sentence"),
        ({"train": rows("0.5", "x")}, None),
        ({"train": [["sentence", "score"], ["a", "0.5"], ["b", "nan"]]}, "line 3: score must be"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_line(tmp_path, files, message):
    folder = write(tmp_path / "a", **files)
    if message is None:
        assert corpus.load(folder).task == "classify"
        return
    with pytest.raises(UserError, match=message):
        corpus.load(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens and 1 tags"),
        ({"tokens": "a b", "tags": ["O"]}, "must be a list of tokens"),
        ({"tokens": ["a"], "tags": "O"}, "must be a list with a tag"),
        ({"tokens": ["a"], "tags": [None]}, "has no tags"),
    ],
)
def test_tags_must_fit_their_tokens(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"tokens": ["a"], "tags": ["B"]}) + "\n" + json.dumps(line))
    with pytest.raises(UserError, match=f"line 2.* {message}"):
        corpus.load(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", 1], "tags": ["O", "O"]}, "line 1: tokens: a token must be a text, got 1"),
        ({"tokens": [None], "tags": ["O"]}, "a token must be a text, got nothing"),
        ({"tokens": ["\ud800"], "tags": ["O"]}, "half of a surrogate pair"),
        ({"messages": [{"role": "assistant"}]}, "line 1: the content of a message must be a text"),
        ({"messages": "Hello"}, "line 1: messages must be a list of messages, got 'Hello'"),
    ],
)
def test_tokens_and_messages_that_are_none_are_refused_with_their_line(tmp_path, row, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message) as refusal:
        corpus.load(path, task="tag" if "tokens" in row else "causal", validation_fraction=0)
    assert "\n" not in str(refusal.value)


def test_folders_of_images_are_no_text(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "metadata.csv").write_text("file_name,label\n")
    assert not part_files.is_text(tmp_path)
    assert not part_files.is_text(tmp_path / "data.npz")


def test_plain_text_of_causal_models_is_one_text_whose_end_validates(tmp_path):
    path = tmp_path / "play.txt"
    path.write_text("ROMEO:\nSo shalt thou.\n\nJULIET:\nHow art thou?\n" * 10)
    data = corpus.load(path, task="causal", validation_fraction=0.1)
    (train,), (end,) = data.train.texts[0], data.validation.texts[0]
    assert train + end == path.read_text()
    assert train.endswith("\n")
    assert 0.1 <= len(end) / len(train + end) < 0.15
    assert len(corpus.load(path, task="mlm").train) > 20  # for other tasks lines are texts
    assert len(corpus.load(path, task="causal", validation_fraction=0).validation) == 0


def test_named_texts_lie_in_the_folder_of_data_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "sets"
    (root / "text" / "known").mkdir(parents=True)
    assert part_files.locate("known", root) == root / "text" / "known"
    assert part_files.locate("other", root) == root / "other"
    assert part_files.locate("a/known", root) == Path("a/known")
    (tmp_path / "known").mkdir()
    assert part_files.locate("known", root) == Path("known")
