"""The data that `kd` trains and tests on: a data set, or a distilled set with its source data."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int

from dsdistill.harness.data import datasets, distilled_set, origin, preprocess
from dsdistill.harness.data.datasets import Splits
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.data.labeled_images import (
    Examples,
    LabeledImages,
    describe_missing_classes,
    spread,
)
from dsdistill.harness.data.mel_images import MelFormat, MelOptions
from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError
from kd.data import batching
from kd.data.batching import SCORE_BATCH, ResidentBatches
from kd.models.zoo.class_groups import ClassGroups
from kd.parallel.engine import Engine
from kd.recipe import Recipe


@dataclass(frozen=True, eq=False)
class DataSource:
    """Images to train on and, where there are any, images to validate and test on.

    Attributes:
        name: Short name, for folder names and reports.
        splits: The real images; None if those of a distilled set are not available.
        distilled: The distilled set, if it is trained on; else None.
        note: Note for the user, such as why there is no evaluation; None without any.
        privacy: What the labels cost, for the report, where they are noisy answers; else None.
        transfer: Images to train on in place of the training images, with labels that mean
            nothing; None without any.
        groups: The groups that its classes are, and what is joined to them; None where the classes
            are the data's own.
    """

    name: str
    splits: Splits | None
    distilled: DistilledSet | None = None
    note: str | None = None
    privacy: Mapping[str, float | int] | None = None
    transfer: LabeledImages | None = None
    groups: ClassGroups | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.train_images.shape

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in label order."""
        return self.train_images.classes

    @property
    def train_images(self) -> LabeledImages:
        """The images trained on; those of a distilled set are already preprocessed."""
        if self.transfer is not None:
            return self.transfer
        if self.distilled is not None:
            return self.distilled.examples().data
        assert self.splits is not None
        return self.splits.train

    @property
    def train_labels(self) -> Int[np.ndarray, " n"] | Int[np.ndarray, "n k"]:
        """Class, or several labels, of each image to train on."""
        return self.train_images.labels

    @property
    def has_several_labels(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.splits is not None and self.splits.train.has_several_labels

    @property
    def from_weights(self) -> bool:
        """Whether the images were made from a teacher's weights: only its answers tell of them."""
        return self.distilled is not None and origin.read_provenance(self.distilled).from_weights

    @property
    def count(self) -> int:
        """Number of images to train on."""
        return len(self.train_images)

    @property
    def validation_count(self) -> int:
        """Number of images held out of the training set."""
        return len(self.splits.validation) if self.splits else 0

    @property
    def mel(self) -> MelFormat | None:
        """Format of the images of recordings; None for other images."""
        return self.splits and self.splits.mel

    @property
    def brings_validation(self) -> bool:
        """Whether the validation images are a part of the data's own."""
        return self.splits is not None and self.splits.brings_validation

    def missing_classes(self, *, judged: bool = False) -> list[str]:
        """Lines that name the classes of which an accuracy says nothing.

        Args:
            judged: Whether only the test images are looked at.
        """
        if self.splits is None:
            return []
        parts = {"test": self.splits.test}
        if not judged:
            parts = {"validation": self.splits.validation} | parts
        lines = (
            describe_missing_classes(name, part.labels, part.classes)
            for name, part in parts.items()
        )
        return [line for line in lines if line]

    @property
    def digest(self) -> str:
        """SHA-256 that changes with the images trained on."""
        if self.distilled is not None:
            return hashlib.sha256(self.distilled.images.tobytes()).hexdigest()
        if self.transfer is not None:
            return f"transfer-{datasets.digest(self.transfer)}"
        assert self.splits is not None
        return f"{self.splits.digest}-{len(self.splits.train)}"

    def fit(self, kind: str | None) -> Preprocess:
        """Return the distilled set's stored preprocessing, or fit one on the training images.

        Args:
            kind: Kind of preprocessing; None is standardisation, for colour too: unlike a kernel, a
                network loses nothing by it.
        """
        if self.distilled is not None:
            return self.distilled.preprocess
        images = self.train_images
        # `--resume` fits anew: ZCA of few images stays what it was in runs of earlier versions.
        return preprocess.fit(kind or "standardise", images.chunks, images.shape, True)

    def train(
        self,
        recipe: Recipe,
        fitted: Preprocess,
        on: Engine,
        workers: int = 0,
        least: int = batching.MIN_IMAGES_PER_PROCESS,
    ) -> ResidentBatches:
        """The preprocessed training images in batches of `recipe.batch_size` per process.

        Args:
            recipe: Recipe with the batch size.
            fitted: Preprocessing of real images.
            on: Engine of the training.
            workers: Ignored; `file_source.FileSource.train` needs it.
            least: Smallest number of images in a process's share of a batch.
        """
        world = on.num_processes
        size = recipe.batch_size * world
        if self.distilled is not None:
            examples = self.distilled.examples()
        else:
            examples = Examples(self.train_images, fitted)
        return batching.prepare_resident(examples, size, on.device, world, least)

    def validation(
        self, recipe: Recipe, fitted: Preprocess, device: torch.device, workers: int = 0
    ) -> ResidentBatches | None:
        """Batches of real images held out of the training set; None if there are none."""
        return _evaluation_batches(self.splits and self.splits.validation, fitted, device)

    def shuffled(
        self, recipe: Recipe, fitted: Preprocess, device: torch.device, workers: int = 0
    ) -> ResidentBatches | None:
        """Batches of real training images, not augmented; None if there are none."""
        if self.splits is None:
            return None
        return _unchanged(self.splits.train, fitted, device)

    def sample(
        self,
        count: int,
        recipe: Recipe,
        fitted: Preprocess,
        device: torch.device,
        workers: int = 0,
    ) -> ResidentBatches | None:
        """Batches of up to `count` real training images, spread over classes; None without any."""
        if self.splits is None:
            return None
        rows = spread(self.splits.train.labels, count)
        return _unchanged(self.splits.train.select(rows), fitted, device)

    def transfer_sample(
        self, count: int, fitted: Preprocess, device: torch.device
    ) -> ResidentBatches | None:
        """Batches of up to `count` images of a transfer set or a distilled set, evenly spaced.

        None where the real images of the data are trained on.
        """
        if self.transfer is None and self.distilled is None:
            return None
        images = self.train_images
        images = images.select(np.arange(0, len(images), math.ceil(len(images) / count)))
        labels = batching.label_tensor(images.labels).to(device)
        examples = Examples(images, fitted, is_preprocessed=self.distilled is not None)
        return ResidentBatches(examples, SCORE_BATCH, device, labels)

    def test(
        self, recipe: Recipe, fitted: Preprocess, device: torch.device, workers: int = 0
    ) -> ResidentBatches | None:
        """Batches of the real test images, read once at the end; None if there are none."""
        return _evaluation_batches(self.splits and self.splits.test, fitted, device)


def resolve(
    name: str,
    *,
    root: Path,
    image_size: int | None = None,
    validation_fraction: float | None = None,
    channels: int | None = None,
    classes: Sequence[str] | None = None,
    announce: bool = True,
    sound: MelOptions | None = None,
) -> DataSource:
    """Resolve DATA and load it.

    Args:
        name: A data set as in `datasets.load`, the folder of a `dsdistill` run, or a distilled
            `.safetensors` file.
        root: Folder of the data sets.
        image_size, validation_fraction, channels, classes, announce, sound: As in `datasets.load`;
            a distilled set has its own.

    Raises:
        UserError: If the data are not available, or a distilled set contradicts its source data.
    """
    path = Path(name).expanduser()
    if is_distilled(name):
        if any(value is not None for value in (image_size, validation_fraction, channels, sound)):
            raise UserError(
                "a distilled set brings its image size, its channels and its validation images: "
                "leave --image-size, --channels, --validation-fraction and the options of "
                "recordings out"
            )
        return _load_distilled(distilled_set.locate(path), root)
    if path.is_dir() and (path / "config.json").is_file():
        raise UserError(f"{path} is a run's folder without a finished distilled set")
    fraction = fraction_or_default(validation_fraction)
    splits = datasets.load(
        name,
        root=root,
        image_size=image_size,
        validation_fraction=fraction,
        channels=channels,
        classes=classes,
        announce=announce,
        sound=sound,
        several_labels=True,
    )
    return DataSource(splits.name, splits)


def fraction_or_default(fraction: float | None) -> float:
    """Share of the training images that is held out for validation; the default for None."""
    return origin.DEFAULT_VALIDATION_FRACTION if fraction is None else fraction


def is_distilled(data: str) -> bool:
    """Whether DATA is a distilled set's file or the folder of a run with one."""
    path = Path(data).expanduser()
    return path.suffix == ".safetensors" or (path / "distilled.safetensors").is_file()


def _load_distilled(path: Path, root: Path) -> DataSource:
    distilled = distilled_set.load(path)
    name = path.parent.resolve().name if path.name == "distilled.safetensors" else path.stem
    came_from = origin.source(path, distilled)
    if came_from is None:
        why = f"{path} does not say what it was distilled from"
        if origin.read_provenance(distilled).from_weights:
            why = f"{path} was made without data"
        return DataSource(name, None, distilled, f"{why}: {_NO_EVALUATION}")
    try:
        splits = origin.load(path, distilled, came_from, root=root)
    except (UserError, OSError) as error:
        return DataSource(name, None, distilled, f"{error}: {_NO_EVALUATION}")
    origin.check_same_data(path, distilled, splits, came_from)
    return DataSource(name, splits, distilled)


_NO_EVALUATION = "no validation and no test"


def _unchanged(images: LabeledImages, fitted: Preprocess, device: torch.device) -> ResidentBatches:
    labels = batching.label_tensor(images.labels).to(device)
    return ResidentBatches(Examples(images, fitted), SCORE_BATCH, device, labels)


def _evaluation_batches(
    images: LabeledImages | None, fitted: Preprocess, device: torch.device
) -> ResidentBatches | None:
    if images is None or not len(images):
        return None
    return batching.prepare_resident(Examples(images, fitted), SCORE_BATCH, device)
