"""A torch optimizer and schedule that the user made, in place of the recipe's."""

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dsdistill.harness.errors import UserError
from kd.objectives.schemes import Objective, as_module

Every = Literal["epoch", "step"]


@dataclass(frozen=True, eq=False)
class OwnOptimizer:
    """The user's optimizer over the student's parameters.

    Attributes:
        optimizer: The optimizer. Projectors of the loss are added to it as one more group, with the
            options of its first group, until `detach`.
        scheduler: A schedule of its learning rates; None keeps them.
        every: Whether the schedule takes a step before each epoch but the first, or before each
            step of the optimizer but the first.
        start: Number of steps that the schedule had taken before the training.
        group_count: Number of the user's own parameter groups.
    """

    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None = None
    every: Every = "epoch"
    start: int = 0
    group_count: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "group_count", len(self.optimizer.param_groups))

    def attach(
        self, objective: Objective, per_epoch: int
    ) -> tuple[torch.optim.Optimizer, "TorchSchedule"]:
        """Add the objective's projectors; return the optimizer and its schedule.

        Args:
            objective: The objective, on its device.
            per_epoch: Number of steps in an epoch.
        """
        optimizer = self.optimizer
        in_use = {id(p) for group in optimizer.param_groups for p in group["params"]}
        in_use |= {id(p) for p in objective.student.parameters()}
        trained = as_module(objective).parameters()
        projectors = [p for p in trained if p.requires_grad and id(p) not in in_use]
        if projectors:
            options = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
            optimizer.add_param_group({**options, "params": projectors})
            for schedule, lists in self._lists_by_group():
                for name in lists:
                    setattr(schedule, name, [*getattr(schedule, name), getattr(schedule, name)[0]])
        _move_state(optimizer)
        every = per_epoch if self.every == "epoch" else 1
        return optimizer, TorchSchedule(self.scheduler, self.start, every)

    def detach(self) -> None:
        """Take the projectors out again, after the student has moved to where it was."""
        groups = self.optimizer.param_groups
        for parameter in itertools.chain.from_iterable(
            group["params"] for group in groups[self.group_count :]
        ):
            self.optimizer.state.pop(parameter, None)
        del groups[self.group_count :]
        for schedule, lists in self._lists_by_group():
            for name in lists:
                setattr(schedule, name, getattr(schedule, name)[: self.group_count])
        _move_state(self.optimizer)

    def _lists_by_group(self) -> Iterator[tuple[Any, list[str]]]:
        """The schedules that the user's consists of, and their lists of one value per group."""
        waiting: list[Any] = [] if self.scheduler is None else [self.scheduler]
        for schedule in waiting:
            waiting.extend(getattr(schedule, "_schedulers", ()))
            names = ("base_lrs", "lr_lambdas", "_last_lr")
            yield schedule, [name for name in names if hasattr(schedule, name)]


class TorchSchedule:
    """A torch schedule with the method of timm's: `step_update(step)` before each step."""

    def __init__(self, scheduler: LRScheduler | None, start: int, every: int) -> None:
        """Wrap a schedule.

        Args:
            scheduler: The schedule; None keeps the learning rates.
            start: Number of its steps before the training.
            every: Number of the optimizer's steps to a step of the schedule.
        """
        self.scheduler, self.start, self.every = scheduler, start, every

    def step_update(self, step: int) -> None:
        """Bring the schedule to a step of the training; it never goes back."""
        if self.scheduler is None:
            return
        with warnings.catch_warnings():
            # A resumed training brings a new schedule to its place before the optimizer's first
            # step, of which torch warns.
            warnings.simplefilter("ignore", UserWarning)
            while self.scheduler.last_epoch < self.start + step // self.every:
                self.scheduler.step()


def _move_state(optimizer: torch.optim.Optimizer) -> None:
    """Move an optimizer's state to the device of its parameters, as loading a state does."""
    optimizer.load_state_dict(optimizer.state_dict())


def check(own: OwnOptimizer, student: nn.Module) -> None:
    """Refuse an optimizer or a schedule that cannot train the student.

    Raises:
        UserError: If it cannot.
    """
    of_student = {id(parameter) for parameter in student.parameters()}
    trained = {id(p) for group in own.optimizer.param_groups for p in group["params"]}
    if not trained & of_student:
        raise UserError(
            "optimizer has none of the student's parameters: make it with student.parameters()"
        )
    if isinstance(own.optimizer, torch.optim.LBFGS):
        raise UserError("optimizer LBFGS needs a closure, which a training by batches has not")
    if own.scheduler is None:
        return
    if isinstance(own.scheduler, ReduceLROnPlateau) or not hasattr(own.scheduler, "last_epoch"):
        raise UserError(
            f"scheduler {type(own.scheduler).__name__} is no function of the step: give another, "
            "such as CosineAnnealingLR or SequentialLR"
        )
    if own.scheduler.optimizer is not own.optimizer:
        raise UserError("scheduler is of another optimizer: make it with the one that is given")
