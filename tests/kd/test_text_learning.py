"""What can be learned from texts is learned, from labels and from a teacher, for every task."""

from pathlib import Path

import pytest
import text_data
import text_support
from kd_support import main, read_report
from text_data import write_json, write_tsv

FAST = ("--lr", 0.01, "--batch-size", 16, "--schedule", "constant", "--device", "cpu")
FRESH = ("--student", "bert:2x32", "--tokenizer", "words", "--max-length", 16)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data that follow rules, and a model with its own tokenizer."""
    folder = tmp_path_factory.mktemp("learned")
    text_data.write_all(folder)
    for part, n, seed in text_data.PARTS:
        texts = text_data.sentences(n, seed)
        scores = [(text, f"{0.5 * text.count('a') - 0.25 * text.count('b'):.2f}") for text in texts]
        write_tsv(folder / "weight" / f"{part}.tsv", scores, "sentence\tscore")
        both = zip(text_data.sentences(n, seed + 10), text_data.rows(n, seed), strict=True)
        pairs = [(other, *row) for other, row in both]  # the second text alone has the class
        write_tsv(folder / "second" / f"{part}.tsv", pairs, "sentence1\tsentence2\tlabel")
        answers = [{"prompt": text[:1], "completion": f" {text[:1]} {text[:1]}"} for text in texts]
        write_json(folder / "echo" / f"{part}.jsonl", answers)
    (folder / "verse.txt").write_text("a b c d e f g h\n" * 64)
    text_support.bert_folder(folder / "bert", "ForMaskedLM")
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(work)
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)
    return monkeypatch


LEARNED: dict[str, tuple[tuple[object, ...], str, float]] = {
    "classes": (("one", *FRESH, "--epochs", 15), "test_accuracy", 0.9),
    "pairs": (("second", "--student", "bilstm:16", "--tokenizer", "hf:bert", "--epochs", 15),
              "test_accuracy", 0.9),
    "scores": (("weight", *FRESH, "--epochs", 25), "test_pearson", 0.8),
    "tags": (("tag", *FRESH, "--epochs", 5), "test_entity_f1", 0.95),
    "hidden tokens": (("verse.txt", "--task", "mlm", *FRESH, "--epochs", 25),
                      "validation_accuracy", 0.9),
    "next tokens": (("verse.txt", "--task", "causal", *FRESH, "--epochs", 25),
                    "validation_accuracy", 0.9),
    "completions": (("echo", "--task", "causal", "--student", "bert:2x32", "--tokenizer",
                     "characters", "--epochs", 40), "test_accuracy", 0.9),
}  # fmt: skip


@pytest.mark.parametrize("task", LEARNED)
def test_a_rule_is_learned(inside: pytest.MonkeyPatch, tmp_path: Path, task: str) -> None:
    line, figure, least = LEARNED[task]
    main(inside, "train", *line, *FAST, "--out", tmp_path / "run")
    assert read_report(tmp_path / "run")[figure] >= least


TAUGHT: dict[str, tuple[tuple[object, ...], tuple[object, ...], str, float]] = {
    "classes": (("one", *FRESH, "--epochs", 15),
                ("one", "--student", "hf:bert", "--loss", "kd", "--epochs", 15),
                "test_accuracy", 0.9),
    "scores": (("weight", *FRESH, "--epochs", 25),
               ("weight", "--student", "bilstm:16", "--tokenizer", "hf:bert", "--loss", "logits",
                "--epochs", 25),
               "test_pearson", 0.8),
    "tags": (("tag", *FRESH, "--epochs", 5),
             ("tag", "--student", "bert:1x16", "--loss", "kd", "--epochs", 8),
             "test_entity_f1", 0.95),
    "next tokens": (("verse.txt", "--task", "causal", *FRESH, "--epochs", 25),
                    ("verse.txt", "--task", "causal", "--student", "bert:1x16", "--loss",
                     "tokens:1:temperature=1", "--epochs", 40), "validation_accuracy", 0.9),
}  # fmt: skip


@pytest.mark.parametrize("task", TAUGHT)
def test_a_rule_is_learned_from_the_teachers_answers_alone(
    inside: pytest.MonkeyPatch, tmp_path: Path, task: str
) -> None:
    """Of classes and scores the teacher has another tokenizer."""
    teacher, line, figure, least = TAUGHT[task]
    main(inside, "train", *teacher, *FAST, "--out", tmp_path / "teacher")
    main(
        inside, "train", *line, *FAST, "--teacher", tmp_path / "teacher", "--out", tmp_path / "run"
    )
    assert read_report(tmp_path / "run")[figure] >= least


def test_weights_are_averaged_and_a_training_ends_early(
    inside: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ("train", "tag", *FRESH, *FAST, "--epochs", 30, "--patience", 2, "--ema", 0.8)
    main(inside, *line, "--average-best", 2, "--label-smoothing", 0.1, "--out", tmp_path / "run")
    report = read_report(tmp_path / "run")
    assert report["epochs"] < 30
    assert report["test_entity_f1"] >= 0.95
    assert "no better validation entity_f1 in 2 validations" in capsys.readouterr().err
