"""`kd evaluate` of students of texts: which texts are judged, by which figures, beside whom."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import kd_support as support
import language_support
import numpy as np
import pytest
import torch
from kd_support import main
from text_support import LETTERS, bert_folder

from dsdistill.harness import files
from dsdistill.harness.errors import UserError
from kd.commands import evaluate as command
from kd.commands import train
from kd.evaluation import scoring
from kd.models.language import saved_text_models, text_students
from kd.models.language.text_model import TextModel
from kd.options import EvaluateOptions

CLASSES = ("bad", "fair", "good")
LENGTH = 12


def rows(count: int, seed: int, classes: tuple[str, ...] = CLASSES) -> list[tuple[str, str]]:
    """Random texts of letters with random labels, every class among the first."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(LETTERS, rng.integers(1, 9))) for _ in range(count)]
    labels = [classes[i] if i < len(classes) else str(rng.choice(classes)) for i in range(count)]
    return list(zip(texts, labels, strict=True))


def write(path: Path, lines: list[tuple[str, ...]], head: tuple[str, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(line) + "\n" for line in [head, *lines]))


def run_of(folder: Path, name: str, task: Any, classes: tuple[str, ...], **config: Any) -> None:
    """A finished run, as far as an evaluation reads it."""
    seed = config.pop("seed", 1)
    model = text_students.build(name, task, classes, max_length=LENGTH, seed=seed)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    folder.mkdir()
    saved_text_models.save_run(folder, model)
    files.write_json(folder / "config.json", config)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Data with and without parts, and a student and teachers of them."""
    folder = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    bert = "hf:" + bert_folder(folder / "bert", "Model")
    for part, count in (("train", 30), ("dev", 11), ("test", 13)):
        write(folder / "parts" / f"{part}.tsv", rows(count, count), ("sentence", "label"))
    write(folder / "plain.tsv", rows(40, 5), ("sentence", "label"))
    for i, (name, data) in enumerate((("of-parts", "parts"), ("of-plain", "plain.tsv"))):
        run_of(folder / name, bert, "classify", CLASSES, data=str(folder / data), seed=i)
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the data; latency is not measured, which takes two seconds."""
    monkeypatch.chdir(work)
    monkeypatch.setattr(scoring, "text_latency", lambda *_, **__: {"latency_ms_batch_1": 0.5})
    return work


def judged(run: str, data: str | None = None, **options: Any) -> dict[str, Any]:
    return command.evaluate(EvaluateOptions(Path(run), data, device="cpu", **options))


def logits(run: str, texts: list[str]) -> np.ndarray:
    """Logits of each text alone, without batches or padding."""
    model = saved_text_models.load_run(Path(run))
    return np.concatenate([alone(model, text) for text in texts])


@torch.no_grad()
def alone(model: TextModel, text: str) -> np.ndarray:
    ids = model.tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt")
    return model.network.network.eval()(**ids).logits.numpy()


def by_hand(run: str, lines: list[tuple[str, str]]) -> dict[str, float]:
    """Accuracy, macro F1 and NLL from their definitions."""
    scores = logits(run, [text for text, _ in lines]).astype(np.float64)
    labels = np.array([CLASSES.index(label) for _, label in lines])
    predicted = scores.argmax(1)
    f1 = []
    for k in range(len(CLASSES)):
        right = ((predicted == k) & (labels == k)).sum()
        total = (predicted == k).sum() + (labels == k).sum()
        f1 += [2 * right / total] if total else []
    logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    return {
        "accuracy": float((predicted == labels).mean()),
        "macro_f1": float(np.mean(f1)),
        "nll": float(-logs[np.arange(len(labels)), labels].mean()),
    }


def same(figures: dict[str, Any], expected: dict[str, float]) -> bool:
    return all(figures[k] == pytest.approx(v, abs=1e-5) for k, v in expected.items())


def test_the_test_part_of_the_runs_data_is_judged(work, monkeypatch):
    monkeypatch.chdir(work)
    figures = judged("of-parts")
    assert (figures["texts"], figures["judged_on"]) == (13, "test texts of parts")
    assert same(figures, by_hand("of-parts", rows(13, 13)))
    assert figures["classes_matched"] == "by name"
    assert min(figures["latency_ms_batch_1"], figures["latency_ms_batch_64"]) > 0
    assert 3 <= figures["latency_tokens"] <= 10


def test_validation_texts_are_judged_where_there_are_no_test_texts(inside):
    write(Path("two/train.tsv"), rows(30, 30), ("sentence", "label"))
    write(Path("two/dev.tsv"), rows(11, 11), ("sentence", "label"))
    figures = judged("of-parts", "two")
    assert (figures["texts"], figures["judged_on"]) == (11, "validation texts of two")
    assert same(figures, by_hand("of-parts", rows(11, 11)))
    write(Path("two/test.tsv"), [(text, "-1") for text, _ in rows(9, 9)], ("sentence", "label"))
    assert judged("of-parts", "two")["texts"] == 11  # test texts without labels judge nothing


def test_of_the_data_trained_on_only_the_held_out_share_is_judged(inside):
    own = judged("of-plain")
    assert own["texts"] == 4  # a tenth of 40
    assert "held out" in own["judged_on"]
    other = judged("of-parts", "plain.tsv")
    assert (other["texts"], other["judged_on"]) == (40, "all texts of plain.tsv")
    assert same(other, by_hand("of-parts", rows(40, 5)))


def test_a_folder_without_texts_to_train_on_is_judged(inside):
    write(Path("lone/test.tsv"), rows(8, 8), ("sentence", "label"))
    figures = judged("of-parts", "lone")
    assert (figures["texts"], figures["judged_on"]) == (8, "all texts of lone/test.tsv")
    assert same(figures, by_hand("of-parts", rows(8, 8)))


def test_labels_are_matched_by_name_also_where_some_are_missing(inside, capsys):
    lines = rows(12, 7, classes=("good", "bad"))
    write(Path("some.tsv"), lines, ("sentence", "label"))
    figures = judged("of-parts", "some.tsv")
    # The average is over the classes that occur among labels and answers.
    assert same(figures, by_hand("of-parts", lines))
    assert "some has no class 'fair'" in capsys.readouterr().err


def test_a_class_map_says_which_labels_are_which(inside):
    names = {"bad": "1 star", "fair": "3 stars", "good": "5 stars"}
    lines = rows(15, 15)
    write(Path("stars.tsv"), [(text, names[label]) for text, label in lines], ("text", "label"))
    with pytest.raises(UserError, match="--class-map FILE must say which are which"):
        judged("of-parts", "stars.tsv")
    mapping = Path("stars.json")
    mapping.write_text(json.dumps({new: old for old, new in names.items()}))
    figures = judged("of-parts", "stars.tsv", class_map=mapping)
    assert figures["classes_matched"] == "by the class map"
    assert same(figures, by_hand("of-parts", lines))


def test_columns_of_other_data_can_be_named(inside):
    write(Path("columns.tsv"), rows(10, 10), ("body", "verdict"))
    with pytest.raises(UserError, match="name it with --text") as refusal:
        judged("of-parts", "columns.tsv")
    assert "--task" not in str(refusal.value)
    figures = judged("of-parts", "columns.tsv", text="body", label="verdict")
    assert same(figures, by_hand("of-parts", rows(10, 10)))


def test_teachers_are_judged_alone_and_together(inside):
    lines, teachers = rows(13, 13), ("of-plain", "of-parts")
    one = judged("of-parts", teacher="of-plain")
    assert one["teacher_accuracy"] == by_hand("of-plain", lines)["accuracy"]
    assert one["teacher_nll"] == pytest.approx(by_hand("of-plain", lines)["nll"], abs=1e-5)
    assert "teachers" not in one
    texts = [text for text, _ in lines]
    scores = [torch.from_numpy(logits(name, texts)).softmax(1).numpy() for name in teachers]
    answers = [x.argmax(1) for x in (*scores, (scores[0] + scores[1]) / 2)]
    assert one["teacher_agreement"] == (answers[0] == answers[1]).mean()
    both = judged("of-parts", teacher=",".join(teachers))
    assert [*both["teachers"]] == [*teachers]
    assert both["teachers"]["of-parts"]["agreement"] == 1
    assert both["teacher_agreement"] == (answers[2] == answers[1]).mean()


def test_each_language_has_a_row(inside):
    lines = [(*line, ("de", "fr", "sw")[i % 3]) for i, line in enumerate(rows(14, 14))]
    write(Path("tongues.tsv"), lines, ("text", "label", "language"))
    figures = judged("of-parts", "tongues.tsv")
    assert [*figures["languages"]] == ["de", "fr", "sw"]
    french = [(text, label) for text, label, language in lines if language == "fr"]
    row = figures["languages"]["fr"]
    assert row["texts"] == len(french) == 5
    assert row["accuracy"] == by_hand("of-parts", french)["accuracy"]


def test_scores_have_correlations(inside):
    rng = np.random.default_rng(0)
    lines = [(text, f"{rng.random():.2f}") for text, _ in rows(9, 9)]
    write(Path("scores.tsv"), lines, ("sentence", "score"))
    run_of(Path("of-scores"), "hf:bert", "regress", (), data="scores.tsv", seed=3)
    run_of(Path("other-scores"), "hf:bert", "regress", (), data="scores.tsv", seed=4)
    write(Path("more/test.tsv"), lines, ("sentence", "score"))
    figures = judged("of-scores", "more", teacher="other-scores,of-scores")
    texts, scores = [x for x, _ in lines], np.array([float(y) for _, y in lines])
    answers = [logits(name, texts)[:, 0] for name in ("of-scores", "other-scores")]
    assert figures["pearson"] == pytest.approx(np.corrcoef(answers[0], scores)[0, 1], abs=1e-4)
    assert figures["mse"] == pytest.approx(np.square(answers[0] - scores).mean(), rel=1e-4)
    mean = np.mean(answers, 0)
    assert figures["teacher_pearson"] == pytest.approx(np.corrcoef(mean, scores)[0, 1], abs=1e-4)
    assert figures["classes_matched"] is None
    with pytest.raises(UserError, match="--class-map has no effect on --task regress"):
        judged("of-scores", "more", class_map=Path("map.json"))


def causal_run(folder: Path, characters: str) -> None:
    """A random language model of these characters."""
    tokenizer = language_support.characters(characters)
    language_support.causal_model(tokenizer, "gpt2").network.save_pretrained(folder / "weights")
    tokenizer.save_pretrained(folder / "weights")
    run_of(folder / "run", f"hf:{folder / 'weights'}", "causal", (), data="play.txt")


def test_language_models_have_a_perplexity_and_teachers_their_own_tokens(inside):
    Path("play.txt").write_text("".join(f"to be or not, {i}\n" for i in range(40)))
    causal_run(Path("writer"), "to be or not, 0123456789\n")
    causal_run(Path("reader"), "9876543210 ,abcdefghijklmnopqrstuvwxyz\n")
    figures = judged("writer/run", teacher="reader/run")
    assert figures["perplexity"] == pytest.approx(math.exp(figures["nll"]))
    assert figures["bits_per_byte"] > 0
    own = judged("reader/run")
    assert own["bits_per_byte"] == pytest.approx(figures["teacher_bits_per_byte"])
    assert "teacher_agreement" not in figures


def test_the_report_of_a_training_has_the_same_figures(inside, monkeypatch):
    options = ("--epochs", 1, "--out", "trained", "--batch-size", 16)
    name = "bilstm:4"
    main(monkeypatch, "train", "parts", "--student", name, "--teacher", "of-plain", *options)
    report = json.loads(Path("trained/report.json").read_text())
    figures = judged("trained")
    for key in ("accuracy", "macro_f1", "matthews"):
        assert report[f"test_{key}"] == figures[key]
    for key in ("nll", "teacher_accuracy", "teacher_agreement", "teacher_macro_f1"):
        assert report[key] == figures[key]
    assert report["latency_tokens"] == figures["latency_tokens"]
    assert report["latency_ms_batch_1"] > 0
    (line,) = Path("trained/metrics.jsonl").read_text().splitlines()
    assert {"texts_per_second", "validation_macro_f1"} <= json.loads(line).keys()
    support.refused(monkeypatch, "evaluate", "trained", "no-such-data")


def test_outputs_that_fit_centred_labels_have_no_probabilities(inside, monkeypatch):
    options = ("--epochs", 1, "--out", "squares", "--batch-size", 16, "--loss", "mse")
    words = ("--tokenizer", "words")
    main(monkeypatch, "train", "parts", "--student", "bilstm:4", *words, *options)
    report = json.loads(Path("squares/report.json").read_text())
    (line,) = Path("squares/metrics.jsonl").read_text().splitlines()
    for figures in (report, judged("squares"), json.loads(line)):
        names = {name.rpartition("validation_")[2] for name in figures}
        assert not {"nll", "calibration_error"} & names
        assert {"accuracy", "test_accuracy"} & names


def test_a_run_that_was_taught_layers_alone_is_said_to_be(inside, capsys):
    shutil.copytree("of-parts", "layers")
    files.write_json(Path("layers/recipe.json"), {"loss": "hidden:1"})
    config = json.loads(Path("layers/config.json").read_text())
    files.write_json(Path("layers/config.json"), config | {"teacher": "hf:bert"})
    assert "teacher_accuracy" not in judged("layers")  # a teacher that has no head
    assert "those of an untrained head" in capsys.readouterr().err


def test_texts_that_do_not_fit_are_one_line(inside):
    lines = [(text, text, label) for text, label in rows(9, 9)]
    write(Path("pairs.tsv"), lines, ("sentence1", "sentence2", "label"))
    with pytest.raises(UserError, match="takes single texts, and pairs has 2 columns") as refusal:
        judged("of-parts", "pairs.tsv")
    assert "\n" not in str(refusal.value)


def test_a_student_that_a_cpu_cannot_run_costs_no_training(capsys):
    class Training:
        def latency(self) -> dict[str, float]:
            raise RuntimeError("needs a GPU\nhere is a trace")

    assert train._latency(Training()) == {}  # pyright: ignore[reportArgumentType]
    assert capsys.readouterr().err == (
        "note: no latency: the student does not run on a CPU (needs a GPU)\n"
    )
