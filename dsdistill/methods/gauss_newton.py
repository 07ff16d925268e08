"""The Gauss-Newton step of KIP, which uses that the loss is a sum of squares.

Adam knows the gradient of a batch. The derivative of every single entry of the kernel costs no
more than that gradient (`kernels.banded.slopes`), and it says how all predictions p of the batch
move with all pixels and labels: the Jacobian J, which is never formed. A step s minimises the loss
of the predictions as they move to first order, damped by S, which is diagonal:

    1/2 mean (p + J s - y_t)²  +  1/2 s^T S s

by conjugate gradients, which start from the step before. Part of s is taken. A step that does not
lower the loss of its own batch is taken back, and one that lowers it by much less than p + J s
promised makes the damping of the next ones larger, until they keep their promises again.

Source: Levenberg (1944) and Marquardt (1963) for the step and its damping; Martens (2010), "Deep
learning via Hessian-free optimization", for conjugate gradients on batches. That KIP is solved in
this way is this project's.
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
from dsdistill.parallel import devices

ITERATIONS = 30  # of conjugate gradients: more follow the noise of the batch
WARM_START = 0.9  # of the last direction, where they start
SLOPES_MEMORY_FACTOR = 2.2  # times their size, while they are computed
PROBES = 4  # random vectors that estimate the mean of a diagonal
POOR, GOOD = 0.25, 0.75  # shares of the promised decrease
MIN_DIAGONAL = 1e-30  # of a diagonal: no predictions move
RISE, FALL = 4.0, 0.5  # of the damping after a poor and a good step

_product = functools.partial(jnp.einsum, precision="highest")  # a GPU's default is TF32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GaussNewtonState:
    """What one step leaves to the next.

    Attributes:
        count: Steps so far.
        direction: The last solution, of which a part was taken.
        boost: What the damping is multiplied by, at least 1.
    """

    count: Int[Array, ""]
    direction: LearnedArrays
    boost: Float[Array, ""]


@dataclass(frozen=True)
class GaussNewton:
    """Part of the solved step, damped; an `Optimizer`.

    Attributes:
        learning_rate: The part of the solution that is taken, at most 1.
        damping: What holds a step near its start, relative to the mean of the diagonal of J^T J.
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
    """The slopes of a network.

    Raises:
        UserError: If its kernel has none, with what computes it.
    """
    if network.slopes is None:
        raise UserError(
            f"--optimizer gauss-newton needs a kernel in closed form or of exact planes, and "
            f"{network.name} is computed by {network.engine}: use --optimizer adam"
        )
    return network.slopes


def check_memory(support: Float[np.ndarray, "n h w c"], targets: int) -> None:
    """Refuse slopes that do not fit.

    Raises:
        UserError: With what they need.
    """
    n, pixels = len(support), support[0].size
    each = 4 * n * pixels * (SLOPES_MEMORY_FACTOR * devices.share(targets) + 3 * n)
    free, count = gram.free_bytes(), jax.local_device_count()
    if each > free:
        raise UserError(
            f"the slopes of {n} x {targets} pairs need {memory.format_bytes(each * count)}, "
            f"{memory.format_bytes(free * count)} is free: lower --target-batch"
        )


def initial_state(learned: LearnedArrays) -> GaussNewtonState:
    """Before the first step."""
    return GaussNewtonState(jnp.int32(0), jax.tree.map(jnp.zeros_like, learned), jnp.float32(1))


@dataclass(frozen=True)
class Problem:
    """One device's part of a batch.

    Attributes:
        slopes: The kernel's, see `Network`.
        strength: The ridge, relative.
        free: 1 for pixels that are learned, 0 for others.
        x_t, y_t: Targets.
        weights: Of each target in the mean; 0 for those that fill up a share.
        targets: How many there are on all devices.
    """

    slopes: Slopes
    strength: float
    free: Float[Array, "n h w c"]
    x_t: Float[Array, "m h w c"]
    y_t: Float[Array, "m k"]
    weights: Float[Array, " m"]
    targets: int


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
    """One step; inside `devices.shard_targets`.

    Args:
        problem: This device's.
        whole: Images and labels of the support.
        learned: Those of them that move.
        last: What the step before left.
        loss: This device's part of the loss of other values of `learned`.
        rate: The part of the solution that is taken.
        damping: Relative to the mean of the diagonal of J^T J, for images and labels separately.
        key: For the estimate of that mean.

    Returns:
        The loss before the step, the values after it, and what the next step starts from.
    """
    predictions, forward, backward = linearise(problem, whole, learned)
    errors = predictions - problem.y_t
    weights = jnp.broadcast_to(problem.weights[:, None], errors.shape) / errors.shape[1]

    def mean_square(of: Array) -> Array:
        return devices.total(0.5 * jnp.sum(weights * of**2))

    scale = _scales(backward, weights, (problem.targets, weights.shape[1]), key)
    gradient = _times(scale, devices.total(backward(weights * errors)))

    def curvature(
        v: LearnedArrays,
    ) -> LearnedArrays:  # scaled, so that the mean of its diagonal is 1
        change = devices.total(backward(weights * forward(_times(scale, v))))
        more = damping * last.boost
        return jax.tree.map(lambda c, v: c + more * v, _times(scale, change), v)

    first = {name: WARM_START * v / scale[name] for name, v in last.direction.items()}
    direction = _times(scale, cg(curvature, gradient, x0=first, tol=0, maxiter=ITERATIONS)[0])
    change = jax.tree.map(lambda v: (-rate * v).astype(v.dtype), direction)
    moved = jax.tree.map(jnp.add, learned, change)

    value = mean_square(errors)
    promised = value - mean_square(errors + forward(change))
    found = value - devices.total(loss(moved))
    kept = found > 0  # not if it is NaN
    share = jnp.where(kept, found / promised, 0)
    factor = jnp.where(share < POOR, RISE, jnp.where(share > GOOD, FALL, 1.0))
    boost = jnp.maximum(last.boost * factor, 1)
    moved = jax.tree.map(lambda new, old: jnp.where(kept, new, old), moved, learned)
    return value, moved, GaussNewtonState(last.count + 1, direction, jnp.float32(boost))


def linearise(
    problem: Problem, whole: LearnedArrays, learned: LearnedArrays
) -> tuple[Array, Callable[[LearnedArrays], Array], Callable[[Array], LearnedArrays]]:
    """The predictions of the targets, and their derivative, applied to a change of what is learned.

    Returns:
        p, (m, k) in float64; J as a function of a change; J^T as a function of (m, k), of which
        `devices.total` is that of all targets.
    """
    images = whole["images"]
    double = images.astype(jnp.float64)
    rows_ss, each_ss = problem.slopes(devices.local_rows(double), double)
    k_ss = devices.gather_rows(rows_ss)[: len(images)]
    each_ss = devices.gather_rows(each_ss.astype(jnp.float32))[: len(images)]
    k_st, each_st = problem.slopes(images, problem.x_t)

    def predicted(k_ss: Array, k_st: Array, y_s: Array) -> Array:
        return ridge.predict(k_st, ridge.solve(k_ss, y_s, problem.strength))

    y_s = whole["labels"].astype(jnp.float64)
    at = k_ss, k_st.astype(jnp.float64), y_s
    predictions, push = jax.linearize(predicted, *at)
    pull = jax.linear_transpose(push, *at)

    def forward(change: LearnedArrays) -> Array:
        moves = change["images"] * problem.free
        # An image moves its row of k_ss as the first of two images, its column as the second.
        rows = _product("nahwc,nhwc->na", each_ss, moves)
        k_ts = _product("nmhwc,nhwc->nm", each_st, moves)
        labels = change["labels"] if "labels" in learned else jnp.zeros_like(y_s)
        return push(*(a.astype(jnp.float64) for a in (rows + rows.T, k_ts, labels)))

    def backward(cotangent: Array) -> LearnedArrays:
        d_ss, d_st, d_y = (g.astype(jnp.float32) for g in pull(cotangent.astype(jnp.float64)))
        moves = _product("na,nahwc->nhwc", d_ss + d_ss.T, each_ss)
        moves += _product("nm,nmhwc->nhwc", d_st, each_st)
        every = {"images": moves * problem.free, "labels": d_y}
        return {name: every[name] for name in learned}

    return predictions, forward, backward


def _scales(
    backward: Callable[[Array], LearnedArrays],
    weights: Float[Array, "m k"],
    shape: tuple[int, int],
    key: PRNGKeyArray,
) -> LearnedArrays:
    """One over the root of the mean of the diagonal of J^T J, for images and for labels.

    The square of J^T times random signs is that diagonal, in the mean over the signs. `shape` is
    that of all targets' predictions, so that signs do not depend on the number of devices.
    """

    def probe(key: PRNGKeyArray) -> LearnedArrays:
        signs = devices.local_rows(jax.random.rademacher(key, shape, weights.dtype))
        moves = devices.total(backward(jnp.sqrt(weights) * signs))
        return {name: jnp.mean(v**2) for name, v in moves.items()}

    found = jax.lax.map(probe, jax.random.split(key, PROBES))
    return {
        name: 1 / jnp.sqrt(jnp.maximum(means.mean(), MIN_DIAGONAL)) for name, means in found.items()
    }


def _times(scales: LearnedArrays, values: LearnedArrays) -> LearnedArrays:
    return {name: scales[name] * value for name, value in values.items()}
