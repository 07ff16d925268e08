"""Training batches: augmented, mixed, and with the teachers' logits where these are stored.

A teacher is given the same view of an image as the student. Without augmentation its logits are
computed once, as a table; with augmentation `--cache` stores them epoch by epoch, and what losses
of vectors take from its layers.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from kd.assembly.answer_caches import announce, from_tables, open_all, refuse_layers
from kd.assembly.training_parts import TrainingParts
from kd.data import augment, batching
from kd.data.batching import Batch, BatchSource, ResidentBatches, Unit
from kd.data.teacher_answers import CachedBatches, Kept, Table
from kd.data.teacher_cache import TeacherCache
from kd.evaluation import scoring
from kd.objectives.schemes import Distillation, Objective
from kd.options import TrainOptions
from kd.recipe import SPECAUGMENT_FIELDS

STATIC = "static"  # name of the entry with the logits of images that are not augmented
REMEDY = "use another disk, --cache-top, or leave it out"
VIEW_OPTIONS = (  # what a view of an image depends on besides the image
    "batch_size",
    "augment",
    "crop_padding",
    "hflip",
    "interpolation",
    "min_scale",
    "auto_augment",
    "color_jitter",
    "random_erase",
    "repeats",
    "mixup",
    "cutmix",
    "mix_probability",
    "mix_switch",
    "image_size",
)


def load(parts: TrainingParts) -> BatchSource:
    """Load the training images in batches, not augmented and without too small a last batch.

    Raises:
        UserError: If there are too few images for the loss or the number of processes.
    """
    on, least = parts.on, min_images_per_process(parts)
    images = parts.source.train(parts.recipe, parts.student.preprocess, on, parts.readers, least)
    if not images.sizes:
        raise UserError(
            f"{parts.source.name} has fewer training images than one batch of "
            f"{parts.recipe.batch_size} images per process: lower --batch-size"
        )
    last = images.sizes[-1]
    whole = parts.recipe.batch_size * on.num_processes
    if last > whole and on.is_main_process:
        progress.say(
            f"the last batch of an epoch holds {last} images, not {whole}: the remaining "
            f"{last - whole} are fewer than the "
            f"{batching.min_shared_size(on.num_processes, least)} that a batch needs"
        )
    return images


def min_images_per_process(parts: TrainingParts) -> int:
    """Fewest images of a batch that each process needs, for the loss and for batch norm."""
    return max(batching.MIN_IMAGES_PER_PROCESS, *(term.min_images for term in parts.terms))


def prepare(
    parts: TrainingParts, options: TrainOptions, objective: Objective, source: BatchSource
) -> BatchSource:
    """Augment the training batches and add the teachers' logits where these can be stored.

    Args:
        parts: Parts of the training.
        options: Options of the training.
        objective: Objective of the training.
        source: Batches from `load`.

    Raises:
        UserError: If `--cache` is given for a loss that takes more than logits and vectors.
    """
    classes = parts.source.classes
    paired = _add_teacher_images(source, parts)
    augmented = augment.augment_batches(paired, parts.recipe, len(classes), _silence(parts))
    moving = [term.name for term in parts.terms if term.definition.against == "moving teacher"]
    if moving and options.cache is not None:
        raise UserError(
            f"--cache keeps the teachers' answers, and with --loss {moving[0]} these are of images "
            "that change with the student: leave it out, or use rslad or ard"
        )
    if not isinstance(objective, Distillation) or not objective.needs_answers:
        return augmented
    if options.cache is not None and parts.teacher_data is not None:
        raise UserError(
            "--cache keeps answers to the student's images, and with --teacher-data the teachers "
            "see other ones: leave it out"
        )
    if options.cache is not None:
        return _cached(parts, options, objective, source, augmented)
    if objective.needs_features or augmented is not paired:
        return augmented
    if not isinstance(source, ResidentBatches):
        return paired
    answered = _precompute_logits(source, parts, ())
    return paired if answered is source else answered  # too many answers for memory


def _add_teacher_images(source: BatchSource, parts: TrainingParts) -> BatchSource:
    """Add the teachers' own pictures to batches, before both are augmented alike."""
    if parts.teacher_data is None:
        return source
    pictures = _teacher_batches(parts)

    def add(batch: Batch, seed: int) -> Batch:
        assert batch.index is not None
        theirs = pictures.batch(batch.index.cpu().numpy()).images
        return replace(batch, teacher_inputs=(theirs,) * len(parts.teachers))

    return batching.ChangedBatches(source, add)


def _teacher_batches(parts: TrainingParts) -> ResidentBatches:
    """The teachers' pictures of the training images, in the order of the data."""
    assert parts.teacher_data is not None
    pictures = parts.teacher_data
    return pictures.source.train(parts.recipe, pictures.preprocess, parts.on)


def _silence(parts: TrainingParts) -> list[Float[Tensor, "c h w"]]:
    """Preprocessed images of a silent recording, of the student's and of the teachers' own."""
    if parts.source.mel is None:
        return []
    sources = [(parts.source, parts.student.preprocess)]
    if parts.teacher_data is not None:
        sources.append((parts.teacher_data.source, parts.teacher_data.preprocess))
    return [
        batching.to_nchw(fitted.apply(np.zeros((1, *source.shape), np.float32)))[0]
        for source, fitted in sources
    ]


def _cached(
    parts: TrainingParts,
    options: TrainOptions,
    objective: Distillation,
    source: BatchSource,
    augmented: BatchSource,
) -> BatchSource:
    """The batches with answers from the cache: tables of still images, or views by epoch."""
    assert options.cache is not None
    count, on = parts.source.count, parts.on
    # Images that are read from files while a training goes on are cropped as they are read.
    still = augmented is source and isinstance(source, ResidentBatches)
    kept = _open_caches(parts, options, objective, still=still)
    say = progress.say if on.is_main_process else lambda line: None
    room = partial(announce, options.cache, say=say, remedy=REMEDY)
    if not still:
        recipe = parts.recipe
        per_epoch = math.ceil(len(augmented) / recipe.accumulate)
        epochs = math.ceil(recipe.total_steps(per_epoch) / per_epoch)
        needed = sum(x.missing_bytes(count, epochs, on.num_processes) for x in kept)
        room(needed, f"{epochs} views of {count:,} images")
        return CachedBatches(augmented, kept, objective.ask, partial(_count_rows, augmented.sizes))
    assert isinstance(source, ResidentBatches)
    table = Table(np.ones(count, np.int64), batching.SCORE_BATCH)
    logits = tuple(x for x in kept if x.vector is None)
    if 4 * count * sum(x.width for x in logits) > batching.MAX_RESIDENT_BYTES:
        logits = ()  # they are read as they are needed
    tables = [x for x in kept if x not in logits]
    rows = sum(x.row_bytes for x in logits if not x.cache.has(STATIC))
    needed = count * rows + sum(map(table.missing_bytes, tables))
    room(needed, f"{count:,} images")
    if logits:
        source = _precompute_logits(source, parts, tuple(x.cache for x in logits))
    if not tables:
        return source
    every = [table] * len(parts.teachers)
    makers = [source.batch] * len(parts.teachers)
    return from_tables(source, tables, every, makers, objective, on, texts=count)


def _count_rows(
    sizes: Sequence[int], seed: int, epoch: int, rank: int, world: int
) -> dict[Unit, list[int]]:
    return {"rows": [len(batching.share_positions(size, rank, world)) for size in sizes]}


def _precompute_logits(
    source: ResidentBatches, parts: TrainingParts, caches: tuple[TeacherCache, ...]
) -> ResidentBatches:
    """Add every teacher's logits of every image, unless they would take too much memory."""
    n, k = len(source.examples), len(parts.source.classes)
    if 4 * n * k * len(parts.teachers) > batching.MAX_RESIDENT_BYTES:
        return source
    tables, seen = [], source if parts.teacher_data is None else _teacher_batches(parts)
    for i, teacher in enumerate(parts.teachers):
        logits = caches[i].load(STATIC, n, k) if caches else None
        if logits is None:
            with progress.bar(len(source), "teacher batches") as show:
                logits = torch.from_numpy(scoring.outputs(teacher, seen, tick=show))
            if caches and parts.on.is_main_process:
                caches[i].save(STATIC, logits)
            # What is computed must be what is read after a stop.
            logits = caches[i].as_kept(logits) if caches else logits
        tables.append(logits.to(source.device))
    return replace(source, teacher_logits=tuple(tables))


def _open_caches(
    parts: TrainingParts, options: TrainOptions, objective: Distillation, *, still: bool
) -> tuple[Kept, ...]:
    """Open the caches of all answers that the loss takes."""
    if parts.source.count == 0:
        raise UserError(
            f"--cache needs images whose identity is known, and {parts.source.name} is read from "
            "front to back: leave it out, or use a folder"
        )
    refuse_layers(objective, np.ones(parts.source.count, np.int64), "images")
    # The preprocessing of the images is part of each teacher's adapter, and so of its fingerprint.
    common: dict[str, Any] = {"data": parts.source.digest, "shape": parts.source.shape}
    if not still:
        recipe = asdict(parts.recipe)
        common |= {name: recipe[name] for name in VIEW_OPTIONS} | {"seed": parts.seed}
        if parts.recipe.augment == "specaugment":
            common |= {name: recipe[name] for name in SPECAUGMENT_FIELDS}
        least = min_images_per_process(parts)
        if least > batching.MIN_IMAGES_PER_PROCESS:  # it decides where the last batch begins
            common["least"] = least
    count = len(parts.teachers)
    widths = [len(parts.source.classes)] * count
    return open_all(
        options, objective, parts.terms, [common] * count, widths, top=options.cache_top
    )
