"""Scoring of networks of texts: classes, scores and tags, as GLUE and CoNLL judge them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from jaxtyping import Float, Int
from torch import nn

from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import majority, metrics
from kd.data.batching import EvaluationBatches
from kd.models.language.task import Task
from kd.models.token_inputs import IGNORED
from kd.parallel.engine import Engine
from kd.recipe import Metric


@dataclass(frozen=True)
class Answers:
    """Outputs of a network and what they should have been.

    Attributes:
        outputs: Logits of the classes or tags; of scores one column.
        targets: Classes, scores or tags.
        rows: Text of each answer; a tagged text has one answer for each token with a tag.
    """

    outputs: Float[np.ndarray, "m k"]
    targets: Int[np.ndarray, " m"] | Float[np.ndarray, " m"]
    rows: Int[np.ndarray, " m"]

    def of(self, texts: Int[np.ndarray, " n"]) -> "Answers":
        """The answers for these texts."""
        chosen = np.isin(self.rows, texts)
        return Answers(self.outputs[chosen], self.targets[chosen], self.rows[chosen])


def answers(
    network: nn.Module,
    batches: EvaluationBatches,
    on: Engine | None = None,
    *,
    teacher: int | None = None,
) -> Answers:
    """Collect the answers of a network in evaluation mode, in the order of the data.

    Args:
        network: Network of texts, whose mode is restored.
        batches: Texts with labels, or tags as targets of their tokens.
        on: The processes, each of which computes its share; None for one process.
        teacher: Number of the teacher that the network is, whose tokens may be other ones.
    """
    was_training, parts = network.training, []
    rank, world = (on.process_index, on.num_processes) if on else (0, 1)
    network.eval()
    with torch.inference_mode():
        for batch in batches.in_order(rank, world):
            inputs = batch.inputs if teacher is None else batch.inputs_of(teacher)
            outputs, targets = network(inputs).float(), batch.labels
            assert batch.index is not None
            rows = batch.index
            if batch.token_targets is not None:
                tagged = batch.token_targets != IGNORED
                outputs, targets = outputs[tagged], batch.token_targets[tagged]
                rows = rows[:, None].expand_as(tagged)[tagged]
            parts.append([x.cpu().numpy() for x in (outputs, targets, rows)])
    network.train(was_training)
    if world > 1:
        parts = gather_object(parts)
    outputs, targets, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(rows, kind="stable")  # the tokens of a text stay in their order
    return Answers(outputs[order], targets[order], rows[order])


def class_figures(given: Answers, classes: Sequence[str] = ()) -> dict[str, float]:
    """Accuracy, macro F1, Matthews' correlation, NLL in nats and calibration error of classes.

    Args:
        given: Answers with classes as targets.
        classes: Not used: classes have no order among them.
    """
    predicted = given.outputs.argmax(1)
    probabilities = metrics.softmax(given.outputs)
    return {
        "accuracy": metrics.accuracy(given.outputs, given.targets),
        "macro_f1": _macro_f1(given.targets, predicted),
        "matthews": _matthews(given.targets, predicted),
        "nll": metrics.nll(probabilities, given.targets),
        "calibration_error": metrics.expected_calibration_error(probabilities, given.targets),
    }


def score_figures(given: Answers, classes: Sequence[str] = ()) -> dict[str, float]:
    """Pearson's and Spearman's correlation, and mean squared error, of scores.

    The correlation of constant answers is 0.

    Args:
        given: Answers with scores as targets.
        classes: Not used: there are none.
    """
    from scipy import stats

    predicted = given.outputs[:, 0].astype(np.float64)
    return {
        "pearson": _correlation(stats.pearsonr, predicted, given.targets),
        "spearman": _correlation(stats.spearmanr, predicted, given.targets),
        "mse": float(np.square(predicted - given.targets).mean()),
    }


def tag_figures(given: Answers, classes: Sequence[str]) -> dict[str, float]:
    """Accuracy and macro F1 of tags; of tags that mark entities, also their F1.

    Args:
        given: Answers with tags as targets.
        classes: Names of the tags. Entities are marked where one is named `O` and all others begin
            with `B-` or `I-`.
    """
    predicted = given.outputs.argmax(1)
    figures = {
        "accuracy": metrics.accuracy(given.outputs, given.targets),
        "macro_f1": _macro_f1(given.targets, predicted),
        "nll": metrics.nll(metrics.softmax(given.outputs), given.targets),
    }
    if _marks_entities(classes):
        expected, answered = (
            entities([classes[int(tag)] for tag in tags], given.rows)
            for tags in (given.targets, predicted)
        )
        right = len(expected & answered)
        total = len(expected) + len(answered)
        figures["entity_f1"] = 2 * right / total if total else 0.0
    return figures


def entities(tags: Sequence[str], rows: Int[np.ndarray, " m"]) -> set[tuple[int, int, str]]:
    """Entities of tagged texts, as first token, token after the last, and kind.

    An entity begins at `B-`, and at an `I-` that continues none of its kind.

    Args:
        tags: Tags of all tokens, `O` outside of entities.
        rows: Text of each token.

    Source: The evaluation of CoNLL-2000 and CoNLL-2003 (conlleval).
    """
    spans: set[tuple[int, int, str]] = set()
    begin, kind = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        goes_on = mark == "I" and name == kind and i < len(tags) and rows[i] == rows[i - 1]
        if kind and not goes_on:
            spans.add((begin, i, kind))
            kind = ""
        if mark != "O" and not kind:
            begin, kind = i, name
    return spans


# Figures of the answers of a task.
FIGURES: Mapping[Task, Callable[[Answers, Sequence[str]], dict[str, float]]] = {
    "classify": class_figures,
    "regress": score_figures,
    "tag": tag_figures,
}


METRICS: Mapping[Task, tuple[Metric, ...]] = {  # those of them that can select an epoch
    "classify": ("accuracy", "nll", "macro_f1", "matthews"),
    "regress": ("spearman", "pearson"),
    "tag": ("entity_f1", "macro_f1", "accuracy", "nll"),
    "mlm": ("nll", "accuracy"),
    "causal": ("nll", "accuracy"),
    "embed": ("cosine", "spearman", "pearson"),
}


def check_metric(metric: Metric, task: Task, classes: Sequence[str]) -> None:
    """Refuse to select the best epoch by a figure that the task does not have.

    Args:
        metric: The figure.
        task: The task.
        classes: Names of its classes or tags.

    Raises:
        UserError: With those that it has.
    """
    has_entities = _marks_entities(classes)
    known = [name for name in METRICS[task] if name != "entity_f1" or has_entities]
    if metric not in known:
        tags = ", whose tags mark no entities" if metric == "entity_f1" and task == "tag" else ""
        raise UserError(
            f"--metric {metric} is no figure of --task {task}{tags}: use {', '.join(known)}"
        )


def default_metric(task: Task, classes: Sequence[str]) -> Metric:
    """The figure that selects the best epoch of a task, where none is asked for.

    Args:
        task: The task.
        classes: Names of its classes or tags.
    """
    if task == "tag":
        return "entity_f1" if _marks_entities(classes) else "macro_f1"
    if task == "embed":
        return "cosine"
    return "accuracy" if task == "classify" else "spearman" if task == "regress" else "nll"


def by_language(
    task: Task, given: Answers, classes: Sequence[str], languages: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Figures of the texts of each language, with their number, in the order of the alphabet.

    Args:
        task: Task of the answers.
        given: Answers for all texts.
        classes: Names of the classes or tags.
        languages: Language of each text.
    """
    names, rows = np.array(languages), {}
    for name in sorted(set(languages)):
        texts = np.flatnonzero(names == name)
        figures = FIGURES[task](given.of(texts), classes)
        rows[name] = {"texts": len(texts), **figures}
    return rows


def notes(who: str, given: Answers, classes: Sequence[str], what: str = "text") -> list[str]:
    """Sentences on an accuracy that only repeats how common a class is.

    Args:
        who: What gave the answers.
        given: Answers with classes as targets.
        classes: Names of the classes.
        what: What each answer is for, `text` or `token`.
    """
    predicted = np.unique(given.outputs.argmax(1)).tolist()
    lines = (
        majority.common_class(given.targets, classes, f"{what}s"),
        majority.constant_answer(who, predicted, given.targets, classes, what),
    )
    return [line for line in lines if line]


def _macro_f1(targets: Int[np.ndarray, " m"], predicted: Int[np.ndarray, " m"]) -> float:
    from sklearn.metrics import f1_score  # takes half a second, which images need not wait for

    return float(f1_score(targets, predicted, average="macro", zero_division=0.0))  # pyright: ignore


def _matthews(targets: Int[np.ndarray, " m"], predicted: Int[np.ndarray, " m"]) -> float:
    # Of a single class the library warns and answers 0 too.
    if len(np.union1d(targets, predicted)) < 2:
        return 0.0
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(targets, predicted))


def _correlation(function: Callable[..., Any], x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(function(x, y).statistic)


def _marks_entities(classes: Sequence[str]) -> bool:
    return "O" in classes and all(name == "O" or name[:2] in ("B-", "I-") for name in classes)
