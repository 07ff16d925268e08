"""The caches of a training's teachers: what they keep, where, and how much room it takes."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from dsdistill.harness import memory
from dsdistill.harness.errors import UserError
from kd.data import teacher_cache
from kd.data.batching import Batch, BatchSource, ChangedBatches, Unit
from kd.data.teacher_answers import FromTables, Kept, Table
from kd.objectives.schemes import Distillation
from kd.objectives.terms import Term
from kd.options import TrainOptions
from kd.parallel.engine import Engine


def refuse_layers(objective: Distillation, lengths: Int[np.ndarray, " n"], what: str) -> None:
    """Refuse a loss that takes more of a teacher's layers than vectors.

    Args:
        objective: Objective of the training.
        lengths: Number of tokens of each text; ones for images.
        what: What there are as many of, such as `images`.

    Raises:
        UserError: With the size of what the loss takes.
    """
    for name, layers in objective.teacher_layers():
        if not layers.vectors:
            size = memory.format_bytes(layers.count_bytes(lengths))
            raise UserError(
                f"--cache keeps the teachers' answers and vectors of their layers, and --loss "
                f"{name} takes whole layers, {size} for {len(lengths):,} {what}: leave --cache "
                "out, or the term"
            )


def open_all(
    options: TrainOptions,
    objective: Distillation,
    loss_terms: Sequence[Term],
    keys: Sequence[Mapping[str, Any]],
    widths: Sequence[int],
    *,
    unit: Unit = "rows",
    top: int | None = None,
) -> tuple[Kept, ...]:
    """Open a cache for each kind of answer that the loss takes from each teacher.

    Args:
        options: Options with `cache`.
        objective: Objective of the training.
        loss_terms: Terms of the loss.
        keys: All that the answers of each teacher depend on beside its weights.
        widths: Number of logits of each teacher.
        unit: What the logits are of, `rows` (images or texts) or `tokens`.
        top: Number of the largest probabilities to keep; None keeps all logits.

    Raises:
        UserError: If only the largest probabilities are kept, and the terms take logits or
            probabilities at several temperatures; or the folder cannot be used.
    """
    assert options.cache is not None
    temperature = 1.0 if top is None else _common_temperature(loss_terms)
    kept: list[Kept] = []
    for number, (teacher, key, width) in enumerate(
        zip(objective.teachers, keys, widths, strict=True)
    ):
        whole = {
            **key,
            "teacher": teacher_cache.fingerprint(teacher),
            "architecture": teacher_cache.architecture(teacher),
        }
        if objective.needs_logits:
            cache = teacher_cache.open_cache(options.cache, whole, top=top, temperature=temperature)
            kept.append(Kept(number, None, width, unit, cache))
        vectors = {
            vector: values
            for _, layers in objective.teacher_layers()
            if layers.teacher == number
            for vector, values in layers.vectors.items()
        }
        for vector, values in vectors.items():
            cache = teacher_cache.open_cache(
                options.cache, {**whole, "vector": vector._asdict()}, top=None
            )
            kept.append(Kept(number, vector, values, "rows", cache))
    return tuple(kept)


def needs_exact_logits(loss_terms: Sequence[Term]) -> str | None:
    """Name of a term that compares logits and not probabilities; None without one."""
    exact = (
        term.name
        for term in loss_terms
        if term.definition.needs_raw_logits or term.parameters.get("logits")  # of `adv`
    )
    return next(exact, None)


def announce(folder: Path, needed: int, what: str, say: Callable[[str], None], remedy: str) -> None:
    """Say how much room a cache will take, before it is filled.

    Args:
        folder: Folder of the cache.
        needed: Bytes of what is not there yet.
        what: What the answers are to, such as `1,000 texts`.
        say: Called with the line.
        remedy: What to do where there is too little room.

    Raises:
        UserError: If the disk has less room.
    """
    if not needed:
        say(f"teacher cache {folder}: the answers to {what} are there")
        return
    size, free = memory.format_bytes(needed), shutil.disk_usage(folder).free
    if needed > free:
        teacher_cache.remove_empty(folder)
        raise UserError(
            f"--cache {folder} would take {size} for the answers to {what}, and the disk has "
            f"{memory.format_bytes(free)}: {remedy}"
        )
    say(f"teacher cache {folder}: {size} for the answers to {what}")


def from_tables(
    source: BatchSource,
    kept: Sequence[Kept],
    tables: Sequence[Table],
    batches: Sequence[Callable[[Int[np.ndarray, " n"]], Batch]],
    objective: Distillation,
    on: Engine,
    *,
    texts: int,
) -> BatchSource:
    """Fill the tables of answers that are the same in every epoch, and add them to batches.

    Several processes answer a part each.

    Args:
        source: The batches.
        kept: Kinds of answers.
        tables: The table of each teacher.
        batches: For each teacher what builds the batch of some texts.
        objective: Objective of the training, which asks the teachers.
        on: Engine of the training.
        texts: Number of texts that have answers, see `FromTables`.
    """
    for number in dict.fromkeys(each.teacher for each in kept):
        some = [each for each in kept if each.teacher == number]
        share = {"rank": on.process_index, "world": on.num_processes}
        tables[number].fill(some, batches[number], objective.ask, **share)
        on.wait_for_everyone()
        if on.num_processes > 1:  # those that others have written to a disk of their own
            tables[number].fill(some, batches[number], objective.ask)
    used = tuple(tables[each.teacher] for each in kept)
    entries = []
    for each, table in zip(kept, used, strict=True):
        entry = table.open(each)
        if entry is None:
            raise UserError(
                f"{each.cache.folder} cannot be read back after it was written: choose another "
                "--cache"
            )
        entries.append(entry)
    return ChangedBatches(source, FromTables(tuple(kept), used, tuple(entries), texts))


def _common_temperature(loss_terms: Sequence[Term]) -> float:
    """The temperature at which the terms take the teachers' probabilities.

    Raises:
        UserError: If there are several, or a term compares logits.
    """
    if (exact := needs_exact_logits(loss_terms)) is not None:
        raise UserError(
            f"--cache-top keeps probabilities, and --loss {exact} compares the logits "
            "themselves: leave it out"
        )
    on_logits = [
        term
        for term in loss_terms
        if term.definition.needs_teacher and not term.definition.reads_layers
    ]
    temperatures = sorted({term.parameters.get("temperature", 1.0) for term in on_logits})
    if len(temperatures) > 1:
        shown = ", ".join(f"{value:g}" for value in temperatures)
        raise UserError(
            f"--cache-top keeps probabilities at one temperature, and the terms of --loss have "
            f"{shown}: give them one, or leave --cache-top out"
        )
    return temperatures[0] if temperatures else 1.0
