"""The Gauss-Newton step of KIP, which exploits how the loss depends on the predictions.

Adam uses the gradient of a batch. The derivatives of all single entries of the kernel cost no
more than that gradient (`conv_kernel.slopes`), and they give the Jacobian J, which is never
formed: how all predictions p of the batch change with all pixels and labels. With gradient g and
curvature H of the outer loss at p, a step s minimises the loss with the predictions linearised, to
the second order in them, and a diagonal damping S:

    g^T J s  +  1/2 s^T J^T H J s  +  1/2 s^T S s

by conjugate gradients, which start from the previous step. A fraction of s is taken. A step that
does not lower the loss of its own batch is undone. One that lowers it by much less than the
linearised predictions promise raises the damping, until steps keep the promise again.

Source: Levenberg (1944) and Marquardt (1963) for the step and its damping; Martens (2010), "Deep
learning via Hessian-free optimization", for conjugate gradients on batches. Applying it to KIP is
this project's idea.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dsdistill.harness import memory
from dsdistill.harness.errors import UserError
from dsdistill.kernels import gram
from dsdistill.kernels.networks import InfiniteNetwork, Slopes
from dsdistill.methods import ridge
from dsdistill.methods.optimizer import LearnedArrays, StepProblem
from dsdistill.methods.outer_loss import OuterLoss
from dsdistill.parallel import devices

ITERATIONS = 30  # of conjugate gradients: more would fit the noise of the batch
WARM_START = 0.9  # fraction of the previous direction that conjugate gradients start from
SLOPES_MEMORY_FACTOR = 2.2  # peak memory while slopes are computed, relative to their size
PROBES = 4  # random vectors that estimate the mean of a diagonal
POOR, GOOD = 0.25, 0.75  # shares of the promised decrease below and above which damping changes
MIN_DIAGONAL = 1e-30  # floor of a mean diagonal: at 0 no prediction changes
DAMPING_RISE, DAMPING_FALL = 4.0, 0.5  # factors after a poor and after a good step

_product = functools.partial(jnp.einsum, precision="highest")  # a GPU's default is TF32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GaussNewtonState:
    """What a step passes on to the next one.

    Attributes:
        count: Number of steps so far.
        direction: Solution of the last step, of which a fraction was taken.
        boost: Factor of the damping, at least 1.
    """

    count: Int[Array, ""]
    direction: LearnedArrays
    boost: Float[Array, ""]


@dataclass(frozen=True)
class GaussNewton:
    """Part of the solved step, damped; an `Optimizer`.

    Attributes:
        learning_rate: The part of the solution that is taken, at most 1.
        damping: What holds a step near its start, relative to the mean diagonal of J^T H J.
    """

    learning_rate: float = 0.3
    damping: float = 0.01

    @property
    def differentiates_kernel(self) -> bool:
        return False  # the slopes of every entry come with the entry

    def check_network(self, network: InfiniteNetwork) -> None:
        require_slopes(network)

    def check_memory(self, support: Float[Any, "n h w c"], targets: int) -> None:
        check_memory(support, targets)

    def initial_state(self, learned: LearnedArrays) -> GaussNewtonState:
        return initial_state(learned)

    def step(
        self,
        problem: StepProblem,
        state: GaussNewtonState,
        factor: Float[Array, ""],
        key: PRNGKeyArray,
    ) -> tuple[Array, LearnedArrays, GaussNewtonState]:
        linear = Problem(
            require_slopes(problem.network),
            problem.ridge,
            ~problem.frozen,
            problem.x_t,
            problem.y_t,
            problem.weights,
            problem.targets,
            problem.outer,
        )
        return step(
            linear,
            problem.support,
            problem.learned,
            state,
            problem.loss,
            rate=self.learning_rate * factor,
            damping=self.damping,
            key=jax.random.fold_in(key, 1),
        )

    def evaluate_tile(
        self, network: InfiniteNetwork, gram: Callable[[Array, Array], Array]
    ) -> Callable[[Array, Array], Any]:
        slopes = require_slopes(network)
        return lambda x1, x2: (slopes(x1, x2), gram(x1, x2))

    def remedy(self, *, learn_labels: bool) -> str:
        return f"--damping (now {self.damping:g})"


def require_slopes(network: InfiniteNetwork) -> Slopes:
    """The slopes of a network's kernel: the derivatives of its single entries.

    Raises:
        UserError: If the engine of its kernel has none.
    """
    if network.slopes is None:
        raise UserError(
            f"--optimizer gauss-newton needs a kernel in closed form or of exact planes, but "
            f"{network.name} is computed by {network.engine}: use --optimizer adam"
        )
    return network.slopes


def check_memory(support: Float[np.ndarray, "n h w c"], targets: int) -> None:
    """Refuse slopes that do not fit into memory.

    Args:
        support: Images of the support.
        targets: Number of targets per step.

    Raises:
        UserError: If they do not fit; the message states what they need.
    """
    n, pixels = len(support), support[0].size
    # Bytes of one device, in float32.
    needed = 4 * n * pixels * (SLOPES_MEMORY_FACTOR * devices.share(targets) + 3 * n)
    free, count = gram.free_bytes(), jax.local_device_count()
    if needed > free:
        raise UserError(
            f"the slopes of {n} x {targets} pairs need {memory.format_bytes(needed * count)}, "
            f"{memory.format_bytes(free * count)} is free: lower --target-batch"
        )


def initial_state(learned: LearnedArrays) -> GaussNewtonState:
    """The state before the first step."""
    return GaussNewtonState(jnp.int32(0), jax.tree.map(jnp.zeros_like, learned), jnp.float32(1))


@dataclass(frozen=True)
class Problem:
    """One device's part of a batch.

    Attributes:
        slopes: Slopes of the kernel, see `InfiniteNetwork`.
        ridge: Ridge, relative to the mean of diag(k_ss).
        free: 1 for pixels that are learned, 0 for others.
        x_t, y_t: Images and labels of this device's targets.
        weights: Weight of each target in the mean; 0 for padding.
        targets: Number of targets on all devices.
        outer: The loss as a function of the predictions.
    """

    slopes: Slopes
    ridge: float
    free: Float[Array, "n h w c"]
    x_t: Float[Array, "m h w c"]
    y_t: Float[Array, "m k"]
    weights: Float[Array, " m"]
    targets: int
    outer: OuterLoss


def step(
    problem: Problem,
    whole: LearnedArrays,
    learned: LearnedArrays,
    last: GaussNewtonState,
    loss: Callable[[LearnedArrays], Array],
    *,
    rate: Array,
    damping: float,
    key: PRNGKeyArray,
) -> tuple[Array, LearnedArrays, GaussNewtonState]:
    """Take one step; to be called inside `devices.shard_targets`.

    Args:
        problem: This device's part of the batch.
        whole: Images and labels of the support.
        learned: The arrays among `whole` that are learned.
        last: State after the previous step.
        loss: This device's part of the loss as a function of `learned`.
        rate: Fraction of the solution that is taken.
        damping: Relative to the mean diagonal of J^T H J, for images and labels separately.
        key: JAX key for the estimate of that mean.

    Returns:
        The loss before the step, the learned arrays after it, and the state for the next step.
    """
    predictions, forward, backward = linearise(problem, whole, learned)
    model = problem.outer.quadratic(predictions, problem.y_t, problem.weights)

    def outer_loss(predictions: Array) -> Array:
        part = problem.outer.value(predictions, problem.y_t, problem.weights, devices.total)
        return devices.total(part)

    scale = _scales(backward, model.root, (problem.targets, predictions.shape[1]), key)
    gradient = _times(scale, devices.total(backward(model.gradient)))

    # Scaled so that the mean of its diagonal is 1, plus the damping.
    def curvature(v: LearnedArrays) -> LearnedArrays:
        product = devices.total(backward(model.product(forward(_times(scale, v)))))
        boosted = damping * last.boost
        return jax.tree.map(lambda p, v: p + boosted * v, _times(scale, product), v)

    first = {name: WARM_START * v / scale[name] for name, v in last.direction.items()}
    direction = _times(scale, cg(curvature, gradient, x0=first, tol=0, maxiter=ITERATIONS)[0])
    change = jax.tree.map(lambda v: (-rate * v).astype(v.dtype), direction)
    moved = jax.tree.map(jnp.add, learned, change)

    value = outer_loss(predictions)
    promised = value - outer_loss(predictions + forward(change))
    decrease = value - devices.total(loss(moved))
    accepted = decrease > 0  # False for NaN
    share = jnp.where(accepted, decrease / promised, 0)
    factor = jnp.where(share < POOR, DAMPING_RISE, jnp.where(share > GOOD, DAMPING_FALL, 1.0))
    boost = jnp.maximum(last.boost * factor, 1)
    moved = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), moved, learned)
    return value, moved, GaussNewtonState(last.count + 1, direction, jnp.float32(boost))


def linearise(
    problem: Problem, whole: LearnedArrays, learned: LearnedArrays
) -> tuple[Array, Callable[[LearnedArrays], Array], Callable[[Array], LearnedArrays]]:
    """Predictions of the targets, and their Jacobian J as two linear functions.

    Args:
        problem, whole, learned: As for `step`.

    Returns:
        The predictions p, (m, k) in float64; J, applied to a change of `learned`; J^T, applied to
        an (m, k) array, whose `devices.total` is that of all targets.
    """
    images = whole["images"]
    double = images.astype(jnp.float64)
    rows_ss, each_ss = problem.slopes(devices.local_rows(double), double)
    k_ss = devices.gather_rows(rows_ss)[: len(images)]
    each_ss = devices.gather_rows(each_ss.astype(jnp.float32))[: len(images)]
    k_st, each_st = problem.slopes(images, problem.x_t)

    def predict(k_ss: Array, k_st: Array, y_s: Array) -> Array:
        return ridge.predict(k_st, ridge.solve(k_ss, y_s, problem.ridge))

    y_s = whole["labels"].astype(jnp.float64)
    at = k_ss, k_st.astype(jnp.float64), y_s
    predictions, push = jax.linearize(predict, *at)
    pull = jax.linear_transpose(push, *at)

    def forward(change: LearnedArrays) -> Array:
        moves = change["images"] * problem.free
        # An image changes its row of k_ss as the first argument and its column as the second.
        rows = _product("nahwc,nhwc->na", each_ss, moves)
        k_ts = _product("nmhwc,nhwc->nm", each_st, moves)
        labels = change["labels"] if "labels" in learned else jnp.zeros_like(y_s)
        return push(*(a.astype(jnp.float64) for a in (rows + rows.T, k_ts, labels)))

    def backward(cotangent: Array) -> LearnedArrays:
        d_ss, d_st, d_y = (g.astype(jnp.float32) for g in pull(cotangent.astype(jnp.float64)))
        moves = _product("na,nahwc->nhwc", d_ss + d_ss.T, each_ss)
        moves += _product("nm,nmhwc->nhwc", d_st, each_st)
        cotangents = {"images": moves * problem.free, "labels": d_y}
        return {name: cotangents[name] for name in learned}

    return predictions, forward, backward


def _scales(
    backward: Callable[[Array], LearnedArrays],
    root: Callable[[Array], Array],
    shape: tuple[int, int],
    key: PRNGKeyArray,
) -> LearnedArrays:
    """1 / sqrt(mean of the diagonal of J^T H J), for images and for labels.

    The expected square of J^T R times random signs is that diagonal, where R is a root of H.
    `shape` is that of the predictions of all targets, so that the signs do not depend on the number
    of devices.
    """

    def probe(key: PRNGKeyArray) -> LearnedArrays:
        signs = devices.local_rows(jax.random.rademacher(key, shape, jnp.float64))
        moves = devices.total(backward(root(signs)))
        return {name: jnp.mean(v**2) for name, v in moves.items()}

    squares = jax.lax.map(probe, jax.random.split(key, PROBES))
    return {
        name: 1 / jnp.sqrt(jnp.maximum(means.mean(), MIN_DIAGONAL))
        for name, means in squares.items()
    }


def _times(scales: LearnedArrays, values: LearnedArrays) -> LearnedArrays:
    return {name: scales[name] * value for name, value in values.items()}
