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
from kd.evaluation import text_scoring
from kd.evaluation.text_scoring import Answers
from kd.parallel.engine import Engine

ROWS = 1024  # of a matrix of similarities at once, which bounds the memory
TIE = 1e-6  # a copy of a translation that is as similar but for rounding
ALIKE = 0.9  # mean similarity of different texts above which embeddings tell little
SAMPLE = 1000  # texts whose similarities to each other are averaged


@dataclass(frozen=True, eq=False)
class EmbeddingScorer:
    """Measures embeddings of texts.

    Attributes:
        batches: The texts; of pairs all first ones before the second ones.
        teachers: The teachers; the mean of their embeddings is what the student's should be.
        pairs: Whether they are pairs.
        scores: How similar people find the texts of each pair; None without.
        languages: Language of each text, or of each pair; None where it is not said.
        parallel: Whether the second text of a pair is a translation of the first.
        on: The processes, each of which embeds its share; None for one process.
    """

    batches: EvaluationBatches
    teachers: Sequence[nn.Module]
    pairs: bool = False
    scores: Float[np.ndarray, " n"] | None = None
    languages: tuple[str, ...] | None = None
    parallel: bool = False
    on: Engine | None = None

    @cached_property
    def targets(self) -> Float[np.ndarray, "m d"] | None:
        """The teachers' mean embeddings of all texts; None without teachers."""
        if not self.teachers:
            return None
        return np.mean([self.embed(x, i) for i, x in enumerate(self.teachers)], axis=0)

    def embed(self, network: nn.Module, teacher: int | None = None) -> Float[np.ndarray, "m d"]:
        """Embeddings of all texts, in their order.

        Args:
            network: A student, or a teacher with its number.
            teacher: Number of the teacher.
        """
        return text_scoring.answers(network, self.batches, self.on, teacher=teacher).outputs

    def measure(self, network: nn.Module) -> dict[str, float]:
        """Figures of a student, as `figures`."""
        return self._figures(self.embed(network))

    def measure_teacher(self, number: int) -> dict[str, float]:
        """Figures of a teacher: of pairs with scores their correlation, else none."""
        if self.scores is None:
            return {}
        embeddings = self.embed(self.teachers[number], number)
        return figures(embeddings, None, pairs=True, scores=self.scores, parallel=False)

    def report(self, network: nn.Module, teacher_names: Sequence[str]) -> dict[str, Any]:
        """Figures of a student, of each language where these are known, and of its teachers.

        Args:
            network: The student.
            teacher_names: Names of the teachers.

        Returns:
            The figures; `languages` with those of each; those of a teacher begin with `teacher_`,
            of several `teachers` holds those of each.
        """
        student = self.embed(network)
        report: dict[str, Any] = self._figures(student)
        if self.languages:
            names = np.array(self.languages)
            report["languages"] = {
                name: self._figures_of(student, np.flatnonzero(names == name))
                for name in sorted(set(self.languages))
            }
        each = {name: self.measure_teacher(i) for i, name in enumerate(teacher_names)}
        if len(each) == 1:
            (figures_of_teacher,) = each.values()
            return report | {f"teacher_{name}": x for name, x in figures_of_teacher.items()}
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
        """Figures of some texts, or pairs, with their number."""
        halves = [rows, rows + len(student) // 2] if self.pairs else [rows]
        return {"texts": len(rows), **self._figures(student, np.concatenate(halves), rows)}

    def _figures(
        self,
        embeddings: np.ndarray,
        texts: np.ndarray | slice = slice(None),
        rows: np.ndarray | slice = slice(None),
    ) -> dict[str, float]:
        """Figures of texts, whose scores stand in `rows`."""
        return figures(
            embeddings[texts],
            None if self.targets is None else self.targets[texts],
            pairs=self.pairs,
            scores=None if self.scores is None else self.scores[rows],
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
