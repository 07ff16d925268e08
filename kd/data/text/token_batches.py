"""Batches of texts of like length, with as little padding as that allows.

Everything random is a function of (seed, epoch, row), as for images: an epoch can start at any
batch, and several processes share a batch without communication.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kd.data import batching
from kd.data.batching import Batch, Unit, derive_seed, split_rows
from kd.data.text.tokenization import EncodedPart
from kd.models.token_inputs import IGNORED, TokenInputs

POOL_BATCHES = 50  # batches whose texts are sorted by length together: enough to waste little


@dataclass(frozen=True)
class MaskedTokens:
    """What a masked language model is trained on: some tokens are hidden, and predicted.

    Of each hundred chosen tokens eighty become the mask, ten another token and ten stay. Of a text
    with few tokens one is chosen at least, as in BERT's own preparation of texts.

    Attributes:
        share: Share of the tokens that are chosen, special tokens apart.
        mask: Id of the mask.
        special: Ids that are never chosen.
        size: Number of ids, of which others are drawn.

    Source: Devlin et al. (2019), arXiv:1810.04805, section 3.1.
    """

    share: float
    mask: int
    special: tuple[int, ...]
    size: int

    def apply(
        self, ids: Int[np.ndarray, " l"], rng: np.random.Generator
    ) -> tuple[Int[np.ndarray, " l"], Int[np.ndarray, " l"]]:
        """The ids of a text with tokens hidden, and the target of each.

        Args:
            ids: Ids of the text.
            rng: Generator of the draws.
        """
        chosen = (rng.random(len(ids)) < self.share) & ~np.isin(ids, self.special)
        how = rng.random(len(ids))
        others = rng.integers(self.size, size=len(ids))
        candidates = np.flatnonzero(~np.isin(ids, self.special))
        if len(candidates) and not chosen.any():
            chosen[rng.choice(candidates)] = True
        hidden = np.where(chosen & (how < 0.8), self.mask, ids)
        hidden = np.where(chosen & (how >= 0.8) & (how < 0.9), others, hidden)
        return hidden, np.where(chosen, ids, IGNORED)


@dataclass(frozen=True, eq=False)
class TokenBatches:
    """Batches of encoded texts, to train on and to evaluate on.

    Attributes:
        parts: The texts as the student's tokenizer encodes them, and then as each teacher's does
            whose tokenizer is another one.
        teachers: For each teacher the place of its encoding in `parts`; empty where all have the
            student's.
        padding: Id of the token for padding in each encoding.
        labels: Class or score of each text; None without. A score is also the target of a loss.
        teacher_logits: Logits of each teacher for all texts, where they are known already.
        size: Number of texts in a batch over all processes.
        device: Device of the batches.
        masked: How tokens are hidden in training; None: they are not.
        world: Largest number of processes that share a batch.
        least: Smallest number of texts in a process's share of a batch.
        sorts: Whether texts of like length share a batch.
    """

    parts: tuple[EncodedPart, ...]
    padding: tuple[int, ...]
    labels: Tensor | None
    size: int
    device: torch.device
    teachers: tuple[int, ...] = ()
    teacher_logits: tuple[Float[Tensor, "N k"], ...] | None = None
    masked: MaskedTokens | None = None
    world: int = 1
    least: int = 1
    sorts: bool = True

    @property
    def sizes(self) -> list[int]:
        """Number of texts of each batch of an epoch, over all processes."""
        return [len(rows) for rows in self._split(np.arange(len(self.parts[0])))]

    def __len__(self) -> int:
        return len(self.sizes)

    def epoch(
        self, seed: int, epoch: int, *, first: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Yield every text once, in an order that depends only on `seed` and `epoch`."""
        rng = np.random.default_rng(derive_seed(seed, epoch))
        for rows in self._ordered(rng)[first:]:
            own = rows[rank::world]
            totals = self._totals(rows, (seed, epoch)) if world > 1 else None
            yield replace(self._batch(own, (seed, epoch)), total_images=len(rows), totals=totals)

    def in_order(self, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Yield every `world`-th batch from batch `rank` on, the longest texts first.

        Tokens are hidden as in the first epoch of seed 0, always the same ones.
        """
        order = np.argsort(-self.parts[0].lengths, kind="stable")
        for rows in split_rows(order, self.size)[rank::world]:
            yield self.batch(rows)

    def first(self, count: int) -> Batch:
        """The first texts of the data as a batch.

        Args:
            count: Largest number of texts.
        """
        return self.batch(np.arange(min(count, len(self.parts[0]))))

    def batch(self, rows: Int[np.ndarray, " n"]) -> Batch:
        """The batch of some texts, with tokens hidden as in `in_order`.

        Args:
            rows: Numbers of the texts.
        """
        return self._batch(rows, (0, 0))

    def count_rows(
        self, seed: int, epoch: int, rank: int, world: int
    ) -> Mapping[Unit, Sequence[int]]:
        """Numbers of texts and of tokens in a process's share of each batch of an epoch."""
        rng = np.random.default_rng(derive_seed(seed, epoch))
        shares = [rows[rank::world] for rows in self._ordered(rng)]
        lengths = self.parts[0].lengths
        return {
            "rows": [len(rows) for rows in shares],
            "tokens": [int(lengths[rows].sum()) for rows in shares],
        }

    def _ordered(self, rng: np.random.Generator) -> list[Int[np.ndarray, " n"]]:
        """The rows of each batch of an epoch.

        Random rows are sorted by length in pools of `POOL_BATCHES` batches, and the batches are put
        in a random order; the last one, whose size may differ, stays last.
        """
        lengths = self.parts[0].lengths
        order = rng.permutation(len(lengths))
        if self.sorts:
            pool = POOL_BATCHES * self.size
            pools = [order[i : i + pool] for i in range(0, len(order), pool)]
            order = np.concatenate([x[np.argsort(-lengths[x], kind="stable")] for x in pools])
        batches = self._split(order)
        if not self.sorts:
            return batches
        places = rng.permutation(len(batches) - 1)
        return [*(batches[i] for i in places), batches[-1]]

    def _split(self, order: Int[np.ndarray, " n"]) -> list[Int[np.ndarray, " m"]]:
        # Shares differ by one text at most, so that one for each process is enough.
        return split_rows(order, self.size, least=self.least * self.world)

    def _batch(self, rows: Int[np.ndarray, " n"], key: tuple[int, int]) -> Batch:
        """The batch of these rows.

        Args:
            rows: Numbers of the texts.
            key: Seed and epoch, of which with the row hidden tokens are a function.
        """
        ids, targets = self._tokens(rows, key)
        inputs = pad(ids, self.padding[0], _types(self.parts[0], rows))
        length = inputs.ids.shape[1]
        taught = tuple(self._other(i, rows) if i else inputs for i in self.teachers)
        index = torch.from_numpy(rows)
        labels = index if self.labels is None else self.labels[index]
        known = self.teacher_logits
        batch = Batch(
            inputs,
            labels,
            targets=labels[:, None] if labels.is_floating_point() else None,
            teacher_logits=None if known is None else tuple(table[index] for table in known),
            index=index,
            teacher_inputs=taught or None,
            token_targets=None if targets is None else fill(targets, IGNORED, length),
        )
        return batching.move(batch, self.device)

    def _tokens(
        self, rows: Int[np.ndarray, " n"], key: tuple[int, int]
    ) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        """Ids and targets of the tokens of each row."""
        part = self.parts[0]
        ids = [part.ids[part.offsets[i] : part.offsets[i + 1]] for i in rows]
        if self.masked is not None:
            rngs = (np.random.default_rng(derive_seed(*key, int(i))) for i in rows)
            pairs = [self.masked.apply(x, rng) for x, rng in zip(ids, rngs, strict=True)]
            return [x for x, _ in pairs], [y for _, y in pairs]
        if part.targets is not None:
            return ids, [part.targets[part.offsets[i] : part.offsets[i + 1]] for i in rows]
        return ids, None

    def _other(self, place: int, rows: Int[np.ndarray, " n"]) -> TokenInputs:
        part = self.parts[place]
        ids = [part.ids[part.offsets[i] : part.offsets[i + 1]] for i in rows]
        return pad(ids, self.padding[place], _types(part, rows))

    def _totals(self, rows: Int[np.ndarray, " n"], key: tuple[int, int]) -> Mapping[Unit, int]:
        """Number of tokens and of targets of a whole batch."""
        tokens = int(self.parts[0].lengths[rows].sum())
        _, targets = self._tokens(rows, key)
        if targets is None:
            return {"tokens": tokens}
        return {"tokens": tokens, "targets": sum(int((x != IGNORED).sum()) for x in targets)}


def _types(part: EncodedPart, rows: Int[np.ndarray, " n"]) -> list[np.ndarray] | None:
    if part.types is None:
        return None
    return [part.types[part.offsets[i] : part.offsets[i + 1]] for i in rows]


def pad(ids: list[np.ndarray], padding: int, types: list[np.ndarray] | None = None) -> TokenInputs:
    """Rows of ids, and of types where there are any, filled up to the longest.

    Args:
        ids: Ids of each row.
        padding: Id of the token for padding.
        types: Types of the tokens of each row.
    """
    lengths = torch.tensor([len(x) for x in ids])
    length = int(lengths.max())
    mask = torch.arange(length) < lengths[:, None]
    filled = fill(ids, padding, length)
    return TokenInputs(filled, mask, None if types is None else fill(types, 0, length))


def fill(rows: list[np.ndarray], value: int, length: int) -> Int[Tensor, "n l"]:
    """Rows of numbers as a matrix, filled up with a value.

    Args:
        rows: Numbers of each row.
        value: What stands after them.
        length: Number of columns.
    """
    filled = np.full((len(rows), length), value, np.int64)
    for target, row in zip(filled, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(filled)
