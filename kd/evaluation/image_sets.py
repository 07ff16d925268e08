"""Images of a data set whose features are extracted: files that are read as needed, or arrays."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image

from dsdistill.harness.data import datasets, feature_file
from dsdistill.harness.data import image_files as image_format
from dsdistill.harness.data.labeled_images import LabeledImages
from dsdistill.harness.errors import UserError
from kd.data import data_source
from kd.data.batching import Batch
from kd.data.files import archives, image_files
from kd.data.files.image_files import ImageFiles, UnreadableImage
from kd.data.files.stream import UNREADABLE, FileBatches
from kd.data.files.transforms import Views
from kd.evaluation.features import ArrayImages, OrderedImages

Skip = Callable[[int, str], None]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """All images of a data set, those to train on first, then validation, then test images.

    Attributes:
        name: Name or path of the data.
        store: The files, or the arrays.
        labels: Class of each image.
        classes: Class names, in label order.
        counts: Number of images of each part.
        shape: Height, width and channels of the first image.
        digest: SHA-256 that changes with the images.
        draw_order: As in `labeled_images.split_by_class`.
    """

    name: str
    store: ImageFiles | LabeledImages
    labels: Int[np.ndarray, " n"]
    classes: tuple[str, ...]
    counts: tuple[int, int, int]
    shape: tuple[int, int, int]
    digest: str
    draw_order: tuple[int, ...] | None

    def ordered(
        self, views: Views, device: torch.device, batch_size: int, workers: int, skip: Skip
    ) -> OrderedImages:
        """The images as batches.

        Args:
            views: Size and random views.
            device: Device of the batches.
            batch_size: Largest number of images in a batch.
            workers: Processes that read image files.
            skip: Called with the row of each image that cannot be read, and why, before its batch
                is yielded, in which it is black.
        """
        if isinstance(self.store, LabeledImages):
            return ArrayImages(self.store, views, device)
        batches = FileBatches(
            self.store, views, batch_size, device, workers=workers, blank_unreadable=True
        )
        return ReadableFiles(batches, skip)


@dataclass(frozen=True, eq=False)
class ReadableFiles:
    """Images of files as batches, black in place of those that cannot be read.

    Attributes:
        batches: The files, with `blank_unreadable`.
        skip: As for `ImageSet.ordered`.
    """

    batches: FileBatches
    skip: Skip

    def of_rows(
        self, parts: Sequence[Int[np.ndarray, " n"]], key: tuple[int, int] | None = None
    ) -> Iterator[Batch]:
        """As `OrderedImages.of_rows`."""
        for part, batch in zip(parts, self.batches.of_rows(parts, key), strict=True):
            unreadable = (batch.labels == UNREADABLE).cpu().numpy()
            for row in part[unreadable].tolist():
                self.skip(row, self._reason(row))
            yield batch

    def _reason(self, row: int) -> str:
        files = self.batches.images
        try:
            files.read(row, len(self.batches.views.mean))
        except UnreadableImage as error:
            cause = error.__cause__
            assert isinstance(cause, Exception)
            return f"{files.name(row)}: {image_format.describe_error(cause)}"
        return f"{files.name(row)}: unreadable when it was its turn"


def load(data: str, *, root: Path) -> ImageSet:
    """List the images of a folder, or load those of another data set; none are held out.

    Args:
        data: Folder of class folders, named data set, or `.npz` of images.
        root: Folder of the named data sets.

    Raises:
        UserError: If the data are missing, or are no images that can be read by row.
    """
    path = Path(data).expanduser()
    if archives.is_timm_name(data) or data_source.is_distilled(data):
        raise UserError(
            f"{data} is no set of images with labels that can be read by row: give a named data "
            "set, a folder of class folders, or an .npz file"
        )
    if data not in datasets.NAMES and path.is_dir():
        return _open_folder(data, path)
    feature_file.refuse(data)
    splits = datasets.load(data, root=root, validation_fraction=0.0)
    whole = [splits.train, splits.train.select(np.zeros(0, np.int64)), splits.test]
    images = of_parts(data, whole, "")
    assert isinstance(images.store, LabeledImages)
    return replace(images, digest=datasets.digest(images.store))


def of_parts(name: str, parts: Sequence[LabeledImages], digest: str) -> ImageSet:
    """Images that are loaded already; not copied where the parts are rows of one array.

    Args:
        name: Name of the data.
        parts: Training, validation and test images, or only the first of these.
        digest: SHA-256 that changes with the images.
    """
    given = [part for part in parts if len(part)]
    first, labels = given[0], np.concatenate([part.labels for part in given])
    if all(part.store is first.store for part in given):
        aligned = (np.arange(len(part)) if part.rows is None else part.rows for part in given)
        store = LabeledImages(first.store, labels, first.classes, np.concatenate(list(aligned)))
    else:
        pixels = np.concatenate([part.images() for part in given])
        store = LabeledImages(pixels, labels, first.classes)
    train, validation, test = (*map(len, parts), 0, 0)[:3]
    counts = train, validation, test
    return ImageSet(name, store, labels, first.classes, counts, first.shape, digest, None)


def _first_readable(files: ImageFiles) -> Image.Image:
    """The first image that can be read, in colour.

    Raises:
        DataError: If more are unreadable than may be.
    """
    allowed = image_format.unreadable_allowed(len(files))
    for row in range(allowed):
        with suppress(UnreadableImage):
            return files.read(row, 3)[0]
    return files.read(allowed, 3)[0]


def _open_folder(data: str, path: Path) -> ImageSet:
    splits = image_files.open_folder(path, 0.0)
    parts = [splits.train, *([splits.validation] if len(splits.validation) else [])]
    parts += [splits.test] if len(splits.test) else []
    store = ImageFiles(
        splits.train.reader,
        splits.train.classes,
        splits.train.stamp,
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.labels for part in parts if part.labels is not None]),
        splits.train.draw_order,
    )
    image = _first_readable(store)
    counts = len(splits.train), len(splits.validation), len(splits.test)
    shape, order = (image.height, image.width, 3), splits.train.draw_order
    assert store.labels is not None
    return ImageSet(data, store, store.labels, store.classes, counts, shape, store.digest, order)
