"""Data read from files during a training: folders, and timm's `wds/`, `hfds/` and `tfds/`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int

from dsdistill.harness.data.labeled_images import describe_missing_classes, spread
from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from kd.data.batching import MIN_IMAGES_PER_PROCESS, SCORE_BATCH, BatchSource, EvaluationBatches
from kd.data.files import archives, image_files
from kd.data.files.archives import ArchiveSplit
from kd.data.files.image_files import ImageFiles
from kd.data.files.transforms import Views
from kd.models.zoo.class_groups import ClassGroups
from kd.parallel.engine import Engine
from kd.recipe import Recipe

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as timm has them
TIMM_SPLITS = ("train", "validation")  # of a data set by timm's name, which has no test images then
JUDGED = ("validation", "test")  # parts whose accuracy is told
SourceSplit = ImageFiles | ArchiveSplit


@dataclass(frozen=True, eq=False)
class FileSource:
    """Images to train, validate and test on, not kept in memory; like `data_source.DataSource`.

    Attributes:
        name: Short name, for folder names and reports.
        parts: Training, validation and test images; the last two may be missing.
        size: Height and width of a network's images.
        channels: 3 for colour, 1 for grayscale.
        note: Note for the user; None without any.
        brings_validation: Whether the validation images are a part of the data's own.
        distilled: None: files are never a distilled set.
        mel: None: recordings are not read during a training.
        groups: As in `data_source.DataSource`.
        has_several_labels: False: images with several labels are not read during a training.
    """

    name: str
    parts: tuple[SourceSplit, SourceSplit | None, SourceSplit | None]
    size: int
    channels: int = 3
    note: str | None = None
    brings_validation: bool = False
    distilled: None = None
    mel: None = None
    groups: ClassGroups | None = None
    has_several_labels: Literal[False] = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.size, self.size, self.channels

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in label order."""
        return self.parts[0].classes

    @property
    def train_labels(self) -> Int[np.ndarray, " n"] | None:
        """Class of each image to train on; None if it is not known before they are read."""
        train = self.parts[0]
        return train.labels if isinstance(train, ImageFiles) else None

    @property
    def count(self) -> int:
        """Number of images to train on; 0 if it is not known before they are read."""
        train = self.parts[0]
        return len(train) if isinstance(train, ImageFiles) else 0

    @property
    def validation_count(self) -> int | None:
        """Number of images to validate on; None if it is not known before they are read."""
        held = self.parts[1]
        return None if isinstance(held, ArchiveSplit) else len(held or ())

    def missing_classes(self, *, judged: bool = False) -> list[str]:
        """As `data_source.DataSource.missing_classes`."""
        lines = (
            describe_missing_classes(name, part.labels, self.classes)
            for name, part in zip(JUDGED, self.parts[1:], strict=True)
            if (name == "test" or not judged)
            and isinstance(part, ImageFiles)
            and part.labels is not None
        )
        return [line for line in lines if line]

    @property
    def digest(self) -> str:
        """SHA-256 that changes with the images trained on."""
        train = self.parts[0]
        return train.digest if isinstance(train, ImageFiles) else f"{train.name} {train.split}"

    def fit(self, kind: str | None) -> Preprocess:
        """Return ImageNet's normalisation: nothing can be fitted on images not yet read."""
        if kind not in (None, "standardise"):
            raise UserError(f"--preprocess {kind} needs all images at once: leave it out")
        mean, std = (np.asarray(values, np.float32) for values in (MEAN, STD))
        if self.channels == 1:  # as timm does for networks of one channel
            mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
        return Preprocess("standardise", mean, std)

    def train(
        self,
        recipe: Recipe,
        fitted: Preprocess,
        on: Engine,
        workers: int,
        least: int = MIN_IMAGES_PER_PROCESS,
    ) -> BatchSource:
        """The training images in batches of `recipe.batch_size` per process, cropped and augmented.

        Args:
            recipe: Recipe with the batch size and the augmentation.
            fitted: Normalisation of the images.
            on: Engine of the training.
            workers: Number of decoding processes.
            least: Smallest number of images in a process's share of a batch.
        """
        world = on.num_processes
        return archives.stream_split(
            self.parts[0],
            self._views(recipe, fitted),
            recipe.batch_size * world,
            on.device,
            world=world,
            repeats=recipe.repeats,
            workers=workers,
            least=least,
        )

    def validation(
        self, recipe: Recipe, fitted: Preprocess, device: torch.device, workers: int = 0
    ) -> EvaluationBatches | None:
        """Batches of the validation images; None if there are none."""
        return self._evaluation_batches(self.parts[1], recipe, fitted, device, workers)

    def shuffled(
        self, recipe: Recipe, fitted: Preprocess, device: torch.device, workers: int = 0
    ) -> BatchSource:
        """Batches of training images with evaluation views."""
        views = self._views(recipe, fitted)
        return archives.stream_split(
            self.parts[0], views, SCORE_BATCH, device, augment=False, workers=workers
        )

    def sample(
        self,
        count: int,
        recipe: Recipe,
        fitted: Preprocess,
        device: torch.device,
        workers: int = 0,
    ) -> EvaluationBatches | None:
        """Batches of up to `count` training images, spread over classes; None for an archive."""
        train = self.parts[0]
        if not isinstance(train, ImageFiles):
            return None
        # Labels that are not known yet count as one class.
        labels = np.zeros(len(train), np.int64) if train.labels is None else train.labels
        chosen = train.select(spread(labels, count))
        return self._evaluation_batches(chosen, recipe, fitted, device, workers)

    def test(
        self, recipe: Recipe, fitted: Preprocess, device: torch.device, workers: int = 0
    ) -> EvaluationBatches | None:
        """Batches of the test images, read once at the end; None if there are none."""
        return self._evaluation_batches(self.parts[2], recipe, fitted, device, workers)

    def _evaluation_batches(
        self,
        part: SourceSplit | None,
        recipe: Recipe,
        fitted: Preprocess,
        device: torch.device,
        workers: int,
    ) -> EvaluationBatches | None:
        if part is None or (isinstance(part, ImageFiles) and not len(part)):
            return None
        views = self._views(recipe, fitted)
        return archives.stream_split(
            part, views, SCORE_BATCH, device, augment=False, workers=workers
        )

    def _views(self, recipe: Recipe, fitted: Preprocess) -> Views:
        mean, std = (tuple(float(v) for v in values) for values in (fitted.mean, fitted.std))
        random = recipe.interpolation == "random"
        return Views(
            (self.size, self.size),
            mean,
            std,
            interpolation="bicubic" if random else recipe.interpolation,
            train_interpolation=recipe.interpolation,
            scale=(recipe.min_scale, 1.0),
            hflip=recipe.hflip,
            color_jitter=recipe.color_jitter,
            auto_augment=recipe.auto_augment,
            random_erase=recipe.random_erase,
            crop_pct=recipe.crop_share,
        )


def resolve(
    data: str,
    *,
    root: Path,
    image_size: int | None,
    validation_fraction: float,
    channels: int | None = None,
    classes: Sequence[str] | None = None,
    announce: bool = True,
) -> FileSource:
    """List the images of a data set that is read during the training.

    Args:
        data: A folder of class folders, or one of timm's names.
        root: Folder of timm's named data sets.
        image_size: Height and width of the crops.
        validation_fraction: Share of a folder's training images that is held out.
        channels: 1 or 3; None is 3.
        classes, announce: For a folder, as in `datasets.load`.

    Raises:
        UserError: If the data are not available, or are not a data set of files.
    """
    if image_size is None:
        raise UserError("--augment imagenet cuts images to one size: give --image-size 224, say")
    path = Path(data).expanduser()
    if archives.is_timm_name(data):
        train, held = (archives.open_split(data, part, root=root) for part in TIMM_SPLITS)
        note = f"{data} has no test images: its validation images choose the best epoch"
        return FileSource(
            data.replace("/", "-"), (train, held, None), image_size, channels or 3, note, True
        )
    if not path.is_dir():
        raise UserError(
            f"--augment imagenet reads image files as it goes, and {data} is no folder of class "
            "folders: use --augment crop-flip, or none"
        )
    splits = image_files.open_folder(path, validation_fraction, classes, announce=announce)
    parts = (splits.train, splits.validation, splits.test)
    if channels is None and (gray := image_files.describe_gray(path, splits.train)):
        progress.note(gray)
    return FileSource(
        path.resolve().stem,
        parts,
        image_size,
        channels or 3,
        brings_validation=splits.brings_validation,
    )
