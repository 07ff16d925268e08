"""Kernel Inducing Points: a support set learned by gradient descent through ridge regression.

Each step draws a class-balanced batch of targets (x_t, y_t) from the training images, predicts it
by kernel ridge regression from the support (x_s, y_s), and lowers an outer loss of the prediction
p, over x_s and with `learn_labels` over y_s too:

    p = k_ts (k_ss + ridge * mean(diag k_ss) I)^-1 y_s
    loss = 1/2 mean (p - y_t)²    or    the cross-entropy of softmax(a p), see `outer_loss`

Source: Nguyen, Chen and Lee (2021), arXiv:2011.00050, algorithm 1; Nguyen, Novak, Xiao and Lee
(2021), arXiv:2107.13034, for label learning and augmentation. Deviation: kernels of the targets
are float32 and the solution is float64, while the authors' code is float64 throughout; the tests
compare both.
"""

import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation.held_out import Predict
from dsdistill.kernels import diagnosis, features, gram
from dsdistill.kernels.networks import InfiniteNetwork
from dsdistill.methods import preprocessing, ridge
from dsdistill.methods.adam import Adam
from dsdistill.methods.augment import add_flips, augment_images
from dsdistill.methods.initial_support import Support
from dsdistill.methods.network_sources import NetworkSource
from dsdistill.methods.optimizer import Optimizer, StepProblem
from dsdistill.methods.outer_loss import OuterLoss, SquaredError
from dsdistill.methods.preprocessing import ArrayPreprocess
from dsdistill.methods.targets import TargetBatches, load_into_memory
from dsdistill.parallel import devices

Targets = tuple[np.ndarray, np.ndarray]  # images and labels of a batch
# From the state of the networks, the step's key for them, x_s and x_t to k_ss and k_st.
KernelMatrices = Callable[[Any, PRNGKeyArray, Array, Array], tuple[Array, Array]]
NETWORK_KEY = 16  # of a step's key, for its networks; augmentation has the smaller numbers


class State(NamedTuple):
    """State of an optimisation.

    Attributes:
        images, labels: The support.
        moments: The optimiser's state.
        networks: State of the objective's `source` of networks; () without one.
    """

    images: Float[Array, "n h w c"]
    labels: Float[Array, "n k"]
    moments: Any
    networks: Any = ()


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
        optimizer: How a step moves the support.
        cosine_steps: Number of steps over which the learning rates fall to 0 along a cosine; None:
            constant rates.
        learn_labels: Whether labels are learned too.
        augment: Random transforms of the targets, names of `dsdistill.methods.augment`.
        outer: The loss of the predictions.
        source: Where each step takes its networks from, for the features of a finite network.
        flips: Whether the mirror images of the support count as further images.
        augment_raw: Whether `augment` changes raw images, which are preprocessed in the step; else
            preprocessed ones, as in runs of earlier versions.
    """

    networks: tuple[InfiniteNetwork, ...]
    ridge: float = 1e-2
    optimizer: Optimizer = field(default_factory=Adam)
    cosine_steps: int | None = None
    learn_labels: bool = False
    augment: tuple[str, ...] = ()
    outer: OuterLoss = field(default_factory=SquaredError)
    source: NetworkSource | None = None
    flips: bool = False
    augment_raw: bool = True

    def initial_state(self, support: Support) -> State:
        """The state before the first step."""
        return self.restart(jnp.asarray(support.images), jnp.asarray(support.labels))

    def restart(self, images: Float[Array, "n h w c"], labels: Float[Array, "n k"]) -> State:
        """The state with these images and labels; optimizer, schedule and networks start afresh."""
        learned, source = _learned_arrays(self, images, labels), self.source
        shape, classes = images.shape[1:], labels.shape[1]
        networks = () if source is None else source.initial_state(shape, classes)
        return State(images, labels, self.optimizer.initial_state(learned), networks)

    def load_targets(self, train: Examples) -> Examples:
        """Images that targets are drawn from: preprocessed at once if steps augment no raw ones."""
        return train if _augments_raw(self, train) else load_into_memory(train)

    def stepper(self, support: Support, train: Examples, target_batch: int, seed: int) -> "Stepper":
        """Compiled steps, see `Stepper`."""
        return Stepper(self, support, train, target_batch, seed)

    def fit(
        self,
        images: Float[np.ndarray, "n h w c"],
        labels: Float[np.ndarray, "n k"],
        unit: str | None = None,
    ) -> Predict:
        """Fit ridge regression to a support, with the first of the kernels.

        Args:
            images, labels: The support.
            unit: Name of the images in the progress bar of a long prediction; None shows no bar.

        Raises:
            UserError: If the kernel is singular at this ridge, or does not fit into memory.
        """
        network, flips = self.networks[0], self.flips
        return ridge.fit(network, images, labels, self.ridge, flips=flips, unit=unit)

    def check_memory(self, support: Support, train: Examples, targets: int) -> None:
        """Refuse targets of a step that cannot fit into memory, before any computation.

        Raises:
            UserError: If they cannot; the message states what they need.
        """
        size = TargetBatches(train, targets, 0).size
        self.optimizer.check_memory(support.images, size)

    def divergence_error(self, what: str) -> UserError:
        """The error that ends a diverged run, with the options to change."""
        remedy = self.optimizer.remedy(learn_labels=self.learn_labels)
        return UserError(f"{what}: raise --ridge (now {self.ridge:g}) or {remedy}")


def _augments_raw(objective: KipObjective, train: Examples) -> bool:
    return bool(objective.augment) and objective.augment_raw and not train.is_preprocessed


class Stepper:
    """Compiled steps of one objective on target batches of one size; a context manager.

    The same seed gives the same support, bit for bit on one machine, however often the run is
    stopped and continued: targets and network of a step depend on the seed and the step alone,
    the learning rates on the steps that the optimizer's state has seen.

    Args:
        objective: What is minimised.
        support: Which pixels stay, and how many images there are.
        train: Targets are drawn from these.
        target_batch: Targets per step, the same number of every class as far as a class has them.
        seed: Seed of the target batches, their augmentation and the choice among networks.
    """

    def __init__(
        self,
        objective: KipObjective,
        support: Support,
        train: Examples,
        target_batch: int,
        seed: int,
    ) -> None:
        objective.check_memory(support, train, target_batch)
        self._objective, self._seed = objective, seed
        raw, self._preprocess = _augments_raw(objective, train), None
        self._seen = train.preprocess.apply if raw else lambda images: images
        if raw:
            self._preprocess = devices.replicate(preprocessing.from_fitted(train.preprocess))
        self._batches = TargetBatches(objective.load_targets(train), target_batch, seed, raw=raw)
        size = self._batches.size
        self._updates = [
            _compile_update(objective, network, support, size) for network in objective.networks
        ]
        n = _support_size(objective, support)
        self._pairs = n * (n + size)
        self._worker = ThreadPoolExecutor(1)
        self._upcoming: tuple[int, Future[Targets]] | None = None
        self._began = 0.0  # a step takes from its draw to its loss

    def __enter__(self) -> "Stepper":
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.shutdown()

    def draw(self, step: int) -> Targets:
        """Targets, raw if the step will augment raw ones, and their labels, counted from 0.

        Those of the next step are gathered meanwhile.
        """
        self._began = time.monotonic()
        if self._upcoming is None or self._upcoming[0] != step:
            self._upcoming = step, self._worker.submit(self._batches.draw, step)
        targets = self._upcoming[1].result()
        self._upcoming = step + 1, self._worker.submit(self._batches.draw, step + 1)
        return targets

    def step(self, state: State, targets: Targets, step: int) -> Step:
        """One step from a state.

        Args:
            state: After the step before.
            targets: Those that `draw` gives for the step.
            step: Its number, counted from 0.

        Raises:
            UserError: If the loss or the support is not finite.
        """
        network = _draw_network(len(self._updates), self._seed, step)
        with jax.enable_x64(True):
            key = jax.random.fold_in(jax.random.key(self._seed), step)
            after, loss = self._updates[network](state, *targets, key, self._preprocess)
            loss = float(loss)
        if not np.isfinite(loss):
            images = np.asarray(state.images)
            culprit = self._objective.networks[network]
            why = diagnosis.explain_not_finite(culprit, images, self._seen(targets[0]))
            what = f"the loss is not finite at step {step}, {why}"
            raise self._objective.divergence_error(what)
        return Step(step + 1, after, loss, network, self._pairs, time.monotonic() - self._began)


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
    """Bare steps of KIP, one for each item taken, without validation.

    Args:
        objective, support, train, target_batch, seed: As for `Stepper`.
        steps: Number of steps in all.
        state, done: Continue after `done` steps from this state.

    Raises:
        UserError: If the loss or the support is not finite; the state of the previous step is the
            last good one.
    """
    with Stepper(objective, support, train, target_batch, seed) as stepper:
        # Placed as every later state will be: otherwise the second step would compile again.
        current = devices.replicate(state or objective.initial_state(support))
        for number in range(done, steps):
            step = stepper.step(current, stepper.draw(number), number)
            current = step.state
            yield step


def _draw_network(networks: int, seed: int, step: int) -> int:
    """Draw the position of a step's network."""
    return int(np.random.default_rng([seed, 3, step]).integers(networks))


def _compile_update(
    objective: KipObjective, network: InfiniteNetwork, support: Support, targets: int
) -> Callable[..., Any]:
    n, (h, w, c) = _support_size(objective, support), support.images.shape[1:]
    matrices = kernel_matrices(objective, network, n, (h, w, c), targets)
    source = objective.source

    def share(
        at: tuple[State, PRNGKeyArray, ArrayPreprocess | None],
        real: Array,
        x_t: Array,
        y_t: Array,
    ) -> tuple[Array, Any, Any, Any]:
        """The step as one device computes it from its targets; results agree on all devices."""
        state, key, preprocess = at
        network_key = jax.random.fold_in(key, NETWORK_KEY)
        if preprocess is not None:  # targets are raw
            x_t = preprocessing.preprocess(x_t, preprocess)
        whole = {"images": state.images, "labels": state.labels}
        learned = _learned_arrays(objective, **whole)
        # Before the update: 1 at the first step.
        factor = schedule_factor(objective, state.moments.count)

        def loss(learned: dict[str, Array]) -> Array:
            x_s, y_s = _augment_support(objective, whole | learned)
            k_ss, k_st = matrices(state.networks, network_key, x_s, x_t)
            predictions = ridge.predict(k_st, ridge.solve(k_ss, y_s, objective.ridge))
            return objective.outer.value(predictions, y_t, real / targets, devices.total)

        problem = StepProblem(
            network,
            objective.ridge,
            whole,
            learned,
            jnp.asarray(support.frozen),
            x_t,
            y_t,
            real / targets,
            targets,
            loss,
            objective.outer,
        )
        value, moved, moments = objective.optimizer.step(problem, state.moments, factor, key)
        networks = state.networks
        if source is not None:
            after = _augment_support(objective, whole | moved)
            networks = source.train(networks, network_key, *after)
        return value, moved, moments, networks

    def update(
        state: State,
        x_t: Array,
        y_t: Array,
        key: PRNGKeyArray,
        preprocess: ArrayPreprocess | None,
    ) -> tuple[State, Array]:
        x_t = x_t if preprocess is None else preprocessing.unit_range(x_t)
        x_t = augment_images(x_t, key, objective.augment)
        sharded = devices.shard_targets(share)
        at = state, key, preprocess
        value, moved, moments, networks = sharded(at, targets, x_t, y_t)
        # A finite loss can have a gradient that is not finite: detected here, the previous state
        # is still good.
        numbers = jax.tree.leaves((moved, moments, networks))
        finite = [jnp.isfinite(leaf).all() for leaf in numbers]
        value = jnp.where(jnp.stack(finite).all(), value, jnp.nan)
        labels = moved.get("labels", state.labels)
        return State(moved["images"], labels, moments, networks), value

    return jax.jit(update)


def kernel_matrices(
    objective: KipObjective,
    network: InfiniteNetwork,
    count: int,
    shape: tuple[int, int, int],
    targets: int,
) -> KernelMatrices:
    """How a step evaluates the kernel of the support with itself and with a device's targets.

    Args:
        objective: The objective, whose source of networks or tiles are used.
        network: One of its networks.
        count: Number of images that predict the targets.
        shape: Height, width and channels of an image.
        targets: Targets per step, on all devices.
    """
    source = objective.source
    if source is not None:

        def with_drawn_networks(
            state: Any, key: PRNGKeyArray, x_s: Array, x_t: Array
        ) -> tuple[Array, Array]:
            drawn = source.draw(state, key, x_s.shape[-1])
            return features.support_and_target_kernels(source.network, drawn, x_s, x_t)

        return with_drawn_networks
    gradient = objective.optimizer.differentiates_kernel
    tile_ss = ridge.support_tile(network, count, shape, gradient=gradient)
    tile_st = gram.plan_tile(network, count, devices.share(targets), shape, gradient=gradient)

    def in_tiles(_: Any, __: PRNGKeyArray, x_s: Array, x_t: Array) -> tuple[Array, Array]:
        k_ss = ridge.support_gram(network, x_s, tile_ss)
        return k_ss, gram.gram(network.kernel, x_s, x_t, tile_st)

    return in_tiles


def _support_size(objective: KipObjective, support: Support) -> int:
    """Number of images that predict the targets."""
    return len(support.images) * (2 if objective.flips else 1)


def _augment_support(objective: KipObjective, arrays: dict[str, Array]) -> tuple[Array, Array]:
    """Images and labels that predict the targets: the support, perhaps with its mirror images."""
    images, labels = arrays["images"], arrays["labels"]
    return add_flips(images, labels) if objective.flips else (images, labels)


def _learned_arrays(objective: KipObjective, images: Array, labels: Array) -> dict[str, Array]:
    return {"images": images} | ({"labels": labels} if objective.learn_labels else {})


def schedule_factor(objective: KipObjective, step: Array) -> Array:
    """Factor of the schedule on the learning rates, float32 even where JAX is in float64 mode."""
    if objective.cosine_steps is None:
        return jnp.float32(1)
    schedule = optax.cosine_decay_schedule(1.0, objective.cosine_steps)
    return jnp.asarray(schedule(step), jnp.float32)
