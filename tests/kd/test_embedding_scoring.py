"""Figures of embeddings, against values computed by loops and by SciPy."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from dsdistill.harness.errors import UserError
from kd.data.batching import Batch
from kd.evaluation.embedding_scoring import EmbeddingScorer, figures, mean_similarity

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (RNG.normal(size=(8, 5)).astype(np.float32) for _ in range(2))
SCORES = np.array([5, 1.5, 3, 0.5], np.float32)
LANGUAGES = ("de", "fr", "de", "fr")


def cosine(a, b) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


class Texts:
    """Batches of the numbers of eight texts, the last ones first."""

    def in_order(self, rank: int = 0, world: int = 1):
        for rows in (torch.arange(5, 8), torch.arange(5)):
            yield Batch(rows[:, None].float(), rows, index=rows)


class Table(nn.Module):
    """A network that gives the rows of a matrix."""

    def __init__(self, rows: np.ndarray) -> None:
        super().__init__()
        self.rows, self.calls = torch.from_numpy(rows), 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.rows[inputs[:, 0].long()]


def scorer(teacher: np.ndarray = TEACHER, **options) -> EmbeddingScorer:
    options = {"teachers": (Table(teacher),), "pairs": True, "scores": SCORES} | options
    return EmbeddingScorer(Texts(), languages=LANGUAGES, **options)


def test_error_and_cosine_are_means_over_texts():
    given = figures(STUDENT, TEACHER, pairs=False, scores=None, parallel=False)
    assert given == pytest.approx(
        {
            "mse": np.mean([(s - t) ** 2 for s, t in zip(STUDENT, TEACHER, strict=True)]),
            "cosine": np.mean([cosine(s, t) for s, t in zip(STUDENT, TEACHER, strict=True)]),
        },
        rel=1e-6,
    )


def test_similarities_of_pairs_are_correlated_with_their_scores():
    given = figures(STUDENT, TEACHER, pairs=True, scores=SCORES, parallel=False)
    cosines = [cosine(STUDENT[i], STUDENT[4 + i]) for i in range(4)]
    assert given["spearman"] == pytest.approx(stats.spearmanr(cosines, SCORES).statistic)
    assert given["pearson"] == pytest.approx(stats.pearsonr(cosines, SCORES).statistic)


def test_translations_that_are_the_most_similar_are_counted():
    axes = np.eye(4, dtype=np.float32)
    first = axes[:3]
    # The second answer is nearest to the first query; each answer but it is nearest to its own.
    second = np.stack([axes[0] + 0.5 * axes[3], axes[0] + 0.2 * axes[1], axes[2]])
    both = np.concatenate([first, second])
    given = figures(both, both, pairs=True, scores=None, parallel=True)
    assert given["source_to_target"] == pytest.approx(2 / 3)  # the first query finds the second
    assert given["target_to_source"] == pytest.approx(2 / 3)  # the second answer finds the first
    copies = np.concatenate([first[[0, 0]], second[[0, 0]]])  # equal translations are all right
    given = figures(copies, copies, pairs=True, scores=None, parallel=True)
    assert given["source_to_target"] == 1


def test_the_teacher_is_asked_once_for_all_validations():
    given = scorer()
    student = Table(STUDENT)
    first, second = given.measure(student), given.measure(student)
    assert first == second
    assert given.teachers[0].calls == 2  # the batches
    assert first == figures(STUDENT, TEACHER, pairs=True, scores=SCORES, parallel=False)


def test_several_teachers_teach_their_mean():
    given = scorer(teachers=(Table(TEACHER), Table(STUDENT)))
    np.testing.assert_allclose(given.targets, (TEACHER + STUDENT) / 2, rtol=1e-6)


def test_the_report_has_languages_and_teachers():
    report = scorer(parallel=True).report(Table(STUDENT), ["a"])
    rows = [1, 3, 5, 7]
    expected = figures(
        STUDENT[rows], TEACHER[rows], pairs=True, scores=SCORES[[1, 3]], parallel=True
    )
    assert report["languages"]["fr"] == {"texts": 2, **expected}
    assert report["teacher_spearman"] == pytest.approx(
        stats.spearmanr([cosine(TEACHER[i], TEACHER[4 + i]) for i in range(4)], SCORES).statistic
    )


def test_without_teachers_scores_are_all_there_is():
    report = scorer(teachers=()).report(Table(STUDENT), [])
    assert set(report) == {"pearson", "spearman", "languages"}


def test_a_teacher_that_embeds_all_texts_alike_is_said():
    lines: list[str] = []
    scorer().check_teacher("a", 0, None, lines.append)
    assert len(lines) == 1
    assert "embeddings of 5 values" in lines[0]
    alike = TEACHER + 100
    scorer(teacher=alike).check_teacher("a", 0, None, lines.append)
    assert "embeds different texts nearly alike" in lines[-1]
    pairs = [cosine(x, y) for i, x in enumerate(alike) for j, y in enumerate(alike) if i != j]
    assert mean_similarity(alike) == pytest.approx(np.mean(pairs))
    with pytest.raises(UserError, match="has no effect on embeddings"):
        scorer().check_teacher("a", 0, 0.5, lines.append)
