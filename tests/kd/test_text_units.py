"""Terms on texts weigh rows, tokens and targets alike, however these are put into batches."""

import json
from pathlib import Path
from typing import Any

import kd_support as support
import language_support
import numpy as np
import process_support
import pytest
import safetensors.numpy
import text_data
import text_support
from kd_support import main

SCRIPT = Path(__file__).parents[1] / "support" / "texts_in_processes.py"
STEADY = ("--optimizer", "sgd", "--lr", 0.05, "--schedule", "constant", "--warmup", 0)
STEADY += ("--epochs", 3, "--device", "cpu")
TASKS = {  # data and networks; the terms have all units, and layers
    "classify": ("one", "hf:body", "hf:judge", "ce,kd,hidden,scores,patient"),
    "regress": ("score", "hf:body", "hf:rater", "mse,logits,hidden"),
    "tag": ("tag", "hf:body", "hf:tagger", "ce,kd,hidden,relations:1:heads=4"),
    "mlm": ("plain", "hf:body", "hf:other", "mlm,tokens,cosine,hidden"),
    "causal": ("prompt", "hf:small", "hf:large", "clm,tokens:1:temperature=1:targets=1,hidden"),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 32 training rows of every task, and models without dropout."""
    folder = tmp_path_factory.mktemp("units")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_data, "PARTS", (("train", 32, 0), ("dev", 8, 1), ("test", 8, 2)))
        text_data.write_all(folder)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    text_support.bert_folder(folder / "body", "ForMaskedLM", **still)
    text_support.bert_folder(folder / "other", "ForMaskedLM", seed=1, **still)
    names = {"judge": ("neg", "pos"), "tagger": ("B-X", "O")}
    for name, classes in names.items():
        kind = "ForSequenceClassification" if name == "judge" else "ForTokenClassification"
        labels: dict[str, Any] = {"id2label": dict(enumerate(classes))}
        labels["label2id"] = {each: i for i, each in enumerate(classes)}
        text_support.bert_folder(folder / name, kind, seed=1, **still, **labels)
    score = {"num_labels": 1, "problem_type": "regression"}
    text_support.bert_folder(folder / "rater", "ForSequenceClassification", **still, **score)
    tokenizer = language_support.characters("abcdefghij ")
    for seed, name in enumerate(("small", "large")):
        model = language_support.causal_model(tokenizer, seed=seed, positions=48)
        model.network.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.chdir(work)
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)
    return monkeypatch


def line(task: str) -> tuple[object, ...]:
    data, student, teacher, loss = TASKS[task]
    words = (data, "--task", task, "--student", student, "--teacher", teacher, "--loss", loss)
    return (*words, *STEADY)


def weights(folder: Path | str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(Path(folder) / "student.safetensors")


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():  # float32 sums in another order
        np.testing.assert_allclose(other[name], value, rtol=0, atol=2e-6, err_msg=name)


def whole(inside: pytest.MonkeyPatch, task: str) -> dict[str, np.ndarray]:
    """The student of one batch with all rows."""
    out = Path(f"whole-{task}")
    if not out.exists():
        main(inside, "train", *line(task), "--batch-size", 32, "--out", out)
    return weights(out)


@pytest.mark.parametrize("task", TASKS)
def test_accumulated_batches_give_the_student_of_one_batch(
    inside: pytest.MonkeyPatch, tmp_path: Path, task: str
) -> None:
    """One batch is as long as its longest row, four are not: padding must not count either."""
    few = (*line(task), "--batch-size", 8, "--accumulate", 4)
    main(inside, "train", *few, "--out", tmp_path / "run")
    same(whole(inside, task), weights(tmp_path / "run"))
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    other = json.loads(Path(f"whole-{task}/metrics.jsonl").read_text().splitlines()[0])
    for name in (term.split(":")[0] for term in TASKS[task][3].split(",")):
        assert first[name] == pytest.approx(other[name], rel=1e-5), name


def test_two_processes_give_the_student_of_one(
    inside: pytest.MonkeyPatch, work: Path, tmp_path: Path
) -> None:
    lines = tmp_path / "lines.json"
    words = [
        [*map(str, line(task)), "--batch-size", "8", "--accumulate", "2", "--out", f"two-{task}"]
        for task in TASKS
    ]
    lines.write_text(json.dumps(words))
    outputs = process_support.finish(process_support.start(work, lines, script=SCRIPT))
    assert outputs[1][0] == ""  # the first process alone prints
    for task in TASKS:
        same(whole(inside, task), weights(work / f"two-{task}"))
        one, two = (support.read_report(work / f"{name}-{task}") for name in ("whole", "two"))
        names = [name for name in one if name.startswith(("test_", "validation_")) and one[name]]
        assert len(names) > 2
        for name in names:
            assert two[name] == pytest.approx(one[name], rel=1e-4), (task, name)
