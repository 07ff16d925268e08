"""Training batches: augmented, mixed, and with the teachers' logits where these are stored.

A teacher is given the same view of an image as the student. Without augmentation its logits are
computed once, as a table; with augmentation `--cache` stores them epoch by epoch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from kd.commands.training_parts import TrainingParts
from kd.data import augment, batching, teacher_cache
from kd.data.batching import Batch, BatchSource, ResidentBatches
from kd.data.teacher_cache import TeacherCache
from kd.evaluation import scoring
from kd.objectives.schemes import Distillation, Objective
from kd.objectives.terms import Term
from kd.options import TrainOptions
from kd.recipe import SPECAUGMENT_FIELDS

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
        UserError: If `--cache` is given for a loss that needs more than logits.
    """
    classes = parts.source.classes
    augmented = augment.augment_batches(source, parts.recipe, len(classes), _silence(parts))
    moving = [term.name for term in parts.terms if term.definition.against == "moving teacher"]
    if moving and options.cache is not None:
        raise UserError(
            f"--cache keeps the teachers' answers, and with --loss {moving[0]} these are of images "
            "that change with the student: leave it out, or use rslad or ard"
        )
    if not isinstance(objective, Distillation) or not objective.needs_answers:
        return augmented
    if objective.needs_features:
        if options.cache is not None:
            raise UserError(
                "--cache keeps the teachers' logits, and this loss needs their features too: "
                "leave --cache out, or the terms with layers"
            )
        return augmented
    caches = _open_caches(parts, options, still=augmented is source)
    if augmented is source and isinstance(source, ResidentBatches):
        return _precompute_logits(source, parts, caches)
    return CachedBatches(augmented, parts.teachers, caches, len(classes)) if caches else augmented


def _silence(parts: TrainingParts) -> Float[Tensor, "c h w"] | None:
    """The preprocessed image of a silent recording; None where the images are of none."""
    if parts.source.mel is None:
        return None
    black = np.zeros((1, *parts.source.shape), np.float32)
    return batching.to_nchw(parts.student.preprocess.apply(black))[0]


@dataclass(frozen=True, eq=False)
class CachedBatches:
    """Batches with the teachers' logits, read from the cache or computed and written to it.

    An epoch that is entered in the middle, after a kill, is not written; a later training does so.

    Attributes:
        source: Batches without logits.
        teachers: One teacher for each cache.
        caches: Caches of the logits for this process's share of every batch.
        classes: Number of classes.
    """

    source: BatchSource
    teachers: tuple[nn.Module, ...]
    caches: tuple[TeacherCache, ...]
    classes: int

    @property
    def device(self) -> torch.device:
        return self.source.device

    def __len__(self) -> int:
        return len(self.source)

    @property
    def sizes(self) -> list[int]:
        return self.source.sizes

    def epoch(
        self, seed: int, epoch: int, *, first: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Yield the batches of the source's epoch, with logits."""
        stream = self.source.epoch(seed, epoch, first=first, rank=rank, world=world)
        shares = [len(batching.share_positions(size, rank, world)) for size in self.sizes]
        name, ends = f"epoch-{epoch:05}-{rank}-of-{world}", np.cumsum([0, *shares])
        entries = [cache.open(name, int(ends[-1]), self.classes) for cache in self.caches]
        with ExitStack() as stack:  # an epoch that is left early closes it with an error
            writers = [
                stack.enter_context(cache.write(name)) if entry is None and first == 0 else None
                for cache, entry in zip(self.caches, entries, strict=True)
            ]
            for number, batch in enumerate(stream, first):
                rows = slice(int(ends[number]), int(ends[number + 1]))
                teacher_logits = []
                for teacher, entry, write in zip(self.teachers, entries, writers, strict=True):
                    logits = predict_logits(teacher, batch) if entry is None else entry[rows]
                    teacher_logits.append(logits.to(self.device))
                    if write is not None:
                        write(logits)
                yield replace(batch, teacher_logits=tuple(teacher_logits))


def predict_logits(teacher: nn.Module, batch: Batch) -> Tensor:
    """A teacher's logits of a batch, in float32 and without gradients."""
    with torch.no_grad():
        return teacher(batch.inputs).float()


def _precompute_logits(
    source: ResidentBatches, parts: TrainingParts, caches: tuple[TeacherCache, ...]
) -> BatchSource:
    """Add every teacher's logits of every image, unless they would take too much memory."""
    n, k = len(source.examples), len(parts.source.classes)
    if 4 * n * k * len(parts.teachers) > batching.MAX_RESIDENT_BYTES:
        return source
    tables = []
    for i, teacher in enumerate(parts.teachers):
        logits = caches[i].load("static", n, k) if caches else None
        if logits is None:
            with progress.bar(len(source), "teacher batches") as show:
                logits = torch.from_numpy(scoring.outputs(teacher, source, tick=show))
            if caches and parts.on.is_main_process:
                caches[i].save("static", logits)
        tables.append(logits.to(source.device))
    return replace(source, teacher_logits=tuple(tables))


def _open_caches(
    parts: TrainingParts, options: TrainOptions, *, still: bool
) -> tuple[TeacherCache, ...]:
    """Open one cache for each teacher; none without `--cache`."""
    if options.cache is None:
        return ()
    if parts.source.count == 0:
        raise UserError(
            f"--cache needs images whose identity is known, and {parts.source.name} is read from "
            "front to back: leave it out, or use a folder"
        )
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
    return open_caches(options, parts.terms, parts.teachers, [common] * len(parts.teachers))


def open_caches(
    options: TrainOptions,
    loss_terms: Sequence[Term],
    teachers: Sequence[nn.Module],
    keys: Sequence[Mapping[str, Any]],
) -> tuple[TeacherCache, ...]:
    """Open one cache for each teacher.

    Args:
        options: Options with `cache`.
        loss_terms: Terms of the loss.
        teachers: The teachers.
        keys: All that the answers of each depend on beside its weights.

    Raises:
        UserError: If only the largest probabilities are kept, and a term compares logits.
    """
    assert options.cache is not None
    exact = [term.name for term in loss_terms if term.definition.needs_raw_logits]
    if options.cache_top is not None and exact:
        raise UserError(
            f"--cache-top keeps probabilities, and --loss {exact[0]} compares the logits "
            "themselves: leave it out"
        )
    return tuple(
        teacher_cache.open_cache(
            options.cache,
            {**key, "teacher": teacher_cache.fingerprint(teacher)},
            top=options.cache_top,
        )
        for teacher, key in zip(teachers, keys, strict=True)
    )
