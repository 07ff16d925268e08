"""Kernel Inducing Points: a support set learned by gradient descent through ridge regression.

Each step draws a class-balanced batch of targets (x_t, y_t) from the training images, predicts it
by kernel ridge regression from the support (x_s, y_s), and lowers half the mean squared error with
Adam, over x_s and with `learn_labels` over y_s too:

    loss = 1/2 mean (k_ts (k_ss + ridge * mean(diag k_ss) I)^-1 y_s - y_t)²

Source: Nguyen, Chen and Lee (2021), arXiv:2011.00050, algorithm 1; Nguyen, Novak, Xiao and Lee
(2021), arXiv:2107.13034, for label learning and augmentation. Deviation: kernels of the targets
are float32 and the solution is float64, while the authors' code is float64 throughout; the tests
compare both.
"""

import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.errors import UserError
from dsdistill.kernels import diagnosis, gram
from dsdistill.kernels.networks import InfiniteNetwork
from dsdistill.methods import gauss_newton, ridge
from dsdistill.methods.augment import augment_images
from dsdistill.methods.initial_support import Support
from dsdistill.methods.targets import TargetBatches, load_into_memory
from dsdistill.parallel import devices

ADAM = optax.scale_by_adam()  # the learning rates are applied afterwards, see `_adam_step`


class State(NamedTuple):
    """State of an optimisation: images and labels of the support, and the optimiser's state."""

    images: Float[Array, "n h w c"]
    labels: Float[Array, "n k"]
    moments: Any


class Step(NamedTuple):
    """One item of `distill`.

    Attributes:
        done: Number of steps so far, this one included.
        state: State after the step.
        loss: Loss before the step.
        network: Position of the step's network among those of the objective.
        pairs: Number of pairs of images whose kernel was evaluated.
        seconds: Duration; that of each network's first step includes the compilation.
    """

    done: int
    state: State
    loss: float
    network: int
    pairs: int
    seconds: float


@dataclass(frozen=True)
class KipObjective:
    """The loss of KIP and how it is minimised.

    Attributes:
        networks: Networks whose neural tangent kernels are used; each step draws one of them.
        ridge: Ridge, relative to the mean of diag(k_ss).
        optimizer: `adam` or `gauss-newton`, see `dsdistill.methods.gauss_newton`.
        learning_rate: Adam's learning rate, or the fraction of a Gauss-Newton step that is taken.
        label_learning_rate: Adam's learning rate of the labels, whose scale differs; None: that of
            the images.
        damping: Damping of a Gauss-Newton step, relative to the mean curvature.
        cosine_steps: Number of steps over which both rates fall to 0 along a cosine; None: constant
            rates.
        learn_labels: Whether labels are learned too.
        augment: Random transforms of the targets, names of `dsdistill.methods.augment`.
    """

    networks: tuple[InfiniteNetwork, ...]
    ridge: float = 1e-6
    optimizer: str = "adam"
    learning_rate: float = 0.04
    label_learning_rate: float | None = None
    damping: float = 0.01
    cosine_steps: int | None = None
    learn_labels: bool = False
    augment: tuple[str, ...] = ()


def initial_state(objective: KipObjective, support: Support) -> State:
    """The state before the first step."""
    return restart(objective, jnp.asarray(support.images), jnp.asarray(support.labels))


def restart(
    objective: KipObjective, images: Float[Array, "n h w c"], labels: Float[Array, "n k"]
) -> State:
    """The state with these images and labels, and with the optimiser and its schedule reset."""
    learned = _learned_arrays(objective, images, labels)
    first = ADAM.init if objective.optimizer == "adam" else gauss_newton.initial_state
    return State(images, labels, first(learned))


def distill(
    objective: KipObjective,
    support: Support,
    train: Examples,
    *,
    steps: int,
    target_batch: int,
    seed: int,
    state: State | None = None,
    done: int = 0,
) -> Generator[Step, None, None]:
    """Run KIP as a generator: one step for each item that is taken.

    The same seed gives the same support, bit for bit on one machine, however often the run is
    stopped and continued: targets and network of a step depend only on the seed and the step, the
    learning rates on the number of steps in the optimiser's state.

    Args:
        objective: The loss and the optimiser.
        support: Initial images and labels, and the pixels that are never learned.
        train: Images from which targets are drawn.
        steps: Total number of steps.
        target_batch: Targets per step, equally many of each class that has enough images.
        seed: Seed of the target batches, their augmentation and the choice among networks.
        state, done: State after `done` steps, to continue from.

    Raises:
        UserError: If the loss or the support is not finite; the state of the previous step is the
            last good one.
    """
    check_memory(objective, support, train, target_batch)
    batches = TargetBatches(load_into_memory(train), target_batch, seed)
    # Placed as every later state will be: otherwise the second step would compile again.
    current = devices.replicate(state or initial_state(objective, support))
    updates = [
        _compile_update(objective, network, support, batches.size) for network in objective.networks
    ]
    pairs = len(support.images) * (len(support.images) + batches.size)
    with ThreadPoolExecutor(1) as worker:  # gathers the next batch while a step runs
        upcoming = worker.submit(batches.draw, done)
        for step in range(done, steps):
            began = time.monotonic()
            targets = upcoming.result()
            upcoming = worker.submit(batches.draw, step + 1)
            network = _draw_network(len(updates), seed, step)
            with jax.enable_x64(True):
                key = jax.random.fold_in(jax.random.key(seed), step)
                before = current
                current, loss = updates[network](current, *targets, key)
                loss = float(loss)
            if not np.isfinite(loss):
                images = np.asarray(before.images)
                why = diagnosis.explain_not_finite(objective.networks[network], images, targets[0])
                raise divergence_error(objective, f"the loss is not finite at step {step}, {why}")
            yield Step(step + 1, current, loss, network, pairs, time.monotonic() - began)


def check_memory(objective: KipObjective, support: Support, train: Examples, targets: int) -> None:
    """Refuse a number of targets per step that cannot fit into memory, before any computation.

    Raises:
        UserError: If it cannot fit; the message states what it needs.
    """
    if objective.optimizer == "gauss-newton":
        gauss_newton.check_memory(support.images, TargetBatches(train, targets, 0).size)


def divergence_error(objective: KipObjective, what: str) -> UserError:
    """The error that ends a diverged run, with the options to change."""
    if objective.optimizer == "gauss-newton":
        return UserError(
            f"{what}: raise --ridge (now {objective.ridge:g}) or --damping "
            f"(now {objective.damping:g})"
        )
    rates = f"--learning-rate (now {objective.learning_rate:g})"
    if objective.learn_labels and objective.label_learning_rate is not None:
        rates += f" or --label-learning-rate (now {objective.label_learning_rate:g})"
    return UserError(f"{what}: raise --ridge (now {objective.ridge:g}) or lower {rates}")


def _draw_network(networks: int, seed: int, step: int) -> int:
    """Draw the position of a step's network."""
    return int(np.random.default_rng([seed, 3, step]).integers(networks))


def _compile_update(
    objective: KipObjective, network: InfiniteNetwork, support: Support, targets: int
) -> Callable[..., Any]:
    newton = objective.optimizer == "gauss-newton"
    n, shape = len(support.images), support.images.shape[1:]
    tile_ss = ridge.support_tile(network, n, shape, gradient=not newton)
    tile_st = gram.plan_tile(network, n, devices.share(targets), shape, gradient=not newton)

    def share(
        at: tuple[State, PRNGKeyArray], real: Array, x_t: Array, y_t: Array
    ) -> tuple[Array, Any, Any]:
        """The step as one device computes it from its targets; results agree on all devices."""
        state, key = at
        whole = {"images": state.images, "labels": state.labels}
        learned = _learned_arrays(objective, **whole)
        factor = _factor(objective, state.moments.count)  # before the update: 1 at the first step

        def loss(learned: dict[str, Array]) -> Array:
            now = whole | learned
            x_s, y_s = now["images"], now["labels"]
            k_ss = ridge.support_gram(network, x_s, tile_ss)
            k_st = gram.gram(network.kernel, x_s, x_t, tile_st)
            return ridge.loss(k_ss, k_st, y_s, y_t, objective.ridge, real / targets)

        if newton:
            problem = gauss_newton.Problem(
                gauss_newton.require_slopes(network),
                objective.ridge,
                jnp.asarray(~support.frozen),
                x_t,
                y_t,
                real / targets,
                targets,
            )
            rate = objective.learning_rate * factor
            options = {"damping": objective.damping, "key": jax.random.fold_in(key, 1)}
            return gauss_newton.step(
                problem, whole, learned, state.moments, loss, rate=rate, **options
            )
        value, gradient = devices.total(jax.value_and_grad(loss)(learned))
        gradient["images"] = gradient["images"] * ~support.frozen
        return value, *_adam_step(objective, learned, gradient, state.moments, factor)

    def update(state: State, x_t: Array, y_t: Array, key: PRNGKeyArray) -> tuple[State, Array]:
        x_t = augment_images(x_t, key, objective.augment)
        value, moved, moments = devices.shard_targets(share)((state, key), targets, x_t, y_t)
        # A finite loss can have a gradient that is not finite: detected here, the previous state
        # is still good.
        finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((moved, moments))]
        value = jnp.where(jnp.stack(finite).all(), value, jnp.nan)
        return State(moved["images"], moved.get("labels", state.labels), moments), value

    return jax.jit(update)


def _learned_arrays(objective: KipObjective, images: Array, labels: Array) -> dict[str, Array]:
    return {"images": images} | ({"labels": labels} if objective.learn_labels else {})


def _adam_step(
    objective: KipObjective, learned: dict[str, Array], gradient: Any, moments: Any, factor: Array
) -> tuple[Any, Any]:
    """One step of Adam, with a learning rate of its own for images and for labels."""
    change: Any
    change, moments = ADAM.update(gradient, moments)
    rate = label_rate = objective.learning_rate
    if objective.label_learning_rate is not None:
        label_rate = objective.label_learning_rate
    rates = {"images": rate, "labels": label_rate}
    steps: Any = {name: -rates[name] * factor * change[name] for name in learned}
    return optax.apply_updates(learned, steps), moments


def _factor(objective: KipObjective, step: Array) -> Array:
    """Factor of the schedule on the learning rates, float32 even where JAX is in float64 mode."""
    if objective.cosine_steps is None:
        return jnp.float32(1)
    schedule = optax.cosine_decay_schedule(1.0, objective.cosine_steps)
    return jnp.asarray(schedule(step), jnp.float32)
