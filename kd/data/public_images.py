"""Public images that teachers of private ones are asked about, and a training on their answers.

The labels that public images may have are never used, but those of test images for the figures. All
that a training on answers knows of the private images beside the answers is the names of their
classes and the shape of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dsdistill.harness.data import datasets
from dsdistill.harness.data.datasets import Splits
from dsdistill.harness.data.labeled_images import LabeledImages
from dsdistill.harness.errors import UserError
from kd.data import data_source
from kd.data.data_source import DataSource
from kd.privacy.settings import PateSettings
from kd.privacy.votes import REFUSED

OF_TEST_PART = "test:"  # N images of the test part of the private data
_ORDER_SEED = 0  # fixed: images that are public in one run must not be test images in another
_NO_IMAGES = np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class PublicImages:
    """Public images.

    Attributes:
        name: Their name.
        images: Images to ask about, in the order of the queries; their labels are 0.
        test: Labelled images that test the student; none where the classes are others.
    """

    name: str
    images: LabeledImages
    test: LabeledImages


def load(
    data: str,
    public: str,
    *,
    root: Path,
    shape: Sequence[int],
    classes: Sequence[str],
) -> PublicImages:
    """Load public images in the shape of the private ones.

    Args:
        data: The private data.
        public: Other data as in `datasets.load`, whose training images are asked about and whose
            test images test the student; or `test:N`: N test images of `data` are public, and the
            others test the student.
        root: Folder of the data sets.
        shape: Height, width and channels of a private image.
        classes: Names of the private classes.

    Raises:
        UserError: If they are missing, or of another shape.
    """
    h, w, channels = shape
    size = h if h == w else None
    options: dict[str, Any] = {"image_size": size, "channels": channels, "classes": classes}
    of_test = public.startswith(OF_TEST_PART)
    splits = datasets.load(
        data if of_test else public, root=root, validation_fraction=0.0, announce=False, **options
    )
    asked, test = splits.train, splits.test
    if of_test:
        count = _count(public, len(test))
        order = np.random.default_rng(_ORDER_SEED).permutation(len(test))
        asked, test = test.select(order[:count]), test.select(np.sort(order[count:]))
    if asked.shape != tuple(shape):
        raise UserError(
            f"--public {public} has images {asked.shape}, and those of {data} are {tuple(shape)}: "
            "give --image-size"
        )
    if tuple(test.classes) != tuple(classes):
        test = test.select(_NO_IMAGES)
    order = np.random.default_rng(_ORDER_SEED + 1).permutation(len(asked))
    asked = asked.select(order)
    blank = replace(asked, labels=np.zeros(len(asked), np.int64), classes=tuple(classes))
    return PublicImages(splits.name, blank, replace(test, classes=tuple(classes)))


def _count(public: str, images: int) -> int:
    text = public.removeprefix(OF_TEST_PART)
    count = int(text) if text.isdecimal() else 0
    if not 0 < count < images:
        raise UserError(
            f"--public {OF_TEST_PART}N takes N of the {images} test images, and leaves some: got "
            f"{public}"
        )
    return count


def answered(
    public: PublicImages,
    answers: Sequence[int],
    settings: PateSettings,
    *,
    data: str,
    validation_fraction: float | None,
) -> DataSource:
    """The public images that were answered, with the noisy answers as labels.

    Validation images are a share of them, judged by their noisy answers.

    Args:
        public: The public images.
        answers: Class of each image that was asked about, from the first on, or `REFUSED`.
        settings: Settings of the votes.
        data: Name of the private data.
        validation_fraction: Share of the answered images that is held out; None for the default.

    Raises:
        UserError: If fewer than two classes were named.
    """
    labels = np.asarray(answers, np.int64)
    rows = np.flatnonzero(labels != REFUSED)
    if len(np.unique(labels[rows])) < 2:
        raise UserError(
            f"of {len(labels)} queries {len(rows)} were answered, with fewer than two classes: "
            "nothing can be learned from them; raise the number of queries, or lower sigma or "
            "threshold"
        )
    images = replace(public.images.select(rows), labels=labels[rows])
    fraction = data_source.fraction_or_default(validation_fraction)
    held_out = round(fraction * len(rows))  # their order is random
    splits = Splits(
        public.name,
        images.select(np.arange(held_out, len(rows))),
        images.select(np.arange(held_out)),
        public.test,
        datasets.digest(images),
    )
    queries, most = settings.bounds(len(public.images))
    epsilon = settings.epsilon(len(public.images))
    figures = {
        "epsilon": epsilon,
        "delta": settings.delta,
        "answers": len(rows),
        "queries": len(labels),
    }
    note = (
        f"the labels were {len(rows)} noisy answers to {len(labels)} queries: for one image of "
        f"{data} more or less, training and student are ({epsilon:.4g}, {settings.delta:g})-"
        f"differentially private, with at most {most} answers"
        + ("" if settings.threshold is None else f" to at most {queries} queries")
        + "; each further run on these images costs again"
    )
    return DataSource(data, splits, note=note, privacy=figures)
