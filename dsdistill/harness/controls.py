"""What a distilled set is compared with: as many random images, a coreset, and all of them."""

import numpy as np

from dsdistill.harness.errors import unknown
from dsdistill.harness.evaluate import Arm
from dsdistill.harness.labeled import Examples, per_class

CONTROLS = ("random", "coreset", "full")


def arm(name: str, train: Examples, images_per_class: int) -> Arm:
    """One control, drawn from the training images.

    Args:
        name: One of `CONTROLS`.
        train: All training images; their labels become one-hot minus 1/k.
        images_per_class: As many as the distilled set has.
    """
    if name == "full":
        return Arm(name, lambda seed: train)
    if name == "random":
        return Arm(name, lambda seed: random(train, images_per_class, seed))
    if name == "coreset":
        return Arm(name, lambda seed: coreset(train, images_per_class, seed))
    raise unknown("control", name, CONTROLS)


def random(train: Examples, images_per_class: int, seed: int) -> Examples:
    """Real images drawn without replacement, the same number of every class."""
    rng = np.random.default_rng([seed, 2])
    return _chosen(train, per_class(train.data, images_per_class, rng))


def coreset(train: Examples, images_per_class: int, seed: int) -> Examples:
    """The real images nearest to the k-means centres of each class, in preprocessed pixels.

    Args:
        train: Clustered one class at a time.
        images_per_class: Clusters, and images taken, of each class.
        seed: Of the centres' starting points.
    """
    from sklearn.cluster import KMeans

    chosen = []
    for label in range(len(train.data.classes)):
        members = np.flatnonzero(train.data.labels == label)
        pixels = train.images(members).reshape(len(members), -1)
        # scikit-learn annotates n_init as text alone.
        clusters = KMeans(images_per_class, n_init=1, random_state=seed).fit(pixels)  # pyright: ignore[reportArgumentType]
        chosen.append(members[_nearest(clusters.transform(pixels))])
    return _chosen(train, np.concatenate(chosen))


def _nearest(distance: np.ndarray) -> np.ndarray:
    """For each centre its nearest image, no image twice."""
    taken: list[int] = []
    for column in distance.T:
        column = column.copy()
        column[taken] = np.inf
        taken.append(int(column.argmin()))
    return np.array(taken)


def _chosen(train: Examples, rows: np.ndarray) -> Examples:
    return Examples(train.data.select(rows), train.preprocess, ready=train.ready)
