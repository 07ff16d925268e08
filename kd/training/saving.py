"""Decide when a training is saved and stopped, in the same way in all its processes.

Checkpoints are written as often as this is cheap: for a small network every ten seconds, for a
large one so seldom that saving takes a fiftieth of the time, and at least every five minutes.

Several processes must save and stop after the same step, but each has its own clock and signals.
They agree about once a second, by one small sum: an agreement at every step would make a GPU wait.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kd.parallel.engine import Engine

MAX_SAVING_FRACTION = 0.02  # of the time of a training
SECONDS_TO_FIRST_CHECKPOINT = 1.0  # before the first one inside a round
MIN_SECONDS_BETWEEN_CHECKPOINTS = 10.0  # inside a round, however cheap they are
MAX_SECONDS_BETWEEN_CHECKPOINTS = 300.0  # however expensive they are
SECONDS_BETWEEN_AGREEMENTS = 1.0  # of several processes


class Decision(NamedTuple):
    """Whether to save and whether to stop after a step."""

    save: bool
    stop: bool


class SavePolicy:
    """Decides after each step whether the training is saved, and whether it stops.

    Args:
        on: Engine of the training; the clock of its first process decides when to save.
        stopping: Function that returns whether this process has been asked to stop.
    """

    def __init__(self, on: Engine, stopping: Callable[[], bool]) -> None:
        self._on, self._stopping = on, stopping
        self._cost, self._pause = 0.0, SECONDS_TO_FIRST_CHECKPOINT
        self._saved_at = self._agreed_at = time.monotonic()
        self._since, self._gap = 0, 1  # steps since the last agreement, and until the next

    def decide(self, *, round_over: bool) -> Decision:
        """Decide after a step; every process must call this after every step."""
        if self._on.num_processes == 1:
            return self._decide_locally(round_over)
        self._since += 1
        if self._since < self._gap and not round_over:
            return Decision(False, False)
        return self._agree(self._decide_locally(round_over))

    def record_save(self, seconds: float) -> None:
        """Record that the training was saved, and how long saving took."""
        self._cost, self._pause = seconds, MIN_SECONDS_BETWEEN_CHECKPOINTS
        self._saved_at = time.monotonic()

    def _decide_locally(self, round_over: bool) -> Decision:
        wait = max(self._cost / MAX_SAVING_FRACTION, 0.0 if round_over else self._pause)
        stop = self._stopping()
        return Decision(
            stop or time.monotonic() - self._saved_at >= min(wait, MAX_SECONDS_BETWEEN_CHECKPOINTS),
            stop,
        )

    def _agree(self, local: Decision) -> Decision:
        """Stop if any process stops; save, and agree again, by the first process's clock."""
        now = time.monotonic()
        steps = round(self._since * SECONDS_BETWEEN_AGREEMENTS / max(now - self._agreed_at, 1e-9))
        first = self._on.is_main_process
        values = [local.stop, local.save and first, max(steps, 1) if first else 0]
        summed: Any = self._on.reduce(torch.tensor(values, dtype=torch.float64).to(self._on.device))
        stop, save, gap = summed.tolist()
        self._since, self._gap, self._agreed_at = 0, int(gap), now
        return Decision(bool(stop or save), bool(stop))
