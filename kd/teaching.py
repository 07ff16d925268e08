"""Batches as a training sees them: changed, mixed, and with the teachers' answers that are known.

A teacher answers to the very view that the student sees. Where no image ever changes, its answers
are a table, computed once; where they do change, `--cache` keeps them epoch by epoch.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsdistill.harness import progress
from dsdistill.harness.errors import UserError
from kd import augment, cache, data, scoring
from kd.assembly import Parts
from kd.cache import Cache
from kd.data import Batch, Batches, Resident
from kd.objectives import Distillation, Objective
from kd.options import Train

VIEWS = (  # what a view of an image depends on, beside the image
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


def batches(parts: Parts, options: Train, objective: Objective) -> Batches:
    """The training images in batches.

    Raises:
        UserError: If answers are to be kept that the loss does not ask for.
    """
    fitted, on = parts.student.preprocess, parts.on
    source = parts.source.train(parts.recipe, fitted, on, options.readers)
    classes = parts.source.classes
    changed = augment.changed(source, parts.recipe, len(classes))
    if not isinstance(objective, Distillation) or not objective.needs_teacher:
        return changed
    if objective.needs_features:
        if options.cache is not None:
            raise UserError(
                "--cache keeps the teachers' logits, and this loss needs their features too: "
                "leave --cache out, or the terms with layers"
            )
        return changed
    caches = _caches(parts, options, still=changed is source)
    if changed is source and isinstance(source, Resident):
        return _table(source, parts, caches)
    return Cached(changed, parts.teachers, caches, len(classes)) if caches else changed


@dataclass(frozen=True, eq=False)
class Cached:
    """Batches with the teachers' answers, from the cache or on their way into it.

    An epoch that is entered in the middle, after a kill, is not written: the next training writes
    it.

    Attributes:
        source: Of the batches.
        teachers: One for each cache.
        caches: Of this process's share of every batch.
        classes: Their number.
    """

    source: Batches
    teachers: tuple[nn.Module, ...]
    caches: tuple[Cache, ...]
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
        """The source's epoch, with logits."""
        stream = self.source.epoch(seed, epoch, first=first, rank=rank, world=world)
        shares = [len(data.mine(size, rank, world)) for size in self.sizes]
        name, ends = f"epoch-{epoch:05}-{rank}-of-{world}", np.cumsum([0, *shares])
        known = [kept.open(name, int(ends[-1]), self.classes) for kept in self.caches]
        with ExitStack() as stack:  # closed with an error where the epoch is left before its end
            writers = [
                stack.enter_context(kept.writing(name)) if entry is None and first == 0 else None
                for kept, entry in zip(self.caches, known, strict=True)
            ]
            for number, batch in enumerate(stream, first):
                rows = slice(int(ends[number]), int(ends[number + 1]))
                answers = []
                for teacher, entry, write in zip(self.teachers, known, writers, strict=True):
                    logits = answer(teacher, batch) if entry is None else entry[rows]
                    answers.append(logits.to(self.device))
                    if write is not None:
                        write(logits)
                yield replace(batch, teacher_logits=tuple(answers))


def answer(teacher: nn.Module, batch: Batch) -> Tensor:
    """A teacher's logits of a batch, without a graph."""
    with torch.no_grad():
        return teacher(batch.images).float()


def _table(source: Resident, parts: Parts, caches: tuple[Cache, ...]) -> Batches:
    """With every teacher's logits of every image: no augmentation changes them."""
    n, k = len(source.examples), len(parts.source.classes)
    if 4 * n * k * len(parts.teachers) > data.RESIDENT_BYTES:
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


def _caches(parts: Parts, options: Train, *, still: bool) -> tuple[Cache, ...]:
    """One for each teacher; none without `--cache`."""
    if options.cache is None:
        return ()
    if parts.source.count == 0:
        raise UserError(
            f"--cache needs images whose identity is known, and {parts.source.name} is read from "
            "front to back: leave it out, or use a folder"
        )
    # The preprocessing of the images is part of each teacher's own adapter, and so of its hash.
    common: dict[str, Any] = {"data": parts.source.digest, "shape": parts.source.shape}
    if not still:
        recipe = asdict(parts.recipe)
        common |= {name: recipe[name] for name in VIEWS} | {"seed": options.seed}
    return tuple(
        cache.open_cache(
            options.cache,
            common | {"teacher": cache.fingerprint(teacher)},
            top=options.cache_top,
        )
        for teacher in parts.teachers
    )
