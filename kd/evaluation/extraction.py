"""Write the features of a data set through a trained network to one file, resumable to the bit."""

import json
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsdistill.harness import stopping
from dsdistill.harness.data import feature_file
from dsdistill.harness.data.feature_file import PartialFeatures
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from kd.evaluation import features
from kd.evaluation.backbones import Backbone
from kd.evaluation.image_sets import ImageSet

SECONDS_BETWEEN_SAVES = 10.0
VERSIONED_PACKAGES = ("dsdistill", "torch", "timm", "pillow")


@dataclass(frozen=True, eq=False)
class Extraction:
    """Which features are extracted, and how.

    Attributes:
        images: The images; those to train on first.
        backbone: The network, on its device.
        device: That device.
        source: Data set name or absolute path, for the record.
        views: Views of each training image: the plain one, and random ones.
        min_scale: Smallest share of an image's area in a random view.
        hflip: Probability of a horizontal flip in a random view.
        seed: Seed of the random views.
        batch_size: Images in a forward pass.
        workers: Processes that read image files.
    """

    images: ImageSet
    backbone: Backbone
    device: torch.device
    source: str
    views: int = 1
    min_scale: float = 0.25
    hflip: float = 0.5
    seed: int = 0
    batch_size: int = 64
    workers: int = 0

    @property
    def total(self) -> int:
        """Number of features."""
        return len(self.images.labels) + (self.views - 1) * self.images.counts[0]

    def record(self) -> dict[str, Any]:
        """All that the features depend on, JSON-compatible."""
        images = self.images
        return {
            "data": self.source,
            "data_sha256": images.digest,
            "device": self.device.type,
            "images": list(images.counts),
            "draw_order": images.draw_order,
            "views": self.views,
            "min_scale": self.min_scale,
            "hflip": self.hflip,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "versions": {name: version(name) for name in VERSIONED_PACKAGES},
        } | self.backbone.record()


def write(path: Path, extraction: Extraction, *, resume: bool) -> dict[str, float]:
    """Extract the features and write them to a file as `feature_file` describes it.

    Args:
        path: The file; until it is whole, its rows are in the folder `<file>.partial`.
        extraction: Which features, and how.
        resume: Whether to continue what an earlier process has begun.

    Returns:
        `seconds` of this process, and `features_per_second`.

    Raises:
        UserError: As `PartialFeatures`.
        KeyboardInterrupt: If stopped, after the rows so far are safe.
    """
    what, total = extraction, extraction.total
    images, backbone = what.images, what.backbone
    n, training = len(images.labels), images.counts[0]
    batches = features.plan(n, training, what.views, what.batch_size)
    partial = PartialFeatures(path, what.record(), (total, backbone.width), resume=resume)
    views = backbone.views(scale=(what.min_scale, 1.0), hflip=what.hflip)
    ends = np.cumsum([len(batch.rows) for batch in batches])
    left = batches[int(np.searchsorted(ends, partial.done, "right")) :]
    began, first = time.monotonic(), partial.done
    try:
        with stopping.watch() as flag:
            ordered = images.ordered(views, what.device, what.batch_size, what.workers)
            stream = features.extract(backbone, ordered, left, what.seed, what.device)
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
            sources = np.concatenate([np.arange(n), np.tile(np.arange(training), what.views - 1)])
            parts = np.repeat(np.arange(len(images.counts)), images.counts)
            partial.finish(images.labels[sources], images.classes, parts[sources], sources)
    finally:
        partial.close()
    return {"seconds": spent, "features_per_second": (total - first) / spent}


def write_in_run(path: Path, extraction: Extraction) -> feature_file.Features:
    """Write the features into the folder of a run, or continue, or read what is finished.

    Nothing that cannot be continued is left: after an error of the input, not even a part.

    Args:
        path: The file, in a folder that this process has locked.
        extraction: Which features, and how.

    Raises:
        UserError: If the file was made otherwise, or as `write`.
        KeyboardInterrupt: If stopped, after the rows so far are safe.
    """
    partial = path.with_name(f"{path.name}{feature_file.PARTIAL_SUFFIX}")
    if not path.exists():
        begun = (partial / feature_file.STATE).is_file()
        if not begun and partial.exists():
            shutil.rmtree(partial)  # killed before its first row was safe
        try:
            write(path, extraction, resume=begun)
        except UserError:
            if not begun:
                shutil.rmtree(partial, ignore_errors=True)
            raise
    written = feature_file.read(path)
    expected = json.loads(json.dumps(extraction.record()))
    for name, value in expected.items():
        if written.record.get(name) != value:
            raise UserError(
                f"{path} was written with another {name} ({written.record.get(name)}, now "
                f"{value}): continue with the same, or remove it"
            )
    return written
