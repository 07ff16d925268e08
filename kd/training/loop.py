"""One plain loop over an objective: steps, rounds, validation, checkpoints.

A round is an epoch, or several: as many as `--validate-every` says, and by default, where epochs
are shorter than a hundred steps, as many as make at most forty rounds of the training (see
`kd.training.steps`). After a round the student is validated. The training is saved after rounds
and inside them, as often as it is cheap (see `kd.training.saving`).
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace

import torch
from torch import nn

from dsdistill.harness.runs.progress import ShowProgress
from dsdistill.harness.runs.run_folder import Metrics
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

Figures = Mapping[str, float]


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
    log: Metrics | None = None,
    show: ShowProgress | None = None,
) -> TrainingState:
    """Minimise the sum of the objective's terms; the same seed gives the same student.

    Args:
        objective: Called with a batch, returns named loss terms; has a `student` with a `network`.
        batches: The training images; a batch is `recipe.batch_size` images a process.
        recipe: Length, optimizer and learning rate.
        seed: Of the order of the images and of any randomness inside the networks.
        on: Where it computes; the CPU.
        validate: Figures of a network as it is now, `accuracy` and `nll`. Without it the last
            weights count as the best.
        validation_images: Number of images that `validate` looks at; None where nobody knows. Many
            of them make validations rarer where epochs are short.
        saved: What an earlier call last gave to `save`, to go on from.
        save: Called now and then, and after the last step, with arrays and a JSON-compatible rest.
        stopping: Asked after each step whether to stop there. The training is saved first.
        log: Where the mean terms and the figures of each round go.
        show: Called after each step.

    Returns:
        The last state; `best` are the weights with the best validation figure, of equal ones the
        latest. The student itself is left with its last weights.

    Raises:
        UserError: If a loss term is not finite.
        KeyboardInterrupt: If it was stopped before its end; it was saved.
    """
    loop = steps.prepare(objective, batches, recipe, on or engine.make(), validation_images)
    state = loop.restored(saved) if saved else TrainingState()
    meter, watch, saving = Meter(state.meter), FiniteGuard(), SavePolicy(loop.on, stopping)
    objective.train()
    with torch.random.fork_rng(), closing(loop.stream(batches, seed, state)) as stream:
        for step, parts in stream:
            terms = loop.update(step, parts, seed)
            watch.check(step, terms, parts, loop.rate)
            meter.add(terms, sum(len(part) for part in parts))
            state = replace(state, step=step + 1, epoch=(step + 1) // loop.per_epoch)
            if show:
                show(step + 1, **meter.now(), **_best_figure(state, recipe))
            round_over = loop.ends_round(step + 1)
            if round_over:
                watch.flush()
                state = _end_round(loop, state, meter, validate, log)
                meter = Meter()
                objective.train()  # whatever the validation left it in
            over, decision = loop.is_over(state), saving.decide(round_over=round_over)
            if save and (over or decision.save):
                watch.flush()
                began = time.monotonic()
                save(loop.packed(replace(state, meter=meter.sums())))
                saving.saved(time.monotonic() - began)
            if over:
                break
            if decision.stop:
                raise KeyboardInterrupt
    loop.finish()
    return state


def _end_round(
    loop: Trainer,
    state: TrainingState,
    meter: Meter,
    validate: Callable[[nn.Module], Figures] | None,
    log: Metrics | None,
) -> TrainingState:
    state = replace(state, epoch=math.ceil(state.step / loop.per_epoch))
    network = loop.judged
    figures = validate(network) if validate else None
    recipe = loop.recipe
    options = {"metric": recipe.metric, "keep": recipe.average_best}
    state = checkpoint.after_validation(state, network, figures, **options)
    means = meter.means(loop.on)
    if log:
        known = {f"validation_{name}": value for name, value in (figures or {}).items()}
        log.write(state.step, epoch=state.epoch, lr=loop.rate, **means, **known)
    return state


def _best_figure(state: TrainingState, recipe: Recipe) -> dict[str, float]:
    figures = state.kept[0].figures if state.kept else {}
    return {f"best_{recipe.metric}": figures[recipe.metric]} if figures else {}
