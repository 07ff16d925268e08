"""Controls: as many real images as the distilled set has, chosen in three ways, and all of them.

Random images are what a distilled set must beat to be worth anything; k-means and herding choose
images that represent their class, which is often hard to beat at few images per class. Random
images with other labels show what labels alone are worth: one soft label of a teacher for each
image, or the labels that Label Solve gives them.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from dsdistill.harness.data.labeled_images import Examples, check_images_per_class, draw_per_class
from dsdistill.harness.errors import unknown_name
from dsdistill.harness.evaluation.protocol import Arm

CONTROLS = ("random", "k-means", "herding", "full")
SOFT, SOLVED = "random-soft", "random-solved"
RELABELLED = (SOFT, SOLVED)  # random images with labels that a function gives them
Relabel = Callable[[Examples], Float[np.ndarray, "n k"]]


def is_reserved(name: str) -> bool:
    """Whether a name means the first set or a control, so that no further set may have it."""
    return name.startswith("distilled") or name in (*CONTROLS, *RELABELLED)


def arm(name: str, train: Examples, images_per_class: int, relabel: Relabel | None = None) -> Arm:
    """One control, drawn from the training images.

    Args:
        name: One of `CONTROLS` or of `RELABELLED`.
        train: All training images; their labels become one-hot minus 1/k.
        images_per_class: Number of images that the distilled set has of each class.
        relabel: Labels, in the encoding of a set, of drawn images; for those of `RELABELLED`.
    """
    if name in RELABELLED:
        assert relabel is not None, "the labels of this control come from a function"
        return Arm(name, lambda seed: _relabelled(random(train, images_per_class, seed), relabel))
    if name == "full":
        return Arm(name, lambda seed: train, fixed=True)
    if name == "random":
        return Arm(name, lambda seed: random(train, images_per_class, seed))
    if name == "k-means":
        return Arm(name, lambda seed: k_means(train, images_per_class, seed))
    if name == "herding":
        herded = functools.cache(lambda: herding(train, images_per_class))
        return Arm(name, lambda seed: herded(), fixed=True)
    raise unknown_name("control", name, (*CONTROLS, *RELABELLED))


def random(train: Examples, images_per_class: int, seed: int) -> Examples:
    """Real images drawn without replacement, the same number of every class."""
    rng = np.random.default_rng([seed, 2])
    return _select(train, draw_per_class(train.data, images_per_class, rng))


def k_means(train: Examples, images_per_class: int, seed: int) -> Examples:
    """The real images nearest to the k-means centres of each class, in preprocessed pixels.

    Args:
        train: Clustered one class at a time.
        images_per_class: Number of clusters, and of images taken, per class.
        seed: Seed of the centres' starting points.

    Raises:
        UserError: If a class has fewer images.
    """
    from sklearn.cluster import KMeans

    def choose(pixels: Float[np.ndarray, "n d"]) -> Int[np.ndarray, " m"]:
        # scikit-learn annotates n_init as text alone.
        clusters = KMeans(images_per_class, n_init=1, random_state=seed).fit(pixels)  # pyright: ignore[reportArgumentType]
        return _nearest_images(clusters.transform(pixels))

    return _choose_per_class(train, images_per_class, choose)


def herding(train: Examples, images_per_class: int) -> Examples:
    """Real images whose mean follows the mean of their class, in preprocessed pixels.

    Greedy: each next image is the one that brings the mean of the images chosen so far nearest to
    the mean of all, and is not taken twice. Nothing is random.

    Args:
        train: One class at a time is held in memory.
        images_per_class: Images taken of each class, in the order in which they are chosen.

    Raises:
        UserError: If a class has fewer images.

    Source: Welling (2009), "Herding dynamical weights to learn"; as the choice of exemplars in
    Rebuffi et al. (2017), arXiv:1611.07725, algorithm 4, but in pixels, not in the normalised
    features of a network, and without taking an image twice.
    """
    return _choose_per_class(
        train, images_per_class, lambda pixels: _herd(pixels, images_per_class)
    )


def _herd(x: Float[np.ndarray, "n d"], count: int) -> Int[np.ndarray, " m"]:
    """Greedy argmin_x ‖(s + x) / t‖ over centred images x, where s is the sum of those chosen.

    ‖s + x‖² = ‖s‖² + 2 x·s + ‖x‖²: one product of the images with a vector for each image chosen.
    The images are centred in place.
    """
    # Centred, the three terms are small: uncentred, float32 would lose their difference.
    x -= x.mean(0, dtype=np.float64).astype(np.float32)
    total, squares = np.zeros(x.shape[1], np.float32), np.vecdot(x, x)
    taken: list[int] = []
    for _ in range(count):
        length = squares + 2 * (x @ total)
        length[taken] = np.inf
        taken.append(int(length.argmin()))
        total += x[taken[-1]]
    return np.array(taken)


def _nearest_images(distance: Float[np.ndarray, "n m"]) -> Int[np.ndarray, " m"]:
    """The nearest image of each centre, no image twice."""
    taken: list[int] = []
    for column in distance.T:
        column = column.copy()
        column[taken] = np.inf
        taken.append(int(column.argmin()))
    return np.array(taken)


def _choose_per_class(
    train: Examples, images_per_class: int, choose: Callable[[np.ndarray], np.ndarray]
) -> Examples:
    """Select the images whose positions `choose` returns for the flattened images of each class."""
    check_images_per_class(train.data, images_per_class)

    def rows(label: int) -> Int[np.ndarray, " m"]:
        # A separate function, so that the memory of a class is freed before the next one is read.
        members = np.flatnonzero(train.data.labels == label)
        return members[choose(train.images(members).reshape(len(members), -1))]

    return _select(train, np.concatenate([rows(k) for k in range(len(train.data.classes))]))


def _relabelled(drawn: Examples, relabel: Relabel) -> Examples:
    return replace(drawn, targets=relabel(drawn))


def _select(train: Examples, rows: Int[np.ndarray, " n"]) -> Examples:
    return Examples(
        train.data.select(rows), train.preprocess, is_preprocessed=train.is_preprocessed
    )
