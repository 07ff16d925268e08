"""Load a teacher of texts, and check its classes and its tokenizer against the student's.

A teacher that is fed another tokenizer's ids, or whose classes are in another order than the
data's, teaches nonsense without any error; so both are compared, and what differs is refused, or
handled and said.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.errors import UserError
from kd.models.language import sentence_encoder, text_model, tokenizer, trained_models
from kd.models.language.sentence_encoder import SentenceEncoder
from kd.models.language.task import ALIGNED, Task
from kd.models.language.text_model import TextModel
from kd.models.language.trained_models import HF, WITH_CLASSES
from kd.models.token_inputs import TokenInputs
from kd.models.zoo import class_names
from kd.models.zoo.class_names import ClassMap, Match


@dataclass(frozen=True)
class ResolvedTextTeacher:
    """The decisions about a teacher of texts.

    Attributes:
        max_length: Largest number of tokens of a text that it is given.
        notes: Lines about these decisions.
    """

    max_length: int
    notes: tuple[str, ...] = ()


class TextTeacher(nn.Module):
    """A frozen network of texts that gives logits of the data's classes, of tokens, or embeddings.

    It is always in evaluation mode: a teacher that drops units teaches noise.

    Attributes:
        classifier: The network; taps go on the layers of its `network`.
        model: It with its tokenizer.
        own_tokenizer: Its tokenizer, where it must be given other ids than the student; else None.
        resolved: The decisions about classes and tokens.
    """

    outputs: Tensor | None
    settings: Tensor

    def __init__(
        self,
        model: TextModel,
        matched: Match,
        resolved: ResolvedTextTeacher,
        *,
        shares_ids: bool,
    ) -> None:
        """Wrap a model, which is frozen.

        Args:
            model: The model.
            matched: The output of each class.
            resolved: The decisions.
            shares_ids: Whether it is given the student's ids.
        """
        super().__init__()
        self.classifier = model.network
        self.model = model
        self.own_tokenizer = None if shares_ids else model.tokenizer
        self.resolved = resolved
        outputs = None if matched.outputs is None else torch.tensor(matched.outputs)
        self.register_buffer("outputs", outputs)
        # What changes the logits is a buffer, so that a hash of the state covers it.
        changes = [model.network.vocabulary or 0, 0 if shares_ids else resolved.max_length]
        if isinstance(model.network.network, SentenceEncoder):
            changes += sentence_encoder.settings(model.network.network.head)
        self.register_buffer("settings", torch.tensor(changes))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever is asked."""
        return super().train(False)

    def forward(self, inputs: TokenInputs) -> Float[Tensor, "n *l k"]:
        logits = self.classifier(inputs)
        return logits if self.outputs is None else logits[..., self.outputs]


def load(
    name: str,
    student: TextModel,
    classes: tuple[str, ...],
    texts: Sequence[str] = (),
    *,
    class_map: ClassMap | None = None,
    class_map_option: str = "--class-map",
    head: bool = True,
) -> TextTeacher:
    """Load a frozen teacher for a student and the data's classes.

    Labels are matched by name, as for images (`class_names.match`). Tokenizers are compared by
    their vocabularies and on texts: a teacher with the student's takes its ids; any other one needs
    texts to be tokenised twice, and its `own_tokenizer` says so. A teacher that tells the tokens of
    the second text of a pair from those of the first is tokenised for too, where the student's
    tokenizer does not: without that it would answer worse, and nothing would show it.

    Args:
        name: `hf:ID`, `hf:DIR` or the folder of a run.
        student: The student, whose task, tokenizer, length and pairs it must fit.
        classes: Names of the data's classes or tags, in order; empty for other tasks.
        texts: Texts of the data, on which tokenizers are compared.
        class_map: Class of the data -> class of the teacher, where they differ.
        class_map_option: Option of the class map, for messages.
        head: Whether its logits teach. A teacher of whose layers alone a student learns needs no
            head for the task.

    Raises:
        UserError: If there is no such teacher, it has no trained head, other classes, takes fewer
            tokens than the student, or single texts where the data are pairs.
    """
    who, task = f"teacher {name}", student.task
    model = trained_models.load(name, task, classes, pairs=student.pairs)
    text_model.require_same_pairs(who, model, student.pairs)
    notes: list[str] = []
    if model.network.untrained:
        if head:
            raise UserError(
                f"{who} has no trained head for {task} (without weights: "
                f"{model.network.untrained[0]}): "
                f"fine-tune it first with kd train DATA --student {name}"
            )
        notes.append(f"no head for {task}: its layers alone teach")
    matched = Match("by name")
    if task in WITH_CLASSES and not model.network.untrained:
        matched = class_names.match(who, model.classes, classes, class_map, class_map_option)
    shares_ids = tokenizer.same_ids(student.tokenizer, model.tokenizer, texts)
    if not shares_ids:
        notes.append("another tokenizer than the student's: texts are tokenised twice")
    elif student.pairs and _takes_types(model):
        shares_ids = tokenizer.marks_second_text(student.tokenizer)
        if not shares_ids:
            notes.append("it marks the second text of a pair: texts are tokenised twice")
    length = _length(name, model, student, shares_ids=shares_ids)
    notes += [matched.note] if matched.note else []
    notes += [] if matched.how == "by name" else [f"classes matched {matched.how}"]
    resolved = ResolvedTextTeacher(length, tuple(notes))
    return TextTeacher(model, matched, resolved, shares_ids=shares_ids)


def require_same_tokens(
    who: str, teacher: TextTeacher, task: Task, terms: Sequence[str] = ()
) -> None:
    """Refuse a teacher with another tokenizer where its tokens are compared with the student's.

    Args:
        who: Name of the teacher in messages.
        teacher: The teacher.
        task: What the student is trained for.
        terms: Names of the terms of the loss that compare token by token.

    Raises:
        UserError: If the task or a term does, with the way out.
    """
    if teacher.own_tokenizer is None or not (terms or task in ALIGNED):
        return
    another = "a student with its tokenizer, as --student teacher or bert:4x312"
    ways = f"--recipe sequence, or {another}" if task == "causal" else another
    raise UserError(
        f"teacher {who} has another tokenizer than the student, and "
        f"{', '.join(terms) or f'--task {task}'} compares token by token: use {ways}"
    )


def tokenizers(
    student: TextModel, teachers: Sequence[TextTeacher], *, other_texts: bool = False
) -> tuple[tuple[Any, ...], tuple[int, ...], tuple[int, ...]]:
    """The student's tokenizer, and those of teachers that must be given other ids.

    Args:
        student: The student.
        teachers: Its teachers.
        other_texts: Whether teachers see other texts than the student, such as those of which it
            sees translations: theirs is then another entry though it be the same.

    Returns:
        The tokenizers; for each the largest number of tokens of a text; for each teacher the place
        of its tokenizer.
    """
    distinct, lengths, places = [student.tokenizer], [student.max_length], []
    for teacher in teachers:
        apart = other_texts or teacher.own_tokenizer is not None
        places.append(len(distinct) if apart else 0)
        if apart:
            distinct.append(teacher.model.tokenizer)
            lengths.append(teacher.resolved.max_length)
    return tuple(distinct), tuple(lengths), tuple(places)


def _takes_types(model: TextModel) -> bool:
    """Whether a model is told which tokens are of the second of two texts."""
    return model.network.takes_types and tokenizer.marks_second_text(model.tokenizer)


def _length(name: str, model: TextModel, student: TextModel, *, shares_ids: bool) -> int:
    """Largest number of tokens of a text for the teacher.

    Raises:
        UserError: If it takes fewer of the student's tokens than the student.
    """
    positions, length = model.positions, student.max_length
    if shares_ids:
        if positions is not None and positions < length:
            raise UserError(
                f"teacher {name} takes {positions} tokens and the student {length}: --max-length "
                f"{positions}"
            )
        return length
    if not name.startswith(HF):
        return model.max_length  # as it was trained
    return length if positions is None else min(length, positions)
