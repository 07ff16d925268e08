"""Batches with the answers of frozen teachers that a cache keeps: logits, and vectors of layers.

Answers that are the same in every epoch are kept once, as a table in parts; those to random views
of images, or to texts with hidden tokens, epoch by epoch. A teacher that answers for tokens has a
row for each real one: padding is not kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsdistill.harness.runs import progress
from kd.data import teacher_cache
from kd.data.batching import Batch, BatchSource, LayerVector, Unit
from kd.data.teacher_cache import CachedLogits, TeacherCache
from kd.models.token_inputs import TokenInputs

PART_BATCHES = 64  # of a table: what a stopped command has to compute again at most
# A teacher's logits of a batch, and its vectors: `kd.objectives.schemes.Distillation.ask`.
Ask = Callable[[int, Batch], tuple[Tensor, Mapping[LayerVector, Tensor]]]
# Number of rows of each unit in each batch of an epoch: seed, epoch, rank, number of processes.
CountRows = Callable[[int, int, int, int], Mapping[Unit, Sequence[int]]]


@dataclass(frozen=True, eq=False)
class Kept:
    """One kind of answer of one teacher, and the cache that keeps it.

    Attributes:
        teacher: Number of the teacher.
        vector: Which vector of its layers; None for its logits.
        width: Number of values of a row.
        unit: What a row is of, `rows` (images or texts) or `tokens`.
        cache: The cache.
    """

    teacher: int
    vector: LayerVector | None
    width: int
    unit: Unit
    cache: TeacherCache

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on disk."""
        return self.cache.row_bytes(self.width)

    def missing_bytes(self, rows: int, epochs: int, world: int) -> int:
        """Bytes on disk of the epochs that the cache does not have.

        Args:
            rows: Number of rows of an epoch.
            epochs: Number of epochs of the training.
            world: Number of processes.
        """
        names = (epoch_name(epoch, rank, world) for epoch in range(epochs) for rank in range(world))
        share = sum(not self.cache.has(name) for name in names) / world
        return round(self.row_bytes * rows * share)

    def rows_of(
        self, batch: Batch, logits: Tensor, vectors: Mapping[LayerVector, Tensor]
    ) -> Float[Tensor, "m k"]:
        """The rows of a batch in what its teacher has answered."""
        values = logits if self.vector is None else vectors[self.vector]
        if self.unit == "tokens":
            assert isinstance(batch.inputs, TokenInputs)
            values = values[batch.inputs.mask]
        return values.float()


def attach(batch: Batch, kept: Sequence[Kept], rows: Sequence[Tensor]) -> Batch:
    """The batch with the teachers' answers.

    Args:
        batch: The batch; logits that it has already stay.
        kept: Kinds of answers.
        rows: Rows of each kind for this batch.
    """
    logits: list[Tensor] = []
    vectors: list[dict[LayerVector, Tensor]] = [{} for _ in range(1 + max(x.teacher for x in kept))]
    for each, values in zip(kept, rows, strict=True):
        if each.vector is not None:
            vectors[each.teacher][each.vector] = values
        elif each.unit == "tokens":
            assert isinstance(batch.inputs, TokenInputs)
            mask = batch.inputs.mask
            filled = values.new_zeros(*mask.shape, each.width)
            filled[mask] = values
            logits.append(filled)
        else:
            logits.append(values)
    return replace(
        batch,
        teacher_logits=tuple(logits) or batch.teacher_logits or (),
        teacher_vectors=tuple(vectors) if any(vectors) else None,
    )


@dataclass(frozen=True, eq=False)
class CachedBatches:
    """Batches with the teachers' answers, read from the cache or computed and written to it.

    An epoch that is entered in the middle, after a kill, is not written; a later training does so.

    Attributes:
        source: Batches without answers.
        kept: Kinds of answers, with caches for this process's share of every batch.
        ask: Asks a teacher.
        count_rows: Counts the rows of each batch.
    """

    source: BatchSource
    kept: tuple[Kept, ...]
    ask: Ask
    count_rows: CountRows

    @property
    def device(self) -> torch.device:
        return self.source.device

    def __len__(self) -> int:
        return len(self.source)

    @property
    def sizes(self) -> list[int]:
        return self.source.sizes

    def epoch(
        self, seed: int, epoch: int, *, first: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Yield the batches of the source's epoch, with answers."""
        stream = self.source.epoch(seed, epoch, first=first, rank=rank, world=world)
        counts = self.count_rows(seed, epoch, rank, world)
        ends = {unit: np.cumsum([0, *each]) for unit, each in counts.items()}
        name = epoch_name(epoch, rank, world)
        entries = [x.cache.open(name, int(ends[x.unit][-1]), x.width) for x in self.kept]
        with ExitStack() as stack:  # an epoch that is left early closes it with an error
            writers = [
                stack.enter_context(each.cache.write(name))
                if entry is None and first == 0
                else None
                for each, entry in zip(self.kept, entries, strict=True)
            ]
            for number, batch in enumerate(stream, first):
                missing = [x for x, entry in zip(self.kept, entries, strict=True) if entry is None]
                answers = {i: self.ask(i, batch) for i in dict.fromkeys(x.teacher for x in missing)}
                rows = []
                for each, entry, write in zip(self.kept, entries, writers, strict=True):
                    if entry is None:
                        computed = each.rows_of(batch, *answers[each.teacher])
                        rows.append(each.cache.as_kept(computed))
                        if write is not None:
                            write(computed)
                    else:
                        place = slice(*map(int, ends[each.unit][number : number + 2]))
                        rows.append(entry.read(place, self.device))
                yield attach(batch, self.kept, rows)


def epoch_name(epoch: int, rank: int, world: int) -> str:
    """Name of the entry of a process's share of an epoch."""
    return f"epoch-{epoch:05}-{rank}-of-{world}"


@dataclass(frozen=True, eq=False)
class Table:
    """Answers that are the same in every epoch: their rows, the longest texts first.

    Attributes:
        lengths: Number of tokens of each text; ones for images, which keep their order.
        size: Number of texts that are answered at once, on which the last bits depend.
    """

    lengths: Int[np.ndarray, " n"]
    size: int

    @cached_property
    def order(self) -> Int[np.ndarray, " n"]:
        """The texts in the order of the table."""
        return np.argsort(-self.lengths, kind="stable")

    @property
    def parts(self) -> list[tuple[str, Mapping[Unit, int]]]:
        """Names of the parts, with the number of their rows."""
        pieces = (self.lengths[texts] for texts in self._pieces(PART_BATCHES * self.size))
        return [
            (f"part-{i:05}", {"rows": len(piece), "tokens": int(piece.sum())})
            for i, piece in enumerate(pieces)
        ]

    def missing_bytes(self, kept: Kept) -> int:
        """Bytes on disk of the parts that the cache does not have.

        Args:
            kept: A kind of answer.
        """
        missing = (counts for name, counts in self.parts if not kept.cache.has(name))
        return kept.row_bytes * sum(counts[kept.unit] for counts in missing)

    def places(self, unit: Unit, index: Int[np.ndarray, " m"]) -> Int[np.ndarray, " r"]:
        """Numbers of the rows of some texts, text by text.

        Args:
            unit: What a row is of.
            index: Numbers of the texts.
        """
        places = self._inverse[index]
        if unit == "rows":
            return places
        starts = self._starts[places]
        pairs = zip(starts, starts + self.lengths[index], strict=True)
        return np.concatenate([np.arange(start, end) for start, end in pairs])

    def fill(
        self,
        kept: Sequence[Kept],
        batch: Callable[[Int[np.ndarray, " n"]], Batch],
        ask: Ask,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Ask one teacher for the answers that are missing, of every `world`-th part.

        Args:
            kept: Kinds of answers of one teacher.
            batch: Builds the batch of some texts.
            ask: Asks a teacher.
            rank, world: Number of this process, and of all.
        """
        own = list(zip(self.parts, self._pieces(PART_BATCHES * self.size), strict=True))
        lacking = [
            (name, texts, some)
            for (name, counts), texts in own[rank::world]
            if (some := [x for x in kept if x.cache.open(name, counts[x.unit], x.width) is None])
        ]
        done, total = 0, sum(len(texts) for _, texts, _ in lacking)
        with progress.bar(total, "answers of the teacher") as show:
            for name, texts, some in lacking:
                with ExitStack() as stack:
                    writers = [stack.enter_context(x.cache.write(name)) for x in some]
                    for rows in np.split(texts, range(self.size, len(texts), self.size)):
                        answered = batch(rows)
                        logits, vectors = ask(some[0].teacher, answered)
                        for each, write in zip(some, writers, strict=True):
                            write(each.rows_of(answered, logits, vectors))
                        done += len(rows)
                        show(done)

    def open(self, kept: Kept) -> CachedLogits | None:
        """Open all parts of a kind of answer; None if one of them cannot be used."""
        entries = []
        for name, counts in self.parts:
            entry = kept.cache.open(name, counts[kept.unit], kept.width)
            if entry is None:
                return None
            entries.append(entry)
        return teacher_cache.join(entries)

    def _pieces(self, size: int) -> list[Int[np.ndarray, " m"]]:
        return np.split(self.order, range(size, len(self.order), size))

    @cached_property
    def _inverse(self) -> Int[np.ndarray, " n"]:
        """Place of each text in the order."""
        return np.argsort(self.order)

    @cached_property
    def _starts(self) -> Int[np.ndarray, " n"]:
        """First token of the text at each place."""
        return np.cumsum([0, *self.lengths[self.order][:-1]])


@dataclass(frozen=True, eq=False)
class FromTables:
    """Adds the answers of tables to batches, see `kd.data.batching.ChangedBatches`.

    Attributes:
        kept: Kinds of answers.
        tables: The table of each.
        entries: Its rows.
        texts: Number of texts that have rows: the text of a batch with the number i has those of
            i modulo this one, since translations have the answers to their sources.
    """

    kept: tuple[Kept, ...]
    tables: tuple[Table, ...]
    entries: tuple[CachedLogits, ...]
    texts: int

    def __call__(self, batch: Batch, seed: int) -> Batch:
        assert batch.index is not None
        index = batch.index.cpu().numpy() % self.texts
        device = batch.index.device
        rows = [
            entry.read(table.places(each.unit, index), device)
            for each, table, entry in zip(self.kept, self.tables, self.entries, strict=True)
        ]
        return attach(batch, self.kept, rows)
