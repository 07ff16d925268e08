"""Ridge regression with a kernel that has an explicit map Phi: two sums in one pass over the data.

    A = Phi^T Phi  (p x p),    B = Phi^T Y  (p x k)

are all that a linear model needs of any number N of examples, so that neither the N x N kernel nor
the kernel between a support and the targets is ever formed. Labels that are classes enter B as sums
of each class, and not as an N x k matrix:

    B = S - (S 1) 1^T / k,    S = sum of Phi over each class        (labels: one-hot minus 1/k)

Memory: 8 p (p + k) bytes for the sums, and one chunk of examples. Sums are in float64.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsdistill.harness import memory
from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.errors import UserError
from dsdistill.parallel import devices

CHUNK = 8192  # examples per chunk
FeatureMap = Callable[[Float[Array, "n h w c"]], Float[Array, "n p"]]


class Sums(NamedTuple):
    """The two sums over the first `done` examples."""

    done: int
    gram_tt: Float[Array | np.ndarray, "p p"]
    gram_ty: Float[Array | np.ndarray, "p k"]


def width(feature_map: FeatureMap, shape: tuple[int, ...]) -> int:
    """Number of values p of the map of an image.

    Args:
        feature_map: The map.
        shape: Height, width and channels of an image.
    """
    one = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return jax.eval_shape(feature_map, one).shape[1]


def accumulate(
    feature_map: FeatureMap, train: Examples, start: Sums | None = None
) -> Iterator[Sums]:
    """Sum over all examples, one chunk for each item that is taken.

    Args:
        feature_map: The map.
        train: The examples; read once, in chunks.
        start: Sums to continue from.

    Raises:
        UserError: If the sums do not fit into memory, or are not finite.
    """
    p, k = width(feature_map, train.data.shape), len(train.data.classes)
    purpose = f"a linear model of {p} values and {k} classes"
    memory.require(4 * 8 * p * (p + k), purpose, "use features of fewer values")
    size = min(CHUNK, len(train))
    add = _compile(feature_map, k)
    sums = start or Sums(0, np.zeros((p, p)), np.zeros((p, k)))
    with jax.enable_x64(True):  # placed as every later sum will be: no second compilation
        sums = Sums(sums.done, *map(devices.replicate, sums[1:]))
    for first in range(sums.done, len(train), size):
        done = min(first + size, len(train))
        rows = np.minimum(np.arange(first, first + size), len(train) - 1)  # one shape for all
        labels = train.data.labels[rows] if train.targets is None else train.targets[rows]
        with jax.enable_x64(True):
            added = add(*sums[1:], done - first, train.images(rows), labels)
            jax.block_until_ready(added)
        if not all(np.isfinite(array).all() for array in added):
            raise UserError(f"the sums over the examples from {first} on are not finite")
        sums = Sums(done, *added)
        yield sums


def weights(
    gram_tt: Float[np.ndarray, "p p"], gram_ty: Float[np.ndarray, "p k"], ridge: float
) -> Float[np.ndarray, "p k"]:
    """Weights (A + ridge I)^-1 B of the regression, in float64.

    Args:
        gram_tt, gram_ty: The sums A and B.
        ridge: Absolute ridge.

    Raises:
        UserError: If the system is singular at this ridge.
    """
    with jax.enable_x64(True):
        regular = jnp.asarray(gram_tt) + ridge * jnp.eye(len(gram_tt))
        solved = np.asarray(jax.scipy.linalg.solve(regular, gram_ty, assume_a="pos"))
    if not np.isfinite(solved).all():
        raise UserError(f"the linear model is singular at a ridge of {ridge:g}: raise --ridge")
    return solved


def _compile(feature_map: FeatureMap, k: int) -> Callable[..., tuple[Array, Array]]:
    """A compiled function that adds the first `count` examples of a chunk to the two sums."""

    def share(whole: tuple[()], real: Array, x: Array, labels: Array) -> tuple[Array, Array]:
        phi = feature_map(x.astype(jnp.float64))
        phi = jnp.where(real[:, None], phi, 0)  # padding adds nothing
        return devices.total((phi.T @ phi, _product(phi, labels, k)))

    @jax.jit
    def add(
        gram_tt: Array, gram_ty: Array, count: Array, x: Array, labels: Array
    ) -> tuple[Array, Array]:
        more_tt, more_ty = devices.shard_targets(share)((), count, x, labels)
        return gram_tt + more_tt, gram_ty + more_ty

    return add


def _product(
    phi: Float[Array, "m p"], labels: Int[Array, " m"] | Float[Array, "m k"], k: int
) -> Float[Array, "p k"]:
    """Phi^T Y, for classes by sums of each class."""
    if labels.ndim == 2:
        return phi.T @ labels.astype(phi.dtype)
    by_class = jax.ops.segment_sum(phi, labels, k)  # (k, p)
    return (by_class - by_class.sum(0) / k).T
