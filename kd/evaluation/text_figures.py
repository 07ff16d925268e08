"""All figures of a network of texts on one part of the data, beside those of its teachers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation import metrics
from kd.data.batching import SCORE_BATCH
from kd.data.text.token_batches import MaskedTokens, TokenBatches
from kd.data.text.tokenization import EncodedPart
from kd.evaluation import scoring, text_scoring, token_scoring
from kd.evaluation.embedding_scoring import EmbeddingScorer
from kd.evaluation.text_scoring import Answers
from kd.losses.ensemble import combined_logits
from kd.models.language.language_model import LanguageModel
from kd.models.language.task import OF_TOKENS, Task
from kd.parallel.engine import Engine

HIDDEN_SHARE = 0.15  # of the tokens of a masked language model's texts, as BERT's
OF_PROBABILITIES = ("nll", "calibration_error")  # figures that outputs of no logits do not have


@dataclass(frozen=True, eq=False)
class JudgedTexts:
    """Texts that a student and its teachers are judged on.

    Attributes:
        task: What was learned from them.
        classes: Names of the classes or tags, in label order; empty for other tasks.
        encodings: The texts as the student's tokenizer encodes them, then as each other one does.
        tokenizers: The tokenizers, in the same order.
        encoding_of_teacher: Place of each teacher's tokenizer among them.
        labels: Class or score of each text; None for tasks whose tokens have the targets.
        languages: Language of each text; None where it is not said.
        device: Device of the networks.
        paired: For the task `embed`, whether the second half of the texts are the second ones of
            pairs, of which scores and languages are.
        parallel: For it, whether these are translations of the first half.
        gives_logits: Whether the student's outputs are logits; others are no probabilities, and
            have neither NLL nor calibration error.
    """

    task: Task
    classes: tuple[str, ...]
    encodings: tuple[EncodedPart, ...]
    tokenizers: tuple[Any, ...]
    encoding_of_teacher: tuple[int, ...]
    labels: np.ndarray | None
    languages: tuple[str, ...] | None
    device: torch.device
    paired: bool = False
    parallel: bool = False
    gives_logits: bool = True

    @property
    def usual_length(self) -> int:
        """Median number of the student's tokens of a text."""
        return max(1, int(np.median(self.encodings[0].lengths)))

    def batches(self) -> TokenBatches:
        """The texts for the student, and for teachers that answer for whole texts or words."""
        places = self.encoding_of_teacher
        labels = None if self.task == "embed" else self.labels
        return TokenBatches(
            self.encodings,
            tuple(tokenizer.pad_token_id for tokenizer in self.tokenizers),
            None if labels is None else torch.from_numpy(labels),
            SCORE_BATCH,
            self.device,
            teachers=places if any(places) else (),
        )

    def token_batches(self, place: int) -> TokenBatches:
        """The texts with targets for their tokens, as the tokenizer at a place encodes them."""
        tokenizer = self.tokenizers[place]
        return TokenBatches(
            (self.encodings[place],),
            (tokenizer.pad_token_id,),
            None,
            SCORE_BATCH,
            self.device,
            masked=hidden_tokens("the model", tokenizer) if self.task == "mlm" else None,
        )


def hidden_tokens(who: str, tokenizer: Any) -> MaskedTokens:
    """How tokens are hidden from a masked language model.

    Args:
        who: Name of the model in messages.
        tokenizer: Its tokenizer.

    Raises:
        UserError: If the tokenizer has no token for that.
    """
    if tokenizer.mask_token_id is None:
        raise UserError(f"{who} has no mask among its tokens, which --task mlm needs")
    special = tuple(tokenizer.all_special_ids)
    return MaskedTokens(HIDDEN_SHARE, tokenizer.mask_token_id, special, len(tokenizer))


def measure(
    network: nn.Module, texts: JudgedTexts, on: Engine | None = None, *, teacher: int | None = None
) -> tuple[dict[str, float], Answers | None]:
    """Measure the figures of the task.

    Args:
        network: Network of texts, whose mode is restored.
        texts: The texts.
        on: The processes, each of which computes its share; None for one process.
        teacher: Number of the teacher that the network is; None for the student.

    Returns:
        The figures, and the answers where these are classes, scores or tags.
    """
    if texts.task in OF_TOKENS:
        place = 0 if teacher is None else texts.encoding_of_teacher[teacher]
        batches, text_bytes = texts.token_batches(place), texts.encodings[place].text_bytes
        return token_scoring.validate(network, batches, on, text_bytes=text_bytes), None
    given = text_scoring.answers(network, texts.batches(), on, teacher=teacher)
    figures = text_scoring.FIGURES[texts.task](given, texts.classes)
    if teacher is None and not texts.gives_logits:
        figures = {name: figures[name] for name in figures if name not in OF_PROBABILITIES}
    return figures, given


def embedding_scorer(
    texts: JudgedTexts, teachers: Sequence[nn.Module], on: Engine | None = None
) -> EmbeddingScorer:
    """What measures embeddings of texts.

    Args:
        texts: The texts.
        teachers: Teachers in the order of `texts.encoding_of_teacher`.
        on: The processes, each of which embeds its share; None for one process.
    """
    return EmbeddingScorer(
        texts.batches(), teachers, texts.paired, texts.labels, texts.languages, texts.parallel, on
    )


def evaluate(
    student: nn.Module, texts: JudgedTexts, teachers: Sequence[tuple[str, nn.Module]] = ()
) -> dict[str, Any]:
    """Measure all figures of a student, and of its teachers on the same texts.

    Args:
        student: The student.
        texts: The texts.
        teachers: Teachers with their names, in the order of `texts.encoding_of_teacher`.

    Returns:
        The number of `texts` and the figures of the task. Where languages are said, `languages`
        holds the figures of each. Of classes, `notes` are sentences on an accuracy that only
        repeats how common a class is. A teacher's figures begin with `teacher_`, and of classes
        there is `teacher_agreement`. Of several teachers these are the figures of the mean of
        their probabilities or scores, and `teachers` holds the figures of each; language models
        have those of each alone.
    """
    if texts.task == "embed":
        scorer = embedding_scorer(texts, [teacher for _, teacher in teachers])
        report = scorer.report(student, [name for name, _ in teachers])
        return {"texts": len(texts.encodings[0]), **report}
    figures, given = measure(student, texts)
    report: dict[str, Any] = {"texts": len(texts.encodings[0]), **figures}
    if given is not None and texts.languages:
        report["languages"] = text_scoring.by_language(
            texts.task, given, texts.classes, texts.languages
        )
    if given is not None and texts.classes:
        what = "token" if texts.task == "tag" else "text"
        report["notes"] = text_scoring.notes("the student", given, texts.classes, what)
    answered = [measure(teacher, texts, teacher=i) for i, (_, teacher) in enumerate(teachers)]
    if len(answered) == 1:
        report |= _named_teacher(*answered[0], given, texts.classes)
    elif answered:
        if together := _mean_answers([theirs for _, theirs in answered], texts.classes):
            mean = text_scoring.FIGURES[texts.task](together, texts.classes)
            report |= _named_teacher(mean, together, given, texts.classes)
        report["teachers"] = {
            name: _with_agreement(*theirs, given, texts.classes)
            for (name, _), theirs in zip(teachers, answered, strict=True)
        }
    return report


def latency(
    network: LanguageModel, texts: JudgedTexts, *, quick: bool = False
) -> dict[str, float | int]:
    """Median milliseconds on the CPU of one text and of a batch of 64, and their length in tokens.

    Args:
        network: The network.
        texts: Texts, whose median length is that of the text.
        quick: Whether one text alone is measured, in a second or less for most networks.
    """
    length = texts.usual_length
    tokens = len(texts.tokenizers[0])
    figures = scoring.text_latency(network, tokens, length, quick=quick)
    return {"latency_tokens": length, **figures}


def _with_agreement(
    figures: Mapping[str, float],
    answers: Answers | None,
    given: Answers | None,
    classes: Sequence[str],
) -> dict[str, float]:
    """Figures of a teacher; of classes also the share of the student's answers that are its."""
    if answers is None or given is None or not classes:
        return dict(figures)
    return {"agreement": metrics.agreement(given.outputs, answers.outputs), **figures}


def _named_teacher(
    figures: Mapping[str, float],
    answers: Answers | None,
    given: Answers | None,
    classes: Sequence[str],
) -> dict[str, float]:
    named = _with_agreement(figures, answers, given, classes)
    return {f"teacher_{name}": value for name, value in named.items()}


def _mean_answers(answers: Sequence[Answers | None], classes: Sequence[str]) -> Answers | None:
    """Answers with the mean of all probabilities, or of all scores; None for language models."""
    known = [each for each in answers if each is not None]
    if len(known) < len(answers):
        return None
    outputs = [torch.from_numpy(each.outputs) for each in known]
    mean = combined_logits(outputs, temperature=1.0) if classes else torch.stack(outputs).mean(0)
    return replace(known[0], outputs=mean.numpy())
