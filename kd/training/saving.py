"""When a training is saved and stopped, decided alike in all its processes.

A checkpoint is written as often as it is cheap: a small network's every few seconds, a large one's
so seldom that saving takes a fiftieth of the time, and never less than every five minutes.

Several processes must save and stop after the same step, and have clocks and signals of their own.
They agree about once a second, by one small sum: an agreement at every step would make a GPU wait.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kd.parallel.engine import Engine

MAX_SAVING_FRACTION = 0.02  # of the time of a training that saving it may take
SECONDS_TO_FIRST_CHECKPOINT = 1.0  # seconds until the first checkpoint inside a round
# Seconds between two of them inside a round, however cheap they are.
MIN_SECONDS_BETWEEN_CHECKPOINTS = 10.0
MAX_SECONDS_BETWEEN_CHECKPOINTS = 300.0  # seconds between two checkpoints, however dear they are
SECONDS_BETWEEN_AGREEMENTS = 1.0  # seconds between two agreements of several processes


class Decision(NamedTuple):
    """What is to be done after a step."""

    save: bool
    stop: bool


class SavePolicy:
    """Decides after each step whether the training is saved, and whether it stops there.

    Args:
        on: The processes; the clock of the first one counts.
        stopping: Whether the user or the system has asked this process to stop.
    """

    def __init__(self, on: Engine, stopping: Callable[[], bool]) -> None:
        self._on, self._stopping = on, stopping
        self._cost, self._pause = 0.0, SECONDS_TO_FIRST_CHECKPOINT
        self._saved_at = self._agreed_at = time.monotonic()
        self._since, self._gap = 0, 1  # steps since the last agreement, and until the next

    def decide(self, *, round_over: bool) -> Decision:
        """Decide after a step; every process asks after each."""
        if self._on.num_processes == 1:
            return self._mine(round_over)
        self._since += 1
        if self._since < self._gap and not round_over:
            return Decision(False, False)
        return self._agree(self._mine(round_over))

    def saved(self, seconds: float) -> None:
        """Note that the training was saved, and how long that took."""
        self._cost, self._pause, self._saved_at = (
            seconds,
            MIN_SECONDS_BETWEEN_CHECKPOINTS,
            time.monotonic(),
        )

    def _mine(self, round_over: bool) -> Decision:
        wait = max(self._cost / MAX_SAVING_FRACTION, 0.0 if round_over else self._pause)
        stop = self._stopping()
        return Decision(
            stop or time.monotonic() - self._saved_at >= min(wait, MAX_SECONDS_BETWEEN_CHECKPOINTS),
            stop,
        )

    def _agree(self, mine: Decision) -> Decision:
        """Stop where any process is to; save, and agree again, as the first one's clock says."""
        now = time.monotonic()
        steps = round(self._since * SECONDS_BETWEEN_AGREEMENTS / max(now - self._agreed_at, 1e-9))
        first = self._on.is_main_process
        answers = [mine.stop, mine.save and first, max(steps, 1) if first else 0]
        summed: Any = self._on.reduce(
            torch.tensor(answers, dtype=torch.float64).to(self._on.device)
        )
        stop, save, gap = summed.tolist()
        self._since, self._gap, self._agreed_at = 0, int(gap), now
        return Decision(bool(stop or save), bool(stop))
