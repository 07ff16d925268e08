"""The parts of a training, and its step."""

import contextlib
import copy
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kd.data.batching import Batch, BatchSource, Unit, derive_seed, seed_torch
from kd.objectives.projectors import EmbeddingMemory
from kd.objectives.schemes import Objective, as_module
from kd.parallel import sharding
from kd.parallel.engine import Engine
from kd.recipe import Recipe
from kd.training import checkpoint
from kd.training.checkpoint import LeftOut, PackedState, TrainingState
from kd.training.optimization import Schedule, WeightAverage, make_optimizer, make_schedule
from kd.training.user_optimizer import TorchSchedule, UserOptimizer

LONG_EPOCH_STEPS = 100  # with this many steps or more, every epoch is validated
# In a training with short epochs: the largest number of validations, the share of the work that
# they may take, and the smallest number, whatever they take: fewer could not select an epoch.
VALIDATIONS, VALIDATION_SHARE, FEWEST_VALIDATIONS = 40, 0.1, 5


@dataclass(frozen=True, eq=False)
class Trainer:
    """The parts of a training, and its step.

    Attributes:
        objective: The objective, not wrapped.
        wrapped: The objective, wrapped for all processes.
        weights: All weights of `wrapped`, listed once: a walk through all modules at each step
            takes a hundredth of a small one.
        optimizer: Optimizer of the trainable weights, wrapped by Accelerate where it must be.
        schedule: Schedule of the learning rate, the recipe's or the user's.
        average: Moving average of the student's weights; None without one.
        recipe: Length, optimizer and learning rate.
        on: Engine of the training.
        per_epoch: Number of steps in an epoch.
        total: Number of steps in the training.
        validations: Number of validations in the training, unless the recipe sets an interval.
        replica: Whole copy of the student's network, where FSDP shards it; else None.
        left_out: Weights of the student that checkpoints do not hold.
    """

    objective: Objective
    wrapped: nn.Module
    weights: tuple[nn.Parameter, ...]
    optimizer: Any
    schedule: Schedule | TorchSchedule
    average: WeightAverage | None
    recipe: Recipe
    on: Engine
    per_epoch: int
    total: int
    validations: int
    replica: nn.Module | None
    left_out: LeftOut

    @property
    def rate(self) -> float:
        """The learning rate of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def evaluated_network(self) -> nn.Module:
        """The network that is validated and saved: the average, where there is one."""
        return self.average.network if self.average else self.student

    @property
    def student(self) -> nn.Module:
        """The student's network, gathered if sharded; all processes must read this together."""
        network = self.objective.student.network
        return sharding.gather(network, self.replica) if self.replica else network

    def stream(
        self, batches: BatchSource, seed: int, state: TrainingState
    ) -> Generator[tuple[int, list[Batch]], None, None]:
        """Yield the steps after a state, each with its batches; none if the training is over."""
        rank, world, step = self.on.process_index, self.on.num_processes, state.step
        while step < self.total and not self.is_over(state):
            epoch, within = divmod(step, self.per_epoch)
            begin = within * self.recipe.accumulate
            source = batches.epoch(seed, epoch, first=begin, rank=rank, world=world)
            while step < self.total and (parts := list(islice(source, self.recipe.accumulate))):
                step += 1
                try:
                    yield step - 1, parts
                finally:
                    # Exhausts the source at the end of an epoch, also of the last one: the teacher
                    # cache writes its entry then.
                    if step % self.per_epoch == 0:
                        next(source, None)

    def update(self, step: int, parts: list[Batch], seed: int) -> dict[str, Tensor]:
        """Take one step; return the mean terms before it, over this process's images."""
        self.schedule.step_update(step)
        self.optimizer.zero_grad()
        for weight in self.weights:  # a user's optimizer may have only a part
            weight.grad = None
        units = self.objective.units
        each = dict.fromkeys(units.values())  # in the same order everywhere: sums depend on it
        totals: dict[Unit, int] = {unit: sum(part.total(unit) for part in parts) for unit in each}
        terms: dict[str, Tensor] = {}
        for i, part in enumerate(parts):
            seed_torch(derive_seed(seed, step, i, self.on.process_index), self.on.device)
            last = i + 1 == len(parts)
            with contextlib.nullcontext() if last else self.on.no_sync(self.wrapped):
                part_terms = self.wrapped(part)
                # Gradients are averaged over processes, whatever their shares: hence the number.
                weights: dict[Unit, float] = {
                    unit: part.count(unit) * self.on.num_processes / max(total, 1)
                    for unit, total in totals.items()
                }
                self.on.backward(_weighted_sum(part_terms, units, weights))
            for name, value in part_terms.items():
                terms[name] = terms.get(name, 0) + value.detach() * weights[units[name]]
        if self.recipe.clip is not None:
            self.on.clip_grad_norm_(self.weights, self.recipe.clip)
        self.optimizer.step()
        self.objective.after_step(step + 1, self.total)
        if self.average:
            self.average.update(self.student, step + 1)
        return terms

    def ends_round(self, done: int) -> bool:
        """Whether a round is over after `done` steps."""
        epoch, rest = divmod(done, self.per_epoch)
        if done == self.total or rest:
            return done == self.total
        if self.recipe.validate_every is not None:
            return epoch % self.recipe.validate_every == 0
        epochs = math.ceil(self.total / self.per_epoch)
        # Evenly spaced: a round ends where the number of rounds that should be over rises.
        return self.validations * epoch // epochs > self.validations * (epoch - 1) // epochs

    def is_over(self, state: TrainingState) -> bool:
        """Whether a training has taken all its steps, was ended, or its patience is exhausted."""
        patience = self.recipe.patience
        ended = state.stopped or state.step == self.total
        return ended or (patience is not None and state.stale >= patience)

    def finish(self) -> None:
        """Replace the student's sharded network by the gathered one."""
        self.objective.student.network = self.student

    def pack(self, state: TrainingState) -> PackedState:
        """Pack the training for a checkpoint."""
        absent = self.left_out.of_objective(as_module(self.objective))
        stored = self.objective.checkpoint_state()
        modules = {"objective": {n: value for n, value in stored.items() if n not in absent}}
        if self.average:
            average = self.average.network.state_dict()
            names = average.keys() - self.left_out.names
            modules["average"] = {n: value for n, value in average.items() if n in names}
        return checkpoint.pack(
            state, modules, self.optimizer, self.on.scaler, left_out=self.left_out
        )

    def restore(self, saved: PackedState) -> TrainingState:
        """Restore the training from a checkpoint."""
        modules = {"objective": as_module(self.objective)}
        if self.average:
            modules["average"] = self.average.network
        scaler, schedule = self.on.scaler, self.schedule
        # A user's schedule computes rates from those before: it must find its own, not the stored
        # ones, which may be of a shorter schedule.
        reached = schedule.resume(saved[1]["step"]) if isinstance(schedule, TorchSchedule) else []
        state = checkpoint.unpack(
            saved,
            modules,
            self.optimizer,
            scaler,
            network=self.evaluated_network,
            left_out=self.left_out,
        )
        for group, options in zip(self.optimizer.param_groups, reached, strict=False):
            group.update(options)
        return state


def prepare(
    objective: Objective,
    batches: BatchSource,
    recipe: Recipe,
    on: Engine,
    validation_images: int | None = None,
    own: UserOptimizer | None = None,
) -> Trainer:
    """Move everything to its device and wrap it for all processes, before the first step.

    Args:
        objective: The objective; its networks are moved in place.
        batches: Training images.
        recipe: Length, optimizer and learning rate.
        on: Engine of the training.
        validation_images: Number of validation images; None if unknown.
        own: The user's optimizer; None for the recipe's.
    """
    per_epoch = math.ceil(len(batches) / recipe.accumulate)
    total = recipe.total_steps(per_epoch)
    module = as_module(objective).to(on.device)
    left_out = LeftOut.of_student(objective.student)
    if own is not None:
        optimizer, schedule = own.attach(objective, per_epoch)
    else:
        optimizer = make_optimizer(module, recipe)
        schedule = make_schedule(optimizer, recipe, per_epoch)
    average = WeightAverage(objective.student.network, recipe, total) if recipe.ema else None
    replica = copy.deepcopy(objective.student.network) if on.is_fsdp2 else None
    if on.is_fsdp2:
        wrapped, prepared = sharding.shard(on, module, optimizer)
    else:
        _exclude_frozen_from_ddp(objective)
        wrapped, prepared = on.prepare(module, optimizer)
    if on.num_processes == 1 and on.scaler is None:
        prepared = optimizer  # the wrapper would only cost a quarter of a millisecond per step
    validations = choose_validations(sum(batches.sizes), per_epoch, total, validation_images)
    return Trainer(
        objective,
        wrapped,
        tuple(wrapped.parameters()),
        prepared,
        schedule,
        average,
        recipe,
        on,
        per_epoch,
        total,
        validations,
        replica,
        left_out,
    )


def _weighted_sum(
    terms: Mapping[str, Tensor], units: Mapping[str, Unit], weights: Mapping[Unit, float]
) -> Tensor:
    """Sum the terms of a batch, each times the weight of its unit."""
    sums = []
    for unit, weight in weights.items():
        own = [value for name, value in terms.items() if units[name] == unit]
        sums.append(torch.stack(own).sum() * weight)
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def choose_validations(
    images: int, per_epoch: int, total: int, validation_images: int | None
) -> int:
    """Choose the number of validations in a training, where the recipe does not.

    Long epochs are all validated. With short ones there are `VALIDATIONS`, but no more than take
    `VALIDATION_SHARE` of the work of the training, and no fewer than `FEWEST_VALIDATIONS`. Work is
    counted in passes of an image through the student: one to validate on it, three to train on it
    (forward, and backward for activations and for weights). It is counted, not timed, so that a
    resumed training is validated after the same epochs.

    Args:
        images: Number of images in an epoch.
        per_epoch: Number of steps in an epoch.
        total: Number of steps in the training.
        validation_images: Number of validation images; None if unknown.
    """
    epochs = math.ceil(total / per_epoch)
    if per_epoch >= LONG_EPOCH_STEPS:
        return epochs
    count = VALIDATIONS
    if validation_images:
        work = 3 * images * total / per_epoch
        count = min(count, int(VALIDATION_SHARE * work / validation_images))
    return min(epochs, max(count, FEWEST_VALIDATIONS))


def _exclude_frozen_from_ddp(objective: Objective) -> None:
    """Keep DDP from sending frozen teachers and memories, equal in all processes, at each step."""
    module = as_module(objective)
    trained, modules = objective.checkpoint_state(), dict(module.named_modules())
    ignored = [
        name
        for name in module.state_dict()
        if name not in trained or isinstance(modules[name.rpartition(".")[0]], EmbeddingMemory)
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
