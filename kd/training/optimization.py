"""timm's optimizers and learning-rate schedules, and averages of weights."""

import copy
import math
from typing import Any

import torch
from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from dsdistill.harness.errors import UserError, first_line
from kd.recipe import Recipe


def make_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Create timm's optimizer of the trainable weights of an objective.

    Norms and biases (vectors and scalars) are not decayed unless `recipe.decay_all` is set. timm's
    LAMB itself clips the gradient's norm at 1.
    """
    options: dict[str, Any] = {"filter_bias_and_bn": not recipe.decay_all}
    if recipe.has_momentum:
        options["momentum"] = recipe.momentum
    return create_optimizer_v2(
        module,
        recipe.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        **options,
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int
) -> Scheduler:
    """Create the schedule, a function of the step only: call `step_update(step)` before a step.

    A linear warm-up; then a cosine to `final` and a cool-down at constant rate, or a drop by
    `decay` at each milestone, or a constant rate.
    """
    total = recipe.total_steps(steps_per_epoch)
    warmup = recipe.in_steps(recipe.warmup, steps_per_epoch)
    cooldown = recipe.in_steps(recipe.cooldown, steps_per_epoch)
    rise = {"warmup_t": warmup, "warmup_lr_init": recipe.warmup_from * recipe.lr}
    if recipe.schedule == "cosine":
        fall = max(total - warmup - cooldown, 2)  # timm warns of a cosine of one step
        low = recipe.final * recipe.lr
        return CosineLRScheduler(
            optimizer, fall, low, warmup_prefix=True, t_in_epochs=False, **rise
        )
    # timm's milestones come one step early and count from the end of the warm-up.
    falls = [recipe.in_steps(m, steps_per_epoch) + 1 - warmup for m in recipe.milestones]
    if recipe.schedule == "constant":
        falls = []
    return MultiStepLRScheduler(
        optimizer, falls, recipe.decay, warmup_prefix=True, t_in_epochs=False, **rise
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
