"""The texts of a training and their token ids: the data's own, copies, or what a teacher writes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from dsdistill.harness import paths
from kd.data.text import (
    causal_rows,
    embedding_texts,
    masked_candidates,
    teacher_texts,
    tokenization,
    transfer_set,
    word_replacement,
)
from kd.data.text.corpus import Corpus, TextPart
from kd.data.text.tokenization import EncodedPart
from kd.models.language.task import Task
from kd.models.language.text_teachers import TextTeacher
from kd.options import TrainOptions
from kd.parallel.engine import Engine
from kd.recipe import COPYING_AUGMENTS, Recipe


@dataclass(frozen=True, eq=False)
class EncodedTexts:
    """Texts of one part as token ids.

    Attributes:
        encodings: As the student's tokenizer encodes them, then as each other tokenizer does.
        labels: Class or score of each, or of each pair for the task `embed`; None for tasks
            without, and for copies of texts.
        languages: Language of each, or of each pair; None where it is not said.
    """

    encodings: tuple[EncodedPart, ...]
    labels: np.ndarray | None = None
    languages: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.encodings[0])


def choose(
    options: TrainOptions,
    chosen: Recipe,
    texts: Corpus,
    tokenizers: Sequence[Any],
    teachers: Sequence[TextTeacher],
    on: Engine,
    say: Callable[[str], None],
    *,
    max_length: int,
) -> tuple[TextPart, Bool[np.ndarray, " n"] | None]:
    """Choose the texts to train on: those of the corpus, with copies, or the teacher's own.

    Args:
        options: Options of the training.
        chosen: Its recipe.
        texts: The corpus.
        tokenizers: The student's tokenizer, then those of teachers with another one.
        teachers: The teachers.
        on: Engine of the training.
        say: Called with a line on what was made.
        max_length: Largest number of tokens of a text of the teacher's.

    Returns:
        The texts, and of the teacher's own whether each is complete.

    Raises:
        UserError: If no copies can be made of the texts, or the teacher cannot write.
    """
    part = texts.train
    folder = (options.cache or paths.transfer_sets()).expanduser()
    if chosen.augment == "teacher":
        teacher = teachers[0].model
        written = teacher_texts.write(
            part,
            teacher.network,
            teacher.tokenizer,
            folder,
            on,
            seed=options.seed,
            max_length=max_length,
        )
        say(written.described)
        return written.part, written.complete
    if chosen.augment not in COPYING_AUGMENTS:
        return part, None
    # Without a seed: trainings that differ in it share the copies, and the teacher's answers.
    count = chosen.copies or transfer_set.default_copies(part)
    if chosen.augment == "words":
        mask = word_replacement.mask_text(tokenizers[::-1])
        bands = word_replacement.count_bands(part)
        copies = word_replacement.WordReplacement(bands, count, mask=mask)
    else:
        assert options.mlm is not None
        copies = masked_candidates.load(options.mlm, part, on.device, copies=count)
    with on.main_process_first():  # the others read what it has made
        enlarged = transfer_set.build(part, copies, folder)
    say(f"{len(part):,} training texts and {len(enlarged) - len(part):,} copies without labels")
    return enlarged.part, None


def encode_all(
    task: Task,
    tokenizers: Sequence[Any],
    lengths: Sequence[int],
    part: TextPart,
    complete: Bool[np.ndarray, " n"] | None = None,
    *,
    parallel: bool,
) -> EncodedTexts:
    """Encode the texts of a part with every tokenizer.

    Args:
        task: What is learned.
        tokenizers: The student's tokenizer, then those of teachers with another one.
        lengths: Largest number of tokens of a row for each.
        part: The texts.
        complete: As for `encode`.
        parallel: Whether pairs are texts and their translations.

    Raises:
        UserError: As `encode`.
    """
    each = [part] * len(tokenizers)
    if task == "embed":
        theirs = embedding_texts.of_teacher(part, parallel=parallel)
        each = [embedding_texts.of_student(part), *([theirs] * (len(tokenizers) - 1))]
    encodings = tuple(
        encode(texts, task, tokenizer, length, complete)
        for texts, tokenizer, length in zip(each, tokenizers, lengths, strict=True)
    )
    labels = part.labels if isinstance(part.labels, np.ndarray) else None
    return EncodedTexts(encodings, labels, part.languages)


def encode(
    part: TextPart,
    task: Task,
    tokenizer: Any,
    max_length: int,
    complete: Bool[np.ndarray, " n"] | None = None,
) -> EncodedPart:
    """Encode the texts of a part for a task.

    Args:
        part: The texts.
        task: What is learned from them.
        tokenizer: Tokenizer of the model.
        max_length: Largest number of tokens of a row.
        complete: For a causal model, whether each completion is complete; None: all are.

    Raises:
        UserError: If the texts do not fit the task, or have no tokens.
    """
    if task == "causal":
        return causal_rows.encode(part, tokenizer, max_length, complete=complete)
    if task == "mlm":
        return causal_rows.encode_texts(part.texts[0], tokenizer, max_length, causal=False)
    return tokenization.encode(part, tokenizer, max_length)


def strings(column: Sequence[Any]) -> Sequence[str]:
    """The texts of a column: of tagged sentences their tokens, of conversations their turns.

    Args:
        column: Column of a `TextPart`.
    """
    if not len(column) or isinstance(column[0], str):
        return column
    return [
        " ".join(str(each["content"] if isinstance(each, Mapping) else each) for each in row)
        for row in column
    ]
