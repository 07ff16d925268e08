"""Milliseconds of texts of a stated length."""

import itertools
from typing import Any, ClassVar

import pytest
from torch import Tensor, nn

from kd.evaluation import scoring
from kd.models.language import bilstm
from kd.models.language.language_model import LanguageModel


class Recorder(nn.Module):
    """A network that remembers the shapes of its inputs, as do its copies."""

    shapes: ClassVar[list[tuple[int, ...]]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.shapes.append(tuple(input_ids.shape))
        assert bool(attention_mask.all())
        return input_ids.float()


def test_the_median_call_of_one_text_and_of_a_batch(monkeypatch: Any) -> None:
    # Readings 0 1 3 6 10 15 ...: calls of 1, 3 and 5 seconds, enough for a budget of one.
    readings = (float(n * (n + 1) // 2) for n in itertools.count())
    monkeypatch.setattr(scoring.time, "perf_counter", lambda: next(readings))
    figures = scoring.text_latency(LanguageModel(Recorder()), 30, 5)
    assert set(Recorder.shapes) == {(1, 5), (64, 5)}
    assert figures == pytest.approx({"latency_ms_batch_1": 3e3, "latency_ms_batch_64": 9e3})


def test_a_quick_measurement_is_one_call_after_warm_up(monkeypatch: Any) -> None:
    readings = (float(n * (n + 1) // 2) for n in itertools.count())
    monkeypatch.setattr(scoring.time, "perf_counter", lambda: next(readings))
    Recorder.shapes.clear()
    figures = scoring.text_latency(LanguageModel(Recorder()), 30, 7, quick=True)
    assert figures == {"latency_ms_batch_1": 1e3}
    assert Recorder.shapes == [(1, 7), (1, 7)]


def test_the_network_stays_as_it_was() -> None:
    network = bilstm.build(30, 2, 4, pairs=True).train()
    assert scoring.text_latency(network, 30, 6)["latency_ms_batch_1"] > 0
    assert network.training
