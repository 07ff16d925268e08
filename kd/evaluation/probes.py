"""Probes of embeddings: what a linear classifier and the nearest neighbours find in them.

A network without a head has no accuracy of its own. Two classifiers of scikit-learn's judge its
embeddings, fitted on labelled training images: multinomial logistic regression, whose
regularisation is chosen on validation images, and the k nearest neighbours by cosine.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import nn

from dsdistill.harness.errors import UserError
from kd.data.batching import EvaluationBatches
from kd.evaluation import scoring

NEIGHBOURS = 20  # as self-supervised backbones are judged by
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # inverse regularisations C that are tried
TRAIN_IMAGES = 10_000  # labelled images that the probes are fitted on, at most
ITERATIONS = 1000


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Embeddings of labelled images.

    Attributes:
        values: One row for each image.
        labels: Number of the class of each image.
    """

    values: Float[np.ndarray, "n d"]
    labels: Int[np.ndarray, " n"]


@dataclass(frozen=True)
class ProbeFigures:
    """Figures of embeddings.

    Attributes:
        linear: Accuracy of the linear probe, a fraction.
        nearest: Accuracy of the nearest neighbours, a fraction.
        train_images: Number of images that the probes were fitted on.
    """

    linear: float
    nearest: float
    train_images: int


def leave_one_out_accuracy(known: Embeddings, *, neighbours: int = NEIGHBOURS) -> float:
    """Accuracy of the nearest neighbours of each image among the others.

    Each neighbour counts once, and of classes with as many the first in label order wins.

    Args:
        known: Two embeddings or more.
        neighbours: Number of neighbours, at most all others.
    """
    from sklearn.neighbors import NearestNeighbors

    count = min(neighbours, len(known.values) - 1)
    search = NearestNeighbors(n_neighbors=count, metric="cosine", algorithm="brute")
    rows = search.fit(_in_float64(known.values)).kneighbors(return_distance=False)
    classes = int(known.labels.max()) + 1
    votes = np.stack([np.bincount(row, minlength=classes) for row in known.labels[rows]])
    return float((votes.argmax(1) == known.labels).mean())


def measure(train: Embeddings, validation: Embeddings | None, test: Embeddings) -> ProbeFigures:
    """Fit both probes on training images, and measure them on test images.

    Args:
        train: Embeddings that the probes are fitted on, of two classes or more.
        validation: Embeddings on which the regularisation of the linear probe is chosen; None: C
            is 1.
        test: Embeddings that are read once.
    """
    from sklearn.neighbors import KNeighborsClassifier

    strengths = (1.0,) if validation is None or not len(validation.values) else STRENGTHS
    probes = [_linear_probe(train, strength) for strength in strengths]
    best = probes[0]
    if len(probes) > 1:
        assert validation is not None
        scores = [_accuracy(probe, validation) for probe in probes]
        best = probes[int(np.argmax(scores))]  # of equal ones the most regular
    count = min(NEIGHBOURS, len(train.values))
    nearest = KNeighborsClassifier(count, metric="cosine", algorithm="brute")
    nearest.fit(_in_float64(train.values), train.labels)
    return ProbeFigures(_accuracy(best, test), _accuracy(nearest, test), len(train.values))


def embed(network: nn.Module, batches: EvaluationBatches) -> Embeddings:
    """The embeddings that a network without a head gives labelled images."""
    return Embeddings(*scoring.outputs_and_labels(network, batches))


def figures(
    network: nn.Module,
    train: EvaluationBatches | None,
    validation: EvaluationBatches | None,
    test: EvaluationBatches,
) -> dict[str, Any]:
    """Measure the embeddings of a network, for a report.

    Args:
        network: A network without a head.
        train: Labelled training images; None without any.
        validation: Validation images; None without any.
        test: Test images, which are read once.

    Raises:
        UserError: If there are no training images of two classes.
    """
    known = None if train is None else embed(network, train)
    if known is None or len(np.unique(known.labels)) < 2:
        raise UserError(
            "an embedding is judged by probes, which are fitted on labelled training images of two "
            "classes or more, and the data have none: name data with a training part"
        )
    judged = embed(network, test)
    held_out = None if validation is None else embed(network, validation)
    measured = measure(known, held_out, judged)
    return {
        "images": len(judged.labels),
        "linear_probe_accuracy": measured.linear,
        "nearest_neighbours_accuracy": measured.nearest,
        "probe_images": measured.train_images,
    }


def _linear_probe(train: Embeddings, strength: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=ITERATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # its accuracy hardly moves any more
        return probe.fit(_in_float64(train.values), train.labels)


def _accuracy(probe: Any, known: Embeddings) -> float:
    return float((probe.predict(_in_float64(known.values)) == known.labels).mean())


def _in_float64(values: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Embeddings in double precision, where the sums of the probes are exact enough."""
    return values.astype(np.float64)
