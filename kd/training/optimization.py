"""Optimizers by timm's names, learning-rate schedules, and averages of weights.

Most trainings need neither timm nor torchvision, which it imports: 2.5 seconds of computing. So
torch's own optimizers are created here as timm creates them, and timm is asked for all others.
"""

import bisect
import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dsdistill.harness.errors import UserError, first_line
from kd.recipe import Recipe

# timm's names of torch's optimizers, and what timm passes to them. The fused AdamW updates all
# weights in one pass over memory, as transformers' Trainer does: on two cores a step of a BERT with
# 22 million weights takes 0.83 of the time. A checkpoint says which one it goes on with.
_TORCH_OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"nesterov": True}),
    "momentum": (torch.optim.SGD, {"nesterov": False}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {"fused": True}),
}


def make_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Create timm's optimizer of the trainable weights of an objective.

    Norms and biases (vectors and scalars) are not decayed unless `recipe.decay_all` is set. timm's
    LAMB itself clips the gradient's norm at 1.
    """
    options: dict[str, Any] = {"lr": recipe.lr}
    if recipe.has_momentum:
        options["momentum"] = recipe.momentum
    if recipe.optimizer in _TORCH_OPTIMIZERS:
        create, settings = _TORCH_OPTIMIZERS[recipe.optimizer]
        # Every group has a decay of its own: timm passes 0 for those that had none.
        return create(_decay_groups(module, recipe), weight_decay=0.0, **settings, **options)
    from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]

    return create_optimizer_v2(
        module,
        recipe.optimizer,
        weight_decay=recipe.weight_decay,
        filter_bias_and_bn=not recipe.decay_all,
        **options,
    )


def _decay_groups(module: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Divide the trainable weights into those without and with decay, as timm does."""
    names: set[str] = getattr(module, "no_weight_decay", set)()
    undecayed, decayed = [], []
    for name, weight in module.named_parameters():
        if not weight.requires_grad:
            continue
        vector = weight.ndim <= 1 or name.endswith(".bias")
        spared = not recipe.weight_decay or name in names or (vector and not recipe.decay_all)
        (undecayed if spared else decayed).append(weight)
    groups = [(undecayed, 0.0), (decayed, recipe.weight_decay)]
    return [{"params": weights, "weight_decay": decay} for weights, decay in groups if weights]


class Schedule:
    """Learning rate of an optimizer's groups, as a function of the step only.

    Args:
        optimizer: Its groups have the rate that the schedule starts from or rises to.
        warmup: Steps of a linear rise from the rate `start`.
        rate: Rate at a number of steps after the rise, from the rate that it rises to.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup: int,
        start: float,
        rate: Callable[[int, float], float],
    ) -> None:
        self._optimizer = optimizer
        self._warmup, self._start, self._rate = warmup, start, rate
        self._tops = [group.setdefault("initial_lr", group["lr"]) for group in self._groups()]
        if warmup:
            self.step_update(0)

    def step_update(self, step: int) -> None:
        """Set the rates of step 0, 1, ...; call it before the step."""
        for group, top in zip(self._groups(), self._tops, strict=True):
            group["lr"] = self._at(step, top)

    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups  # a checkpoint that is loaded replaces them

    def _at(self, step: int, top: float) -> float:
        if step < self._warmup:
            return self._start + step * ((top - self._start) / self._warmup)
        return self._rate(step - self._warmup, top)


def make_schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int
) -> Schedule:
    """Create the schedule of a recipe.

    A linear warm-up; then a cosine or a line to `final` and a cool-down at constant rate, or a drop
    by `decay` at each milestone, or a constant rate. The rates are those of timm's
    `CosineLRScheduler` and `MultiStepLRScheduler`, to the bit; the line is that of transformers.
    """
    total = recipe.total_steps(steps_per_epoch)
    warmup = recipe.in_steps(recipe.warmup, steps_per_epoch)
    start = recipe.warmup_from * recipe.lr
    if recipe.schedule in ("cosine", "linear"):
        cooldown = recipe.in_steps(recipe.cooldown, steps_per_epoch)
        fall, low = max(total - warmup - cooldown, 2), recipe.final * recipe.lr

        def cosine(step: int, top: float) -> float:
            if step >= fall:
                return low
            return low + 0.5 * (top - low) * (1 + math.cos(math.pi * step / fall))

        def linear(step: int, top: float) -> float:
            return low + (top - low) * max(1 - step / fall, 0)

        chosen = cosine if recipe.schedule == "cosine" else linear
        return Schedule(optimizer, warmup, start, chosen)
    drops = [recipe.in_steps(m, steps_per_epoch) - warmup for m in recipe.milestones]
    if recipe.schedule == "constant":
        drops = []
    return Schedule(
        optimizer, warmup, start, lambda step, top: top * recipe.decay ** bisect.bisect(drops, step)
    )


class WeightAverage:
    """Exponential moving average of a network's weights and buffers.

    The decay rises as ema (1 - exp(-ramp · step / total)), so that the random initial weights are
    soon forgotten.

    Source: Polyak and Juditsky (1992); the ramp is that of SuperGradients.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, total: int) -> None:
        assert recipe.ema is not None
        self.largest, self.ramp, self.total = recipe.ema, recipe.ema_ramp, total
        from timm.utils.model_ema import ModelEmaV3

        self._model = ModelEmaV3(network)

    @property
    def network(self) -> nn.Module:
        """The averaged network, in evaluation mode."""
        return self._model.module

    def update(self, network: nn.Module, step: int) -> None:
        """Update the average with the weights after step 1, 2, ..."""
        self._model.decay = self.decay(step)
        self._model.update(network)

    def decay(self, step: int) -> float:
        """Decay of the average at step 1, 2, ..."""
        return self.largest * (1 - math.exp(-self.ramp * step / self.total))


def check_optimizer(recipe: Recipe) -> None:
    """Refuse an optimizer that cannot be created, before data are loaded.

    Raises:
        UserError: If timm does not know it, or it needs other arguments.
    """
    try:
        make_optimizer(nn.Linear(1, 1), recipe)
    except Exception as error:  # timm's optimizers raise many kinds of errors
        first = first_line(error)
        raise UserError(f"cannot make optimizer {recipe.optimizer!r}: {first}") from error


def mean_weights(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Average several networks' weights; integer tensors are those of the first."""
    if len(parts) == 1:
        return copy.copy(parts[0])

    def mean(name: str) -> torch.Tensor:
        first = parts[0][name]
        if not first.is_floating_point():
            return first
        return torch.stack([part[name].double() for part in parts]).mean(0).to(first.dtype)

    return {name: mean(name) for name in parts[0]}
