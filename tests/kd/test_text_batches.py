"""Batches of texts: every text once, little padding, shares of processes, hidden tokens."""

import numpy as np
import pytest
import torch

from kd.data.text.token_batches import MaskedTokens, TokenBatches
from kd.data.text.tokenization import EncodedPart
from kd.models.token_inputs import IGNORED

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(3, 40, 100)
OFFSETS = np.concatenate([[0], np.cumsum(LENGTHS)])
IDS = RNG.integers(5, 50, OFFSETS[-1]).astype(np.int32)
CPU = torch.device("cpu")
MASKED = MaskedTokens(0.3, mask=4, special=(2, 3), size=50)


def source(**changes) -> TokenBatches:
    part = EncodedPart(IDS, OFFSETS, np.zeros(len(IDS), np.int8))
    given = {"labels": torch.arange(100) % 3, "size": 8, "device": CPU} | changes
    return TokenBatches((part,), (0,), **given)


def text(batch, i) -> list[int]:
    return batch.inputs.ids[i][batch.inputs.mask[i]].tolist()


def test_every_text_is_in_an_epoch_once_with_its_label():
    batches = list(source().epoch(1, 0))
    rows = torch.cat([batch.index for batch in batches])
    assert sorted(rows.tolist()) == list(range(100))
    assert [len(batch) for batch in batches] == source().sizes
    for batch in batches:
        assert batch.labels.tolist() == [row % 3 for row in batch.index.tolist()]
        for i, row in enumerate(batch.index.tolist()):
            assert text(batch, i) == IDS[OFFSETS[row] : OFFSETS[row + 1]].tolist()
        assert (batch.inputs.ids[~batch.inputs.mask] == 0).all()
        assert batch.total("tokens") == batch.count("tokens") == batch.inputs.mask.sum()


@pytest.mark.parametrize("masked", [None, MASKED], ids=["plain", "masked"])
def test_to_count_tokens_is_not_to_wait_for_the_device(masked):
    """A tensor on `meta` has no values: to read one, or to wait for one, is an error."""
    made = {
        device: list(source(masked=masked, device=torch.device(device)).epoch(0, 0))
        for device in ("cpu", "meta")
    }
    for batch, other in zip(made["cpu"], made["meta"], strict=True):
        assert other.inputs.mask.is_meta
        assert other.total("tokens") == other.count("tokens") == batch.inputs.mask.sum()
        if masked:
            assert other.count("targets") == (batch.token_targets != IGNORED).sum()


def test_texts_of_like_length_share_a_batch():
    def padded(**changes) -> int:
        return sum(batch.inputs.ids.numel() for batch in source(**changes).epoch(0, 0))

    assert padded() < 1.15 * OFFSETS[-1]
    assert padded(sorts=False) > 1.5 * OFFSETS[-1]
    order = [batch.inputs.ids.shape[1] for batch in source().epoch(0, 0)]
    assert order != sorted(order, reverse=True)  # batches of all lengths, mixed


def test_an_epoch_is_a_function_of_seed_and_epoch_and_begins_anywhere():
    def ids(*args, **options):
        return [batch.inputs.ids for batch in source(masked=MASKED).epoch(*args, **options)]

    whole = ids(1, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, ids(1, 2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], ids(1, 2, first=5), strict=True))
    assert any(a.shape != b.shape or not torch.equal(a, b)
               for a, b in zip(whole, ids(1, 3), strict=True))  # fmt: skip


@pytest.mark.parametrize("masked", [None, MASKED])
def test_processes_share_a_batch_and_know_its_totals(masked):
    whole = list(source(masked=masked, world=2).epoch(0, 0))
    shares = [list(source(masked=masked, world=2).epoch(0, 0, rank=r, world=2)) for r in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        rows = torch.cat([part.index for part in parts])
        assert sorted(rows.tolist()) == sorted(batch.index.tolist())
        for unit in ("rows", "tokens", "targets"):
            totals = {part.total(unit) for part in parts}
            assert totals == {batch.count(unit)} or (unit == "targets" and masked is None)
            assert sum(part.count(unit) for part in parts) == batch.count(unit)
        hidden = {row: text(batch, i) for i, row in enumerate(batch.index.tolist())}
        for part in parts:
            for i, row in enumerate(part.index.tolist()):
                assert text(part, i) == hidden[row]


def test_hidden_tokens():
    ids = np.tile(np.array([2, *range(5, 45), 3]), 500)
    hidden, targets = MASKED.apply(ids, np.random.default_rng(0))
    chosen = targets != IGNORED
    assert (targets[chosen] == ids[chosen]).all()
    assert (hidden[~chosen] == ids[~chosen]).all()
    assert not chosen[np.isin(ids, (2, 3))].any()
    assert chosen.mean() == pytest.approx(0.3 * 40 / 42, rel=0.05)
    assert (hidden[chosen] == 4).mean() == pytest.approx(0.8, abs=0.02)
    assert (hidden[chosen] == ids[chosen]).mean() == pytest.approx(0.1 + 0.1 / 50, abs=0.02)


def test_targets_of_tokens_are_in_the_batch_and_padding_has_none():
    targets = np.where(RNG.random(len(IDS)) < 0.5, IDS + 1, IGNORED)
    batches = TokenBatches((EncodedPart(IDS, OFFSETS, targets=targets),), (0,), None, 8, CPU)
    batch = next(iter(batches.epoch(0, 0)))
    for i, row in enumerate(batch.index.tolist()):
        own = targets[OFFSETS[row] : OFFSETS[row + 1]].tolist()
        assert batch.token_targets[i, : len(own)].tolist() == own
        assert (batch.token_targets[i, len(own) :] == IGNORED).all()
    assert batch.total("targets") == batch.count("targets") > 0


def test_a_teacher_with_another_tokenizer_gets_its_own_ids():
    one = EncodedPart(IDS, OFFSETS)
    lengths = LENGTHS + 1
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    other = EncodedPart(np.arange(offsets[-1], dtype=np.int32), offsets)
    batches = TokenBatches((one, other), (0, 7), None, 8, CPU, teachers=(1, 0))
    batch = next(iter(batches.epoch(0, 0)))
    first, second = batch.inputs_of(0), batch.inputs_of(1)
    assert torch.equal(second.ids, batch.inputs.ids)
    for i, row in enumerate(batch.index.tolist()):
        assert first.ids[i][first.mask[i]].tolist() == list(range(offsets[row], offsets[row + 1]))
    assert (first.ids[~first.mask] == 7).all()


def test_a_small_last_batch_joins_the_one_before():
    assert source(size=33, world=2, least=2).sizes == [33, 33, 34]
    assert [len(b) for b in source(size=33, world=2, least=2).epoch(0, 0)] == [33, 33, 34]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_process_has_a_text_of_a_batch_of_one_each(world):
    batches = source(size=world, world=world)
    shares = [list(batches.epoch(0, 0, rank=rank, world=world)) for rank in range(world)]
    sizes = {len(batch) for share in shares for batch in share[:-1]}
    assert sizes == {1}
    assert {len(share[-1]) for share in shares} <= {1, 2}
    rows = sorted(i for share in shares for batch in share for i in batch.index.tolist())
    assert rows == list(range(100))


def test_a_text_of_few_tokens_has_one_hidden_at_least():
    rng = np.random.default_rng(0)
    few = MaskedTokens(0.01, mask=4, special=(2, 3), size=50)
    for _ in range(20):
        _, targets = few.apply(np.array([2, 7, 8, 3]), rng)
        assert (targets != IGNORED).sum() == 1
        assert (targets[[0, 3]] == IGNORED).all()
    _, targets = few.apply(np.array([2, 3]), rng)  # there is nothing to hide
    assert (targets == IGNORED).all()
