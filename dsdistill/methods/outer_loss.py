"""Outer losses of KIP: what the predictions of the targets are judged by.

The inner problem, ridge regression on the support, is the same for all of them. An outer loss is a
frozen value. It gives its value, and for Gauss-Newton its quadratic model in the predictions: the
gradient g, and the curvature H as a product with a vector and as a square root R, R R^T = H.

Source: Nguyen, Chen and Lee (2021), arXiv:2011.00050, for the squared error; Loo, Hasani, Amini
and Rus (2022), arXiv:2210.12067 (RFAD), for cross-entropy of scaled predictions.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dsdistill.harness.data.labeled_images import centred_one_hot
from dsdistill.parallel import devices

Predictions = Float[Array, "m k"]
Weights = Float[Array, " m"]
Total = Callable[[Array], Array]  # sums an array over all devices

NEWTON_STEPS = 20  # for the scale: from SMALLEST_SCALE at most a factor of MAX_FACTOR each
MAX_FACTOR = 4.0
SMALLEST_SCALE = 0.1  # of predictions that are worse than none
SMOOTHING = 0.01  # share of a label that is spread over all classes
CONFIDENCE = 0.997  # more than smoothed labels have, so that only small predictions are held back


@dataclass(frozen=True, eq=False)
class Quadratic:
    """Quadratic model of an outer loss, as a function of the predictions.

    Attributes:
        gradient: Gradient g, (m, k), of the weighted mean over all targets.
        product: H v for an (m, k) array v.
        root: R v for an (m, k) array v.
    """

    gradient: Predictions
    product: Callable[[Predictions], Predictions]
    root: Callable[[Predictions], Predictions]


class OuterLoss(Protocol):
    """What the predictions of the targets are judged by; targets may lie on several devices."""

    def value(
        self, predictions: Predictions, labels: Predictions, weights: Weights, total: Total
    ) -> Float[Array, ""]:
        """This device's part of the loss.

        Args:
            predictions: Predictions of this device's targets.
            labels: Their centred labels.
            weights: Weight of each target in the mean over all devices.
            total: Sums over the devices; `devices.total` inside of `devices.shard_targets`.
        """
        ...

    def quadratic(
        self, predictions: Predictions, labels: Predictions, weights: Weights
    ) -> Quadratic:
        """The quadratic model around these predictions, inside of `devices.shard_targets`."""
        ...


@dataclass(frozen=True)
class SquaredError:
    """Half the mean squared error over all entries of the predictions, as in KIP's papers."""

    def value(
        self, predictions: Predictions, labels: Predictions, weights: Weights, total: Total
    ) -> Float[Array, ""]:
        return 0.5 * (weights @ jnp.mean((predictions - labels) ** 2, axis=1))

    def quadratic(
        self, predictions: Predictions, labels: Predictions, weights: Weights
    ) -> Quadratic:
        errors = predictions - labels
        each = jnp.broadcast_to(weights[:, None], errors.shape) / errors.shape[1]
        return Quadratic(each * errors, lambda v: each * v, lambda v: jnp.sqrt(each) * v)


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross-entropy of softmax(a * predictions), in nats; the scale a fits the batch best.

    Ridge regression on centred labels predicts values whose scale is no logit's. RFAD learns log a
    by gradient descent beside the images. Here a minimises the loss of each batch: the problem
    is convex in one number, so that nothing has to be tuned or stored, and the loss is a function
    of the predictions alone. Its gradient is that at a fixed a, since a is optimal or at its limit.

    Labels are smoothed by `SMOOTHING`. Otherwise a batch that is predicted without a fault has no
    best scale and next to no gradient, and Adam wanders: 95 to 97 % on digits, where the smoothed
    loss reaches what the squared error does.

    The scale is at most `largest_scale`. A loss that is blind to scale lets the predictions shrink,
    to less than half in 300 steps with `fc`, and a network of finite width, whose kernel is the
    infinite one plus noise, then predicts mostly noise (docs/results.md).
    """

    def value(
        self, predictions: Predictions, labels: Predictions, weights: Weights, total: Total
    ) -> Float[Array, ""]:
        scale = fit_scale(predictions, labels, weights, total)
        log_likelihood = jax.nn.log_softmax(scale * predictions)
        return -(weights @ jnp.sum(_probabilities(labels) * log_likelihood, axis=1))

    def quadratic(
        self, predictions: Predictions, labels: Predictions, weights: Weights
    ) -> Quadratic:
        scale = fit_scale(predictions, labels, weights, devices.total)
        q, each = jax.nn.softmax(scale * predictions), weights[:, None]

        def product(v: Predictions) -> Predictions:
            return each * scale**2 * q * (v - jnp.sum(q * v, axis=1, keepdims=True))

        def root(v: Predictions) -> Predictions:
            half = jnp.sqrt(q) * v
            return jnp.sqrt(each) * scale * (half - q * jnp.sum(half, axis=1, keepdims=True))

        return Quadratic(each * scale * (q - _probabilities(labels)), product, root)


OUTER_LOSSES: dict[str, OuterLoss] = {"mse": SquaredError(), "ce": CrossEntropy()}


def largest_scale(classes: int) -> float:
    """The scale a at which softmax(a * y) gives the class of a centred label y `CONFIDENCE`.

    It is 8.0 for ten classes, RFAD's factor of the labels that its networks learn.
    """
    return math.log(max(classes - 1, 1) * CONFIDENCE / (1 - CONFIDENCE))


def fit_scale(
    predictions: Predictions, labels: Predictions, weights: Weights, total: Total
) -> Float[Array, ""]:
    """The scale a <= `largest_scale` at which cross-entropy of softmax(a * predictions) is least.

    No gradient passes through it. The derivative in a rises and is concave where it matters, so
    that Newton's steps from below do not overshoot.

    Args:
        predictions, labels, weights, total: As for `OuterLoss.value`.
    """
    p, y, w = map(jax.lax.stop_gradient, (predictions, _probabilities(labels), weights))
    right = total(w @ jnp.sum(y * p, axis=1))
    limit = largest_scale(p.shape[1])

    def newton(_: int, scale: Array) -> Array:
        q = jax.nn.softmax(scale * p)
        mean = jnp.sum(q * p, axis=1)
        variance = jnp.sum(q * (p - mean[:, None]) ** 2, axis=1)
        sums = total(jnp.stack([w @ mean, w @ variance]))
        slope, curvature = sums[0] - right, sums[1]
        moved = scale - slope / jnp.maximum(curvature, jnp.finfo(p.dtype).tiny)
        moved = jnp.clip(moved, scale / MAX_FACTOR, scale * MAX_FACTOR)
        return jnp.clip(moved, SMALLEST_SCALE, limit)

    first = jnp.full((), SMALLEST_SCALE, p.dtype)
    return jax.lax.fori_loop(0, NEWTON_STEPS, newton, first)


def mean_value(
    outer: OuterLoss, scores: Float[np.ndarray, "m k"], labels: Float[np.ndarray, "m k"]
) -> float:
    """The loss of predictions that are at hand as arrays on one host."""
    with jax.enable_x64(True):
        return float(_mean_value(outer, scores.astype(np.float64), labels.astype(np.float64)))


@functools.partial(jax.jit, static_argnums=0)
def _mean_value(outer: OuterLoss, scores: Predictions, labels: Predictions) -> Float[Array, ""]:
    return outer.value(scores, labels, jnp.full(len(scores), 1 / len(scores)), lambda part: part)


def zero_value(outer: OuterLoss, classes: int) -> float:
    """The loss of predictions that are all 0, for hard labels."""
    return mean_value(
        outer, np.zeros((classes, classes)), centred_one_hot(np.arange(classes), classes)
    )


def _probabilities(labels: Predictions) -> Predictions:
    """Smoothed class probabilities of centred labels."""
    return (1 - SMOOTHING) * labels + 1 / labels.shape[1]
