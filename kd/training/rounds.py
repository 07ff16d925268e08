"""The figures of a training's rounds, for callbacks and the result."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

VALIDATION_PREFIX = "validation_"  # of the figures of a round on validation images


@dataclass(frozen=True)
class Round:
    """A round of a training: one epoch, or `validate_every` epochs, and a validation.

    Attributes:
        epoch: Number of finished epochs.
        step: Number of finished steps of the optimizer.
        lr: Learning rate of the last step.
        losses: Mean of each weighted term of the loss over the round, by the term's name.
        validation: `accuracy` and, for logits, `nll` in nats on the validation images; empty
            without any.
        images_per_second: Training images per second, over all processes.
    """

    epoch: int
    step: int
    lr: float
    losses: Mapping[str, float]
    validation: Mapping[str, float]
    images_per_second: float

    @property
    def figures(self) -> dict[str, float]:
        """All figures by name, for a logger: `loss_kd`, `validation_accuracy`, `lr`, ..."""
        return {
            "epoch": self.epoch,
            "lr": self.lr,
            "loss": sum(self.losses.values()),
            **{f"loss_{name}": value for name, value in self.losses.items()},
            **{f"{VALIDATION_PREFIX}{name}": value for name, value in self.validation.items()},
            "images_per_second": self.images_per_second,
        }


Callback = Callable[[Round], object]


class RoundRecorder:
    """Keeps the rounds of a training, and calls the user's functions after each.

    Attributes:
        rounds: The rounds so far.
        stop: Whether a function has returned True.
    """

    def __init__(self, callbacks: Sequence[Callback], rounds: Iterable[Mapping[str, Any]]) -> None:
        """Record a training.

        Args:
            callbacks: Functions that are called with each round.
            rounds: Rounds of an earlier part of the training, from `to_json`.
        """
        self.callbacks = tuple(callbacks)
        self.rounds = [Round(**values) for values in rounds]
        self.stop = False

    def write(self, step: int, **values: Any) -> None:
        """Record a round, as `kd.training.loop` reports it."""
        epoch, lr = values.pop("epoch"), float(values.pop("lr"))
        speed = values.pop("images_per_second")
        validation = {
            name.removeprefix(VALIDATION_PREFIX): values.pop(name)
            for name in list(values)
            if name.startswith(VALIDATION_PREFIX)
        }
        self.rounds.append(Round(epoch, step, lr, values, validation, speed))
        for callback in self.callbacks:
            answer = callback(self.rounds[-1])
            self.stop = self.stop or (isinstance(answer, bool | np.bool_) and bool(answer))

    def to_json(self) -> list[dict[str, Any]]:
        """The rounds as JSON-compatible values."""
        return [asdict(each) for each in self.rounds]
