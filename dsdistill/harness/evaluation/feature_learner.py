"""Learners on the features of a backbone, where the data and the set are images.

Every image, of the set, of a control and of the held-out ones, passes through the same map: its
pixels in [0, 1] to features, which are centred on all training images of the evaluation. So arms
differ only in their images. A feature is computed once for each backbone, whatever the number of
learners, seeds and arms, and kept as float16: 2 d bytes for an image.

Pixels of real images are those of the data; a set's are what its preprocessing makes of its images
when it is undone, neither clipped nor rounded.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float, Float16, Int, Num

from dsdistill.harness import memory
from dsdistill.harness.data import feature_file, preprocess
from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.evaluation.held_out import Predict
from dsdistill.harness.evaluation.protocol import Learner
from dsdistill.harness.runs import progress

# Images in a forward pass. Features depend on it to the last bit, and results on them are kept.
BATCH = 100


class PixelFeatures(Protocol):
    """A backbone: features (n, d) of images in [0, 1], at most `BATCH` at a time.

    Attributes:
        name: Name in messages and reports.
        width: Number of values d of a feature.
        identity: All that the features depend on besides the images, JSON-compatible; with
            `weights_sha256`.
        accelerator: Name of the device that it computes on; None for the CPU.
    """

    @property
    def name(self) -> str: ...

    @property
    def width(self) -> int: ...

    @property
    def identity(self) -> Mapping[str, Any]: ...

    @property
    def accelerator(self) -> str | None: ...

    def __call__(self, images: Float[np.ndarray, "n h w c"], /) -> Float[np.ndarray, "n d"]: ...


@dataclass(frozen=True, eq=False)
class _StoreFeatures:
    """Features of some images of one store, each at the position of its image.

    Attributes:
        store: The images, held so that no other array takes their place in memory.
        values: Features; those of images that were never asked for take no memory.
        known: Which of them have been computed.
    """

    store: Num[np.ndarray, "N h w c"]
    values: Float16[np.ndarray, "N 1 1 d"]
    known: Bool[np.ndarray, " N"]


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """The features of all images of an evaluation by one backbone, each computed once.

    Attributes:
        backbone: The map from pixels to features.
        train: All training images of the evaluation, on which features are centred.
    """

    backbone: PixelFeatures
    train: LabeledImages
    _stores: dict[int, _StoreFeatures] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def preprocess(self) -> Preprocess:
        """The preprocessing of features: `centre`, fitted on the training images."""
        began, count, d = time.monotonic(), len(self.train), self.backbone.width
        features = self._features(self.train, None)
        seconds = time.monotonic() - began
        progress.say(
            f"{self.backbone.name}: {d} features of each of {count} training images in "
            f"{progress.format_duration(seconds)}, {count / seconds:.0f} images per second, "
            f"{memory.format_bytes(2 * d * count)} of memory"
        )
        return preprocess.fit("centre", features.chunks, features.shape)

    def examples(self, images: Examples) -> Examples:
        """The features of examples, centred, with the examples' labels."""
        fitted = self.preprocess  # first: training images are then computed in their order
        undo = images.preprocess if images.is_preprocessed else None
        return Examples(self._features(images.data, undo), fitted, images.targets)

    def features(self, pixels: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n 1 1 d"]:
        """The centred features of images in [0, 1], which are not kept."""
        fitted = self.preprocess
        batches = range(0, len(pixels), BATCH)
        parts = [self._compute(pixels[first : first + BATCH]) for first in batches]
        return fitted.apply(np.concatenate(parts))

    def _features(self, images: LabeledImages, undo: Preprocess | None) -> LabeledImages:
        """The features of images in place of their pixels.

        Args:
            images: The images.
            undo: Preprocessing that has been applied to them; None for none.
        """
        rows = np.arange(len(images)) if images.rows is None else images.rows
        stored = self._stores.get(id(images.store)) or self._reserve(images.store)
        self._fill(stored, rows, undo)
        return replace(images, store=stored.values)

    def _reserve(self, store: Num[np.ndarray, "N h w c"]) -> _StoreFeatures:
        shape = (len(store), 1, 1, self.backbone.width)
        stored = _StoreFeatures(store, np.empty(shape, np.float16), np.zeros(len(store), bool))
        self._stores[id(store)] = stored
        return stored

    def _fill(
        self, stored: _StoreFeatures, rows: Int[np.ndarray, " n"], undo: Preprocess | None
    ) -> None:
        missing = np.unique(rows[~stored.known[rows]])
        memory.require(
            2 * self.backbone.width * len(missing),
            f"the features of {len(missing)} images by {self.backbone.name}",
            "use a layer or a backbone of fewer values, or fewer images",
        )
        count = len(missing)
        batches = [slice(i, min(i + BATCH, count)) for i in range(0, count, BATCH)]
        for batch in progress.track_if_slow(batches, f"images through {self.backbone.name}"):
            part = missing[batch]
            images = np.asarray(stored.store[part])
            pixels = preprocess.unit_range(images) if undo is None else undo.invert(images)
            stored.values[part] = self._compute(pixels)
            stored.known[part] = True

    def _compute(self, pixels: Float[np.ndarray, "n h w c"]) -> Float16[np.ndarray, "n 1 1 d"]:
        remedy = f"use another backbone than {self.backbone.name}"
        return feature_file.as_half(self.backbone(pixels), remedy)[:, None, None]


@dataclass(frozen=True, eq=False)
class FeatureLearner:
    """A learner that is given features in place of images.

    Attributes:
        learner: The learner of features.
        space: Their backbone, shared by all learners on it.
    """

    learner: Learner
    space: FeatureSpace

    @property
    def name(self) -> str:
        """Name in reports: LEARNER@BACKBONE."""
        return f"{self.learner.name}@{self.space.backbone.name}"

    @property
    def limit(self) -> int | None:
        """As of the learner of features."""
        return self.learner.limit

    @property
    def deterministic(self) -> bool:
        """As of the learner of features: the features of an image are always the same."""
        return getattr(self.learner, "deterministic", False)

    @property
    def identity(self) -> dict[str, Any] | None:
        """All that its results depend on besides the data, JSON-compatible; None if not known."""
        known = getattr(self.learner, "identity", None)
        return known and {"features": self.space.backbone.identity, "learner": known}

    @property
    def accelerator(self) -> str | None:
        """Name of the accelerator of the backbone, or of the learner; None on a CPU."""
        return self.space.backbone.accelerator or getattr(self.learner, "accelerator", None)

    def prepare(self, train: Examples, validation: Examples) -> None:
        """Compute the features of the images, which all trainings on the backbone share."""
        for images in (train, validation):
            self.space.examples(images)

    def __call__(self, train: Examples, validation: Examples, seed: int, /) -> "FeaturePredictor":
        """Train on the features of the images."""
        predict = self.learner(self.space.examples(train), self.space.examples(validation), seed)
        return FeaturePredictor(predict, self.space, train.preprocess)


@dataclass(frozen=True, eq=False)
class FeaturePredictor:
    """A predictor of features as one of images.

    Attributes:
        predict: Scores of centred features.
        space: The backbone of the features.
        preprocess: Preprocessing of the images that are given without their examples.
    """

    predict: Predict
    space: FeatureSpace
    preprocess: Preprocess

    def __call__(self, images: Float[np.ndarray, "n h w c"], /) -> Float[np.ndarray, "n k"]:
        return self.predict(self.space.features(self.preprocess.invert(images)))

    def predict_examples(self, examples: Examples, rows: slice) -> Float[np.ndarray, "n k"]:
        """Scores of some of the examples, whose features are computed once."""
        data = examples.data.select(np.arange(len(examples))[rows])
        part = replace(examples, data=data, targets=None)
        return self.predict(self.space.examples(part).images())
