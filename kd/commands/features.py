"""`kd features`: the features of all images of a data set through a trained network, in one file.

The file is described in `dsdistill.harness.data.feature_file`; the commands of `dsdistill` read it
as any data set.
"""

import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from dsdistill.harness import shell, stopping
from dsdistill.harness.data import datasets, feature_file
from dsdistill.harness.data.feature_file import PartialFeatures
from dsdistill.harness.data.labeled_images import LabeledImages
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from kd.data import data_source
from kd.data.files import archives, image_files
from kd.data.files.image_files import ImageFiles
from kd.data.files.stream import FileBatches
from kd.data.files.transforms import Views
from kd.evaluation import backbones, features
from kd.evaluation.features import ArrayImages, OrderedImages
from kd.models import network_names, networks
from kd.options import FeaturesOptions
from kd.parallel import engine

SECONDS_BETWEEN_SAVES = 10.0


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
        self, views: Views, device: torch.device, options: FeaturesOptions
    ) -> OrderedImages:
        """The images as batches."""
        if isinstance(self.store, LabeledImages):
            return ArrayImages(self.store, views, device)
        return FileBatches(self.store, views, options.batch_size, device, workers=options.readers)


def run(options: FeaturesOptions) -> dict[str, Any]:
    """Extract the features; return figures to print.

    Raises:
        UserError: If data or backbone are missing, do not fit together, or the file exists.
    """
    if not Path(options.student).is_dir():
        networks.check_name(options.student)
    path = options.out or _default_path(options)
    with engine.temporary(options.device) as on:
        device = on.device
    images = _load(options)
    typed = network_names.names_in(options.student, options.trust_module)
    backbone = backbones.load(
        options.student,
        options.layer,
        images.shape,
        image_size=options.image_size,
        convertible=isinstance(images.store, ImageFiles),
        typed=typed,
    ).to(device)
    if isinstance(images.store, ImageFiles) and backbone.model.shape[2] == 3:
        gray = image_files.describe_gray(Path(options.data).expanduser(), images.store)
        if gray is not None:
            progress.note(gray.partition(";")[0])  # what follows is an option of `kd train`
    n, training = len(images.labels), images.counts[0]
    batches = features.plan(n, training, options.views, options.batch_size)
    total = n + (options.views - 1) * training
    record = _record(options, images, device) | backbone.record()
    partial = PartialFeatures(path, record, (total, backbone.width), resume=options.resume)
    given = {name: value for name, value in vars(options).items() if name != "data"}
    command = shell.line(
        "kd features", given | {"out": path, "resume": True}, _defaults(), options.data
    )
    views = backbone.views(scale=(options.min_scale, 1.0), hflip=options.hflip)
    ends = np.cumsum([len(batch.rows) for batch in batches])
    left = batches[int(np.searchsorted(ends, partial.done, "right")) :]
    began, first = time.monotonic(), partial.done
    try:
        with stopping.explain_stop(command, path), stopping.watch() as flag:
            stream = features.extract(
                backbone, images.ordered(views, device, options), left, options.seed, device
            )
            saved = time.monotonic()
            with progress.bar(total, "features", start=first) as show:
                done = first
                for rows in stream:
                    partial.append(rows)
                    done += len(rows)
                    spent = time.monotonic() - began
                    show(done, per_second=(done - first) / spent)
                    if time.monotonic() - saved > SECONDS_BETWEEN_SAVES or flag.requested:
                        partial.save()
                        saved = time.monotonic()
                    flag.check()
            spent = time.monotonic() - began
            sources = np.concatenate(
                [np.arange(n), np.tile(np.arange(training), options.views - 1)]
            )
            parts = np.repeat(np.arange(len(images.counts)), images.counts)
            partial.finish(images.labels[sources], images.classes, parts[sources], sources)
    finally:
        partial.close()
    return {
        "file": str(path),
        "features": total,
        "values_of_each": backbone.width,
        "training_images": training,
        "validation_images": images.counts[1],
        "test_images": images.counts[2],
        "views": options.views,
        "seconds": spent,
        "features_per_second": (total - first) / spent,
    }


def _load(options: FeaturesOptions) -> ImageSet:
    """List the images of a folder, or load those of another data set."""
    data, path = options.data, Path(options.data).expanduser()
    if archives.is_timm_name(data) or data_source.is_distilled(data):
        raise UserError(
            f"{data} is no set of images with labels that can be read by row: give a named data "
            "set, a folder of class folders, or an .npz file"
        )
    if data not in datasets.NAMES and path.is_dir():
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
        image, _ = store.read(0, 3)
        counts = len(splits.train), len(splits.validation), len(splits.test)
        shape, order = (image.height, image.width, 3), splits.train.draw_order
        assert store.labels is not None
        return ImageSet(
            data, store, store.labels, store.classes, counts, shape, store.digest, order
        )
    if path.suffix == ".npz" and feature_file.is_feature_file(path):
        raise UserError(f"{data} holds features already: give the images that they are of")
    splits = datasets.load(data, root=options.data_root, validation_fraction=0.0)
    whole = [splits.train, splits.test]
    store = LabeledImages(
        np.concatenate([part.images() for part in whole]),
        np.concatenate([part.labels for part in whole]),
        splits.train.classes,
    )
    counts = len(splits.train), 0, len(splits.test)
    digest = datasets.digest(store)
    return ImageSet(data, store, store.labels, store.classes, counts, store.shape, digest, None)


def _record(options: FeaturesOptions, images: ImageSet, device: torch.device) -> dict[str, Any]:
    """All that the features depend on besides the backbone, JSON-compatible."""
    return {
        "data": datasets.absolute_name(options.data),
        "data_sha256": images.digest,
        "device": device.type,
        "images": list(images.counts),
        "draw_order": images.draw_order,
        "views": options.views,
        "min_scale": options.min_scale,
        "hflip": options.hflip,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "versions": {name: version(name) for name in ("dsdistill", "torch", "timm", "pillow")},
    }


def _default_path(options: FeaturesOptions) -> Path:
    """`features-<data>-<backbone>.npz` in the current folder."""
    name = Path(options.student).name.replace(":", "-").replace("/", "-")
    return Path(f"features-{Path(options.data).stem}-{name}.npz")


def _defaults() -> dict[str, Any]:
    return vars(FeaturesOptions(data="", student=""))
