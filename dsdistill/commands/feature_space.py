"""Images as a frozen network sees them: a network of `kd`, or a caller's own function.

Only arrays cross: `dsdistill` does not know torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from dsdistill.harness.data import feature_file, preprocess
from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress

BATCH = 64  # images in a forward pass


class Network(Protocol):
    """A map from images to features."""

    def batches(self, images: LabeledImages) -> Iterator[Float[np.ndarray, "m d"]]:
        """Yield the features of all images, `BATCH` at a time."""
        ...

    def record(self) -> dict[str, Any]:
        """All that the features depend on besides the images, JSON-compatible."""
        ...


@dataclass(frozen=True, eq=False)
class TorchNetwork:
    """A frozen network of `kd`.

    Attributes:
        backbone: The network on its device, a `kd.evaluation.backbones.Backbone`.
        device: That device.
    """

    backbone: Any
    device: Any

    def batches(self, images: LabeledImages) -> Iterator[Float[np.ndarray, "m d"]]:
        """As `Network.batches`."""
        from kd.evaluation import features, image_sets

        ordered = image_sets.of_parts("", [images], "").ordered(
            self.backbone.views(), self.device, BATCH, 0
        )
        plan = features.plan(len(images), 0, 1, BATCH)
        return features.extract(self.backbone, ordered, plan, 0, self.device)

    def record(self) -> dict[str, Any]:
        """As `Network.record`."""
        return self.backbone.record()


@dataclass(frozen=True, eq=False)
class FunctionNetwork:
    """A caller's own function from (m, h, w, c) float32 images in [0, 1] to (m, d) features."""

    function: Callable[[np.ndarray], Any]

    def batches(self, images: LabeledImages) -> Iterator[Float[np.ndarray, "m d"]]:
        """As `Network.batches`.

        Raises:
            UserError: If the function returns no row of numbers for each image.
        """
        for chunk in images.chunks(BATCH):
            rows = np.asarray(self.function(preprocess.unit_range(chunk)))
            if rows.ndim < 2 or len(rows) != len(chunk) or rows.dtype.kind not in "fiu":
                raise UserError(
                    f"features of {len(chunk)} images must be numbers of the shape "
                    f"({len(chunk)}, d), got {rows.dtype} {rows.shape}"
                )
            yield rows.reshape(len(rows), -1)

    def record(self) -> dict[str, Any]:
        """As `Network.record`."""
        return {"backbone": "a function"}


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """The features of a network, centred and scaled as those of the training images.

    Attributes:
        network: The network.
        fitted: Map from its features to those that a linear kernel sees.
    """

    network: Network
    fitted: Preprocess

    def examples(self, images: LabeledImages, unit: str) -> Examples:
        """Features of images, in memory.

        Args:
            images: Images in [0, 1], or bytes.
            unit: Name of the images in the progress display.
        """
        return Examples(extract(self.network, images, unit), self.fitted)


def extract(network: Network, images: LabeledImages, unit: str) -> LabeledImages:
    """Features of images in memory, in float16, as in a file of features.

    Args:
        network: The network.
        images: Images in [0, 1], or bytes.
        unit: Name of the images in the progress display.

    Raises:
        UserError: If a feature does not fit into float16.
    """
    stream = network.batches(images)
    parts = [slice(i, min(i + BATCH, len(images))) for i in range(0, len(images), BATCH)]
    rows = [feature_file.as_half(next(stream)) for _ in progress.track_if_slow(parts, unit)]
    store = np.concatenate(rows).reshape(len(images), 1, 1, -1)
    return LabeledImages(store, images.labels, images.classes)


def normalise(train: LabeledImages, validation: LabeledImages | None) -> tuple[Examples, Examples]:
    """Centre and scale features by those of the training images.

    Args:
        train: Features of the training images.
        validation: Features of the validation images; None where there are none.
    """
    fitted = preprocess.fit("centre", train.chunks, train.shape)
    none = train.select(np.zeros(0, np.int64))
    return Examples(train, fitted), Examples(validation or none, fitted)
