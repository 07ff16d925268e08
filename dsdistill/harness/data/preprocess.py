"""Preprocessing that is fitted once, stored with the distilled set, and never refitted.

Most failures to reproduce a published distilled set come from preprocessing that was refitted on
other images, so `Preprocess` is a value that is stored with the set.

Source of the ZCA variant: Nguyen, Novak, Xiao and Lee (2021), arXiv:2107.13034, and the
training notebook published with it.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Num

from dsdistill.harness import memory, stopping
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress

Kind = Literal["standardise", "zca", "none", "centre", "zca-mtt", "zca-rfad", "zca-frepo"]
KINDS: tuple[Kind, ...] = ("standardise", "zca", "none", "centre")  # available for new sets
ZCA_RIDGE = 0.1  # relative to the mean eigenvalue of the covariance, as in the paper's notebook
MTT_RIDGE = 0.1  # absolute, for pixels in [0, 1]
RFAD_RIDGE = FREPO_RIDGE = 0.1  # relative to the mean eigenvalue, for standardised pixels
SPANNED = 1e-10  # of the largest eigenvalue: below it, images have nothing in a direction
# Values of an image up to which ZCA is a default: 64x64 in colour, whose two matrices take 1.2 GB
# in every distilled set.
MAX_DEFAULT_ZCA_VALUES = 64 * 64 * 3
ANNOUNCED_BYTES = 2**30  # memory of ZCA that is worth a line
MAX_CHUNK_VALUES = 2**22  # pixel values in memory at a time: a data set may not fit
PROBE_ROWS = 512  # rows of the matrices whose product is timed
EIGENVECTORS_IN_PRODUCTS = 6  # cost of the eigenvectors of a matrix, in products of two

Chunks = Callable[[int], Iterator[Num[np.ndarray, "m h w c"]]]


@dataclass(frozen=True, eq=False)
class Preprocess:
    """Map from images in [0, 1] (or uint8) to the input of a kernel or network, and back.

    `standardise` subtracts the channel mean and divides by the channel deviation. `centre` divides
    by one number for all channels instead, so that the mean norm becomes the square root of d: the
    directions in which features vary keep their sizes relative to each other. `zca` then
    centres each flattened image, divides it by its L2 norm, and multiplies it by `whiten`.
    `zca-mtt` and `zca-frepo` subtract the mean image, divide by `std` and multiply by `whiten`;
    `zca-rfad` does the same with the channel means in place of the mean image.

    With fewer images than pixel values, `zca` keeps the scale of directions that no image has
    anything in, as published.

    Attributes:
        kind: One of the maps above; `none` only converts to float32 in [0, 1].
        mean: Mean of each channel of the training images; for `zca-mtt` and `zca-frepo` the mean
            image.
        std: Standard deviation of each channel of the training images; 1 for `zca-mtt`.
        whiten, unwhiten: Whitening matrix and its inverse, both symmetric, for all kinds of ZCA.
            d = h w c.
        contrast: Mean L2 norm of the centred training images. ZCA loses the norm of an image, so
            `invert` gives every image this one.
    """

    kind: Kind
    mean: Float[np.ndarray, "*h_w c"]
    std: Float[np.ndarray, " c"]
    whiten: Float[np.ndarray, "d d"] | None = None
    unwhiten: Float[np.ndarray, "d d"] | None = None
    contrast: float = 1.0

    def apply(self, images: Num[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n h w c"]:
        """Preprocess images to float32; uint8 is divided by 255 first, floats keep their values."""
        x = (unit_range(images) - self.mean) / self.std
        if self.whiten is None:
            return x
        flat = _directions(x)[0] if self.kind == "zca" else x.reshape(len(x), -1)
        return (flat @ self.whiten).reshape(x.shape)

    def invert(self, images: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n h w c"]:
        """Map preprocessed images back to pixels, roughly in [0, 1] but not clipped.

        Exact except for `zca`, which loses each image's brightness and contrast.
        """
        x = images
        if self.unwhiten is not None:
            flat = images.reshape(len(images), -1) @ self.unwhiten
            x = (flat * self.contrast).reshape(images.shape)
        return (x * self.std + self.mean).astype(np.float32)

    def same_as(self, other: "Preprocess") -> bool:
        """Whether both maps are equal, value for value."""
        return self.kind == other.kind and all(
            _equal(getattr(self, name), getattr(other, name))
            for name in ("mean", "std", "whiten", "contrast")
        )


def unit_range(
    images: Num[np.ndarray, "n h w c"], dtype: type[np.floating[Any]] = np.float32
) -> Float[np.ndarray, "n h w c"]:
    """Convert images to floats, float32 by default; uint8 is divided by 255."""
    x = np.asarray(images, dtype=dtype)
    return x / dtype(255) if images.dtype == np.uint8 else x


def identity(channels: int) -> Preprocess:
    """Preprocessing that changes nothing, for images that are already preprocessed."""
    return Preprocess("none", np.zeros(channels, np.float32), np.ones(channels, np.float32))


def default_kind(shape: tuple[int, int, int], count: int, *, convolutional: bool) -> Kind:
    """Choose the preprocessing for a kernel, and say so where memory decides.

    ZCA for colour images and convolutional kernels, which it gives up to 8 points on CIFAR-10;
    `standardise` for grayscale and for fully connected kernels, which lose 9 to 13 points by ZCA.
    Where ZCA does not fit into memory, or images have more than `MAX_DEFAULT_ZCA_VALUES` values,
    a note says that pixels are standardised instead.

    `centre` for features: their dimensions are neither whitened nor scaled one by one, for those
    with the smallest variance would become as loud as those that a backbone has learned, and its
    own similarity of images, Z Z^T, would be lost.

    Args:
        shape: Height, width and channels of an image.
        count: Number of training images.
        convolutional: Whether the kernel is that of a convolutional network.
    """
    if is_features(shape):
        return "centre"
    if shape[-1] != 3 or not convolutional:
        return "standardise"
    needed, free = zca_memory(count, shape), memory.available()
    if math.prod(shape) <= MAX_DEFAULT_ZCA_VALUES and needed <= free:
        return "zca"
    progress.say(
        f"note: pixels are standardised, since ZCA whitening, the default for this kernel, of "
        f"{shape[0]}x{shape[1]} images needs {memory.format_bytes(needed)}, "
        f"{memory.format_bytes(free)} is free (a smaller --image-size makes it possible)"
    )
    return "standardise"


def zca_memory(count: int, shape: tuple[int, int, int]) -> int:
    """Bytes of memory that fitting ZCA takes.

    Args:
        count: Number of training images.
        shape: Height, width and channels of an image.
    """
    d = math.prod(shape)
    if count >= d:
        # Covariance, eigenvectors and work space in float64, two float32 matrices at the end.
        return 6 * 8 * d**2
    # Images, eigenvectors and their scaled copy in float64; their products with work space; the
    # two float32 matrices.
    return 3 * 8 * count * d + 6 * 8 * count**2 + 2 * 4 * d**2


def fit(
    kind: str, chunks: Chunks, shape: tuple[int, int, int], amplify_unspanned: bool = False
) -> Preprocess:
    """Fit a preprocessing on training images.

    Args:
        kind: One of `KINDS`.
        chunks: Function of a chunk size that yields all training images in chunks of that size.
        shape: Height, width and channels of an image.
        amplify_unspanned: How ZCA scales directions in which no image has anything, where images
            are fewer than their pixel values: by the inverse root of the ridge, as earlier
            versions did, or not at all, as published.

    Raises:
        UserError: If the kind is unknown, or ZCA does not fit into memory.
    """
    check_kind(kind)
    channels = shape[-1]
    if kind == "none":
        return identity(channels)
    if kind == "zca":
        _require_memory(1, shape)  # the least that it takes, before an image is read
    mean, std, count = _channel_moments(chunks, shape)
    if kind == "standardise":
        return Preprocess("standardise", mean, std)
    if kind == "centre":
        return Preprocess("centre", mean, _common_scale(mean, chunks, shape))
    few = count < math.prod(shape) and not amplify_unspanned
    _require_memory(count if few else math.prod(shape), shape)
    _announce_zca(shape, count, few=few)
    return (_fit_zca_of_few if few else _fit_zca)(mean, std, count, chunks, shape)


def is_features(shape: tuple[int, ...]) -> bool:
    """Whether images of a shape (h, w, c) are features: one pixel with neither 1 nor 3 channels."""
    return tuple(shape[:2]) == (1, 1) and shape[2] not in (1, 3)


def _common_scale(
    mean: np.ndarray, chunks: Chunks, shape: tuple[int, int, int]
) -> Float[np.ndarray, " c"]:
    """The mean norm of the centred images over the root of d, for every channel."""
    total, count = 0.0, 0
    for images in chunks(_images_per_chunk(shape)):
        centred = (unit_range(images) - mean).reshape(len(images), -1)
        total, count = total + float(np.linalg.norm(centred, axis=1).sum()), count + len(images)
    scale = total / count / math.sqrt(math.prod(shape))
    return np.full(shape[-1], scale or 1.0, np.float32)


def _channel_moments(
    chunks: Chunks, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean and standard deviation of each channel, and the number of images."""
    channels = shape[-1]
    count, total, squares = 0, np.zeros(channels), np.zeros(channels)
    for images in chunks(_images_per_chunk(shape)):
        # float64: a sum over millions of pixels loses digits in float32.
        x = unit_range(images).astype(np.float64).reshape(-1, channels)
        count, total, squares = count + len(x), total + x.sum(0), squares + (x * x).sum(0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    std[std < 1e-6] = 1.0  # a constant channel: dividing by 0 would give NaN
    return mean.astype(np.float32), std.astype(np.float32), count // (shape[0] * shape[1])


def _fit_zca(
    mean: np.ndarray, std: np.ndarray, count: int, chunks: Chunks, shape: tuple[int, int, int]
) -> Preprocess:
    """ZCA by the covariance of the directions of the images."""
    d = math.prod(shape)
    covariance, norms = np.zeros((d, d)), 0.0
    for directions, norm in _direction_chunks(mean, std, count, chunks, shape):
        covariance += directions.T.astype(np.float64) @ directions
        norms += float(norm.sum())
    covariance /= count
    # If all images are constant the covariance is zero: whitening is then the identity.
    covariance[np.diag_indices(d)] += ZCA_RIDGE * np.trace(covariance) / d or 1.0
    return Preprocess("zca", mean, std, *_roots(covariance), contrast=norms / count)


def _fit_zca_of_few(
    mean: np.ndarray, std: np.ndarray, count: int, chunks: Chunks, shape: tuple[int, int, int]
) -> Preprocess:
    """ZCA of fewer images than their pixel values, by the n x n products of the images.

    The covariance X^T X / n has the eigenvalues v of X X^T / n, whose eigenvectors u give its own:
    X^T u / sqrt(n v). Directions that no image has anything in keep their scale. The published
    code does so for all but the n largest eigenvalues, which is the same unless images depend
    linearly on each other.
    """
    d = math.prod(shape)
    rows, norms, filled = np.empty((count, d)), 0.0, 0
    # float64: where images depend on each other almost linearly, rounding of float32 would turn
    # the basis out of their span.
    for directions, norm in _direction_chunks(mean, std, count, chunks, shape, np.float64):
        rows[filled : filled + len(directions)] = directions
        norms, filled = norms + float(norm.sum()), filled + len(directions)
    products = rows @ rows.T / count
    values, vectors = stopping.call_interruptibly(lambda: np.linalg.eigh(products))
    spanned = values > SPANNED * max(values[-1], 0)
    values, vectors = values[spanned], vectors[:, spanned]
    basis = rows.T @ (vectors / np.sqrt(count * values))  # (d, rank), orthonormal columns
    roots = np.sqrt(values + ZCA_RIDGE * np.trace(products) / d)
    matrices = (_scale_along(basis, scales) for scales in (1 / roots, roots))
    return Preprocess("zca", mean, std, *matrices, contrast=norms / count)


def _scale_along(
    basis: Float[np.ndarray, "d r"], scales: Float[np.ndarray, " r"]
) -> Float[np.ndarray, "d d"]:
    """Symmetric float32 matrix that scales the directions of a basis, and leaves all others."""
    d, matrix = len(basis), np.empty((len(basis), len(basis)), np.float32)
    change = basis * (scales - 1)
    for first in range(0, d, PROBE_ROWS):  # no float64 copy of the whole
        matrix[first : first + PROBE_ROWS] = change[first : first + PROBE_ROWS] @ basis.T
    matrix[np.diag_indices(d)] += 1
    return matrix


def _direction_chunks(
    mean: np.ndarray,
    std: np.ndarray,
    count: int,
    chunks: Chunks,
    shape: tuple[int, int, int],
    dtype: type[np.floating[Any]] = np.float32,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Directions and norms of all images, see `_directions`, with progress."""
    size = _images_per_chunk(shape)
    parts = [slice(first, min(first + size, count)) for first in range(0, count, size)]
    # `chunks` is exhausted, so that a memory map behind it is read to its end.
    for images, _ in zip(
        chunks(size), progress.track_if_slow(parts, "images for ZCA"), strict=True
    ):
        yield _directions((unit_range(images, dtype) - mean) / std)


def fit_mtt(chunks: Chunks, shape: tuple[int, int, int]) -> Preprocess:
    """Fit the ZCA of MTT, for its whitened sets: on pixels in [0, 1], not standardised.

    Args:
        chunks, shape: As for `fit`.

    Raises:
        UserError: If the covariance does not fit into memory.

    Source: Cazenavette et al. (2022), arXiv:2203.11932, whose code calls Kornia's
    `ZCAWhitening(eps=0.1)`.
    """
    one = np.ones(shape[-1], np.float32)
    total, squares, count = _outer_product_sums(chunks, shape, np.zeros_like(one), one)
    mean = total / count
    covariance = (squares - count * np.outer(mean, mean)) / max(count - 1, 1)
    covariance[np.diag_indices(len(mean))] += MTT_RIDGE
    return Preprocess("zca-mtt", mean.reshape(shape).astype(np.float32), one, *_roots(covariance))


def fit_rfad(chunks: Chunks, shape: tuple[int, int, int]) -> Preprocess:
    """Fit the ZCA of RFAD, for its whitened CIFAR sets: on standardised pixels, not centred.

    Neither the mean image nor the brightness of an image is subtracted: the matrix is the inverse
    square root of the mean outer product of standardised images, plus `RFAD_RIDGE` times its mean
    eigenvalue.

    Args:
        chunks, shape: As for `fit`.

    Raises:
        UserError: If the matrix does not fit into memory.

    Source: Loo et al. (2022), arXiv:2210.12067; `get_zca_matrix` in `data.py` of its code.
    """
    mean, std, _ = _channel_moments(chunks, shape)
    _, squares, count = _outer_product_sums(chunks, shape, mean, std)
    second = squares / count
    second[np.diag_indices(len(second))] += RFAD_RIDGE * np.trace(second) / len(second) or 1.0
    return Preprocess("zca-rfad", mean, std, *_roots(second))


def fit_frepo(
    chunks: Chunks,
    shape: tuple[int, int, int],
    constants: tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]] | None = None,
) -> Preprocess:
    """Fit the ZCA of FRePo, for its whitened colour sets: on standardised pixels, centred.

    The mean image is subtracted. With fewer images than pixel values, directions beyond the number
    of images keep their scale.

    Args:
        chunks, shape: As for `fit`.
        constants: Channel mean and deviation with which the pixels were standardised; by default
            those of the images.

    Raises:
        UserError: If the covariance does not fit into memory.

    Source: Zhou et al. (2022), arXiv:2206.00719; `lib/dataset/ops.py` of its code.
    """
    mean, std = constants or _channel_moments(chunks, shape)[:2]
    total, squares, count = _outer_product_sums(chunks, shape, mean, std)
    centre = total / count
    covariance = squares / count - np.outer(centre, centre)
    covariance[np.diag_indices(len(centre))] += (
        FREPO_RIDGE * np.trace(covariance) / len(centre) or 1.0
    )
    image = mean + std * centre.reshape(shape).astype(np.float32)
    return Preprocess("zca-frepo", image, std, *_roots(covariance, rank=count))


def _outer_product_sums(
    chunks: Chunks,
    shape: tuple[int, int, int],
    mean: Float[np.ndarray, " c"],
    std: Float[np.ndarray, " c"],
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"], int]:
    """Sum of flattened standardised images, sum of their outer products, and their number."""
    d, count = math.prod(shape), 0
    _require_memory(d, shape)
    total, squares = np.zeros(d), np.zeros((d, d))
    for images in chunks(_images_per_chunk(shape)):
        # float64: the square of the mean will be subtracted from the mean square.
        x = ((unit_range(images) - mean) / std).reshape(len(images), d).astype(np.float64)
        count, total, squares = count + len(x), total + x.sum(0), squares + x.T @ x
    return total, squares, count


def _roots(
    covariance: Float[np.ndarray, "d d"], rank: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric inverse square root and square root of a covariance, in float32.

    Args:
        covariance: Symmetric positive definite matrix.
        rank: Number of largest eigenvalues that are known; the others count as 1.
    """
    # Eigenvalues are in ascending order.
    values, vectors = stopping.call_interruptibly(lambda: np.linalg.eigh(covariance))
    roots = np.sqrt(values)
    if rank is not None and rank < len(roots):
        roots[: len(roots) - rank] = 1.0
    inverse, root = (vectors / roots) @ vectors.T, (vectors * roots) @ vectors.T
    return inverse.astype(np.float32), root.astype(np.float32)


def _announce_zca(shape: tuple[int, int, int], count: int, *, few: bool) -> None:
    """Print the time, from that of one matrix product, and the memory of ZCA if either is large."""
    d, small = math.prod(shape), np.ones((PROBE_ROWS, PROBE_ROWS))
    if d < 2 * PROBE_ROWS:
        return
    began = time.perf_counter()
    np.matmul(small, small)
    seconds = (time.perf_counter() - began) / PROBE_ROWS**3
    size = count if few else d  # of the matrix whose eigenvectors are found
    products = 2 * size * size * d + 2 * d * d * size if few else count * d * d + 2 * d**3
    total = seconds * (products + EIGENVECTORS_IN_PRODUCTS * size**3)
    needed = zca_memory(size, shape)
    if total > progress.SECONDS_BETWEEN_LINES or needed > ANNOUNCED_BYTES:
        name = "x".join(map(str, shape))
        progress.say(
            f"ZCA of {count} images of {name}: a matrix of {size}x{size} values and its "
            f"eigenvectors, roughly {progress.format_duration(total)}, "
            f"{memory.format_bytes(needed)} of memory (--preprocess standardise avoids it)"
        )


def _require_memory(count: int, shape: tuple[int, int, int]) -> None:
    """Refuse ZCA of a number of images that does not fit into memory."""
    remedy = "use --preprocess standardise, or a smaller --image-size"
    purpose = f"ZCA whitening of {shape[0]}x{shape[1]} images"
    memory.require(zca_memory(count, shape), purpose, remedy)


def _images_per_chunk(shape: tuple[int, int, int]) -> int:
    """Number of images with `MAX_CHUNK_VALUES` values together, at least one."""
    return max(MAX_CHUNK_VALUES // math.prod(shape), 1)


def _directions(x: Float[np.ndarray, "n h w c"]) -> tuple[np.ndarray, np.ndarray]:
    """Flattened images, centred and divided by their L2 norm; and the norms, (n, 1)."""
    flat = x.reshape(len(x), -1)
    # float64: a float32 mean of equal pixels is not exactly their value, and the division by the
    # norm would amplify the difference to a direction of pure rounding error.
    flat = flat - flat.mean(1, keepdims=True, dtype=np.float64).astype(flat.dtype)
    norm = np.linalg.norm(flat, axis=1, keepdims=True)
    return flat / np.maximum(norm, 1e-12), norm  # a constant image has norm 0 and stays 0


def _equal(a: object, b: object) -> bool:
    if a is None or b is None:
        return a is b
    return np.array_equal(np.asarray(a), np.asarray(b))


def check_kind(kind: str) -> None:
    """Refuse an unknown `--preprocess`."""
    if kind not in KINDS:
        raise UserError(f"preprocess must be one of {', '.join(KINDS)}, got {kind!r}")
