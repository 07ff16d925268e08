"""The protocol: one learner, one budget, on distilled, random, coreset and full data."""

from typing import Protocol

import numpy as np
from jaxtyping import Float

from dsdistill.harness.datasets import Examples


class Predict(Protocol):
    """Scores (n, k) of preprocessed images (n, h, w, c); the largest score is the prediction."""

    def __call__(
        self, images: Float[np.ndarray, "n h w c"], /
    ) -> Float[np.ndarray, "n k"]: ...


class Learner(Protocol):
    """Anything that turns a training set into predictions: ridge regression, a network, a student."""

    @property
    def name(self) -> str: ...

    def __call__(self, train: Examples, validation: Examples, seed: int, /) -> Predict:
        """Train. `validation` may steer the training; the test images are never passed here."""
        ...
