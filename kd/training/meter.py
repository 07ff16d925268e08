"""What is watched during a training: mean loss terms, speed, and terms that are not finite."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dsdistill.harness.errors import UserError
from kd.data.batching import Batch
from kd.parallel.engine import Engine

SECONDS_BETWEEN_READINGS = 0.5  # seconds: reading a value waits for the device
MAX_ROWS_SHOWN = 5  # rows of a batch in an error


class Meter:
    """Mean loss terms and the speed of one round.

    Args:
        sums: What an earlier part of the round left, see `sums`.
    """

    def __init__(self, sums: Mapping[str, float] | None = None) -> None:
        earlier = dict(sums or {})
        self._steps, self._images = earlier.pop("steps", 0.0), earlier.pop("images", 0.0)
        self._seconds = earlier.pop("seconds", 0.0)
        self._sums: dict[str, Tensor | float] = dict(earlier)
        self._last: dict[str, Tensor] = {}
        self._shown: tuple[float, dict[str, float]] = (0.0, {})
        self._began = time.perf_counter()

    def add(self, terms: Mapping[str, Tensor], images: int) -> None:
        """The terms of a step of so many images."""
        self._last = dict(terms)
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double()
        self._steps, self._images = self._steps + 1, self._images + images

    def now(self) -> dict[str, float]:
        """A recent step's terms, and images a second since the round began."""
        if time.monotonic() - self._shown[0] > SECONDS_BETWEEN_READINGS:
            terms = {name: value.item() for name, value in self._last.items()}
            self._shown = time.monotonic(), terms | self._speed()
        return self._shown[1]

    def sums(self) -> dict[str, float]:
        """What a checkpoint in the middle of a round keeps."""
        terms = {name: float(value) for name, value in self._sums.items()}
        passed = self._seconds + time.perf_counter() - self._began
        return terms | {"steps": self._steps, "images": self._images, "seconds": passed}

    def means(self, on: Engine) -> dict[str, float]:
        """The round's mean terms, and its images a second, over all processes."""
        values = [float(value) for value in self._sums.values()]
        parts = torch.tensor([*values, self._images], dtype=torch.float64, device=on.device)
        summed: Any = on.reduce(parts)
        *terms, images = summed.tolist()
        processes = on.num_processes
        means = {
            name: value / self._steps / processes
            for name, value in zip(self._sums, terms, strict=True)
        }
        return means | {"images_per_second": images / self.sums()["seconds"]}

    def _speed(self) -> dict[str, float]:
        return {"images_per_second": self._images / self.sums()["seconds"]}


class FiniteGuard:
    """Stops a training whose loss is not finite.

    A step's terms are judged on the device, and the answer is read after the next step has been
    sent there: waiting for each step would leave a GPU idle. The checkpoint is saved only when all
    have been seen.
    """

    def __init__(self) -> None:
        self._unseen: tuple[Callable[[], bool], tuple[Any, ...]] | None = None

    def check(
        self, step: int, terms: Mapping[str, Tensor], batches: Sequence[Batch], rate: float
    ) -> None:
        """Look at the step before this one.

        Raises:
            UserError: If a term of it was not finite.
        """
        asked = _start_finite_check(terms), (step, terms, batches, rate)
        self.flush()
        self._unseen = asked

    def flush(self) -> None:
        """Look at the last step too."""
        unseen, self._unseen = self._unseen, None
        if unseen is not None and not unseen[0]():
            raise _not_finite_error(*unseen[1])


def _start_finite_check(terms: Mapping[str, Tensor]) -> Callable[[], bool]:
    """Ask the device whether the terms are finite, and how to read the answer.

    Asked later, the question would wait behind whatever had been sent to the device by then.
    """
    answer = torch.isfinite(torch.stack(list(terms.values())).sum())
    if answer.device.type != "cuda":
        return lambda: bool(answer)
    on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
    on_host.copy_(answer, non_blocking=True)
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
    images = ", ".join(map(str, rows[:MAX_ROWS_SHOWN])) + (
        ", ..." if len(rows) > MAX_ROWS_SHOWN else ""
    )
    return UserError(
        f"loss term {name!r} is {terms.get(name, values.sum()).item()} at step {step}, training "
        f"images {images} (learning rate {rate:.3g}): lower --lr"
    )
