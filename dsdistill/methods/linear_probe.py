"""The linear probe: multinomial logistic regression on images or features.

    min over W, b of   mean_i CE(t_i, softmax(x_i W / sqrt(d) + b)) + strength / 2 |W|²

in float32 by SciPy's L-BFGS, from zero: the minimum is unique, so nothing is random. Each pass
streams over the examples, so that memory is the weights and one chunk, whatever their number. The
strength is chosen on the validation images, the best of `STRENGTHS`, each started from the weights
of the stronger one before it.

Labels of a set are centred, and need not be probabilities: t is the label plus 1/k, cut off at 0
and divided by its sum. Hard labels and a teacher's probabilities are so what they were.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array, Float

from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.evaluation import metrics
from dsdistill.harness.evaluation.held_out import Predict
from dsdistill.kernels.linear import linear_map
from dsdistill.methods import targets

STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # relative to features of mean norm 1
MAX_ITERATIONS = 200  # of L-BFGS for each strength
CHUNK = 2000  # examples in a product

Pass = Callable[[np.ndarray, float], tuple[float, np.ndarray]]


@dataclass(frozen=True)
class LinearProbe:
    """A linear probe as a `Learner`; it chooses its strength itself, and has no learning rate.

    Attributes:
        name: Name in reports.
        limit: None: it trains on any number of examples.
    """

    name: str = "linear-probe"
    limit: int | None = None
    deterministic: ClassVar[bool] = True

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that its results depend on besides the data, JSON-compatible."""
        return {"strengths": list(STRENGTHS), "iterations": MAX_ITERATIONS}

    @property
    def accelerator(self) -> str | None:
        """Name of the accelerator that JAX computes on; None on a CPU."""
        device = jax.devices()[0]
        return None if device.platform == "cpu" else device.device_kind

    def __call__(self, train: Examples, validation: Examples, seed: int, /) -> Predict:
        """Fit one probe for each strength, and return the best on the validation images."""
        fits = fit(targets.load_into_memory(train), STRENGTHS)
        labels, judged = validation.data.labels, validation.images()

        def score(weights: Float[np.ndarray, "p k"]) -> tuple[float, float]:
            scores = _scores(weights, judged)
            likelihood = -metrics.nll(metrics.softmax(scores), labels)
            return metrics.accuracy(scores, labels), likelihood

        best = max(fits, key=score)
        return lambda images: _scores(best, images)


def fit(train: Examples, strengths: tuple[float, ...]) -> list[Float[np.ndarray, "p k"]]:
    """Weights of the probe for each strength; the last of the p rows is the constant.

    Args:
        train: The examples.
        strengths: Factors of |W|² / 2, strongest first.
    """
    p, k = int(np.prod(train.data.shape)) + 1, len(train.data.classes)
    passed, weights = _compile_pass(train, p, k), np.zeros(p * k)
    fits = []
    for strength in strengths:
        outcome = scipy.optimize.minimize(
            passed,
            weights,
            args=(strength,),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": MAX_ITERATIONS, "maxcor": 10},
        )
        weights = outcome.x
        fits.append(weights.reshape(p, k).astype(np.float32))
    return fits


def probabilities(labels: Float[np.ndarray, "m k"]) -> Float[np.ndarray, "m k"]:
    """Centred labels as probabilities: plus 1/k, cut off at 0, divided by their sum."""
    shares = np.maximum(labels + 1 / labels.shape[1], 0)
    # Labels without any share, which only a solved label far from all classes has, say nothing.
    total = shares.sum(1, keepdims=True)
    return np.where(total > 0, shares / np.maximum(total, 1e-12), 1 / labels.shape[1])


def _compile_pass(train: Examples, p: int, k: int) -> Pass:
    """The loss and its slopes as a function of flat weights, in one pass over the examples."""
    n = len(train)
    size = min(CHUNK, n)

    def loss(weights: Array, x: Array, shares: Array) -> Array:
        logits = jnp.matmul(linear_map(x), weights, precision="highest")
        # Padding has shares of 0 throughout, and adds nothing.
        return -jnp.sum(shares * jax.nn.log_softmax(logits))

    slopes = jax.jit(jax.value_and_grad(loss))

    def passed(flat: np.ndarray, strength: float) -> tuple[float, np.ndarray]:
        weights = flat.reshape(p, k)
        single, total, gradient = jnp.asarray(weights, jnp.float32), 0.0, np.zeros((p, k))
        for first in range(0, n, size):
            rows = np.minimum(np.arange(first, first + size), n - 1)  # one shape for all
            shares = probabilities(train.labels(rows)).astype(np.float32)
            shares[n - first :] = 0
            value, slope = slopes(single, train.images(rows), shares)
            total, gradient = total + float(value), gradient + np.asarray(slope)
        shrunk = weights.copy()
        shrunk[-1] = 0  # the constant is free
        value = total / n + 0.5 * strength * float((shrunk**2).sum())
        return value, (gradient / n + strength * shrunk).ravel()

    return passed


def _scores(
    weights: Float[np.ndarray, "p k"], images: Float[np.ndarray, "m h w c"]
) -> Float[np.ndarray, "m k"]:
    parts = [
        np.asarray(_logits(weights, images[first : first + CHUNK]))
        for first in range(0, len(images), CHUNK)
    ]
    return np.concatenate(parts)


@jax.jit
def _logits(weights: Array, images: Array) -> Array:
    return jnp.matmul(linear_map(images), weights, precision="highest")
