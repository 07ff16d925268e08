"""Kernel Inducing Points: a support set learned by gradient descent through ridge regression.

Each step draws a class-balanced batch of targets (x_t, y_t) from the training images, predicts it
by kernel ridge regression from the support (x_s, y_s), and moves x_s, and y_s if asked, down the
gradient of half the mean squared error with Adam:

    loss = 1/2 mean (k_ts (k_ss + ridge * mean(diag k_ss) I)^-1 y_s - y_t)²

Source: Nguyen, Chen and Lee (2021), arXiv:2011.00050, algorithm 1; Nguyen, Novak, Xiao and Lee
(2021), arXiv:2107.13034, for label learning and augmentation. Deviation: kernels of the targets
are float32 and the solve float64, where the authors' code is float64 throughout; the test suite
compares both.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from dsdistill import ridge
from dsdistill.harness import memory
from dsdistill.harness.errors import UserError
from dsdistill.harness.labeled import Examples, Labeled, centred_one_hot, per_class
from dsdistill.kernels import gram
from dsdistill.kernels.networks import Network

RESIDENT = 0.25  # share of the free memory that the preprocessed training images may take


class State(NamedTuple):
    """What a step changes: the support, its labels, and Adam's moments."""

    images: Float[Array, "n h w c"]
    labels: Float[Array, "n k"]
    moments: optax.OptState


class Step(NamedTuple):
    """One item of `distill`: steps done, the state after them, the loss before the last of them."""

    done: int
    state: State
    loss: float


@dataclass(frozen=True)
class Objective:
    """What KIP minimises, and how it steps.

    Attributes:
        network: Whose neural tangent kernel.
        ridge: Relative to the mean of diag(k_ss).
        learning_rate: Adam's.
        learn_labels: Whether the gradient also moves the labels.
        augment: Whether targets are flipped and shifted at random.
    """

    network: Network
    ridge: float = 1e-6
    learning_rate: float = 0.04
    learn_labels: bool = False
    augment: bool = False


@dataclass(frozen=True, eq=False)
class Support:
    """Where the optimisation starts.

    Attributes:
        images, labels: Preprocessed images and centred one-hot labels, class by class.
        frozen: Pixels that are never learned (`--corruption`).
    """

    images: Float[np.ndarray, "n h w c"]
    labels: Float[np.ndarray, "n k"]
    frozen: Bool[np.ndarray, "n h w 1"]


def initial_support(
    train: Examples, images_per_class: int, *, noise: bool, corruption: float, seed: int
) -> Support:
    """Class-balanced real images, or unit Gaussian noise, partly replaced by frozen noise.

    Args:
        train: Drawn from without replacement.
        images_per_class: Exactly so many of every class, in class order.
        noise: Start from noise instead of real images.
        corruption: Fraction of the pixels of each image kept as noise for good, in [0, 1].
        seed: Of the draw and of the noise.
    """
    rng = np.random.default_rng([seed, 0])
    rows = per_class(train.data, images_per_class, rng)
    real = train.images(rows)
    noisy = rng.standard_normal(real.shape, np.float32)
    frozen = rng.random((*real.shape[:3], 1)) < corruption
    images = noisy if noise else np.where(frozen, noisy, real)
    labels = centred_one_hot(train.data.labels[rows], len(train.data.classes))
    return Support(images, labels, frozen)


def initial_state(objective: Objective, support: Support) -> State:
    """The state before the first step."""
    images, labels = jnp.asarray(support.images), jnp.asarray(support.labels)
    moments = _optimiser(objective).init(_learned(objective, images, labels))
    return State(images, labels, moments)


def distill(
    objective: Objective,
    support: Support,
    train: Examples,
    *,
    steps: int,
    target_batch: int,
    seed: int,
    state: State | None = None,
    done: int = 0,
) -> Iterator[Step]:
    """Run KIP, one step for each item taken.

    The same seed gives the same support, bit for bit on one machine, however often the run is
    stopped and continued: the targets of a step depend on the seed and the step alone.

    Args:
        objective: What is minimised.
        support: Where it starts, and which pixels stay.
        train: Targets are drawn from these.
        steps: In all.
        target_batch: Targets a step, the same number of every class as far as a class has them.
        seed: Of the target batches and their augmentation.
        state, done: Continue after `done` steps from this state.

    Raises:
        UserError: If the loss is not finite; the state of the step before is the last good one.
    """
    batches = _Batches(resident(train), target_batch, seed)
    current = state or initial_state(objective, support)
    update = _compiled_update(objective, support, batches.size)
    with ThreadPoolExecutor(1) as worker:  # the next batch is gathered while a step runs
        upcoming = worker.submit(batches.draw, done)
        for step in range(done, steps):
            targets = upcoming.result()
            upcoming = worker.submit(batches.draw, step + 1)
            with jax.enable_x64(True):
                key = jax.random.fold_in(jax.random.key(seed), step)
                current, loss = update(current, *targets, key)
                loss = float(loss)
            if not np.isfinite(loss):
                raise UserError(
                    f"the loss is not finite at step {step}: raise --ridge (now "
                    f"{objective.ridge:g}) or lower --learning-rate "
                    f"(now {objective.learning_rate:g})"
                )
            yield Step(step + 1, current, loss)


def resident(examples: Examples) -> Examples:
    """The examples preprocessed once and kept, if they fit into a share of the free memory."""
    h, w, c = examples.data.shape
    if examples.ready or 4 * len(examples) * h * w * c > RESIDENT * memory.available():
        return examples
    images = np.empty((len(examples), h, w, c), np.float32)
    for start in range(0, len(images), 4096):
        rows = slice(start, start + 4096)
        images[rows] = examples.images(rows)
    data = Labeled(images, examples.data.labels, examples.data.classes)
    return Examples(data, examples.preprocess, examples.targets, ready=True)


class _Batches:
    """Class-balanced target batches; the batch of a step is a function of seed and step."""

    def __init__(self, train: Examples, size: int, seed: int) -> None:
        labels = train.data.labels
        share = max(size // len(train.data.classes), 1)
        self._members = [np.flatnonzero(labels == c) for c in range(len(train.data.classes))]
        self._share = [min(share, len(members)) for members in self._members]
        self._train, self._seed = train, seed
        self.size = sum(self._share)

    def draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of one step, without replacement within it."""
        rng = np.random.default_rng([self._seed, 1, step])
        drawn = (
            rng.choice(m, s, replace=False) for m, s in zip(self._members, self._share, strict=True)
        )
        rows = np.concatenate(list(drawn))
        return self._train.images(rows), self._train.labels(rows)


def _compiled_update(objective: Objective, support: Support, targets: int) -> Callable[..., Any]:
    n, shape = len(support.images), support.images.shape[1:]
    network = objective.network
    tile_ss = ridge.support_tile(network, n, shape, gradient=True)
    tile_st = gram.plan(network, n, targets, shape, gradient=True)
    free = jnp.asarray(~support.frozen)

    def update(state: State, x_t: Array, y_t: Array, key: PRNGKeyArray) -> tuple[State, Array]:
        x_t = augmented(x_t, key) if objective.augment else x_t

        def loss(learned: dict[str, Array]) -> Array:
            x_s, y_s = learned["images"], learned.get("labels", state.labels)
            k_ss = ridge.support_gram(network, x_s, tile_ss)
            k_st = gram.gram(network.kernel, x_s, x_t, tile_st)
            return ridge.loss(k_ss, k_st, y_s, y_t, objective.ridge)

        learned = _learned(objective, state.images, state.labels)
        value, gradient = jax.value_and_grad(loss)(learned)
        gradient["images"] = gradient["images"] * free
        change, moments = _optimiser(objective).update(gradient, state.moments)
        moved: Any = optax.apply_updates(learned, change)
        return State(moved["images"], moved.get("labels", state.labels), moments), value

    return jax.jit(update)


def _learned(objective: Objective, images: Array, labels: Array) -> dict[str, Array]:
    return {"images": images} | ({"labels": labels} if objective.learn_labels else {})


def _optimiser(objective: Objective) -> optax.GradientTransformation:
    return optax.adam(objective.learning_rate)


def augmented(images: Float[Array, "m h w c"], key: PRNGKeyArray) -> Float[Array, "m h w c"]:
    """Each image flipped left to right with probability 1/2 and shifted by up to an eighth.

    Pixels that a shift brings in repeat the edge.
    """
    m, h, w, _ = images.shape
    flip_key, *shift_keys = jax.random.split(key, 3)
    flipped = jnp.where(
        jax.random.bernoulli(flip_key, 0.5, (m, 1, 1, 1)), images[:, :, ::-1], images
    )
    for axis, (size, shift_key) in enumerate(zip((h, w), shift_keys, strict=True)):
        reach = size // 8
        shift = jax.random.randint(shift_key, (m, 1), -reach, reach + 1)
        index = jnp.clip(jnp.arange(size) + shift, 0, size - 1)  # (m, size)
        index = jnp.expand_dims(index, (2, 3) if axis == 0 else (1, 3))
        flipped = jnp.take_along_axis(flipped, index, axis=axis + 1)
    return flipped
