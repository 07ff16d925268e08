"""The speed of a training: in images, texts or tokens, also over an interruption."""

import time

import pytest
import torch

from kd.data.batching import Batch
from kd.models.token_inputs import TokenInputs
from kd.parallel import engine
from kd.training.meter import Meter

SECONDS = 4.0
TERMS = {"tokens": torch.tensor(2.0)}  # a term may be called as a unit is


def batch(*, texts: bool, targets: bool) -> Batch:
    """Three images, or three texts with six real tokens and six of padding."""
    labels = torch.zeros(3, dtype=torch.long)
    if not texts:
        return Batch(torch.zeros(3, 1, 2, 2), labels)
    mask = torch.arange(4) < torch.tensor([[4], [1], [1]])
    inputs = TokenInputs(torch.zeros(3, 4, dtype=torch.long), mask)
    return Batch(inputs, labels, token_targets=inputs.ids if targets else None)


@pytest.mark.parametrize(
    ("texts", "targets", "unit", "amount"),
    [(False, False, "images", 3), (True, False, "texts", 3), (True, True, "tokens", 6)],
)
def test_speed_is_in_the_unit_of_the_batches(texts, targets, unit, amount, monkeypatch):
    now = iter((0.0, SECONDS, SECONDS, SECONDS))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    one, meter = batch(texts=texts, targets=targets), Meter()
    for batches in ([one, one], [one]):
        meter.add(TERMS, batches)
    assert meter.now() == {"tokens": 2.0, f"{unit}_per_second": 3 * amount / SECONDS}
    figures = meter.means(engine.make("cpu"))
    assert figures == {"tokens": 2.0, f"{unit}_per_second": 3 * amount / SECONDS}


def test_speed_counts_what_came_before_an_interruption(monkeypatch):
    now = iter((0.0, SECONDS, 0.0, SECONDS))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    one, first = batch(texts=True, targets=True), Meter()
    first.add(TERMS, [one])
    second = Meter(first.sums())
    second.add(TERMS, [one, one])
    assert second.means(engine.make("cpu"))["tokens_per_second"] == 18 / (2 * SECONDS)
