"""One plain loop over an objective: steps, rounds, validation, checkpoints.

A round is an epoch; where epochs are shorter than a hundred steps, as on a distilled set, it is a
fifth of the training. After a round the student is validated and the training is saved; in long
rounds it is saved every few minutes too.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from dsdistill.harness.progress import Show
from dsdistill.harness.runs import Metrics
from kd import checkpoint, engine, steps
from kd.checkpoint import Saved, State
from kd.data import Batches
from kd.engine import Engine
from kd.meter import Meter, Watch
from kd.objectives import Objective
from kd.recipe import Recipe
from kd.steps import Loop

SAVE_EVERY = 300.0  # seconds
Figures = Mapping[str, float]


def train(
    objective: Objective,
    batches: Batches,
    recipe: Recipe,
    seed: int,
    *,
    on: Engine | None = None,
    validate: Callable[[nn.Module], Figures] | None = None,
    saved: Saved | None = None,
    save: Callable[[Saved], None] | None = None,
    log: Metrics | None = None,
    show: Show | None = None,
) -> State:
    """Minimise the sum of the objective's terms; the same seed gives the same student.

    Args:
        objective: Called with a batch, returns named loss terms; has a `student` with a `network`.
        batches: The training images; a batch is `recipe.batch_size` images a process.
        recipe: Length, optimizer and learning rate.
        seed: Of the order of the images and of any randomness inside the networks.
        on: Where it computes; the CPU.
        validate: Figures of a network as it is now, `accuracy` and `nll`. Without it the last
            weights count as the best.
        saved: What an earlier call last gave to `save`, to go on from.
        save: Called after each round, and every few minutes, with arrays and a JSON-compatible
            rest.
        log: Where the mean terms and the figures of each round go.
        show: Called after each step.

    Returns:
        The last state; `best` are the weights with the best validation figure, of equal ones the
        latest. The student itself is left with its last weights.

    Raises:
        UserError: If a loss term is not finite.
    """
    loop = steps.made(objective, batches, recipe, on or engine.make())
    state = loop.restored(saved) if saved else State()
    meter, watch, saved_at = Meter(state.meter), Watch(), time.monotonic()
    objective.train()
    with torch.random.fork_rng():
        for step, parts in loop.stream(batches, seed, state.step):
            terms = loop.update(step, parts, seed)
            watch.check(step, terms, parts, loop.rate)
            meter.add(terms, sum(len(part) for part in parts))
            state = replace(state, step=step + 1, epoch=(step + 1) // loop.per_epoch)
            if show:
                show(step + 1, **meter.now(), **_best(state, recipe))
            if loop.ends_round(step + 1):
                watch.flush()
                state = _round(loop, state, meter, validate, log)
                meter = Meter()
                objective.train()  # whatever the validation left it in
            elif save is None or not loop.agreed(time.monotonic() - saved_at > SAVE_EVERY):
                continue
            watch.flush()
            if save:
                save(loop.packed(replace(state, meter=meter.sums())))
            saved_at = time.monotonic()
    loop.finish()
    return state


def _round(
    loop: Loop,
    state: State,
    meter: Meter,
    validate: Callable[[nn.Module], Figures] | None,
    log: Metrics | None,
) -> State:
    state = replace(state, epoch=math.ceil(state.step / loop.per_epoch))
    network = loop.judged
    figures = validate(network) if validate else None
    recipe = loop.recipe
    options = {"metric": recipe.metric, "keep": recipe.average_best}
    state = checkpoint.with_round(state, network, figures, **options)
    means = meter.means(loop.on)
    if log:
        known = {f"validation_{name}": value for name, value in (figures or {}).items()}
        log.write(state.step, epoch=state.epoch, lr=loop.rate, **means, **known)
    return state


def _best(state: State, recipe: Recipe) -> dict[str, float]:
    figures = state.kept[0].figures if state.kept else {}
    return {f"best_{recipe.metric}": figures[recipe.metric]} if figures else {}
