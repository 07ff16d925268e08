"""Reference outputs for an export: random and real images, and the student's outputs for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsdistill.harness import paths
from dsdistill.harness.data import preprocess
from dsdistill.harness.errors import UserError
from kd.data import batching, transfer_images
from kd.data.files.file_source import FileSource
from kd.data.files.image_files import ImageFiles
from kd.models import saved_models, seals
from kd.models.saved_models import Model
from kd.models.zoo import class_names
from kd.recipe import Recipe
from kd.runs import private_data, run_data

RANDOM_IMAGES, REAL_IMAGES = 16, 48  # number of images
SEED = 0

ImageBatch = Float[np.ndarray, "n h w c"]


@dataclass(frozen=True, eq=False)
class ReferenceOutputs:
    """Images in [0, 1] with the student's outputs.

    Attributes:
        batches: The random images, followed by the real ones if there are any.
        expected: The student's outputs for each batch.
        data: Name of the data set that the real images are from; None if there are none.
        note: Reason why there are no real images; None if there are some.
    """

    batches: tuple[ImageBatch, ...]
    expected: tuple[Float[np.ndarray, "n k"], ...]
    data: str | None
    note: str | None


def gather(
    run: Path, model: Model, root: Path | None, count: int = REAL_IMAGES
) -> ReferenceOutputs:
    """Collect random and real images, each kind as a single image and as a batch.

    Args:
        run: Folder of the student's run, which names its data.
        model: The student, in evaluation mode.
        root: Folder of the data sets; None for the one used in training.
        count: Number of real images, at most.

    Raises:
        UserError: If the student's outputs are not finite.
    """
    rng = np.random.default_rng(SEED)
    kinds, name, note = [rng.random((RANDOM_IMAGES, *model.shape), dtype=np.float32)], None, None
    try:
        name, images = _real_images(run, model, root, rng, count)
        kinds.append(images)
    except (UserError, OSError) as error:
        note = str(error)
    batches = tuple(part for images in kinds for part in (images[:1], images))
    expected = tuple(_student_outputs(model, images) for images in batches)
    if not all(np.isfinite(outputs).all() for outputs in expected):
        raise UserError(f"the student of {run} has outputs that are not finite: train it again")
    return ReferenceOutputs(batches, expected, name, note)


def run(
    runner: Callable[[Tensor], Tensor], reference: ReferenceOutputs
) -> Float[np.ndarray, "n k"]:
    """The outputs of an exported file for all reference images."""
    with torch.inference_mode():
        parts = [runner(batching.to_nchw(images)).numpy() for images in reference.batches]
    return np.concatenate(parts)


def _student_outputs(model: Model, images: ImageBatch) -> Float[np.ndarray, "n k"]:
    """Outputs as in `kd evaluate`: preprocessing in NumPy, then the network."""
    with torch.inference_mode():
        return model.classifier(batching.to_nchw(model.preprocess.apply(images))).numpy()


def _real_images(
    run: Path, model: Model, root: Path | None, rng: np.random.Generator, count: int
) -> tuple[str, ImageBatch]:
    """Name of the run's data and some of its images, from the test set where it has one.

    Raises:
        UserError: If they are missing or do not fit the student.
    """
    config, recipe = _read_if_present(run / "config.json"), run_data.read_recipe(run)
    name = config.get("data")
    if not isinstance(name, str):
        raise UserError(f"{run} does not say what it was trained on")
    root = root or Path(config.get("data_root") or paths.data_root())
    if not model.has_head and transfer_images.is_flat(name):
        h, w, channels = model.shape
        size = h if h == w else None
        source = transfer_images.load_flat(name, image_size=size, channels=channels)
    elif config.get("pate"):
        source = private_data.test_images(config, model, root=root)
    else:
        source = run_data.load(name, model, recipe, config, root=root)
    saved_models.check_shape("the student", model, source.shape)
    if model.has_head:  # raises for other classes; their order is irrelevant here
        class_names.match("the student", model.classes, source.classes, option=None)
    if isinstance(source, FileSource):
        return source.name, _stream_images(source, recipe, rng, count)
    if source.transfer is not None:
        images = source.transfer
        rows = _sample_rows(len(images), rng, count)
        return source.name, preprocess.unit_range(images.images(rows))
    if source.splits is None:
        raise UserError(source.note or f"{name} has no real images")
    images = source.splits.test if len(source.splits.test) else source.splits.train
    rows = _sample_rows(len(images), rng, count)
    return source.splits.name, preprocess.unit_range(images.images(rows))


def _stream_images(
    source: FileSource, recipe: Recipe, rng: np.random.Generator, count: int
) -> ImageBatch:
    """Evaluation views of a sample of images, or of the first images of an archive."""
    train, validation, test = source.parts
    part = test or validation or train
    if isinstance(part, ImageFiles):
        part = part.select(_sample_rows(len(part), rng, count))
    plain, cpu = preprocess.identity(source.shape[2]), torch.device("cpu")
    stream = replace(source, parts=(train, None, part)).test(recipe, plain, cpu)
    assert stream is not None
    first = next(iter(stream.in_order())).images[:count]
    return first.permute(0, 2, 3, 1).numpy()


def _sample_rows(n: int, rng: np.random.Generator, count: int) -> np.ndarray:
    return np.sort(rng.permutation(n)[:count])


def _read_if_present(path: Path) -> Mapping[str, Any]:
    return seals.read(path.parent, path.name) if path.is_file() else {}
