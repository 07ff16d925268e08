"""Label Solve: real images keep their pixels, and their labels are solved for in closed form.

With n support images, the labels for which ridge regression on the support fits the whole training
set best are

    y* = (k_ss + ridge/n I) (k_st k_st^T + ridge/n I)^-1 k_st y_t

k_st k_st^T (n x n) and k_st y_t (n x k) are sums over targets, so one pass over the training set
is enough, tile by tile, in O(n² + tile) memory.

A kernel with an explicit map, K = Phi Phi^T with p values each, needs no k_st at all. With the sums
A = Phi_t^T Phi_t and B = Phi_t^T y_t of `linear_sums`, and Phi_s = U S V^T of rank r <= min(n, p),

    k_st k_st^T = Phi_s A Phi_s^T,    k_st y_t = Phi_s B
    y* = U (S + ridge/n S^-1) (V^T A V + ridge/n S^-2)^-1 V^T B

which is the formula above in the basis U. Where n >= p images of any kind span all p dimensions, V
is square and y* = Phi_s A^-1 B but for the ridge: the labels are the predictions of the classifier
of the whole training set, which regression on them gives back. The images do not matter then.

This ridge is absolute, as in the paper, while that of `dsdistill.methods.ridge`, which predicts
from the result, is relative to the mean of the diagonal.

Source: Nguyen, Chen and Lee (2021), arXiv:2011.00050, section 3.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dsdistill.harness import memory
from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.errors import UserError
from dsdistill.kernels import diagnosis, gram
from dsdistill.kernels.networks import Engine, InfiniteNetwork
from dsdistill.methods import linear_sums
from dsdistill.methods import ridge as krr
from dsdistill.parallel import devices

CHUNK = 2000  # targets per chunk; a tile of the kernel may be smaller
# Pairs per chunk for a convolutional kernel: some ten seconds between two checkpoints.
MAX_CHUNK_PAIRS = 50_000


class Sums(NamedTuple):
    """The two sums over the first `done` targets, in float64."""

    done: int
    gram_tt: Float[Array | np.ndarray, "n n"]
    gram_ty: Float[Array | np.ndarray, "n k"]


def accumulate(
    network: InfiniteNetwork,
    support: Float[np.ndarray, "n h w c"],
    train: Examples,
    start: Sums | None = None,
) -> Iterator[Sums]:
    """Sum k_st k_st^T and k_st y_t, one chunk of targets for each item that is taken.

    For a network with a map, the sums are those of `linear_sums`, which every support shares.

    Args:
        network: Network whose neural tangent kernel is used.
        support: Preprocessed images of the support.
        train: All targets; read once, in chunks.
        start: Sums to continue from.

    Raises:
        UserError: If the support is larger than the training set, or too large for memory; or if
            the kernel is not finite, with the first image for which it is not.
    """
    n, k = len(support), len(train.data.classes)
    if n > len(train):
        raise UserError(
            f"Label Solve needs a support no larger than the training set: {n} support images, "
            f"{len(train)} training images; lower --images-per-class"
        )
    if network.feature_map is not None:
        begun = None if start is None else linear_sums.Sums(*start)
        stream = linear_sums.accumulate(network.feature_map, train, begun)
        yield from (Sums(*sums) for sums in stream)
        return
    purpose = f"Label Solve with {n} support images"
    memory.require(6 * 8 * n * n, purpose, "lower --images-per-class")
    size = chunk_size(network, n, train)
    add = _compile_sum(network, support, size)
    sums = start or Sums(0, *(np.zeros(shape) for shape in ((n, n), (n, k))))
    with jax.enable_x64(True):  # placed as every later sum will be: no second compilation
        sums = Sums(sums.done, *map(devices.replicate, sums[1:]))
    for first in range(sums.done, len(train), size):
        done = min(first + size, len(train))
        rows = np.minimum(np.arange(first, first + size), len(train) - 1)  # one shape for all
        with jax.enable_x64(True):
            added = add(*sums[1:], done - first, train.images(rows), train.labels(rows))
            jax.block_until_ready(added)
        if not all(np.isfinite(array).all() for array in added):
            why = diagnosis.explain_not_finite(network, support, train.images(rows))
            raise UserError(f"the sums over the targets from {first} on are not finite: {why}")
        sums = Sums(done, *added)
        yield sums


def chunk_size(network: InfiniteNetwork, n: int, train: Examples) -> int:
    """Number of targets per chunk of `accumulate`, for `n` support images."""
    if network.feature_map is not None:
        return min(linear_sums.CHUNK, len(train))
    size = min(CHUNK, len(train))
    cheap = network.engine in (Engine.CLOSED_FORM, Engine.FEATURES)
    return size if cheap else min(max(MAX_CHUNK_PAIRS // n, 1), size)


def sum_size(network: InfiniteNetwork, support: Float[np.ndarray, "n h w c"]) -> int:
    """Number of rows of the sums: that of the support, or of the values of the network's map."""
    if network.feature_map is None:
        return len(support)
    return linear_sums.width(network.feature_map, support.shape[1:])


def _compile_sum(
    network: InfiniteNetwork, support: Float[np.ndarray, "n h w c"], targets: int
) -> Callable[..., tuple[Array, Array]]:
    """A compiled function that adds the first `count` of `targets` targets to the two sums."""
    n, *shape = support.shape
    tile = gram.plan_tile(network, n, devices.share(targets), tuple(shape), gradient=False)

    def share(x_s: Array, real: Array, x_t: Array, y_t: Array) -> tuple[Array, Array]:
        k_st = gram.gram(network.kernel, x_s, x_t, tile)
        k_st = jnp.where(real, k_st, 0).astype(jnp.float64)  # padding adds nothing
        return devices.total((k_st @ k_st.T, k_st @ y_t))

    @jax.jit
    def add(
        gram_tt: Array, gram_ty: Array, count: Array, x_t: Array, y_t: Array
    ) -> tuple[Array, Array]:
        more_tt, more_ty = devices.shard_targets(share)(support, count, x_t, y_t)
        return gram_tt + more_tt, gram_ty + more_ty

    return add


def solve(
    network: InfiniteNetwork, support: Float[np.ndarray, "n h w c"], sums: Sums, ridge: float
) -> Float[np.ndarray, "n k"]:
    """Labels of the support images that fit all training images best.

    Args:
        network, support: As for `accumulate`.
        sums: The sums over all targets, the last ones of `accumulate`.
        ridge: Absolute ridge; divided by n.

    Raises:
        UserError: If the system is singular at this ridge.
    """
    n = len(support)
    h, w, c = support.shape[1:]
    if network.feature_map is not None:
        labels = _solve_mapped(network.feature_map, support, sums, ridge / n)
        return _require_finite(labels, ridge)
    with jax.enable_x64(True):
        jitter = ridge / n * jnp.eye(n)
        tile = krr.support_tile(network, n, (h, w, c), gradient=False)
        k_ss = jax.jit(devices.everywhere(lambda x: krr.support_gram(network, x, tile)))(support)
        k_ss, gram_tt, gram_ty = map(np.asarray, (k_ss, *sums[1:]))  # on this host's own device
        fitted = jax.scipy.linalg.solve(gram_tt + jitter, gram_ty, assume_a="pos")
        labels = np.asarray(((k_ss + jitter) @ fitted).astype(jnp.float32))
    return _require_finite(labels, ridge)


def _solve_mapped(
    feature_map: linear_sums.FeatureMap,
    support: Float[np.ndarray, "n h w c"],
    sums: Sums,
    jitter: float,
) -> Float[np.ndarray, "n k"]:
    """Solve with the sums of a kernel's map, as the module's docstring derives.

    Args:
        feature_map, support, sums: As for `solve`.
        jitter: The ridge over n.
    """
    with jax.enable_x64(True):
        phi = feature_map(jnp.asarray(support, jnp.float64))
        gram_tt, gram_ty = (jnp.asarray(np.asarray(array)) for array in sums[1:])
        left, scale, right = jnp.linalg.svd(phi, full_matrices=False)
        # Directions that the support does not have, to the precision of float64.
        rank = int((scale > scale[0] * max(phi.shape) * jnp.finfo(phi.dtype).eps).sum())
        left, scale, right = left[:, :rank], scale[:rank], right[:rank]
        regular = right @ gram_tt @ right.T + jnp.diag(jitter / scale**2)
        fitted = jax.scipy.linalg.solve(regular, right @ gram_ty, assume_a="pos")
        labels = (left * (scale + jitter / scale)) @ fitted
        return np.asarray(labels.astype(jnp.float32))


def _require_finite(labels: Float[np.ndarray, "n k"], ridge: float) -> Float[np.ndarray, "n k"]:
    """Refuse labels of a singular system."""
    if not np.isfinite(labels).all():
        raise UserError(f"Label Solve is singular at a ridge of {ridge:g}: raise --ridge")
    return labels
