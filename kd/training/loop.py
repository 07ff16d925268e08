"""The training loop: steps, rounds, validation, checkpoints.

A round is one epoch or several: `--validate-every` epochs, and by default, where epochs are shorter
than a hundred steps, so many that the training has at most forty rounds (see `kd.training.steps`).
After a round the student is validated. The training is saved after rounds and inside them, as often
as this is cheap (see `kd.training.saving`).
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from dsdistill.harness.runs.progress import ShowProgress
from kd.data.batching import BatchSource
from kd.objectives.schemes import Objective
from kd.parallel import engine
from kd.parallel.engine import Engine
from kd.recipe import Recipe
from kd.training import checkpoint, steps
from kd.training.checkpoint import PackedState, TrainingState
from kd.training.meter import FiniteGuard, Meter
from kd.training.saving import SavePolicy
from kd.training.steps import Trainer
from kd.training.user_optimizer import TorchSchedule, UserOptimizer

Figures = Mapping[str, float]


class RoundLog(Protocol):
    """What receives the figures of each round, such as `metrics_file.Metrics`."""

    def write(self, step: int, **values: Any) -> object: ...


def train(
    objective: Objective,
    batches: BatchSource,
    recipe: Recipe,
    seed: int,
    *,
    on: Engine | None = None,
    validate: Callable[[nn.Module], Figures] | None = None,
    validation_images: int | None = None,
    saved: PackedState | None = None,
    save: Callable[[PackedState], None] | None = None,
    stopping: Callable[[], bool] = lambda: False,
    stop_early: Callable[[], bool] = lambda: False,
    log: RoundLog | None = None,
    show: ShowProgress | None = None,
    optimizer: UserOptimizer | None = None,
) -> TrainingState:
    """Minimise the sum of the objective's terms; the same seed gives the same student.

    Args:
        objective: Module that maps a batch to named loss terms, with a `student` that has a
            `network`.
        batches: Training images in batches of `recipe.batch_size` per process.
        recipe: Length, optimizer and learning rate.
        seed: Seed of the order of the images and of all randomness inside the networks.
        on: Engine of the training; None is the CPU.
        validate: Function that returns the metrics `accuracy` and `nll` of a network. Without it
            the last weights count as the best.
        validation_images: Number of images that `validate` uses; None if unknown. Many of them make
            validations rarer where epochs are short.
        saved: Last value that an earlier call passed to `save`, to resume from.
        save: Function that is called from time to time, and after the last step, with arrays and
            JSON-compatible values.
        stopping: Function that is called after each step, and returns whether to stop. The training
            is saved first.
        stop_early: Function that is called after each round, and returns whether the training ends
            there, as it does when its patience is exhausted; the same in all processes.
        log: Receives the mean terms and the metrics of each round.
        show: Called after each step with its number and current values.
        optimizer: The user's optimizer, instead of the recipe's.

    Returns:
        The last state; its `best` are the weights with the best validation metric, of equal ones
        the latest. The student keeps its last weights.

    Raises:
        UserError: If a loss term is not finite.
        KeyboardInterrupt: If the training was stopped before its end; it was saved.
    """
    trainer = steps.prepare(
        objective, batches, recipe, on or engine.make(), validation_images, optimizer
    )
    state = trainer.restore(saved) if saved else TrainingState()
    meter, guard, saving = Meter(state.meter), FiniteGuard(), SavePolicy(trainer.on, stopping)
    objective.train()
    with torch.random.fork_rng(), closing(trainer.stream(batches, seed, state)) as stream:
        for step, parts in stream:
            terms = trainer.update(step, parts, seed)
            guard.check(step, terms, parts, trainer.rate)
            meter.add(terms, parts)
            state = replace(state, step=step + 1, epoch=(step + 1) // trainer.per_epoch)
            if show:
                show(step + 1, **meter.now(), **_best_figure(state, recipe))
            round_over = trainer.ends_round(step + 1)
            if round_over:
                guard.flush()
                state = _end_round(trainer, state, meter, validate, log)
                meter = Meter()
                objective.train()  # validation may have changed the mode
            if round_over and stop_early():
                state = replace(state, stopped=True)
            over = trainer.is_over(state)
            decision = saving.decide(round_over=round_over)
            if save and (over or decision.save):
                guard.flush()
                began = time.monotonic()
                save(trainer.pack(replace(state, meter=meter.sums())))
                saving.record_save(time.monotonic() - began)
            if over:
                break
            if decision.stop:
                raise KeyboardInterrupt
    if isinstance(trainer.schedule, TorchSchedule):
        trainer.schedule.step_update(state.step)  # also after the last epoch
    trainer.finish()
    return state


def _end_round(
    trainer: Trainer,
    state: TrainingState,
    meter: Meter,
    validate: Callable[[nn.Module], Figures] | None,
    log: RoundLog | None,
) -> TrainingState:
    state = replace(state, epoch=math.ceil(state.step / trainer.per_epoch))
    network = trainer.evaluated_network
    figures = validate(network) if validate else None
    recipe = trainer.recipe
    state = checkpoint.after_validation(
        state,
        network,
        figures,
        metric=recipe.metric,
        keep=recipe.average_best,
        left_out=trainer.left_out.names,
    )
    means = meter.means(trainer.on)
    if log:
        validation = {f"validation_{name}": value for name, value in (figures or {}).items()}
        log.write(state.step, epoch=state.epoch, lr=trainer.rate, **means, **validation)
    return state


def _best_figure(state: TrainingState, recipe: Recipe) -> dict[str, float]:
    figures = state.kept[0].figures if state.kept else {}
    return {f"best_{recipe.metric}": figures[recipe.metric]} if figures else {}
