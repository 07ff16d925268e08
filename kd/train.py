"""One plain loop over an objective: steps, rounds, validation, checkpoints.

A round is an epoch; where epochs are shorter than a hundred steps, as on a distilled set, it is a
fifth of the training. After a round the student is validated and the training is saved.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsdistill.harness.errors import UserError
from dsdistill.harness.progress import Show
from dsdistill.harness.runs import Metrics
from kd import checkpoint
from kd.checkpoint import State
from kd.data import Batch, Batches, derive
from kd.objectives import Objective
from kd.recipes import Recipe

SHORT_EPOCH = 100  # steps


def train(
    objective: Objective,
    batches: Batches,
    recipe: Recipe,
    seed: int,
    *,
    validate: Callable[[], float] | None = None,
    saved: tuple[Mapping[str, np.ndarray], Mapping[str, Any]] | None = None,
    save: Callable[[dict[str, np.ndarray], dict[str, Any]], None] | None = None,
    log: Metrics | None = None,
    show: Show | None = None,
) -> State:
    """Minimise the sum of the objective's terms; the same seed gives the same student.

    Args:
        objective: Called with a batch, returns named loss terms; has a `student` with a `network`.
        batches: The training images.
        recipe: Length, optimizer and learning rate.
        seed: Of the order of the images and of any randomness inside the networks.
        validate: Accuracy of the student as it is now, a fraction. Without it the last weights
            count as the best.
        saved: An earlier call's last `save`, to go on from.
        save: Called after each round with arrays and a JSON-compatible rest.
        log: Where the mean terms and the accuracy of each round go.
        show: Called after each step.

    Returns:
        The last state; `best` are the weights with the highest validation accuracy, of equal ones
        the latest. The student itself is left with its last weights.

    Raises:
        UserError: If a loss term is not finite.
    """
    network = objective.student.network
    optimizer = make_optimizer(objective, recipe)
    total = recipe.total_steps(len(batches))
    state = checkpoint.unpack(*saved, network, optimizer) if saved else State()
    for epochs in rounds(state.epoch, total, len(batches)):
        meter, step = Meter(), state.step
        for batch in _stream(batches, seed, epochs, total - step):
            terms = update(objective, optimizer, batch, step, recipe.lr_at(step, total))
            meter.add(terms, len(batch))
            step += 1
            if show:
                show(step, **meter.now(), **_known(state.best_accuracy, "best_accuracy"))
        accuracy = validate() if validate else None
        state = _advance(state, network, epochs.stop, step, accuracy)
        if log:
            known = _known(accuracy, "validation_accuracy")
            log.write(step, epoch=epochs.stop, **meter.means(), **known)
        if save:
            save(*checkpoint.pack(state, network, optimizer))
    return state


def update(
    objective: Objective, optimizer: torch.optim.Optimizer, batch: Batch, step: int, lr: float
) -> dict[str, Tensor]:
    """One step down the gradient; the terms before it.

    Raises:
        UserError: If a term is not finite; the weights are then as they were.
    """
    objective.train()
    terms = objective(batch)
    loss = torch.stack(list(terms.values())).sum()
    if not torch.isfinite(loss):
        name = next((n for n, v in terms.items() if not torch.isfinite(v)), "sum")
        raise UserError(
            f"loss term {name!r} is {terms.get(name, loss).item()} at step {step} "
            f"(learning rate {lr:.3g}): lower --lr; the last checkpoint is as it was"
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {name: value.detach() for name, value in terms.items()}


def make_optimizer(objective: Objective, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD or AdamW over what is trainable in the objective; vectors and scalars are not decayed."""
    trained = [p for p in objective.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    nesterov = recipe.momentum > 0
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov)


def rounds(done: int, total: int, steps_per_epoch: int) -> Iterator[range]:
    """The epochs between two validations, from epoch `done` to the one of step `total`."""
    epochs = math.ceil(total / steps_per_epoch)
    every = max(1, epochs // 5) if steps_per_epoch < SHORT_EPOCH else 1
    for first in range(done, epochs, every):
        yield range(first, min(first + every, epochs))


class Meter:
    """Mean loss terms and the speed of one round."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.steps = self.images = 0
        self.began = time.perf_counter()

    def add(self, terms: dict[str, Tensor], images: int) -> None:
        self.last = terms
        self.sums = {name: self.sums.get(name, 0) + value for name, value in terms.items()}
        self.steps, self.images = self.steps + 1, self.images + images

    def now(self) -> dict[str, float]:
        """The last step's terms, and images a second since the round began."""
        return {name: value.item() for name, value in self.last.items()} | self._speed()

    def means(self) -> dict[str, float]:
        """The round's mean terms, and its images a second."""
        means = {name: value.item() / self.steps for name, value in self.sums.items()}
        return means | self._speed()

    def _speed(self) -> dict[str, float]:
        return {"images_per_second": self.images / (time.perf_counter() - self.began)}


def _stream(batches: Batches, seed: int, epochs: range, limit: int) -> Iterator[Batch]:
    """Up to `limit` batches of these epochs; randomness inside the networks follows the epoch."""
    for epoch in epochs:
        with seeded(derive(seed, epoch), batches.device):
            for batch in batches.shuffled(seed, epoch):
                if limit == 0:
                    return
                limit -= 1
                yield batch


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global generators from one seed inside, and as they were afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _advance(
    state: State, network: nn.Module, epoch: int, step: int, accuracy: float | None
) -> State:
    # The later of equal epochs: its learning rate was lower.
    if accuracy is None or state.best_accuracy is None or accuracy >= state.best_accuracy:
        return State(epoch, step, epoch, accuracy, checkpoint.copy(network))
    return State(epoch, step, state.best_epoch, state.best_accuracy, state.best)


def _known(value: float | None, name: str) -> dict[str, float]:
    return {} if value is None else {name: value}
