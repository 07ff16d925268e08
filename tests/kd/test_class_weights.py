"""Weights of classes: read, counted, and in the loss alike however the images are divided."""

import json
from pathlib import Path

import kd_support as support
import numpy as np
import pytest
import safetensors.torch
import text_data
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import metrics
from kd.data import class_weights
from kd.losses import response

NAMES = ("cat", "sea-lion", "owl")
LABELS = np.array([0] * 60 + [1] * 30 + [2] * 10)


def test_balanced_weights_are_scikit_learns_and_have_mean_1() -> None:
    made = class_weights.make("balanced", NAMES, LABELS)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    np.testing.assert_allclose(made.values, expected, rtol=1e-12)
    assert made.values[LABELS].mean() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("w.json", '{"owl": 4, "cat": 1, "Sea Lion": "2"}'),
        ("w.csv", "class,weight\nowl,4\ncat,1\nsea lion,2\n"),
        ("w.tsv", "weight\tclass\n4\towl\n1\tcat\n8/4\tsea_lion\n"),
    ],
)
def test_weights_of_a_file_are_scaled_to_a_mean_of_1(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    made = class_weights.make(str(tmp_path / name), NAMES, LABELS)
    # (60 + 2 * 30 + 4 * 10) / 100 = 1.6
    np.testing.assert_allclose(made.values, np.array([1, 2, 4]) / 1.6, rtol=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"cat": 1, "owl": 2}', "leaves out 1 of the data's classes: 'sea-lion'"),
        ('{"cat": 1, "owl": 2, "sea-lion": 1, "emu": 1}', "unknown class of the data .*'emu'"),
        ('{"cat": 1, "owl": 0, "sea-lion": 1}', "'owl' the weight 0: it must be a positive"),
        ('{"cat": 1, "owl": true, "sea-lion": 1}', "'owl' the weight True"),
        ('{"cat": 1, "owl": "much", "sea-lion": 1}', "'owl' the weight 'much'"),
        ('{"cat": 1, "cat": 2, "owl": 1, "sea-lion": 1}', "has class 'cat' twice"),
        ("[1, 2, 3]", "must be one JSON object of class names"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_files_that_do_not_fit_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "w.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        class_weights.make(str(tmp_path / "w.json"), NAMES, LABELS)
    assert "\n" not in str(error.value)


def test_balanced_needs_every_class() -> None:
    with pytest.raises(UserError, match="class 'owl' has no training label: give a file"):
        class_weights.make("balanced", NAMES, LABELS[:90])


def test_the_weighted_loss_is_the_sum_over_images_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 3, generator=generator)
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 0])
    weights = torch.tensor([0.5, 2.0, 3.0])
    log_q = torch.log_softmax(logits.double(), 1).numpy()
    smooth = np.full((7, 3), 0.1 / 3) + 0.9 * np.eye(3)[labels.numpy()]
    expected = -(smooth * np.array([0.5, 2, 3]) * log_q).sum(1).mean()
    got = response.cross_entropy(logits, labels, weights, smoothing=0.1)
    assert got.item() == pytest.approx(expected, rel=1e-6)
    shares = torch.tensor(np.eye(3)[labels.numpy()], dtype=torch.float32)
    mixed = response.cross_entropy(logits, shares, weights, smoothing=0.1)
    assert mixed.item() == pytest.approx(expected, rel=1e-6)
    # Unlike torch's mean, that of two halves is the mean of the whole.
    halves = [
        response.cross_entropy(logits[r], labels[r], weights) for r in (slice(3), slice(3, 7))
    ]
    whole = response.cross_entropy(logits, labels, weights)
    assert (3 * halves[0] + 4 * halves[1]).item() / 7 == pytest.approx(whole.item(), rel=1e-6)
    total = weights[labels].sum() / 7
    torchs = F.cross_entropy(logits, labels, weight=weights) * total
    assert whole.item() == pytest.approx(torchs.item(), rel=1e-6)


def test_figures_by_class_are_scikit_learns() -> None:
    from sklearn.metrics import balanced_accuracy_score, f1_score

    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, 200), rng.integers(0, 5, 200)
    counts = metrics.class_counts(predicted, labels, 6)
    parts = [metrics.class_counts(predicted[r], labels[r], 6) for r in (slice(80), slice(80, 200))]
    np.testing.assert_array_equal(sum(parts), counts)
    expected = f1_score(labels, predicted, average="macro")
    assert metrics.macro_f1(counts) == pytest.approx(expected, abs=1e-12)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        expected = balanced_accuracy_score(labels, predicted)
    assert metrics.balanced_accuracy(counts) == pytest.approx(expected, abs=1e-12)


def test_a_rare_class_is_answered_more_often_and_the_report_has_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.zeros(270, int), np.ones(30, int)])
    # Two classes that overlap: without weights the rare one is hardly ever the likelier one.
    images = 0.45 + 0.08 * labels[:, None, None] + 0.15 * rng.standard_normal((300, 4, 4))
    images = np.clip(images, 0, 1).astype(np.float32)
    np.savez(tmp_path / "rare.npz", images=images, labels=labels)
    common = [str(tmp_path / "rare.npz"), "--student", "mlp:8", "--epochs", "8", "--lr", "0.1"]
    recall, students = {}, {}
    weighted = ["--class-weights", "balanced", "--metric", "balanced_accuracy"]
    in_parts = [*weighted, "--batch-size", "16", "--accumulate", "4"]
    ways = {"plain": [], "weighted": weighted, "accumulated": in_parts}
    for name, more in ways.items():
        out = tmp_path / name
        support.main(monkeypatch, "train", *common, *more, "--out", out)
        report = json.loads((out / "report.json").read_text())
        recall[name] = report["test_balanced_accuracy"]
        students[name] = safetensors.torch.load_file(out / "student.safetensors")
        assert 0 <= report["test_macro_f1"] <= 1
        if more:
            weights = report["class_weights"]
            assert weights["1"] / weights["0"] == pytest.approx(9, rel=0.1)
    assert recall["weighted"] > recall["plain"] + 0.05
    # Four batches of 16 make the step of one of 64: the same loss over the same images.
    for name, value in students["weighted"].items():
        torch.testing.assert_close(students["accumulated"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--class-weights", "balanced", "--loss", "mse:1"], "--loss mse has none: add ce"),
        (["--class-weights", "none.json"], "cannot be read"),
    ],
)
def test_what_has_no_effect_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    arguments = ["digits", "--student", "mlp:8", *more, "--out", tmp_path / "run"]
    assert message in support.refused(monkeypatch, "train", *arguments)
    assert not (tmp_path / "run").exists()


def test_texts_and_tags_have_weights_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_data.write_all(tmp_path)
    monkeypatch.setattr("kd.runs.curves.draw", lambda folder: None)
    student = ("--student", "bert:1x8", "--tokenizer", "words", "--steps", 2, "--device", "cpu")
    words = [row["tags"] for row in map(text_data.tags, text_data.sentences(96, 0))]
    counts = {
        "one": [[row[1] for row in text_data.rows(96, 0)].count(name) for name in ("neg", "pos")],
        "tag": [sum(tags.count(name) for tags in words) for name in ("B-X", "O")],
    }
    for name, (first, second) in counts.items():
        out = tmp_path / f"run-{name}"
        data = tmp_path / name
        support.main(
            monkeypatch, "train", data, *student, "--class-weights", "balanced", "--out", out
        )
        weights = list(support.read_report(out)["class_weights"].values())
        half = (first + second) / 2
        assert weights == pytest.approx([half / first, half / second], rel=1e-9)
    more = ("--class-weights", "balanced", "--out", tmp_path / "refused")
    line = support.refused(monkeypatch, "train", tmp_path / "score", *student, *more)
    assert "--class-weights has no effect on --task regress" in line
