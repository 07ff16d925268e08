"""Kernel ridge regression: the predictor that KIP differentiates through.

    alpha = (k_ss + ridge * mean(diag k_ss) * I)^-1 y_s,    pred = k_st^T alpha

The ridge is relative to the mean of the diagonal, as in the KIP papers, so the same value serves
kernels of any scale. Everything is float64: the smallest eigenvalues of k_ss are a millionth of
the largest, and float32 would return noise. Call these functions under `jax.enable_x64(True)`.

For a kernel with an explicit map Phi of fewer values than there are images, the same predictor is
Phi(x) (Phi^T Phi + ridge * trace(Phi^T Phi) / n I)^-1 Phi^T y, in memory that does not grow with n.

Source: Nguyen, Chen and Lee (2021), arXiv:2011.00050, equation 2.
"""

import collections
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dsdistill.harness import memory
from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from dsdistill.harness.data.preprocess import identity
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation.held_out import Predict
from dsdistill.harness.runs import progress
from dsdistill.kernels.gram import Tile, gram, plan_tile
from dsdistill.kernels.networks import InfiniteNetwork
from dsdistill.methods import linear_sums
from dsdistill.methods.augment import add_flips
from dsdistill.methods.linear_sums import FeatureMap
from dsdistill.parallel import devices

CHUNK = 2000  # images per chunk of a prediction
MAX_TRAINING_IMAGES = 10_000  # for an exact solution: 0.8 GB of kernel, ten seconds on two cores


def solve(k_ss: Float[Array, "n n"], y_s: Float[Array, "n k"], ridge: float) -> Float[Array, "n k"]:
    """Coefficients alpha, by Cholesky; all NaN where k_ss + ridge is not positive definite.

    Args:
        k_ss: Kernel of the support with itself, float64.
        y_s: Support labels.
        ridge: Relative ridge: `ridge * mean(diag(k_ss))` is added to the diagonal.
    """
    n = len(k_ss)
    regular = k_ss + ridge * jnp.trace(k_ss) / n * jnp.eye(n)
    return jax.scipy.linalg.solve(regular, y_s.astype(k_ss.dtype), assume_a="pos")


def predict(k_st: Float[Array, "n m"], alpha: Float[Array, "n k"]) -> Float[Array, "m k"]:
    """Scores of the m targets, in float64: large coefficients of both signs cancel."""
    return k_st.astype(alpha.dtype).T @ alpha


@dataclass(frozen=True)
class RidgeLearner:
    """Kernel ridge regression as a `Learner`, with nothing random or tuned.

    Attributes:
        network: Network whose neural tangent kernel is used.
        ridge: Relative ridge, see `solve`.
        name: Name in reports.
        limit: Largest number of training images; None: any.
        flips: Whether their mirror images count as further training images.
        identity: JSON-compatible identity in the cache of results; None: results are not cached.
    """

    network: InfiniteNetwork
    ridge: float = 1e-6
    name: str = "ridge"
    limit: int | None = MAX_TRAINING_IMAGES
    flips: bool = False
    identity: Mapping[str, Any] | None = None
    deterministic: ClassVar[bool] = True

    @property
    def accelerator(self) -> str | None:
        """Name of the accelerator that JAX computes on; None on a CPU."""
        device = jax.devices()[0]
        return None if device.platform == "cpu" else device.device_kind

    def __call__(self, train: Examples, validation: Examples, seed: int, /) -> Predict:
        """Fit on all training images; validation images and seed have no influence."""
        feature_map = None if self.flips else self.network.feature_map
        explicit = None if feature_map is None else _fit_map(feature_map, train, self.ridge)
        return explicit or fit(
            self.network, train.images(), train.labels(), self.ridge, flips=self.flips
        )


def fit(
    network: InfiniteNetwork,
    images: Float[np.ndarray, "n h w c"],
    labels: Float[np.ndarray, "n k"],
    ridge: float,
    *,
    flips: bool = False,
    unit: str | None = None,
) -> Predict:
    """Fit kernel ridge regression to one support and return its predictor.

    Args:
        network: Network whose neural tangent kernel is used.
        images, labels: The support.
        ridge: Relative ridge, see `solve`.
        flips: Whether the support's mirror images count as further images.
        unit: Name of the images in the progress bar of a long prediction; None shows no bar.

    Raises:
        UserError: If the kernel is singular at this ridge, or does not fit into memory.
    """
    if flips:
        both = add_flips(jnp.asarray(images), jnp.asarray(labels))
        images, labels = np.asarray(both[0]), np.asarray(both[1])
    n = len(images)
    if network.feature_map is not None:
        labelled = LabeledImages(images, labels.argmax(1), tuple(map(str, range(labels.shape[1]))))
        whole = Examples(labelled, identity(images.shape[-1]), labels, is_preprocessed=True)
        if (explicit := _fit_map(network.feature_map, whole, ridge)) is not None:
            return explicit
    memory.require(4 * 8 * n * n, f"ridge regression on {n} images", "use fewer images")
    with jax.enable_x64(True):
        programs = _programs(network, n, images.shape[1:])
        alpha = np.asarray(programs.coefficients(images, labels, ridge))
        if not np.isfinite(alpha).all():
            raise UserError(
                f"the kernel of {n} images is singular at a ridge of {ridge:g}: raise --ridge"
            )

    def predictor(targets: Float[np.ndarray, "m h w c"], /) -> Float[np.ndarray, "m k"]:
        size, scores = min(CHUNK, len(targets)), []
        starts = range(0, len(targets), size)
        parts = [slice(start, min(start + size, len(targets))) for start in starts]
        with jax.enable_x64(True):
            for part in progress.track_if_slow(parts, unit) if unit else parts:
                chunk = targets[part]
                padded = np.zeros((size, *chunk.shape[1:]), np.float32)
                padded[: len(chunk)] = chunk  # one shape for all chunks: one compilation
                scores.append(np.asarray(programs.scores(images, alpha, padded))[: len(chunk)])
        return np.concatenate(scores)

    return predictor


def _fit_map(feature_map: FeatureMap, train: Examples, ridge: float) -> Predict | None:
    """Fit by a kernel's map, in one pass; None unless it has fewer values than there are images.

    Args:
        feature_map: The map.
        train: The support.
        ridge: As for `fit`.
    """
    if len(train) <= linear_sums.width(feature_map, train.data.shape):
        return None
    [sums] = collections.deque(linear_sums.accumulate(feature_map, train), maxlen=1)
    gram_tt, gram_ty = map(np.asarray, sums[1:])
    weights = linear_sums.weights(gram_tt, gram_ty, ridge * np.trace(gram_tt) / len(train))
    apply = jax.jit(lambda x: feature_map(x.astype(jnp.float64)) @ weights)

    def predictor(targets: Float[np.ndarray, "m h w c"], /) -> Float[np.ndarray, "m k"]:
        with jax.enable_x64(True):
            starts = range(0, len(targets), CHUNK)
            parts = [np.asarray(apply(targets[i : i + CHUNK])) for i in starts]
        return np.concatenate(parts)

    return predictor


def support_gram(
    network: InfiniteNetwork, support: Float[Array, "n h w c"], tile: Tile
) -> Float[Array, "n n"]:
    """k_ss in float64 with an exact diagonal: float32 kernels lose digits on identical images.

    Kernels of neural-tangents are float64 only on the diagonal, all others everywhere.

    Args:
        network: Network whose neural tangent kernel is used.
        support: float32 images.
        tile: Tile size, from `support_tile`.
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
    """The tile size for `support_gram` with `n` images."""
    dtype = jnp.float64 if network.diagonal is None else jnp.float32
    with jax.enable_x64(True):
        return plan_tile(network, n, n, shape, gradient=gradient, dtype=dtype)


@dataclass(frozen=True)
class _Programs:
    """The two compiled functions for one support size."""

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
