"""What a training is made of, and one step of it."""

import contextlib
import copy
import math
from collections.abc import Generator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kd.data.batching import Batch, BatchSource, derive_seed
from kd.objectives.projectors import EmbeddingMemory
from kd.objectives.schemes import Objective
from kd.parallel import sharding
from kd.parallel.engine import Engine
from kd.recipe import Recipe
from kd.training import checkpoint
from kd.training.checkpoint import PackedState, TrainingState
from kd.training.optimization import WeightAverage, make_optimizer, make_schedule

LONG_EPOCH_STEPS = 100  # steps; a longer epoch is validated each
# Of a training with short epochs: validations at most, the share of its work that they may take,
# and validations at least, whatever they take: fewer could not choose an epoch.
VALIDATIONS, VALIDATION_SHARE, FEWEST_VALIDATIONS = 40, 0.1, 5


@dataclass(frozen=True, eq=False)
class Trainer:
    """What a training is made of, and its step."""

    objective: Objective
    wrapped: nn.Module
    optimizer: Any
    schedule: Any
    average: WeightAverage | None
    recipe: Recipe
    on: Engine
    per_epoch: int
    total: int
    validations: int  # in all, where the recipe does not say how often
    replica: nn.Module | None  # of the student's network, where FSDP spreads it

    @property
    def rate(self) -> float:
        """The learning rate of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def judged(self) -> nn.Module:
        """What is validated and saved: the average, where there is one."""
        return self.average.network if self.average else self.student

    @property
    def student(self) -> nn.Module:
        """The student's network, whole; all processes must ask for it."""
        own = self.objective.student.network
        return sharding.gather(own, self.replica) if self.replica else own

    def stream(
        self, batches: BatchSource, seed: int, state: TrainingState
    ) -> Generator[tuple[int, list[Batch]], None, None]:
        """The steps after a state's, each with its batches; none after a training that is over."""
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
                    # Lets what is written epoch by epoch know that the epoch is over, also where
                    # the training ends with it.
                    if step % self.per_epoch == 0:
                        next(source, None)

    def update(self, step: int, parts: list[Batch], seed: int) -> dict[str, Tensor]:
        """One step down the gradient; the mean terms before it, of this process's images."""
        self.schedule.step_update(step)
        self.optimizer.zero_grad()
        whole = sum(part.whole or len(part) for part in parts)
        terms: dict[str, Tensor] = {}
        for i, part in enumerate(parts):
            _seed_generators(derive_seed(seed, step, i, self.on.process_index), self.on.device)
            last = i + 1 == len(parts)
            with contextlib.nullcontext() if last else self.on.no_sync(self.wrapped):
                found = self.wrapped(part)
                # Processes' gradients are averaged, whatever their shares: hence their number.
                weight = len(part) * self.on.num_processes / whole
                self.on.backward(torch.stack(list(found.values())).sum() * weight)
            for name, value in found.items():
                terms[name] = terms.get(name, 0) + value.detach() * weight
        if self.recipe.clip is not None:
            self.on.clip_grad_norm_(self.wrapped.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.objective.after_step(step + 1, self.total)
        if self.average:
            self.average.update(self.student, step + 1)
        return terms

    def ends_round(self, done: int) -> bool:
        """Whether a round is over after so many steps."""
        epoch, rest = divmod(done, self.per_epoch)
        if done == self.total or rest:
            return done == self.total
        if self.recipe.validate_every is not None:
            return epoch % self.recipe.validate_every == 0
        epochs = math.ceil(self.total / self.per_epoch)
        # Spread evenly: where the whole number of rounds that should be over rises.
        return self.validations * epoch // epochs > self.validations * (epoch - 1) // epochs

    def is_over(self, state: TrainingState) -> bool:
        """Whether a training has taken all its steps, or has lost its patience."""
        patience = self.recipe.patience
        return state.step == self.total or (patience is not None and state.stale >= patience)

    def finish(self) -> None:
        """Leave the student whole."""
        self.objective.student.network = self.student

    def packed(self, state: TrainingState) -> PackedState:
        modules = {"objective": self.objective.stored()}
        if self.average:
            modules["average"] = self.average.network.state_dict()
        return checkpoint.pack(state, modules, self.optimizer, self.on.scaler)

    def restored(self, saved: PackedState) -> TrainingState:
        modules: dict[str, nn.Module] = {"objective": self.objective}
        if self.average:
            modules["average"] = self.average.network
        scaler = self.on.scaler
        return checkpoint.unpack(saved, modules, self.optimizer, scaler, network=self.judged)


def prepare(
    objective: Objective,
    batches: BatchSource,
    recipe: Recipe,
    on: Engine,
    validation_images: int | None = None,
) -> Trainer:
    """Everything on its device and wrapped for all processes, before the first step."""
    per_epoch = math.ceil(len(batches) / recipe.accumulate)
    total = recipe.total_steps(per_epoch)
    objective.to(on.device)
    optimizer = make_optimizer(objective, recipe)
    schedule = make_schedule(optimizer, recipe, per_epoch)
    average = WeightAverage(objective.student.network, recipe, total) if recipe.ema else None
    replica = copy.deepcopy(objective.student.network) if on.is_fsdp2 else None
    if on.is_fsdp2:
        wrapped, prepared = sharding.shard(on, objective, optimizer)
    else:
        _exclude_frozen_from_ddp(objective)
        wrapped, prepared = on.prepare(objective, optimizer)
    if on.num_processes == 1 and on.scaler is None:
        prepared = optimizer  # the wrapper does nothing then, in a quarter of a millisecond
    often = choose_validations(sum(batches.sizes), per_epoch, total, validation_images)
    return Trainer(
        objective,
        wrapped,
        prepared,
        schedule,
        average,
        recipe,
        on,
        per_epoch,
        total,
        often,
        replica,
    )


def choose_validations(
    images: int, per_epoch: int, total: int, validation_images: int | None
) -> int:
    """How often a training is validated where nothing else is asked for.

    A long epoch is validated each. Of short ones, as many as are `VALIDATIONS`, but no more than
    take `VALIDATION_SHARE` of the work of the training, and no fewer than `FEWEST_VALIDATIONS`.
    Work is counted in passes of an image through the student: one to validate it, three to train
    on it (forward, and backward for activations and for weights). A count, and no clock, so that a
    training that is resumed is validated after the same epochs.

    Args:
        images: Of one epoch.
        per_epoch: Steps of one epoch.
        total: Steps of the training.
        validation_images: Number of those; None where nobody knows.
    """
    epochs = math.ceil(total / per_epoch)
    if per_epoch >= LONG_EPOCH_STEPS:
        return epochs
    often = VALIDATIONS
    if validation_images:
        work = 3 * images * total / per_epoch
        often = min(often, int(VALIDATION_SHARE * work / validation_images))
    return min(epochs, max(often, FEWEST_VALIDATIONS))


def _exclude_frozen_from_ddp(objective: Objective) -> None:
    """Frozen teachers and memories are alike in all processes: DDP would send them at each step."""
    own, kinds = objective.stored(), dict(objective.named_modules())
    unshared = [
        name
        for name in objective.state_dict()
        if name not in own or isinstance(kinds[name.rpartition(".")[0]], EmbeddingMemory)
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, unshared)


def _seed_generators(seed: int, device: torch.device) -> None:
    """torch's global generators; `torch.manual_seed` takes long where CUDA is not in use."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
