"""Assemble an evaluation from its options, all checked before anything is trained."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsdistill.commands import export, training_data
from dsdistill.harness import lists
from dsdistill.harness.data import datasets, distilled_set, origin, preprocess, provenance
from dsdistill.harness.data.datasets import Splits
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.data.labeled_images import (
    Examples,
    LabeledImages,
    draw_balanced,
    iterate_chunks,
)
from dsdistill.harness.errors import UserError, unknown_name
from dsdistill.harness.evaluation import controls
from dsdistill.harness.evaluation.held_out import HeldOut
from dsdistill.harness.evaluation.protocol import Arm, Augmentable, Learner
from dsdistill.harness.runs import progress
from dsdistill.harness.text import quote
from dsdistill.options import EvaluateOptions
from dsdistill.published_sets import reader
from dsdistill.published_sets.reader import StatedFormat

MAX_VALIDATION_IMAGES = 2000  # class-balanced; they choose learning rates and calibrate
DEFAULT_RIDGE = 1e-6  # relative; for kernel ridge regression on a set that states no ridge
DEFAULT_KERNEL = "fc"  # for `ridge` on a set that was made without a kernel
# Options for a published set, and for reading the data that it was distilled from.
FORMAT_OPTIONS = ("pixels", "labels", "mean", "std", "layout", "tiles")
DATA_OPTIONS = ("image_size", "channels")


@dataclass(frozen=True, eq=False)
class EvaluationParts:
    """Everything that an evaluation needs.

    Attributes:
        distilled: The distilled set.
        splits: The data that it was distilled from.
        train: All training images, in the set's preprocessing.
        held_out: Validation and test images, in the set's preprocessing.
        arms: Kinds of training data.
        learners: Learners, each of which is trained on every arm.
        augment: Whether learners that support augmentation are trained with it too.
    """

    distilled: DistilledSet
    splits: Splits
    train: Examples
    held_out: HeldOut
    arms: list[Arm]
    learners: list[Learner]
    augment: bool

    @property
    def trainings(self) -> list[tuple[Learner, bool, Arm]]:
        """Every learner on every arm, without and perhaps with augmentation."""
        return [
            (learner, augmented, arm)
            for learner in self.learners
            for augmented in (False, True)[
                : 1 + (self.augment and isinstance(learner, Augmentable))
            ]
            for arm in self.arms
        ]


def assemble(options: EvaluateOptions) -> EvaluationParts:
    """Load the set, its data and the teacher, and look up all names.

    Raises:
        UserError: If anything is unknown, missing or does not fit together.
    """
    _check(options)
    names = lists.parse_names("--controls", options.controls, empty=True)
    for name in names:
        if name not in controls.CONTROLS:
            raise unknown_name("control", name, controls.CONTROLS)
    distilled, splits = _load_set(options)
    if not len(splits.validation):
        raise UserError(
            f"{splits.name} has too few images to hold any out for validation, on which learning "
            "rates are chosen: evaluate with more images per class"
        )
    learners = [
        _learner(name, distilled, options)
        for name in lists.parse_names("--learners", options.learners)
    ]
    train = Examples(splits.train, distilled.preprocess)
    check_controls(names, splits.train, training_data.images_per_class(distilled))
    data = {
        "sha256": splits.digest,
        "train": len(splits.train),
        "preprocess": training_data.preprocess_digest(distilled.preprocess),
    }
    teacher = None
    if options.teacher is not None:
        from kd.evaluation import answers

        classes, shape = splits.train.classes, splits.train.shape
        prepared, device = distilled.preprocess, options.device
        class_map = options.teacher_class_map
        typed = lists.parse_names("--trust-module", options.trust_module or "", empty=True)
        typed += lists.parse_names("--learners", options.learners)
        teacher = answers.load(options.teacher, prepared, shape, classes, device, class_map, typed)
    teacher_identity = None if teacher is None else teacher.digest
    return EvaluationParts(
        distilled,
        splits,
        train,
        HeldOut(
            Examples(_limit_validation(splits.validation), distilled.preprocess),
            Examples(splits.test, distilled.preprocess),
            teacher,
            {
                "data": data,
                "validation": len(splits.validation),
                # The held-out images may change while the training images stay the same.
                "judging": [datasets.digest(splits.validation), datasets.digest(splits.test)],
                "teacher": teacher_identity,
            },
        ),
        training_data.arms(
            distilled, train, names, data=data, teacher=teacher, teacher_identity=teacher_identity
        ),
        learners,
        options.augment != "none",
    )


def _check(options: EvaluateOptions) -> None:
    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {options.seeds}")
    if options.steps is not None and options.steps < 1:
        raise UserError(f"--steps must be at least 1, got {options.steps}")
    if options.teacher_class_map is not None and options.teacher is None:
        raise UserError("--teacher-class-map needs --teacher")
    if options.resume and options.out is None:
        raise UserError("--resume needs --out, the folder of the evaluation to continue")


def check_controls(names: Sequence[str], train: LabeledImages, per_class: int) -> None:
    """Refuse controls that need more images of a class than the data have."""
    counts = np.bincount(train.labels, minlength=len(train.classes))
    scarce = int(counts.argmin())
    sized = [name for name in names if name != "full"]
    if sized and counts[scarce] < per_class:
        raise UserError(
            f"the set has {per_class} images per class, the data only {counts[scarce]} training "
            f"images of class {quote(train.classes[scarce])}, so {', '.join(sized)} cannot be "
            "drawn: use --controls full"
        )


def _load_set(options: EvaluateOptions) -> tuple[DistilledSet, Splits]:
    """Load the set and the data that it was distilled from."""
    distilled, default = export.read(options.run), EvaluateOptions(options.run)
    if distilled is None and reader.is_published_set(options.run):
        return _load_published(options)
    distilled = distilled or distilled_set.load(distilled_set.locate(options.run))
    for name in (*FORMAT_OPTIONS, *DATA_OPTIONS):
        if getattr(options, name) != getattr(default, name):
            option = name.replace("_", "-")
            raise UserError(
                f"--{option} is for sets from elsewhere; {options.run} states it itself: leave the "
                "option out"
            )
    return distilled, _splits(distilled, options)


def _load_published(options: EvaluateOptions) -> tuple[DistilledSet, Splits]:
    splits = datasets.load(
        _require_data(options, options.data),
        root=options.data_root,
        image_size=options.image_size,
        validation_fraction=origin.DEFAULT_VALIDATION_FRACTION,
        channels=options.channels,
    )
    stated = StatedFormat(**{name: getattr(options, name) for name in FORMAT_OPTIONS})
    fitted = preprocess.fit("standardise", splits.train.chunks, splits.train.shape)

    chunks = functools.partial(iterate_chunks, (splits.train, splits.validation))
    loaded = reader.load(
        options.run, splits.train, stated, preprocess=fitted, data=splits.name, chunks=chunks
    )
    progress.say(f"{options.run}: {'; '.join(loaded.provenance['notes'])}")
    return loaded, splits


def _splits(distilled: DistilledSet, options: EvaluateOptions) -> Splits:
    """Load the data that the set was distilled from, split as they were then."""
    data = _require_data(options, options.data or origin.source(options.run, distilled))
    splits = origin.load(options.run, distilled, data, root=options.data_root)
    origin.check_same_data(options.run, distilled, splits, data)
    return splits


def _require_data(options: EvaluateOptions, data: str | None) -> str:
    if data is None:
        raise UserError(
            f"{options.run} does not say what it was distilled from: add --data, such as "
            "--data cifar10"
        )
    return data


def _limit_validation(validation: LabeledImages) -> LabeledImages:
    """At most `MAX_VALIDATION_IMAGES` validation images, the same for every learner."""
    rows = draw_balanced(validation.labels, MAX_VALIDATION_IMAGES, np.random.default_rng(0))
    return validation.select(np.sort(rows)) if len(rows) < len(validation) else validation


def _learner(name: str, distilled: DistilledSet, options: EvaluateOptions) -> Learner:
    base, _, kernel = name.partition(":")
    if base == "ridge":
        return _ridge(name, kernel, distilled)
    from kd.evaluation.learners import network_learner

    flip = options.augment == "crop-flip"
    return network_learner(
        name,
        steps=options.steps,
        device=options.device,
        flip=flip,
        shape=distilled.images.shape[1:],
        classes=len(distilled.classes),
    )


def _ridge(name: str, kernel: str, distilled: DistilledSet) -> Learner:
    from dsdistill.kernels import networks
    from dsdistill.methods import ridge

    source = origin.read_provenance(distilled)
    depth, std = None, {}
    if not kernel:
        needed = ("kernel", "depth", "w_std", "b_std")
        provenance.require_usable(
            "the distilled set", source, [f"config.{part}" for part in needed]
        )
        # Of several kernels, the one that validated.
        kernel = lists.parse_names("--kernel", source.judge or DEFAULT_KERNEL)[0]
        if ":" in kernel:
            raise UserError(
                f"the distilled set was made with the kernel {kernel}, which is code, and a file "
                "may not choose the code that runs here: if you trust that module, name it "
                f"yourself with --learners ridge:{kernel}; otherwise leave ridge out of --learners"
            )
        depth = source.depth
        known = {"w_std": source.w_std, "b_std": source.b_std}
        std = {part: value for part, value in known.items() if value is not None}
    network = networks.parse(kernel, depth, **std)
    provenance.require_usable("the distilled set", source, ["evaluation_ridge"])
    value = DEFAULT_RIDGE if source.ridge is None else source.ridge
    # The code of a user's module may change while its name stays: such results are not cached.
    identity = None if ":" in kernel else {"kernel": network.name, "ridge": value, **std}
    return ridge.RidgeLearner(network, value, name, identity=identity)
