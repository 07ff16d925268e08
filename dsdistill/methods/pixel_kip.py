"""KIP through a backbone: the support is pixels, the regression is on features.

Each step draws views of the support's images, a pyramid in [0, 1], and class-balanced targets whose
features are at hand. With Z the features of a frozen network, centred as those of the training
images are, it lowers the outer loss of

    p = k(Z_t, Z_s) (k(Z_s, Z_s) + ridge * mean(diag k) I)^-1 y_s

over the pixels. JAX gives the loss and its gradient in Z_s; the backbone, a function of arrays,
takes that back to the views, and JAX to the pyramid.

Source: Nguyen, Chen and Lee (2021), arXiv:2011.00050, for KIP; that its closed form with
cross-entropy outside serves frozen backbones is arXiv:2605.07194. Views, pyramid and colours are
those of linear gradient matching, Cazenavette, Torralba and Sitzmann (2025), arXiv:2511.16674.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from dsdistill.harness.data.datasets import Splits
from dsdistill.harness.data.feature_file import Features
from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation.held_out import Predict
from dsdistill.kernels.networks import InfiniteNetwork
from dsdistill.methods import kip, preprocessing, pyramid, random_views, ridge
from dsdistill.methods.adam import Adam
from dsdistill.methods.initial_support import Support
from dsdistill.methods.kip import KipObjective, State, Step, Targets
from dsdistill.methods.optimizer import Optimizer
from dsdistill.methods.outer_loss import OuterLoss
from dsdistill.methods.targets import TargetBatches, load_into_memory
from dsdistill.parallel import devices

Pullback = Callable[[Float[np.ndarray, "n d"]], Float[np.ndarray, "n h w c"]]


class Encoder(Protocol):
    """A backbone as a function of arrays; images in [0, 1]."""

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the images that the backbone sees."""
        ...

    @property
    def width(self) -> int:
        """Number of values d of a feature."""
        ...

    @property
    def channels(self) -> int:
        """Channels of its images."""
        ...

    def record(self) -> dict[str, Any]:
        """All that the features depend on besides the images, JSON-compatible."""
        ...

    def extract(
        self, path: Path | None, splits: Splits, *, views: int, min_scale: float, seed: int
    ) -> Features:
        """Features of all images and of further views of the training images.

        They are kept in a file, or without a path in memory.
        """
        ...

    def __call__(self, images: Float[np.ndarray, "n h w c"], /) -> Float[np.ndarray, "n d"]:
        """Features of images of any size."""
        ...

    def with_pullback(
        self, images: Float[np.ndarray, "n h w c"]
    ) -> tuple[Float[np.ndarray, "n d"], Pullback]:
        """Features, and the function from a gradient in them to that in the images."""
        ...


class Pixels(NamedTuple):
    """What a step changes beside the labels: the pyramid, and Adam's moments of all that moves."""

    levels: pyramid.Levels
    moments: Any


@dataclass(frozen=True)
class PixelObjective:
    """The loss of KIP on features, minimised over pixels.

    Attributes:
        regression: Kernel, ridge, outer loss and schedule, on features.
        adam: Moves the pyramids, and labels.
        encoder: The backbone.
        preprocess: Preprocessing of features, fitted on those of the training images.
        views: Views of each image in a step.
        min_scale: Smallest part of an image's area in a view.
        hflip: Probability that a view is mirrored.
    """

    regression: KipObjective
    adam: Adam
    encoder: Encoder
    preprocess: Preprocess
    views: int = 3
    min_scale: float = 0.5
    hflip: float = 0.5

    def initial_state(self, support: Support) -> State:
        return self.restart(jnp.asarray(support.images), jnp.asarray(support.labels))

    def restart(self, images: Float[Array, "n h w c"], labels: Float[Array, "n k"]) -> State:
        levels = pyramid.of_images(images)
        moments = self.adam.initial_state(self.learned_arrays(levels, labels))
        return State(_render(levels), labels, Pixels(levels, moments))

    def stepper(
        self, support: Support, train: Examples, target_batch: int, seed: int
    ) -> "PixelStepper":
        return PixelStepper(self, support, train, target_batch, seed)

    def features(self, images: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n 1 1 d"]:
        """Preprocessed features of plain images, as images of one pixel."""
        return self.preprocess.apply(self.encoder(images)[:, None, None, :])

    def fit(
        self,
        images: Float[np.ndarray, "n h w c"],
        labels: Float[np.ndarray, "n k"],
        unit: str | None = None,
    ) -> Predict:
        """Fit ridge regression on the features of a support; it predicts from features."""
        return self.regression.fit(self.features(images), labels, unit)

    def fit_on_images(
        self, images: Float[np.ndarray, "n h w c"], labels: Float[np.ndarray, "n k"]
    ) -> Predict:
        """As `fit`, but it predicts from images in [0, 1]."""
        predict = self.fit(images, labels)
        return lambda others: predict(self.features(others))

    @property
    def networks(self) -> tuple[InfiniteNetwork, ...]:
        return self.regression.networks

    @property
    def optimizer(self) -> Optimizer:
        return self.adam

    @property
    def ridge(self) -> float:
        return self.regression.ridge

    @property
    def outer(self) -> OuterLoss:
        return self.regression.outer

    def load_targets(self, train: Examples) -> Examples:
        return load_into_memory(train)

    def check_memory(self, support: Support, train: Examples, targets: int) -> None:
        """Chunks of the backbone and tiles of the kernel fit."""

    def divergence_error(self, what: str) -> UserError:
        return self.regression.divergence_error(what)

    def learned_arrays(self, levels: pyramid.Levels, labels: Array) -> dict[str, Any]:
        learned = {"labels": labels} if self.regression.learn_labels else {}
        return {"images": levels, **learned}


class PixelStepper:
    """Compiled steps of one objective; a context manager, as `kip.Stepper` is.

    Args:
        objective: What is minimised.
        support: How many images there are.
        train: Features that targets are drawn from.
        target_batch: Targets per step.
        seed: Seed of targets and views.
    """

    def __init__(
        self,
        objective: PixelObjective,
        support: Support,
        train: Examples,
        target_batch: int,
        seed: int,
    ) -> None:
        self._objective, self._key = objective, jax.random.key(seed)
        self._batches = TargetBatches(objective.load_targets(train), target_batch, seed)
        fitted = devices.replicate(preprocessing.from_fitted(objective.preprocess))
        count = len(support.images) * objective.views
        width = math.prod(train.data.shape)
        program = _compile_loss(
            objective.regression, count, width, objective.views, self._batches.size
        )
        self._loss = functools.partial(program, fitted, self._key)
        self._draw_views = jax.jit(self._views)
        self._move = jax.jit(self._moved)
        self._began = 0.0

    def __enter__(self) -> "PixelStepper":
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is open."""

    def draw(self, step: int) -> Targets:
        """Features and labels of one step's targets, counted from 0."""
        self._began = time.monotonic()
        return self._batches.draw(step)

    def step(self, state: State, targets: Targets, step: int) -> Step:
        """One step from a state.

        Args:
            state: After the step before.
            targets: Those that `draw` gives for the step.
            step: Its number, counted from 0.

        Raises:
            UserError: If the loss or the support is not finite.
        """
        key = jax.random.fold_in(self._key, step)
        views = np.asarray(self._draw_views(state.moments.levels, key))
        rows, pullback = self._objective.encoder.with_pullback(views)
        with jax.enable_x64(True):
            loss, slopes = self._loss(rows, state.labels, *targets)
            loss, slopes = float(loss), jax.tree.map(np.asarray, slopes)
        after, finite = self._move(state, key, pullback(slopes.pop("features")), slopes)
        if not (np.isfinite(loss) and finite):
            raise self._objective.divergence_error(f"the loss is not finite at step {step}")
        pairs = len(rows) * (len(rows) + self._batches.size)
        return Step(step + 1, after, loss, 0, pairs, time.monotonic() - self._began)

    def _views(self, levels: pyramid.Levels, key: PRNGKeyArray) -> Float[Array, "m s s c"]:
        objective = self._objective
        return random_views.draw(
            key,
            pyramid.render(levels),
            objective.views,
            objective.encoder.input_size,
            min_scale=objective.min_scale,
            hflip=objective.hflip,
        )

    def _moved(
        self,
        state: State,
        key: PRNGKeyArray,
        view_slopes: Float[Array, "m s s c"],
        label_slopes: dict[str, Array],
    ) -> tuple[State, Array]:
        """The state after a step of Adam, and whether all of it is finite."""
        levels, moments = state.moments
        regression = self._objective.regression
        _, pullback = jax.vjp(lambda levels: self._views(levels, key), levels)
        gradient = {"images": pullback(view_slopes)[0], **label_slopes}
        learned = self._objective.learned_arrays(levels, state.labels)
        factor = kip.schedule_factor(regression, moments.count)
        moved, moments = self._objective.adam.move(learned, gradient, moments, factor)
        after = State(
            pyramid.render(moved["images"]),
            moved.get("labels", state.labels),
            Pixels(moved["images"], moments),
        )
        finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(after)]
        return after, jnp.stack(finite).all()


_render = jax.jit(pyramid.render)


def _compile_loss(
    objective: KipObjective, count: int, width: int, views: int, targets: int
) -> Callable[..., Any]:
    """The loss of a step and its gradient in the features of the views, and in learned labels.

    Args:
        objective: The loss.
        count, width: Number of views of all images, and of values of a feature.
        views: Views of each image.
        targets: Targets per step.
    """
    network = objective.networks[0]
    matrices = kip.kernel_matrices(objective, network, count, (1, 1, width), targets)

    def share(at: Any, real: Array, x_t: Array, y_t: Array) -> tuple[Array, Any]:
        fitted, key, rows, labels = at

        def loss(learned: dict[str, Array]) -> Array:
            z = preprocessing.preprocess(learned["features"][:, None, None, :], fitted)
            y = jnp.tile(learned["labels"] if objective.learn_labels else labels, (views, 1))
            k_ss, k_st = matrices((), key, z, x_t)
            predictions = ridge.predict(k_st, ridge.solve(k_ss, y, objective.ridge))
            return objective.outer.value(predictions, y_t, real / targets, devices.total)

        learned = {"features": rows} | ({"labels": labels} if objective.learn_labels else {})
        return devices.total(jax.value_and_grad(loss)(learned))

    sharded = devices.shard_targets(share)

    def whole(fitted: Any, key: Any, rows: Array, labels: Array, x_t: Array, y_t: Array) -> Any:
        return sharded((fitted, key, rows, labels), targets, x_t, y_t)

    return jax.jit(whole)
