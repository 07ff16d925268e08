"""Images as a frozen network sees them: a network of `kd`, or a caller's own function.

Only arrays cross: `dsdistill` does not know torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from dsdistill.harness.data import feature_file, preprocess
from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress


@dataclass(frozen=True, eq=False)
class Network:
    """A map from images to features.

    Attributes:
        function: From (m, h, w, c) float32 images in [0, 1] to (m, d) features.
        encoder: The `kd.evaluation.encoder.Encoder` that it is; None for a caller's own function.
    """

    function: Callable[[np.ndarray], Any]
    encoder: Any = None

    def batches(self, images: LabeledImages) -> Iterator[Float[np.ndarray, "m d"]]:
        """Yield the features of all images, `feature_file.BATCH` at a time.

        Raises:
            UserError: If the function returns no row of numbers for each image.
        """
        for chunk in images.chunks(feature_file.BATCH):
            rows = np.asarray(self.function(preprocess.unit_range(chunk)))
            if rows.ndim < 2 or len(rows) != len(chunk) or rows.dtype.kind not in "fiu":
                raise UserError(
                    f"features of {len(chunk)} images must be numbers of the shape "
                    f"({len(chunk)}, d), got {rows.dtype} {rows.shape}"
                )
            yield rows.reshape(len(rows), -1)

    def record(self) -> dict[str, Any]:
        """All that the features depend on besides the images, JSON-compatible."""
        return {"backbone": "a function"} if self.encoder is None else self.encoder.record()


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
    parts = [
        slice(i, min(i + feature_file.BATCH, len(images)))
        for i in range(0, len(images), feature_file.BATCH)
    ]
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
