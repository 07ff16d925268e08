"""Initial supports of KIP: real images, noise, or an earlier distilled set.

Source: Nguyen, Chen and Lee (2021), arXiv:2011.00050, for noise and for corruption.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from dsdistill.harness.data import distilled_set
from dsdistill.harness.data.labeled_images import (
    Examples,
    LabeledImages,
    centred_one_hot,
    draw_per_class,
)
from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError, unknown_name

INIT_NAMES = ("real", "noise")  # values of `--init` that name no set


@dataclass(frozen=True, eq=False)
class Support:
    """Initial images and labels of an optimisation.

    Attributes:
        images, labels: Preprocessed images and centred one-hot labels, in class order.
        frozen: Whether a pixel is never learned (`--corruption`).
    """

    images: Float[np.ndarray, "n h w c"]
    labels: Float[np.ndarray, "n k"]
    frozen: Bool[np.ndarray, "n h w 1"]


def draw_support(
    train: Examples, images_per_class: int, *, noise: bool, corruption: float, seed: int
) -> Support:
    """Draw class-balanced real images or Gaussian noise, partly replaced by frozen noise.

    Args:
        train: Images to draw from, without replacement.
        images_per_class: Exact number of images of every class; classes come in order.
        noise: Start from noise of mean 0 and variance 1 instead of real images.
        corruption: Fraction of the pixels that are noise and stay so, in [0, 1].
        seed: Seed of the draw and of the noise.
    """
    rng = np.random.default_rng([seed, 0])
    rows = draw_per_class(train.data, images_per_class, rng)
    images = train.images(rows)
    labels = centred_one_hot(train.data.labels[rows], len(train.data.classes))
    return corrupt(images, labels, corruption, rng, noise=noise)


def corrupt(
    images: Float[np.ndarray, "n h w c"],
    labels: Float[np.ndarray, "n k"],
    fraction: float,
    rng: np.random.Generator,
    *,
    noise: bool = False,
) -> Support:
    """Make a support of images, a fraction of whose pixels is replaced by frozen noise.

    Args:
        images, labels: Images and labels in class order.
        fraction: Fraction of the pixels to replace, in [0, 1].
        rng: Draws the noise and its pixels.
        noise: Replace the other pixels too, by noise that is learned.
    """
    noisy = rng.standard_normal(images.shape, np.float32)
    frozen = rng.random((*images.shape[:3], 1)) < fraction
    return Support(noisy if noise else np.where(frozen, noisy, images), labels, frozen)


def load(init: str) -> tuple[distilled_set.DistilledSet, str]:
    """Load the distilled set that `--init` names, and the SHA-256 of its file.

    Raises:
        UserError: If `init` is no path, or the file is damaged.
    """
    path = Path(init).expanduser()
    if not path.exists():
        raise unknown_name("--init", init, [*INIT_NAMES, "a .safetensors file", "a run's folder"])
    file = distilled_set.locate(path)
    return distilled_set.load(file), hashlib.sha256(file.read_bytes()).hexdigest()


def check(
    distilled: distilled_set.DistilledSet, train: LabeledImages, images_per_class: int | None
) -> int:
    """Refuse a set that a run on these images cannot start from; return its images per class.

    Args:
        distilled: The set that `load` returned.
        train: The images that will be the targets.
        images_per_class: The number that the user asked for; None: any.

    Raises:
        UserError: If classes, shape, label encoding or number of images do not fit.
    """
    k, n = len(train.classes), len(distilled)
    if distilled.classes != train.classes:
        raise UserError(
            f"--init: the set and the data must have the same classes in the same order, got "
            f"{len(distilled.classes)} classes and {k}: choose the data that the set was made from"
        )
    if distilled.images.shape[1:] != train.shape:
        shapes = ("x".join(map(str, s)) for s in (distilled.images.shape[1:], train.shape))
        raise UserError(
            "--init: the set's images are {}, the data's {}: set --image-size and --channels to "
            "match".format(*shapes)
        )
    if distilled.encoding != distilled_set.ENCODING:
        raise UserError(
            f"--init: the set's labels are {distilled.encoding!r}, "
            f"expected {distilled_set.ENCODING!r}"
        )
    if n % k:
        raise UserError(
            f"--init: a set must have the same number of images of each class, got {n} images of "
            f"{k} classes: choose another set"
        )
    if images_per_class not in (None, n // k):
        raise UserError(
            f"--init: the set has {n // k} images per class, --images-per-class asks for "
            f"{images_per_class}: leave that option out"
        )
    return n // k


def overlaps_validation(
    distilled: distilled_set.DistilledSet, digest: str, validation_fraction: float
) -> bool:
    """Whether a set was made with training images that a run holds out for validation.

    Splits are nested: a larger fraction holds out all that a smaller one does.

    Args:
        distilled: A set; one that does not say how it was made counts as independent.
        digest, validation_fraction: SHA-256 and validation fraction of the run's data.
    """
    data, config = (distilled.provenance.get(name) for name in ("data", "config"))
    if not isinstance(data, dict) or not isinstance(config, dict):
        return False
    held_out = config.get("validation_fraction")
    return (
        data.get("sha256") == digest
        and isinstance(held_out, int | float)
        and held_out < validation_fraction
    )


def from_set(
    distilled: distilled_set.DistilledSet, preprocess: Preprocess, *, corruption: float, seed: int
) -> Support:
    """Turn a checked set into a support, in this run's preprocessing.

    Images with another preprocessing are inverted to plain images and preprocessed again; a
    whitened set loses each image's brightness and contrast in that way.

    Args:
        distilled: A set that `check` accepts, in class order.
        preprocess: Preprocessing of this run.
        corruption, seed: As for `draw_support`.
    """
    images = distilled.images
    if not distilled.preprocess.same_as(preprocess):
        images = preprocess.apply(distilled.preprocess.invert(images))
    rng = np.random.default_rng([seed, 0])
    return corrupt(images, distilled.labels, corruption, rng)
