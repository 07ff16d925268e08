"""Label Solve: real images keep their pixels, and their labels are solved for in closed form.

The labels that make ridge regression on the support fit the whole training set best are, with n
support images,

    y* = (k_ss + ridge/n I) (k_st k_st^T + ridge/n I)^-1 k_st y_t

k_st k_st^T (n x n) and k_st y_t (n x k) are sums over targets, so the training set streams
through once, tile by tile, in O(n² + tile) memory.

This ridge is absolute, as in the paper, while the ridge of `dsdistill.ridge`, with which the
result is used, is relative to the mean of the diagonal.

Source: Nguyen, Chen and Lee (2021), arXiv:2011.00050, section 3.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dsdistill import ridge as krr
from dsdistill.harness import memory
from dsdistill.harness.datasets import Examples
from dsdistill.harness.errors import UserError
from dsdistill.kernels import gram
from dsdistill.kernels.networks import Network

CHUNK = 2000  # targets that are read at a time; a tile of the kernel may be smaller


def solve_labels(
    network: Network,
    support: Float[np.ndarray, "n h w c"],
    train: Examples,
    *,
    ridge: float = 1e-6,
    on_chunk: Callable[[int], None] = lambda done: None,
) -> Float[np.ndarray, "n k"]:
    """Labels of the support images that fit all training images best.

    Args:
        network: Whose neural tangent kernel.
        support: Preprocessed images.
        train: All targets; read once, in chunks.
        ridge: Absolute, divided by n.
        on_chunk: Called with the number of targets done so far.

    Raises:
        UserError: If the support is larger than the training set, too large for memory, or the
            system is singular at this ridge.
    """
    n = len(support)
    if n > len(train):
        raise UserError(
            f"Label Solve needs a support no larger than the training set: {n} support images, "
            f"{len(train)} training images; lower --images-per-class"
        )
    memory.require(
        6 * 8 * n * n, f"Label Solve with {n} support images", "lower --images-per-class"
    )
    with jax.enable_x64(True):
        x_s = jnp.asarray(support)
        gram_tt, gram_ty = _sums(network, x_s, train, on_chunk)
        labels = np.asarray(_solve(network, x_s, gram_tt, gram_ty, ridge))
    if not np.isfinite(labels).all():
        raise UserError(f"Label Solve is singular at a ridge of {ridge:g}: raise --ridge")
    return labels


def _sums(
    network: Network,
    support: Array,
    train: Examples,
    on_chunk: Callable[[int], None],
) -> tuple[Array, Array]:
    """k_st k_st^T and k_st y_t over the whole training set, in float64."""
    n = len(support)
    tile = gram.plan(network, n, CHUNK, train.data.shape, gradient=False)

    @jax.jit
    def add(sums: tuple[Array, Array], x_t: Array, y_t: Array, real: Array) -> tuple[Array, Array]:
        k_st = gram.gram(network.kernel, support, x_t, tile)
        k_st = jnp.where(real, k_st, 0).astype(jnp.float64)  # padding adds nothing
        return sums[0] + k_st @ k_st.T, sums[1] + k_st @ y_t

    sums = jnp.zeros((n, n)), jnp.zeros((n, len(train.data.classes)))
    for start in range(0, len(train), CHUNK):
        rows = np.arange(start, start + CHUNK)
        real = rows < len(train)
        rows = np.minimum(rows, len(train) - 1)  # one shape, one compilation
        sums = add(sums, train.images(rows), train.labels(rows), real)
        jax.block_until_ready(sums)
        on_chunk(min(start + CHUNK, len(train)))
    return sums


def _solve(network: Network, support: Array, gram_tt: Array, gram_ty: Array, ridge: float) -> Array:
    n = len(support)
    jitter = ridge / n * jnp.eye(n)
    h, w, c = support.shape[1:]
    tile = gram.plan(network, n, n, (h, w, c), gradient=False, dtype=jnp.float64)
    k_ss = krr.support_gram(network, support, tile)
    fitted = jax.scipy.linalg.solve(gram_tt + jitter, gram_ty, assume_a="pos")
    return ((k_ss + jitter) @ fitted).astype(jnp.float32)
