"""Measurements during a training: mean loss terms, speed, and terms that are not finite."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dsdistill.harness.errors import UserError
from kd.data.batching import Batch
from kd.models.token_inputs import TokenInputs
from kd.parallel.engine import Engine

SECONDS_BETWEEN_READINGS = 0.5  # to read a value is to wait for the device
MAX_ROWS_SHOWN = 5  # rows of a batch in an error


class Meter:
    """Mean loss terms and the speed of one round.

    The speed is in images, or texts, or of texts with a target for each token in tokens.

    Args:
        sums: Result of `sums` from an earlier part of the round.
    """

    def __init__(self, sums: Mapping[str, float] | None = None) -> None:
        earlier = dict(sums or {})
        self._steps = earlier.pop("steps", 0.0)
        self._amount: float = earlier.pop("images", 0.0)  # of whatever unit
        self._unit = "images"
        self._seconds = earlier.pop("seconds", 0.0)
        self._sums: dict[str, Tensor | float] = dict(earlier)
        self._last: dict[str, Tensor] = {}
        self._shown: tuple[float, dict[str, float]] = (0.0, {})
        self._began = time.perf_counter()

    def add(self, terms: Mapping[str, Tensor], batches: Sequence[Batch]) -> None:
        """Add the terms of a step, and what its batches hold."""
        self._last = dict(terms)
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double()
        self._steps += 1
        for batch in batches:
            self._unit, amount = _amount(batch)
            self._amount = self._amount + amount

    def now(self) -> dict[str, float]:
        """A recent step's terms, and the speed since the round began."""
        if time.monotonic() - self._shown[0] > SECONDS_BETWEEN_READINGS:
            terms = {name: value.item() for name, value in self._last.items()}
            self._shown = time.monotonic(), terms | self._speed()
        return self._shown[1]

    def sums(self) -> dict[str, float]:
        """Sums for a checkpoint in the middle of a round."""
        terms = {name: float(value) for name, value in self._sums.items()}
        passed = self._seconds + time.perf_counter() - self._began
        return terms | {"steps": self._steps, "images": self._amount, "seconds": passed}

    def means(self, on: Engine) -> dict[str, float]:
        """The round's mean terms, and its speed, over all processes."""
        values = [float(value) for value in self._sums.values()]
        parts = torch.tensor([*values, self._amount], dtype=torch.float64, device=on.device)
        summed: Any = on.reduce(parts)
        *terms, amount = summed.tolist()
        processes = on.num_processes
        means = {
            name: value / self._steps / processes
            for name, value in zip(self._sums, terms, strict=True)
        }
        return means | {f"{self._unit}_per_second": amount / self.sums()["seconds"]}

    def _speed(self) -> dict[str, float]:
        sums = self.sums()
        return {f"{self._unit}_per_second": sums["images"] / sums["seconds"]}


def _amount(batch: Batch) -> tuple[str, int]:
    """Unit of a batch's inputs, and their number."""
    if not isinstance(batch.inputs, TokenInputs):
        return "images", len(batch)
    if batch.token_targets is None:
        return "texts", len(batch)
    return "tokens", batch.count("tokens")


class FiniteGuard:
    """Stops a training whose loss is not finite.

    A step's terms are checked on the device, and the result is read after the next step has been
    sent there: waiting for each step would leave a GPU idle. A checkpoint is saved only after
    `flush`.
    """

    def __init__(self) -> None:
        self._pending: tuple[Callable[[], bool], tuple[Any, ...]] | None = None

    def check(
        self, step: int, terms: Mapping[str, Tensor], batches: Sequence[Batch], rate: float
    ) -> None:
        """Start the check of a step, and read the result for the step before.

        Raises:
            UserError: If a term of the step before was not finite.
        """
        started = _start_finite_check(terms), (step, terms, batches, rate)
        self.flush()
        self._pending = started

    def flush(self) -> None:
        """Read the result for the last step.

        Raises:
            UserError: If a term of it was not finite.
        """
        pending, self._pending = self._pending, None
        if pending is not None and not pending[0]():
            raise _not_finite_error(*pending[1])


def _start_finite_check(terms: Mapping[str, Tensor]) -> Callable[[], bool]:
    """Start a check on the device whether the terms are finite; return how to read the result.

    A check started later would wait for everything sent to the device in between.
    """
    is_finite = torch.isfinite(torch.stack(list(terms.values())).sum())
    if is_finite.device.type != "cuda":
        return lambda: bool(is_finite)
    on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
    on_host.copy_(is_finite, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> bool:
        copied.synchronize()
        return bool(on_host)

    return read


def _not_finite_error(
    step: int, terms: Mapping[str, Tensor], batches: Sequence[Batch], rate: float
) -> UserError:
    values = torch.stack(list(terms.values()))
    name = next((n for n, v in terms.items() if not torch.isfinite(v)), "sum")
    rows = [i for batch in batches if batch.index is not None for i in batch.index.tolist()]
    numbers = ", ".join(map(str, rows[:MAX_ROWS_SHOWN])) + (
        ", ..." if len(rows) > MAX_ROWS_SHOWN else ""
    )
    kind = "texts" if isinstance(batches[0].inputs, TokenInputs) else "images"
    where = f", training {kind} {numbers}" if rows else ""
    return UserError(
        f"loss term {name!r} is {terms.get(name, values.sum()).item()} at step {step}{where} "
        f"(learning rate {rate:.3g}): lower --lr"
    )
