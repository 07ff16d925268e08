"""Write the features of a data set through a trained network to one file, resumable to the bit."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from dsdistill.harness import stopping
from dsdistill.harness.data import feature_file, image_files
from dsdistill.harness.data.feature_file import PartialFeatures
from dsdistill.harness.data.labeled_images import LabeledImages
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from dsdistill.harness.text import abbreviate_names
from kd.evaluation import features
from kd.evaluation.backbones import FeatureNetwork
from kd.evaluation.features import ViewRows
from kd.evaluation.image_sets import ImageSet, Skip

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
    backbone: FeatureNetwork
    device: torch.device
    source: str
    views: int = 1
    min_scale: float = 0.25
    hflip: float = 0.5
    seed: int = 0
    batch_size: int = feature_file.BATCH
    workers: int = 0

    @property
    def total(self) -> int:
        """Number of features."""
        return len(self.images.labels) + (self.views - 1) * self.images.counts[0]

    @property
    def batches(self) -> list[ViewRows]:
        """All images in batches, in the order of the rows."""
        counts = len(self.images.labels), self.images.counts[0]
        return features.plan(*counts, self.views, self.batch_size)

    def rows(self, batches: Sequence[ViewRows], skip: Skip) -> Iterator[Float[np.ndarray, "m d"]]:
        """Yield the features of some of the batches.

        Args:
            batches: The batches, in order.
            skip: As for `ImageSet.ordered`.
        """
        views = self.backbone.views(scale=(self.min_scale, 1.0), hflip=self.hflip)
        given = views, self.device, self.batch_size, self.workers
        ordered = self.images.ordered(*given, skip)
        return features.extract(self.backbone, ordered, batches, self.seed, self.device)

    def places(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Part of each row, and the row of the plain image that it shows."""
        n, training = len(self.images.labels), self.images.counts[0]
        sources = np.concatenate([np.arange(n), np.tile(np.arange(training), self.views - 1)])
        return np.repeat(np.arange(len(self.images.counts)), self.images.counts)[sources], sources

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
        `seconds` of this process and its `features_per_second`, `features` of the file, and
        `unreadable_images`, which it leaves out, if there are any.

    Raises:
        UserError: As `PartialFeatures`, or if too many images cannot be read.
        KeyboardInterrupt: If stopped, after the rows so far are safe.
    """
    what, total = extraction, extraction.total
    batches = what.batches
    written = PartialFeatures(path, what.record(), (total, what.backbone.width), resume=resume)
    ends = np.cumsum([len(batch.rows) for batch in batches])
    left = batches[int(np.searchsorted(ends, written.done, "right")) :]
    began, first = time.monotonic(), written.done
    try:
        with stopping.watch() as flag:
            stream = what.rows(left, partial(_skip, written, len(what.images.labels)))
            saved = time.monotonic()
            with progress.bar(total, "features", start=first) as show:
                done = first
                for rows in stream:
                    written.append(rows)
                    done += len(rows)
                    spent = time.monotonic() - began
                    show(done, per_second=(done - first) / spent)
                    if time.monotonic() - saved > SECONDS_BETWEEN_SAVES or flag.requested:
                        written.save()
                        saved = time.monotonic()
                    flag.check()
            spent = time.monotonic() - began
            parts, sources = what.places()
            written.finish(what.images.labels[sources], what.images.classes, parts, sources)
    finally:
        written.close()
    speed = {"seconds": spent, "features_per_second": (total - first) / spent}
    if not written.skipped:
        return {"features": total, **speed}
    progress.say(f"note: {_describe(written.skipped)}: left out")
    kept = total - int(np.isin(sources, [*written.skipped]).sum())
    return {"features": kept, "unreadable_images": len(written.skipped), **speed}


def _skip(written: PartialFeatures, images: int, row: int, why: str) -> None:
    """Leave an image out, in all its views; say so of the first one at once.

    Raises:
        UserError: If more are unreadable than may be.
    """
    if row in written.skipped:
        return
    allowed = image_files.unreadable_allowed(images)
    written.skip(row, why)
    if len(written.skipped) > allowed:
        raise UserError(
            f"{_describe(written.skipped)}; at most {allowed} of {images} images may be: repair or "
            "remove them"
        )
    if len(written.skipped) == 1:
        progress.say(f"note: {why}: left out, as up to {allowed} unreadable images are")


def _describe(skipped: Mapping[int, str]) -> str:
    return f"{len(skipped)} images are unreadable ({abbreviate_names([*skipped.values()])})"


def compute(what: Extraction) -> feature_file.Features:
    """The features in memory, to the bit as `write_in_run` has them.

    Args:
        what: Which features, and how.

    Raises:
        UserError: If a feature does not fit into float16.
    """
    store, done = np.empty((what.total, 1, 1, what.backbone.width), np.float16), 0
    with progress.bar(what.total, "features") as show:
        for rows in what.rows(what.batches, _refuse):
            store[done : done + len(rows), 0, 0] = feature_file.as_half(rows)
            done += len(rows)
            show(done)
    parts, sources = what.places()
    data = LabeledImages(store, what.images.labels[sources], what.images.classes)
    return feature_file.Features(data, parts, sources, what.record())


def _refuse(row: int, why: str) -> None:
    raise UserError(f"image {why}: repair or remove it")


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
    expected = feature_file.as_stored(extraction.record())
    if (change := feature_file.changed(written.record, expected)) is not None:
        name, before, now = change
        raise UserError(
            f"{path} was written with another {name} ({before}, now {now}): continue with the "
            "same, or remove it"
        )
    feature_file.note_unknown_layers(path, written.record, expected)
    return written
