"""Trainings that fit a teacher's embeddings: texts, pairs with scores, translations."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from kd_support import main, read_report
from text_support import bert_folder

from dsdistill.harness.errors import UserError
from kd.assembly import text_training
from kd.assembly.text_training import TextTraining
from kd.commands import evaluate
from kd.losses.relation import rkd_distance
from kd.models.language import saved_text_models, sentence_files, trained_models
from kd.models.language.sentence_encoder import EmbeddingHead, SentenceEncoder
from kd.models.language.text_model import TextModel
from kd.models.language.text_teachers import TextTeacher
from kd.models.token_inputs import TokenInputs
from kd.options import EvaluateOptions, Overrides, TrainOptions

SOURCES = ("a b c", "j i", "a a h g f", "c", "b d f", "e e", "g h i j", "d a", "f", "h b")
TARGETS = ("x y", "y", "z z x", "x", "w x y", "w", "z", "y z w x", "w w", "x x")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Texts, translations, scored pairs, and a teacher of 16 values whose embeddings have length 1.

    The teacher has no tokens for the letters of the translations.
    """
    folder = tmp_path_factory.mktemp("embed")
    bert_folder(folder / "teacher", "Model")
    network = transformers.AutoModel.from_pretrained(folder / "teacher")
    sentence_files.write(
        folder / "teacher", SentenceEncoder(network, EmbeddingHead(normalise=True)), 16
    )
    (folder / "texts.txt").write_text("\n".join(SOURCES * 2) + "\n")
    rows = enumerate(zip(SOURCES, TARGETS, strict=True))
    lines = [f"{a}\t{b}\t{i / 4}\t{'de' if i % 2 else 'fr'}" for i, (a, b) in rows]
    (folder / "translations.tsv").write_text("source\ttarget\tscore\tlanguage\n" + "\n".join(lines))
    pairs = [
        f"{a}\t{b}\t{i / 4}" for i, (a, b) in enumerate(zip(SOURCES, SOURCES[::-1], strict=True))
    ]
    (folder / "pairs.tsv").write_text("sentence1\tsentence2\tscore\n" + "\n".join(pairs))
    return folder


def training(work: Path, data: str, loss: str | None = None, **options: Any) -> TextTraining:
    given = {"student": "bert:1x8", "tokenizer": "words", "validation_fraction": 0.2}
    given |= {"teacher": f"hf:{work / 'teacher'}", "device": "cpu"}
    given |= {"overrides": Overrides(loss=loss, batch_size=4)} | options
    return text_training.assemble(TrainOptions(str(work / data), task="embed", **given))


def teacher_embeds(work: Path, texts) -> torch.Tensor:
    return embed(trained_models.load(f"hf:{work / 'teacher'}", "embed", ()), texts)


@torch.no_grad()
def embed(model: TextModel, texts) -> torch.Tensor:
    rows = model.tokenizer(list(texts), padding=True, return_tensors="pt")
    return model.network.eval()(TokenInputs(rows["input_ids"], rows["attention_mask"].bool()))


def test_source_and_translation_both_fit_the_teachers_source(work):
    run = training(work, "translations.tsv")
    train = run.parts.corpus.train
    assert "target is a translation of source" in " ".join(run.parts.corpus.notes)
    objective, source = run.build_objective(), run.load()
    stored = run.prepare(objective, source)
    expected = teacher_embeds(work, train.texts[0])
    own, theirs = run.parts.tokenizers
    objective.eval()
    rows = 0
    for batch, known in zip(source.epoch(0, 0), stored.epoch(0, 0), strict=True):
        for i, row in enumerate(batch.index.tolist()):
            n, seen = row % len(train), batch.inputs.ids[i][batch.inputs.mask[i]]
            text = train.texts[row // len(train)][n]
            assert seen.tolist() == own(text)["input_ids"]
            taught = theirs.decode(batch.inputs_of(0).ids[i], skip_special_tokens=True)
            assert taught == train.texts[0][n]
        targets = expected[batch.index % len(train)]
        torch.testing.assert_close(known.teacher_logits[0], targets, atol=1e-5, rtol=0)
        error = (objective.student(batch.inputs) - targets).square().mean()
        for each in (batch, known):
            torch.testing.assert_close(objective(each)["logits"], error, atol=1e-6, rtol=1e-4)
        rows += len(batch)
    assert rows == 2 * len(train)


def test_columns_that_are_named_are_translations_and_scored_ones_are_not(work):
    named = training(work, "pairs.tsv", text="sentence2,sentence1").parts
    assert named.corpus.parallel
    assert len(named.tokenizers) == 2
    pairs = training(work, "pairs.tsv").parts.corpus
    assert not pairs.parallel
    notes = " ".join(pairs.notes)
    assert "the column score is not used" in notes
    assert "--label score" in notes
    scored = training(work, "pairs.tsv", label="score", text="sentence1,sentence2").parts
    assert not scored.corpus.parallel


def test_relations_are_those_of_the_embeddings(work):
    run = training(work, "texts.txt", "logits:1,rkd-distance:2")
    objective = run.build_objective()
    batch = next(run.load().epoch(0, 0))
    objective.eval()
    with torch.no_grad():
        terms = objective(batch)
        ours = objective.student(batch.inputs)
        theirs = objective.teachers[0](batch.inputs_of(0))
    torch.testing.assert_close(terms["rkd-distance"], 2 * rkd_distance(ours, theirs))


def test_the_teachers_embeddings_are_kept_in_a_cache(work, tmp_path, monkeypatch):
    plain, run = (training(work, "translations.tsv", cache=cache) for cache in (None, tmp_path))
    again = training(work, "translations.tsv", cache=tmp_path)
    prepared = []
    for each in (plain, run, again):
        objective, source = each.build_objective(), each.load()
        if each is again:
            monkeypatch.delattr(TextTeacher, "forward")
            monkeypatch.setattr("kd.assembly.text_answers.try_out", lambda *_: torch.zeros(1, 16))
        prepared.append(each.prepare(objective, source))
    for batches in zip(*(source.epoch(0, 1) for source in prepared), strict=True):
        answers = [batch.teacher_logits[0] for batch in batches]
        assert torch.equal(answers[0], answers[1])
        assert torch.equal(answers[0], answers[2])


def test_a_whole_run(work, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    main(
        monkeypatch, "train", work / "translations.tsv", "--task", "embed",
        "--student", "bilstm:6", "--tokenizer", "words", "--teacher", f"hf:{work / 'teacher'}",
        "--validation-fraction", "0.5", "--epochs", "20", "--batch-size", "4", "--lr", "0.01",
        "--device", "cpu", "--out", out,
    )  # fmt: skip
    said = capsys.readouterr()
    assert "embeddings of 16 values" in said.err
    assert "validation cosine to the teacher's embedding" in said.out
    report = read_report(out)
    assert report["metric"] == "cosine"
    assert report["judged_on"] == "validation texts"
    assert set(report["languages"]) == {"de", "fr"}
    assert 0 <= report["validation_source_to_target"] <= 1
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["logits"] for line in lines if "logits" in line]
    assert losses[-1] < losses[0] / 2
    student = saved_text_models.load_run(out)
    part = training(work, "translations.tsv", validation_fraction=0.5).parts.corpus.validation
    taught = teacher_embeds(work, part.texts[0])
    cosines = [torch.cosine_similarity(embed(student, texts), taught) for texts in part.texts]
    assert report["validation_cosine"] == pytest.approx(float(torch.cat(cosines).mean()), abs=1e-5)
    again = evaluate.evaluate(EvaluateOptions(out, device="cpu"))
    for name in ("cosine", "mse", "source_to_target", "target_to_source"):
        assert again[name] == pytest.approx(report[f"validation_{name}"], abs=1e-6)
    assert again["languages"] == report["languages"]


def test_both_parts_are_judged_by_the_teachers_embeddings(work, tmp_path, monkeypatch):
    for name, texts in (("train", SOURCES), ("dev", SOURCES[:3]), ("test", SOURCES[3:8])):
        (tmp_path / f"{name}.txt").write_text("".join(f"{text}\n" for text in texts))
    options = ("--student", "bert:1x8", "--tokenizer", "words", "--epochs", 1, "--device", "cpu")
    taught = ("--task", "embed", "--teacher", f"hf:{work / 'teacher'}", "--loss", "rkd-distance")
    main(monkeypatch, "train", tmp_path, *options, *taught, "--out", tmp_path / "run")
    report = read_report(tmp_path / "run")
    assert report["judged_on"] == "test texts"
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert report["validation_cosine"] == pytest.approx(json.loads(rows[-1])["validation_cosine"])
    assert abs(report["test_cosine"]) <= 1


def test_scores_of_pairs_judge_student_and_teacher(work):
    run = training(work, "pairs.tsv", label="score", validation_fraction=0.5)
    report = run.figures(None)  # pyright: ignore
    assert -1 <= report["validation_spearman"] <= 1
    part = run.parts.corpus.validation
    first, second = (teacher_embeds(work, column) for column in part.texts)
    cosines = torch.cosine_similarity(first, second).numpy()
    assert report["teacher_pearson"] == pytest.approx(
        np.corrcoef(cosines, part.labels)[0, 1], abs=1e-4
    )


def test_copies_of_texts_have_the_teachers_embeddings_too(work, tmp_path):
    recipe = Overrides(loss=None, batch_size=4, augment="words", copies=2)
    run = training(work, "texts.txt", overrides=recipe, validation_fraction=0.0, cache=tmp_path)
    assert len(run.parts.encoded["train"]) > len(run.parts.corpus.train)
    run.check_teachers()  # on training texts, with their copies
    batch = next(run.prepare(run.build_objective(), run.load()).epoch(0, 0))
    with torch.no_grad():
        taught = run.parts.teachers[0](batch.inputs_of(0))
    torch.testing.assert_close(batch.teacher_logits[0], taught, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("data", "loss", "options", "message"),
    [
        ("texts.txt", None, {"teacher": None}, "fits the embeddings of a teacher: name it with"),
        ("texts.txt", "logits:1,ce:1", {}, "--loss ce takes labels or classes"),
        ("texts.txt", "kd:1", {}, "--loss kd takes labels or classes"),
        ("texts.txt", "mse:1,logits:1", {}, "--loss mse takes labels or classes"),
        ("texts.txt", None, {"label": "text"}, "--label text must be a score of two texts"),
        (
            "translations.tsv", "logits:1,hidden:1", {"student": "bert:2x8", "tokenizer": None},
            "a text and its translation have other tokens",
        ),
        ("texts.txt", "logits:1,hidden:1", {}, "another tokenizer than the student"),
        (
            "pairs.tsv", None, {"overrides": Overrides(metric="spearman")},
            "--metric spearman needs scores of pairs",
        ),
        (
            "translations.tsv", None, {"overrides": Overrides(augment="words")},
            "which their translations do not follow",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(work, data, loss, options, message):
    with pytest.raises(UserError, match=message) as refusal:
        training(work, data, loss, **options)
    assert "\n" not in str(refusal.value)


def test_an_accuracy_of_the_teacher_is_refused(work):
    run = training(work, "texts.txt")
    run = replace(run, options=replace(run.options, min_teacher_accuracy=0.5))
    with pytest.raises(UserError, match="has no effect on embeddings"):
        run.check_teachers()
