"""Scoring of embeddings: against the teacher's, by scores of pairs, and by finding translations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from dsdistill.harness.errors import UserError
from kd.data.batching import EvaluationBatches
from kd.data.text.corpus import TextPart
from kd.evaluation import text_scoring
from kd.evaluation.text_scoring import Answers
from kd.parallel.engine import Engine

ROWS = 1024  # of a matrix of similarities at once, which bounds the memory
TIE = 1e-6  # a copy of a translation that is as similar but for rounding
ALIKE = 0.9  # mean similarity of different texts above which embeddings tell little
SAMPLE = 1000  # texts whose similarities to each other are averaged


@dataclass(frozen=True, eq=False)
class EmbeddingScorer:
    """Measures embeddings of the texts of a part.

    Attributes:
        part: Rows of one or two texts, with scores of pairs or without.
        batches: Its texts, as `embedding_texts` orders them.
        teachers: The teachers; the mean of their embeddings is what the student's should be.
        parallel: Whether the second text of a row is a translation of the first.
        on: The processes, each of which embeds its share; None for one process.
    """

    part: TextPart
    batches: EvaluationBatches
    teachers: Sequence[nn.Module]
    parallel: bool
    on: Engine | None = None

    @cached_property
    def targets(self) -> Float[np.ndarray, "m d"]:
        """The teachers' mean embeddings of all texts."""
        each = [self.embed(teacher, i) for i, teacher in enumerate(self.teachers)]
        return np.mean(each, axis=0)

    def embed(self, network: nn.Module, teacher: int | None = None) -> Float[np.ndarray, "m d"]:
        """Embeddings of all texts, in their order.

        Args:
            network: A student, or a teacher with its number.
            teacher: Number of the teacher.
        """
        return text_scoring.answers(network, self.batches, self.on, teacher=teacher).outputs

    def measure(self, network: nn.Module) -> dict[str, float]:
        """Figures of a student, as `figures`."""
        return self._figures(self.embed(network), self.targets)

    def measure_teacher(self, number: int) -> dict[str, float]:
        """Figures of a teacher: of pairs with scores their correlation, else none."""
        if self.part.labels is None:
            return {}
        return self._figures(self.embed(self.teachers[number], number), None)

    def report(self, network: nn.Module, teacher_names: Sequence[str]) -> dict[str, Any]:
        """Figures of a student, of each language where these are known, and of its teachers.

        Args:
            network: The student.
            teacher_names: Names of the teachers.
        """
        student = self.embed(network)
        report: dict[str, Any] = self._figures(student, self.targets)
        if self.part.languages:
            names = np.array(self.part.languages)
            report["languages"] = {
                name: self._figures_of(student, np.flatnonzero(names == name))
                for name in sorted(set(self.part.languages))
            }
        each = {name: self.measure_teacher(i) for i, name in enumerate(teacher_names)}
        return report | ({"teachers": each} if any(each.values()) else {})

    def check_teacher(
        self, name: str, number: int, minimum: float | None, say: Callable[[str], None]
    ) -> None:
        """Report how well a teacher embeds the texts, and warn where it can hardly teach.

        Args:
            name: Name of the teacher.
            number: Its number.
            minimum: Smallest accuracy that the user asked for, which embeddings do not have.
            say: Called with each line.

        Raises:
            UserError: If there is such a minimum.
        """
        if minimum is not None:
            raise UserError("--min-teacher-accuracy has no effect on embeddings: leave it out")
        embeddings = self.embed(self.teachers[number], number)
        alike = mean_similarity(embeddings[:SAMPLE])
        figures = {"mean cosine of different texts": alike, **self.measure_teacher(number)}
        listed = ", ".join(f"{key} {value:.3g}" for key, value in figures.items())
        say(f"teacher {name}: embeddings of {embeddings.shape[1]} values, {listed}")
        if alike > ALIKE:
            say(
                f"warning: teacher {name} embeds different texts nearly alike: check that it was "
                "trained to embed texts"
            )

    def _figures_of(self, student: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
        """Figures of some rows, with their number."""
        of_both = np.concatenate([rows, rows + len(self.part)][: len(self.part.texts)])
        labels = self.part.labels
        scores = labels[rows] if isinstance(labels, np.ndarray) else None
        given = figures(
            student[of_both],
            self.targets[of_both],
            pairs=len(self.part.texts) == 2,
            scores=scores,
            parallel=self.parallel,
        )
        return {"texts": len(rows), **given}

    def _figures(self, embeddings: np.ndarray, targets: np.ndarray | None) -> dict[str, float]:
        labels = self.part.labels
        return figures(
            embeddings,
            targets,
            pairs=len(self.part.texts) == 2,
            scores=labels if isinstance(labels, np.ndarray) else None,
            parallel=self.parallel,
        )


def figures(
    embeddings: Float[np.ndarray, "m d"],
    targets: Float[np.ndarray, "m d"] | None,
    *,
    pairs: bool,
    scores: Float[np.ndarray, " n"] | None,
    parallel: bool,
) -> dict[str, float]:
    """Measure embeddings.

    Args:
        embeddings: Embeddings of texts, of pairs those of all first texts before the second ones.
        targets: What they should be; None for those of a teacher itself.
        pairs: Whether each row has two texts.
        scores: How similar people find the two texts of each row.
        parallel: Whether the second text of each row is a translation of the first.

    Returns:
        `mse`, the mean over texts and values, and `cosine`, the mean over texts, against the
        targets; `pearson` and `spearman` of the cosines of pairs and their scores, as
        sentence-transformers' EmbeddingSimilarityEvaluator; `source_to_target`, the share of texts
        whose translation is the most similar of all translations, and `target_to_source`, as its
        TranslationEvaluator.
    """
    report: dict[str, float] = {}
    if targets is not None:
        report["mse"] = float(np.square(embeddings - targets, dtype=np.float64).mean())
        report["cosine"] = float(_cosines(embeddings, targets).mean())
    if not pairs:
        return report
    first, second = np.split(embeddings, 2)
    if scores is not None:
        cosines = Answers(_cosines(first, second)[:, None], scores, np.arange(len(first)))
        given = text_scoring.score_figures(cosines)
        report |= {name: given[name] for name in ("pearson", "spearman")}
    if parallel:
        report["source_to_target"] = _retrieval(first, second)
        report["target_to_source"] = _retrieval(second, first)
    return report


def mean_similarity(embeddings: Float[np.ndarray, "m d"]) -> float:
    """Mean cosine of the embeddings of two different rows; 0 of a single one."""
    unit = _unit(embeddings)
    m = len(unit)
    return float((np.square(unit.sum(0)).sum() - m) / (m * (m - 1))) if m > 1 else 0.0


def _retrieval(queries: Float[np.ndarray, "n d"], answers: Float[np.ndarray, "n d"]) -> float:
    """Share of the queries to which no answer is more similar than their own."""
    theirs = torch.from_numpy(_unit(answers))
    right = 0
    for start in range(0, len(queries), ROWS):
        ours = torch.from_numpy(_unit(queries[start : start + ROWS]))
        similarities = ours @ theirs.T
        own = similarities.diagonal(start)
        right += int((own >= similarities.amax(1) - TIE).sum())
    return right / len(queries)


def _cosines(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    return (_unit(a) * _unit(b)).sum(1)


def _unit(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    x = x.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


# Figures that a report has for validation and for test texts.
NAMED_BY_PART = ("cosine", "source_to_target", "target_to_source")
