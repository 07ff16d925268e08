"""A distilled set as a value for callers: its pixels, its predictor, its file."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dsdistill.harness.data import arrays, distilled_set, origin
from dsdistill.harness.data.arrays import ArrayLike
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.errors import UserError, name_arguments
from dsdistill.kernels import networks
from dsdistill.kernels.networks import InfiniteNetwork
from dsdistill.methods import stored_kernel

# A name, or a network of neural-tangents: a `stax` triple or its kernel function.
Kernel = str | tuple[Any, Any, Callable[..., Any]] | Callable[..., Any]


@dataclass(frozen=True, eq=False, repr=False)
class Distilled(DistilledSet):
    """A few synthetic images with real-valued labels: what `kip` and `label_solve` return.

    Attributes:
        images: (n, h, w, c) float32 images as a kernel or network takes them, after `preprocess`.
        labels: (n, k) float32 labels: one-hot minus 1/k, or solved for, or learned.
        preprocess: Map from images in [0, 1] to the space of `images`, and back.
        classes: k class names, in label order.
        provenance: JSON-compatible record: method, options, kernel, seed, versions, figures.
        network: The infinitely wide network that it was made for; None for a set that was loaded.
    """

    network: InfiniteNetwork | None = None

    @property
    def figures(self) -> Mapping[str, float | None]:
        """Figures of the search, such as `validation_accuracy` and `best_step`."""
        return origin.read_provenance(self).metrics

    def as_pixels(self) -> Float[np.ndarray, "n h w c"]:
        """The images as pixels in [0, 1], as a picture shows them: preprocessing undone, clipped.

        Train on `images` where you can: clipping and, for ZCA, the lost brightness of each image
        change what a learner sees.
        """
        return self.preprocess.invert(self.images).clip(0, 1)

    def predictor(self, kernel: Kernel | None = None) -> Callable[[ArrayLike], np.ndarray]:
        """Fit kernel ridge regression to the set, as it was validated.

        Args:
            kernel: A kernel as for `kip`, in place of the set's own. A loaded set that was made
                with a network of neural-tangents needs it: a file may not choose the code that runs
                here.

        Returns:
            Function from (m, h, w, c) images, as `kip` takes them, to (m, k) scores; the largest
                is the predicted class.

        Raises:
            UserError: If the kernel is unknown, or singular on these images.
        """
        with name_arguments():
            chosen = self.network if kernel is None else as_network(kernel)
            name = kernel if isinstance(kernel, str) else ""
            remedy = "give predictor(kernel=...) if you trust it"
            learner = stored_kernel.learner(self, chosen or name, remedy=remedy)
            predict = learner(self.examples(), self.examples(), 0)
        shape = self.images.shape[1:]

        def scores(images: ArrayLike) -> np.ndarray:
            pixels = arrays.check_images(np.asarray(images))
            if pixels.shape[1:] != shape:
                raise UserError(f"images must be {shape}, as in the set, got {pixels.shape[1:]}")
            return predict(self.preprocess.apply(pixels))

        return scores

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the set to one checksummed `.safetensors` file, whole or not at all.

        Raises:
            OSError: If the file cannot be written.
        """
        distilled_set.save(Path(path), self)

    def __repr__(self) -> str:
        record, (n, *shape) = origin.read_provenance(self), self.images.shape
        kernel = f" with {record.kernel}" if record.kernel else ""
        size = "x".join(map(str, shape))
        return (
            f"<Distilled: {n} images of {size}, {len(self.classes)} classes, by "
            f"{record.method}{kernel}>"
        )

    @classmethod
    def wrap(cls, distilled: DistilledSet) -> "Distilled":
        """The same set, as a value for callers."""
        return cls(**{f.name: getattr(distilled, f.name) for f in fields(distilled)})


def load(path: str | os.PathLike[str]) -> Distilled:
    """Read a distilled set: a `.safetensors` file, or the folder of a run.

    Raises:
        UserError: If the file is missing, damaged or no distilled set; a ValueError of one line.
    """
    return Distilled.wrap(distilled_set.load(distilled_set.locate(Path(path))))


def as_network(kernel: Kernel) -> InfiniteNetwork | None:
    """The network of a caller's own kernel; None for a name.

    Raises:
        UserError: If it is neither a name nor a network of neural-tangents.
    """
    if isinstance(kernel, str):
        return None
    return networks.from_neural_tangents(kernel, f"{networks.OBJECT_PREFIX}kernel_fn")
