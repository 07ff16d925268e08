"""Transfer sets: images without labels, or of other classes, that a teacher answers for a student.

Source: Beyer et al. (2022), arXiv:2106.05237, section 5: images of another domain teach too, only
longer.
"""

from pathlib import Path

import numpy as np

from dsdistill.harness import paths
from dsdistill.harness.data import datasets, distilled_set, folders, walk
from dsdistill.harness.data.labeled_images import LabeledImages
from dsdistill.harness.errors import UserError
from kd.data import data_source
from kd.data.data_source import DataSource


def load(
    name: str, *, root: Path, shape: tuple[int, int, int], classes: tuple[str, ...]
) -> LabeledImages:
    """Load the images of a transfer set in the form of a student's images.

    Args:
        name: Folder of image files with or without class folders; name of a data set, whose
            training images are taken, or all images where it has no parts; `.npz` file of images
            with or without labels; distilled set or the folder of its run.
        root: Folder of the named data sets.
        shape: Height, width and channels of the images of the student's data.
        classes: Class names of the student's data.

    Returns:
        The images. Their labels are all 0 and mean nothing.

    Raises:
        UserError: If there are no images, or they cannot take the shape.
    """
    images = _read(name, root, shape)
    if images.shape != shape:
        raise UserError(
            f"--transfer {name} has images of {_describe(images.shape)}, and the data have "
            f"{_describe(shape)}: give both one --image-size and --channels, or another set"
        )
    return LabeledImages(images.store, np.zeros(len(images), np.int64), classes, images.rows)


def is_flat(name: str) -> bool:
    """Whether DATA is a folder of images without class folders, or such a one as `train/` in it."""
    path = Path(name).expanduser()
    if name in datasets.NAMES or not path.is_dir() or data_source.is_distilled(name):
        return False
    folder = path / "train" if (path / "train").is_dir() else path
    return walk.has_loose_images(folder) and not any(
        walk.holds_images(child) for child in walk.subfolders(folder)
    )


def load_flat(name: str, *, image_size: int | None, channels: int | None) -> DataSource:
    """Load a folder of images without classes as all that a training has.

    Args:
        name: A folder for which `is_flat` holds.
        image_size: Height and width; None for those that the images have, which must agree.
        channels: 1 or 3; None for those of the images.

    Raises:
        UserError: If there are no images, or they differ in size.
    """
    path = Path(name).expanduser()
    images = folders.read_unlabelled(path, paths.decoded_images(), image_size, channels)
    note = f"{name} has no labels: no validation and no test"
    return DataSource(path.resolve().name, None, note=note, transfer=images)


def _read(name: str, root: Path, shape: tuple[int, int, int]) -> LabeledImages:
    h, w, channels = shape
    size = h if h == w else None
    path = Path(name).expanduser()
    if data_source.is_distilled(name):
        distilled = distilled_set.load(distilled_set.locate(path))
        images = distilled.preprocess.invert(distilled.images)  # pixels, not clipped
        return LabeledImages(images, np.zeros(len(images), np.int64), ())
    if path.is_dir() and name not in datasets.NAMES:
        return folders.read_unlabelled(path, paths.decoded_images(), size, channels)
    return datasets.load_unlabelled(name, root=root, image_size=size, channels=channels)


def _describe(shape: tuple[int, int, int]) -> str:
    return "{}x{} pixels and {} channels".format(*shape)
