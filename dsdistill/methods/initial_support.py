"""Where KIP starts: real images, noise, or a set that was distilled before.

Source: Nguyen, Chen and Lee (2021), arXiv:2011.00050, for noise and for corruption.
"""

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

INIT_NAMES = ("real", "noise")  # what `--init` can name beside a file


@dataclass(frozen=True, eq=False)
class Support:
    """Where the optimisation starts.

    Attributes:
        images, labels: Preprocessed images and centred one-hot labels, class by class.
        frozen: Pixels that are never learned (`--corruption`).
    """

    images: Float[np.ndarray, "n h w c"]
    labels: Float[np.ndarray, "n k"]
    frozen: Bool[np.ndarray, "n h w 1"]


def draw_support(
    train: Examples, images_per_class: int, *, noise: bool, corruption: float, seed: int
) -> Support:
    """Class-balanced real images, or unit Gaussian noise, partly replaced by frozen noise.

    Args:
        train: Drawn from without replacement.
        images_per_class: Exactly so many of every class, in class order.
        noise: Start from noise instead of real images.
        corruption: Fraction of the pixels of each image kept as noise for good, in [0, 1].
        seed: Of the draw and of the noise.
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
    """A support of these images, so large a fraction of their pixels replaced by frozen noise.

    Args:
        images, labels: Class by class.
        fraction: In [0, 1].
        rng: Draws the noise and where it goes.
        noise: Replace the other pixels too, by noise that is learned.
    """
    noisy = rng.standard_normal(images.shape, np.float32)
    frozen = rng.random((*images.shape[:3], 1)) < fraction
    return Support(noisy if noise else np.where(frozen, noisy, images), labels, frozen)


def load(init: str) -> distilled_set.DistilledSet | None:
    """The distilled set that `--init` names; None for `real` and `noise`.

    Raises:
        UserError: If it is neither, or a file that cannot be trusted.
    """
    if init in INIT_NAMES:
        return None
    path = Path(init).expanduser()
    if not path.exists():
        raise unknown_name("--init", init, [*INIT_NAMES, "a .safetensors file", "a run's folder"])
    return distilled_set.load(distilled_set.locate(path))


def check(
    distilled: distilled_set.DistilledSet, train: LabeledImages, images_per_class: int | None
) -> int:
    """Refuse a set that a run on these images cannot start from, and count its images a class.

    Args:
        distilled: What `load` returned.
        train: The images that will be the targets.
        images_per_class: As the user asked for, or None: as the set has it.

    Raises:
        UserError: If classes, shape, label encoding or number of images do not fit.
    """
    k, n = len(train.classes), len(distilled)
    if distilled.classes != train.classes:
        raise UserError(
            f"--init: the set has {len(distilled.classes)} classes, the data {k}, or they differ "
            "in name or order"
        )
    if distilled.images.shape[1:] != train.shape:
        shapes = ("x".join(map(str, s)) for s in (distilled.images.shape[1:], train.shape))
        raise UserError("--init: the set's images are {}, the data's {}".format(*shapes))
    if distilled.encoding != distilled_set.ENCODING:
        raise UserError(
            f"--init: the set's labels are {distilled.encoding!r}, "
            f"expected {distilled_set.ENCODING!r}"
        )
    if n % k:
        raise UserError(f"--init: the set's {n} images are not the same number of all {k} classes")
    if images_per_class not in (None, n // k):
        raise UserError(
            f"--init: the set has {n // k} images a class, --images-per-class asks for "
            f"{images_per_class}: leave it out"
        )
    return n // k


def overlaps_validation(
    distilled: distilled_set.DistilledSet, digest: str, validation_fraction: float
) -> bool:
    """Whether a set was made with training images that a run holds out for validation.

    Splits are nested: a larger fraction holds out all that a smaller one does.

    Args:
        distilled: A set; one that does not say how it was made has seen nothing.
        digest, validation_fraction: Of the run's data.
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
    """A checked set's images and labels, in this run's preprocessing.

    A set preprocessed in another way goes back to plain images and through this run's; where the
    set was whitened, that loses each image's brightness and contrast.

    Args:
        distilled: Class by class.
        preprocess: As this run's kernel sees images.
        corruption, seed: As in `draw_support`.
    """
    images = distilled.images
    if not distilled.preprocess.same_as(preprocess):
        images = preprocess.apply(distilled.preprocess.invert(images))
    rng = np.random.default_rng([seed, 0])
    return corrupt(images, distilled.labels, corruption, rng)
