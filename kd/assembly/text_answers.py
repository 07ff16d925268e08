"""The answers of the teachers of texts: computed once, or kept in a cache.

Logits of whole texts are held in memory. With `--cache` they are kept on disk, and so are those of
tokens, of a vocabulary the largest, and the vectors that losses take from layers. What depends on
the tokens that an epoch hides is kept for that epoch.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsdistill.harness.runs import progress
from kd.assembly import answer_caches
from kd.assembly.text_parts import TextParts
from kd.data import batching
from kd.data.batching import BatchSource, Unit
from kd.data.teacher_answers import CachedBatches, Table
from kd.data.text.token_batches import TokenBatches
from kd.data.text.tokenization import EncodedPart
from kd.models.language.task import ALIGNED, OF_TOKENS
from kd.models.language.text_teachers import TextTeacher
from kd.models.token_inputs import TokenInputs
from kd.objectives.schemes import Distillation
from kd.objectives.taps import try_out
from kd.options import TrainOptions
from kd.recipe import COPYING_AUGMENTS

TOKEN_TOP = 64  # probabilities of a token that a cache keeps, of a vocabulary
ANSWER_VALUES = 1 << 26  # values of the logits of a batch that fills a cache, 256 MiB
REMEDY = "use another disk, a smaller --cache-top, or leave it out"


def with_logits(parts: TextParts, source: TokenBatches, sample: TokenInputs) -> TokenBatches:
    """Batches with every teacher's logits of whole texts, unless these would take too much memory.

    Args:
        parts: Parts of the training.
        source: Its batches.
        sample: A few texts that the teachers take.
    """
    widths, n = _widths(parts, sample), _count_answered(parts)
    if 4 * n * sum(widths) > batching.MAX_RESIDENT_BYTES:
        return source
    tables = []
    each = zip(parts.teachers, parts.encoding_of_teacher, widths, strict=True)
    for teacher, place, width in each:
        logits = _answer_all(teacher, _texts_of_teacher(parts, source, place), n, width)
        tables.append(logits.repeat(2, 1) if parts.corpus.parallel else logits)
    return replace(source, teacher_logits=tuple(tables))


def with_cache(
    parts: TextParts,
    options: TrainOptions,
    objective: Distillation,
    source: TokenBatches,
    sample: TokenInputs,
    say: Callable[[str], None],
) -> BatchSource:
    """Batches with answers from the cache, which is filled before or while they are used.

    Args:
        parts: Parts of the training.
        options: Options with `cache`.
        objective: Objective of the training.
        source: Its batches.
        sample: A few texts that the teachers take.
        say: Called with lines for the user.

    Raises:
        UserError: If the loss takes more than logits and vectors, or the disk has too little room.
    """
    assert options.cache is not None
    encodings, widths = parts.encoded["train"].encodings, _widths(parts, sample)
    n, lengths = _count_answered(parts), encodings[0].lengths
    if parts.recipe.augment in COPYING_AUGMENTS and not objective.needs_vectors_alone:
        return source  # of texts that are copied the cache keeps the copies
    answer_caches.refuse_layers(objective, lengths, "texts")
    keys: list[dict[str, Any]] = [
        {"tokens": digest(encodings[place])} for place in parts.encoding_of_teacher
    ]
    if source.masked is not None:
        drawn = {"hidden": asdict(source.masked), "seed": options.seed}
        order = {"batch_size": source.size, "least": source.least}
        keys = [{**key, **drawn, **order} for key in keys]
    of_tokens = parts.task in ALIGNED
    kept = answer_caches.open_all(
        options,
        objective,
        parts.terms,
        keys,
        widths,
        unit="tokens" if of_tokens else "rows",
        top=_choose_top(parts, options, objective, max(widths), say),
    )
    counts: dict[Unit, int] = {"rows": n, "tokens": int(lengths.sum())}
    what = f"{n:,} texts"
    if any(each.unit == "tokens" for each in kept):
        what += f" of {counts['tokens']:,} tokens"
    room = partial(answer_caches.announce, options.cache, say=say, remedy=REMEDY)
    if source.masked is not None:
        per_epoch = math.ceil(len(source) / parts.recipe.accumulate)
        epochs = math.ceil(parts.recipe.total_steps(per_epoch) / per_epoch)
        world = parts.on.num_processes
        needed = sum(x.missing_bytes(counts[x.unit], epochs, world) for x in kept)
        room(needed, f"{what}, hidden anew in each of {epochs} epochs")
        return CachedBatches(source, kept, objective.ask, source.count_rows)
    views = [_texts_of_teacher(parts, source, place) for place in parts.encoding_of_teacher]
    tables = [
        Table(view.parts[0].lengths, _batch_size(view, width if of_tokens else 1))
        for view, width in zip(views, widths, strict=True)
    ]
    room(sum(tables[x.teacher].missing_bytes(x) for x in kept), what)
    makers = [view.batch for view in views]
    return answer_caches.from_tables(source, kept, tables, makers, objective, parts.on, texts=n)


def digest(encoding: EncodedPart) -> str:
    """SHA-256 of the tokens of texts."""
    sha = hashlib.sha256()
    for array in (encoding.ids, encoding.offsets, encoding.types):
        sha.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def _choose_top(
    parts: TextParts,
    options: TrainOptions,
    objective: Distillation,
    width: int,
    say: Callable[[str], None],
) -> int | None:
    """Number of the largest probabilities that the cache keeps; None for all logits."""
    of_vocabulary = parts.task in OF_TOKENS and width > TOKEN_TOP and objective.needs_logits
    if options.cache_top is not None or not of_vocabulary:
        return options.cache_top
    if answer_caches.needs_exact_logits(parts.terms):
        return None
    say(
        f"the cache keeps the {TOKEN_TOP} largest of the {width:,} probabilities of a token, and "
        "the others as their sum: --cache-top keeps more"
    )
    return TOKEN_TOP


def _widths(parts: TextParts, sample: TokenInputs) -> list[int]:
    """Number of logits of each teacher, for a text or a token."""
    return [try_out(teacher, sample).shape[-1] for teacher in parts.teachers]


def _count_answered(parts: TextParts) -> int:
    """Number of texts that a teacher answers: translations have the answers to their sources."""
    texts = len(parts.encoded["train"])
    return texts // 2 if parts.corpus.parallel else texts


def _texts_of_teacher(parts: TextParts, source: TokenBatches, place: int) -> TokenBatches:
    """The texts that a teacher answers, as its tokenizer encodes them."""
    part = source.parts[place].first(_count_answered(parts))
    padding = (source.padding[place],)
    return replace(source, parts=(part,), padding=padding, labels=None, teachers=())


def _batch_size(source: TokenBatches, width: int) -> int:
    """Number of texts that are answered at once, whose logits are `ANSWER_VALUES` at most.

    Args:
        source: The texts.
        width: Number of logits of each token; 1 where the answers are of texts.
    """
    longest = int(source.parts[0].lengths.max())
    return max(1, min(batching.SCORE_BATCH, ANSWER_VALUES // (longest * width)))


def _answer_all(teacher: TextTeacher, source: TokenBatches, n: int, k: int) -> Tensor:
    """A teacher's logits (n, k) of all its texts, computed in the batches of a table."""
    logits = torch.empty(n, k)
    batches = replace(source, size=_batch_size(source, 1))
    with progress.bar(len(batches), "teacher batches") as show, torch.no_grad():
        for done, batch in enumerate(batches.in_order(), start=1):
            assert batch.index is not None
            logits[batch.index.cpu()] = teacher(batch.inputs).float().cpu()
            show(done)
    return logits
