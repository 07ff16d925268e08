"""Figures of classes, scores and tags of texts."""

import numpy as np
import pytest

from kd.evaluation import text_scoring
from kd.evaluation.text_scoring import Answers


def _answers(predicted: list[int], targets: list[int], k: int = 3) -> Answers:
    outputs = 4 * np.eye(k)[predicted]
    return Answers(outputs, np.array(targets), np.arange(len(targets)))


def test_f1_and_matthews_see_what_accuracy_hides() -> None:
    """Nine of ten texts are of class 0, and the network always says so."""
    figures = text_scoring.class_figures(_answers([0] * 10, [0] * 9 + [1], 2))
    assert figures["accuracy"] == 0.9
    assert figures["macro_f1"] == pytest.approx((2 * 0.9 / 1.9 + 0) / 2)  # precision .9, recall 1
    assert figures["matthews"] == 0


def test_figures_of_two_classes_are_those_of_the_formula() -> None:
    figures = text_scoring.class_figures(_answers([0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0], 2))
    tp, tn, fp, fn = 2, 2, 1, 1
    assert figures["matthews"] == pytest.approx((tp * tn - fp * fn) / 9)
    assert figures["accuracy"] == pytest.approx(4 / 6)


def test_scores_are_correlated_by_value_and_by_rank() -> None:
    outputs = np.array([[0.0], [1.0], [2.0], [30.0]])
    figures = text_scoring.score_figures(
        Answers(outputs, np.array([1.0, 2.0, 3.0, 4.0]), np.arange(4))
    )
    assert figures["spearman"] == pytest.approx(1)
    assert figures["pearson"] == pytest.approx(np.corrcoef(outputs[:, 0], [1, 2, 3, 4])[0, 1])
    assert figures["mse"] == pytest.approx(np.mean([1, 1, 1, 26**2]))


def test_constant_scores_have_no_correlation() -> None:
    same = Answers(np.ones((3, 1)), np.array([1.0, 2.0, 3.0]), np.arange(3))
    figures = text_scoring.score_figures(same)
    assert figures["pearson"] == figures["spearman"] == 0


TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O B-LOC", {(0, 2, "PER"), (3, 4, "LOC")}),
        ("B-PER B-PER", {(0, 1, "PER"), (1, 2, "PER")}),
        ("O I-PER I-LOC", {(1, 2, "PER"), (2, 3, "LOC")}),
        ("I-LOC I-LOC O O", {(0, 2, "LOC")}),
        ("O O", set()),
    ],
)
def test_entities_of_a_text(tags, expected) -> None:
    each = tags.split()
    assert text_scoring.entities(each, np.zeros(len(each), int)) == expected


def test_an_entity_ends_with_its_text() -> None:
    tags = ["B-PER", "I-PER", "I-PER"]
    assert text_scoring.entities(tags, np.array([0, 0, 1])) == {(0, 2, "PER"), (2, 3, "PER")}


def test_entities_count_as_wholes() -> None:
    """Of two entities one is found, and one of the two answers is half of an entity: F1 1/2."""
    targets = [TAGS.index(tag) for tag in ("B-PER", "I-PER", "O", "B-LOC")]
    predicted = [TAGS.index(tag) for tag in ("B-PER", "O", "O", "B-LOC")]
    given = Answers(4 * np.eye(5)[predicted], np.array(targets), np.zeros(4, int))
    figures = text_scoring.tag_figures(given, TAGS)
    assert figures["entity_f1"] == 0.5
    assert figures["accuracy"] == 0.75
    assert "entity_f1" not in text_scoring.tag_figures(given, ("a", "b", "c", "d", "e"))


def test_every_language_has_its_row() -> None:
    rows = text_scoring.by_language(
        "classify", _answers([0, 1, 2, 0], [0, 1, 0, 0]), ("a", "b", "c"), ("en", "de", "de", "en")
    )
    assert [(name, row["texts"], row["accuracy"]) for name, row in rows.items()] == [
        ("de", 2, 0.5),
        ("en", 2, 1.0),
    ]
