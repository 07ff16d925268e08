"""A torch optimizer and schedule that the user made, in place of the recipe's."""

import copy
import itertools
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dsdistill.harness.errors import UserError, first_line
from kd.objectives.schemes import Objective, as_module
from kd.training import checkpoint

Every = Literal["epoch", "step"]
_OF_CYCLIC = ("max_lrs", "base_momentums", "max_momentums")  # lists of CyclicLR
SCHEDULED = ("lr", "momentum", "betas")  # options of a group that schedules change


@dataclass(frozen=True, eq=False)
class UserOptimizer:
    """The user's optimizer over the student's parameters.

    Attributes:
        optimizer: The optimizer. Projectors of the loss are added to it as one more group, with the
            options of its first group, until `detach`.
        scheduler: A schedule of its learning rates; None keeps them.
        every: Whether the schedule takes a step after each epoch, or after each step of the
            optimizer.
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

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same when a training goes on, by a readable name, JSON-compatible.

        Raises:
            UserError: If an option of the optimizer cannot be stored.
        """
        schedules = [schedule for schedule, _ in self._lists_by_group()]
        options: dict[str, Any] = {}
        for number, group in enumerate(self.optimizer.param_groups[: self.group_count], 1):
            varying = {"params"} | ({"lr"} if schedules else set())
            varying |= {"momentum", "betas"} if "max_momentum" in group else set()
            for name in group.keys() - varying:
                options[f"{name} of group {number}"] = checkpoint.to_number(group[name])
        for name, value in options.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"optimizer has a {type(value).__name__} as {name}, which cannot be stored: "
                    "leave checkpoint out, or take an optimizer without it"
                ) from error
        return {
            "optimizer": type(self.optimizer).__name__,
            "scheduler": " of ".join(type(each).__name__ for each in schedules) or None,
            "scheduler_every": self.every if schedules else None,
            **dict(sorted(options.items())),
        }

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
            names = ("base_lrs", "lr_lambdas", "_last_lr", *_OF_CYCLIC)
            yield schedule, [name for name in names if hasattr(schedule, name)]


def check_storable(own: UserOptimizer) -> None:
    """Refuse an optimizer whose state a checkpoint cannot store, tried on a copy.

    Raises:
        UserError: If it cannot, or the optimizer cannot take a step.
    """
    name, trial = type(own.optimizer).__name__, copy.deepcopy(own.optimizer)
    weights = [weight for group in trial.param_groups for weight in group["params"]]
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    try:
        trial.step()
    except Exception as error:  # an optimizer may raise anything
        raise UserError(f"optimizer {name} cannot take a step: {first_line(error)}") from error
    for key, value in (pair for state in trial.state.values() for pair in state.items()):
        if not isinstance(value, torch.Tensor | int | float | str | None):
            raise UserError(
                f"optimizer {name} has a {type(value).__name__} as the state {key}, which cannot "
                "be stored: leave checkpoint out, or take another optimizer"
            )


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

    def resume(self, step: int) -> list[dict[str, Any]]:
        """Bring the schedule to the last of `step` finished steps.

        Returns:
            The options of each group that it has set; none without a schedule.

        Raises:
            UserError: If it is further already.
        """
        if self.scheduler is None:
            return []
        done, reached = self.scheduler.last_epoch, self.start + step // self.every
        if done > reached:
            raise UserError(
                f"scheduler has taken {done} steps, and {reached} at the checkpoint's step {step}: "
                "make optimizer and scheduler anew"
            )
        self.step_update(max(step - 1, 0))
        groups = self.scheduler.optimizer.param_groups
        return [{name: group[name] for name in SCHEDULED if name in group} for group in groups]

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


def check(own: UserOptimizer, student: nn.Module) -> None:
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
