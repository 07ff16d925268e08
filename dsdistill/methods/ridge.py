"""Kernel ridge regression: the predictor that KIP differentiates through.

    alpha = (k_ss + ridge * mean(diag k_ss) * I)^-1 y_s,    pred = k_st^T alpha

The ridge is relative to the mean of the diagonal, as in the KIP papers, so the same value serves
kernels of any scale. Everything here is float64: the smallest eigenvalues of k_ss are a millionth
of the largest, and float32 would return noise. Call it under `jax.enable_x64(True)`.

Source: Nguyen, Chen and Lee (2021), arXiv:2011.00050, equation 2.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dsdistill.harness import memory
from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation.protocol import Predict
from dsdistill.harness.runs import progress
from dsdistill.kernels.gram import Tile, gram, plan_tile
from dsdistill.kernels.networks import InfiniteNetwork
from dsdistill.parallel import devices

CHUNK = 2000  # images that are predicted at a time
# Training images of an exact solve: 0.8 GB of kernel, ten seconds on two cores.
MAX_TRAINING_IMAGES = 10_000


def solve(k_ss: Float[Array, "n n"], y_s: Float[Array, "n k"], ridge: float) -> Float[Array, "n k"]:
    """Coefficients alpha, by Cholesky; all NaN where k_ss + ridge is not positive definite.

    Args:
        k_ss: Kernel of the support with itself, float64.
        y_s: Support labels.
        ridge: Relative: `ridge * mean(diag(k_ss))` is added to the diagonal.
    """
    n = len(k_ss)
    regular = k_ss + ridge * jnp.trace(k_ss) / n * jnp.eye(n)
    return jax.scipy.linalg.solve(regular, y_s.astype(k_ss.dtype), assume_a="pos")


def predict(k_st: Float[Array, "n m"], alpha: Float[Array, "n k"]) -> Float[Array, "m k"]:
    """Scores of the m targets, in float64: large coefficients of both signs cancel."""
    return k_st.astype(alpha.dtype).T @ alpha


def loss(
    k_ss: Float[Array, "n n"],
    k_st: Float[Array, "n m"],
    y_s: Float[Array, "n k"],
    y_t: Float[Array, "m k"],
    ridge: float,
    weights: Float[Array, " m"] | None = None,
) -> Float[Array, ""]:
    """Half the mean squared error of the predicted targets, over all m k entries.

    Args:
        k_ss, k_st: Kernel of the support with itself and with the targets.
        y_s, y_t: Labels of support and targets.
        ridge: Relative, see `solve`.
        weights: Of each target in the mean; None: 1/m for all.
    """
    errors = jnp.mean((predict(k_st, solve(k_ss, y_s, ridge)) - y_t) ** 2, axis=1)
    return 0.5 * (jnp.mean(errors) if weights is None else weights @ errors)


@dataclass(frozen=True)
class RidgeLearner:
    """Kernel ridge regression as a `Learner`. Nothing in it is random or tuned.

    Attributes:
        network: Whose kernel.
        ridge: Relative, see `solve`.
        name, limit, identity: As any learner's; without an identity its results are not kept.
    """

    network: InfiniteNetwork
    ridge: float = 1e-6
    name: str = "ridge"
    limit: int | None = MAX_TRAINING_IMAGES
    identity: Mapping[str, Any] | None = None
    deterministic: ClassVar[bool] = True

    @property
    def accelerator(self) -> str | None:
        """Its name, if JAX computes on one."""
        device = jax.devices()[0]
        return None if device.platform == "cpu" else device.device_kind

    def __call__(self, train: Examples, validation: Examples, seed: int, /) -> Predict:
        """Fit on all training images; validation images and seed play no part."""
        return fit(self.network, train.images(), train.labels(), self.ridge)


def fit(
    network: InfiniteNetwork,
    images: Float[np.ndarray, "n h w c"],
    labels: Float[np.ndarray, "n k"],
    ridge: float,
    *,
    unit: str | None = None,
) -> Predict:
    """Solve for one support and return its predictor.

    Args:
        network: Whose kernel.
        images, labels: The support.
        ridge: Relative, see `solve`.
        unit: What live progress of a long prediction calls the images; None shows none.

    Raises:
        UserError: If the kernel is singular at this ridge, or does not fit into memory.
    """
    n = len(images)
    memory.require(4 * 8 * n * n, f"ridge regression on {n} images", "use fewer images")
    with jax.enable_x64(True):
        programs = _programs(network, n, images.shape[1:])
        alpha = np.asarray(programs.coefficients(images, labels, ridge))
        if not np.isfinite(alpha).all():
            raise UserError(
                f"the kernel of {n} images is singular at a ridge of {ridge:g}: raise --ridge"
            )

    def predictor(targets: Float[np.ndarray, "m h w c"], /) -> Float[np.ndarray, "m k"]:
        size, out = min(CHUNK, len(targets)), []
        starts = range(0, len(targets), size)
        parts = [slice(start, min(start + size, len(targets))) for start in starts]
        with jax.enable_x64(True):
            for part in progress.track_if_slow(parts, unit) if unit else parts:
                chunk = targets[part]
                filled = np.zeros((size, *chunk.shape[1:]), np.float32)
                filled[: len(chunk)] = chunk  # one shape for all: one compilation
                out.append(np.asarray(programs.scores(images, alpha, filled))[: len(chunk)])
        return np.concatenate(out)

    return predictor


def support_gram(
    network: InfiniteNetwork, support: Float[Array, "n h w c"], tile: Tile
) -> Float[Array, "n n"]:
    """k_ss in float64 with an exact diagonal: in float32 kernels lose digits on identical images.

    neural-tangents' kernels are float64 on the diagonal alone, the others throughout.

    Args:
        network: Whose kernel.
        support: float32 images.
        tile: Of `support_tile`.
    """
    double = support.astype(jnp.float64)
    if network.symmetric is not None:
        return network.symmetric(double)
    if network.diagonal is None:
        return gram(network.kernel, double, double, tile)
    k_ss = gram(network.kernel, support, support, tile).astype(jnp.float64)
    return jnp.where(jnp.eye(len(support), dtype=bool), network.diagonal(double), k_ss)


def support_tile(
    network: InfiniteNetwork, n: int, shape: tuple[int, int, int], *, gradient: bool
) -> Tile:
    """The tile for `support_gram`."""
    dtype = jnp.float64 if network.diagonal is None else jnp.float32
    with jax.enable_x64(True):
        return plan_tile(network, n, n, shape, gradient=gradient, dtype=dtype)


@dataclass(frozen=True)
class _Programs:
    """The two compiled computations of one support size."""

    coefficients: Callable[..., Array]
    scores: Callable[..., Array]


@functools.lru_cache(maxsize=8)  # a run validates dozens of supports of the same size
def _programs(network: InfiniteNetwork, n: int, shape: tuple[int, int, int]) -> _Programs:
    tile_ss = support_tile(network, n, shape, gradient=False)
    tile_st = plan_tile(network, n, devices.share(CHUNK), shape, gradient=False)

    def coefficients(x_s: Array, y_s: Array, ridge: float) -> Array:
        return solve(support_gram(network, x_s, tile_ss), y_s, ridge)

    def everywhere(x_s: Array, y_s: Array, ridge: float) -> Array:
        return devices.everywhere(coefficients)(x_s, y_s, ridge)

    def share(whole: tuple[Array, Array], real: Array, x_t: Array) -> Array:
        x_s, alpha = whole
        return devices.gather_rows(predict(gram(network.kernel, x_s, x_t, tile_st), alpha))

    def scores(x_s: Array, alpha: Array, x_t: Array) -> Array:
        return devices.shard_targets(share)((x_s, alpha), len(x_t), x_t)

    return _Programs(jax.jit(everywhere), jax.jit(scores))
