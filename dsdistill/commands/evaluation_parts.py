"""Assemble an evaluation from its options, all checked before anything is trained."""

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from dsdistill.commands import export, option_ranges, training_data
from dsdistill.harness import lists, shell
from dsdistill.harness.data import datasets, distilled_set, origin, preprocess, provenance
from dsdistill.harness.data.datasets import Splits
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.data.labeled_images import (
    Examples,
    LabeledImages,
    draw_balanced,
    iterate_chunks,
)
from dsdistill.harness.data.preprocess import is_features
from dsdistill.harness.errors import UserError, unknown_name
from dsdistill.harness.evaluation import controls
from dsdistill.harness.evaluation.feature_learner import FeatureLearner, FeatureSpace
from dsdistill.harness.evaluation.held_out import HeldOut
from dsdistill.harness.evaluation.protocol import Arm, Augmentable, Learner
from dsdistill.harness.runs import progress
from dsdistill.harness.text import quote
from dsdistill.kernels import notation
from dsdistill.options import EvaluateOptions, LabelSolveOptions
from dsdistill.published_sets import reader
from dsdistill.published_sets.stated_format import StatedFormat

if TYPE_CHECKING:
    from dsdistill.methods.ridge import RidgeLearner

MAX_VALIDATION_IMAGES = 2000  # class-balanced; they choose learning rates and calibrate
# Options for a published set, and for reading the data that it was distilled from.
FORMAT_OPTIONS = tuple(known.name for known in fields(StatedFormat))
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
        further: Further sets of the same data, by the name of their arm.
    """

    distilled: DistilledSet
    splits: Splits
    train: Examples
    held_out: HeldOut
    arms: list[Arm]
    learners: list[Learner]
    augment: bool
    further: Mapping[str, DistilledSet]

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
    names = parse_controls(options)
    distilled, splits = _load_set(options)
    further = _load_further(options, splits)
    learner_names = lists.parse_names("--learners", options.learners)
    learners = make_learners(learner_names, distilled, splits, options)
    teacher = None
    if options.teacher is not None:
        from kd.evaluation import answers

        classes, shape = splits.train.classes, splits.train.shape
        prepared, device = distilled.preprocess, options.device
        class_map, typed = options.teacher_class_map, _typed_names(learner_names, options)
        images, mel = (prepared, shape, classes, device), splits.mel
        teacher = answers.load(options.teacher, *images, class_map, typed, mel)
    identity = None if teacher is None else teacher.digest
    return combine(
        distilled,
        splits,
        learners,
        names,
        teacher=teacher,
        teacher_identity=identity,
        augment=options.augment != "none",
        further=further,
    )


def combine(
    distilled: DistilledSet,
    splits: Splits,
    learners: list[Learner],
    control_names: Sequence[str],
    *,
    teacher: training_data.LogitFunction | None = None,
    teacher_identity: Any = None,
    augment: bool = False,
    further: Mapping[str, DistilledSet] = MappingProxyType({}),
) -> EvaluationParts:
    """Combine a set, its data and learners to an evaluation.

    Args:
        distilled: The set.
        splits: The data that it was distilled from.
        learners: Learners, each of which is trained on every arm.
        control_names: Of `controls.CONTROLS` and `controls.RELABELLED`.
        teacher: Logits of preprocessed images; None for no teacher.
        teacher_identity: Identity of the teacher, JSON-compatible; None if it has none, in which
            case results cannot be cached.
        augment: Whether learners that support augmentation are trained with it too.
        further: Further sets of the same data, by the name of their arm.

    Raises:
        UserError: If the data have too few images.
    """
    if not len(splits.validation):
        raise UserError(
            f"{splits.name} has too few images to hold any out for validation, on which learning "
            "rates are chosen: evaluate with more images per class"
        )
    if controls.SOFT in control_names and teacher is None:
        raise UserError(
            f"{controls.SOFT} has the labels of a teacher: add one, or leave {controls.SOFT} out "
            "of the controls"
        )
    train = Examples(splits.train, distilled.preprocess)
    check_controls(control_names, splits.train, training_data.images_per_class(distilled))
    solver = _label_solver(distilled, train) if controls.SOLVED in control_names else None
    data = {
        "sha256": splits.digest,
        "train": len(splits.train),
        "preprocess": training_data.preprocess_digest(distilled.preprocess),
    }
    identity = {
        "data": data,
        "validation": len(splits.validation),
        # The held-out images may change while the training images stay the same.
        "judging": [datasets.digest(splits.validation), datasets.digest(splits.test)],
        "teacher": teacher_identity,
    }
    if teacher is not None and teacher_identity is None:
        identity = None
    return EvaluationParts(
        distilled,
        splits,
        train,
        HeldOut(
            Examples(_limit_validation(splits.validation), distilled.preprocess),
            Examples(splits.test, distilled.preprocess),
            teacher,
            identity,
        ),
        training_data.arms(
            distilled,
            train,
            control_names,
            data=data,
            teacher=teacher,
            teacher_identity=teacher_identity,
            solver=solver,
            further=further,
        ),
        learners,
        augment,
        further,
    )


def _label_solver(distilled: DistilledSet, train: Examples) -> training_data.LabelSolver:
    """Label Solve with the set's own kernel on all training images of the evaluation."""
    from dsdistill.methods import stored_kernel

    remedy = f"leave {controls.SOLVED} out of --controls"
    solve, identity = stored_kernel.label_solver(
        distilled, train, LabelSolveOptions.ridge, remedy=remedy
    )
    return training_data.LabelSolver(solve, identity)


def parse_controls(options: EvaluateOptions) -> list[str]:
    """The controls that the options name; refuses options that cannot be right.

    Raises:
        UserError: If a control is unknown, or an option breaks a rule.
    """
    names = lists.parse_names("--controls", options.controls, empty=True)
    known = (*controls.CONTROLS, *controls.RELABELLED)
    for name in names:
        if name not in known:
            raise unknown_name("control", name, known)
    option_ranges.require_at_least(options, {"seeds": 1, "steps": 1})
    if options.teacher_class_map is not None and options.teacher is None:
        raise UserError("--teacher-class-map needs --teacher")
    if options.resume and options.out is None:
        raise UserError("--resume needs --out, the folder of the evaluation to continue")
    return names


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
            raise UserError(
                f"{shell.flag(name)} is for sets from elsewhere; {options.run} states it itself: "
                "leave the option out"
            )
    return distilled, _splits(distilled, options)


def _load_further(options: EvaluateOptions, splits: Splits) -> dict[str, DistilledSet]:
    """Load the sets of `--also`, by the names of their folders, or else their paths.

    Raises:
        UserError: If one cannot be read, is of other data, or is named twice.
    """
    sets: dict[str, DistilledSet] = {}
    paths = [path.resolve() for path in (options.run, *options.also)]
    for path, whole in zip(options.also, paths[1:], strict=True):
        if paths.count(whole) > 1:
            raise UserError(f"{path} is evaluated twice: name it once in RUN and --also")
        folder = whole.parent if whole.name == distilled_set.FILE_NAME else whole
        taken = folder.name in sets or controls.is_reserved(folder.name)
        name = str(folder) if taken else folder.name
        sets[name] = export.read(path) or distilled_set.load(distilled_set.locate(path))
        origin.check_same_data(path, sets[name], splits, str(options.run))
    return sets


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


def make_learners(
    names: Sequence[str], distilled: DistilledSet, splits: Splits, options: EvaluateOptions
) -> list[Learner]:
    """The learners that names mean; those on the same backbone share its features.

    Args:
        names: Elements of `--learners`: LEARNER, or LEARNER@BACKBONE for one on features.
        distilled: The set, whose kernel `ridge` uses.
        splits: The data that it was distilled from.
        options: Steps, device and augmentation of networks, and code that runs may name.

    Raises:
        UserError: If a name is unknown, or a backbone cannot be loaded.
    """
    names = [_on_own_backbone(name, distilled) for name in names]
    typed, labels = _typed_names(names, options), _backbone_labels(names)

    @functools.cache
    def space(backbone: str) -> FeatureSpace:
        from kd.evaluation import backbones, encoder

        shape, device = splits.train.shape, options.device
        label = labels[backbone]
        layer = backbones.EMBEDDING
        loaded = encoder.load(backbone, layer, shape, label=label, device=device, typed=typed)
        return FeatureSpace(loaded, splits.train)

    return [learner(name, distilled, options, space) for name in names]


def _on_own_backbone(name: str, distilled: DistilledSet) -> str:
    """`ridge` of a set that was made through a backbone: on the features of that one.

    Raises:
        UserError: If the backbone is no folder here (a file may not choose what else is loaded), or
            the set was made on another layer than the embedding, which learners see.
    """
    source = origin.read_provenance(distilled)
    if name != "ridge" or source.backbone is None:
        return name
    if source.backbone == provenance.OWN_MODULE:
        raise UserError(
            "the set was made through a module that only its maker has: leave ridge out of "
            "--learners, or name a kernel or a backbone, as in ridge:fc or ridge@BACKBONE"
        )
    if not Path(source.backbone).is_dir():
        raise UserError(
            f"the set was made through the backbone {source.backbone}, which is no folder here: "
            f"write ridge@{source.backbone} in --learners, or leave ridge out"
        )
    layer = (source.config or {}).get("layer", "embedding")
    if layer != "embedding":
        raise UserError(
            f"the set was made on the layer {layer!r} of its backbone, and learners see the "
            "embedding: leave ridge out of --learners"
        )
    return f"ridge@{source.backbone}"


def _backbone_labels(learner_names: Sequence[str]) -> dict[str, str]:
    """A name in reports for each backbone: the last part of a folder's path where no two share it.

    Args:
        learner_names: Elements of `--learners`.
    """
    backbones = dict.fromkeys(name.partition("@")[2] for name in learner_names)
    short = {each: Path(each).resolve().name if Path(each).is_dir() else each for each in backbones}
    counts = collections.Counter(short.values())
    return {each: label if counts[label] == 1 else each for each, label in short.items()}


def code_options(options: EvaluateOptions) -> list[str]:
    """Names of the options that name code, as `module:attribute`, which is imported."""
    learners = lists.parse_names("--learners", options.learners)
    names_code = {"learners": any(map(_is_code, learners)), "teacher": _is_code(options.teacher)}
    return [option for option, holds in names_code.items() if holds]


def _is_code(name: str | None) -> bool:
    """Whether a learner or a teacher is code, or sees the features of a network that is."""
    if name is None or ":" not in name:
        return False
    from kd.evaluation import backbones

    base, _, backbone = name.partition("@")
    kind, _, rest = base.partition(":")
    if kind == "ridge":
        return notation.is_code(rest) or backbones.is_code(backbone)
    network = rest if kind in ("centred", "uncentred") else base
    return backbones.is_code(network) or backbones.is_code(backbone)


def _typed_names(learner_names: Sequence[str], options: EvaluateOptions) -> list[str]:
    """All names that may be code which the user has typed."""
    trusted = lists.parse_names("--trust-module", options.trust_module or "", empty=True)
    backbones = [name.partition("@")[2] for name in learner_names]
    return [*trusted, *learner_names, *filter(None, backbones)]


def learner(
    name: str,
    distilled: DistilledSet,
    options: EvaluateOptions,
    space: Callable[[str], FeatureSpace],
) -> Learner:
    """The learner that a name means.

    Args:
        name: An element of `--learners`.
        distilled: The set, whose kernel `ridge` uses.
        options: Steps, device and augmentation of networks.
        space: The features of the evaluation's images by the backbone of a name.

    Raises:
        UserError: If the name is unknown.
    """
    base, at, backbone = name.partition("@")
    is_regression = base.partition(":")[0] == "ridge"
    if at and (base == "linear-probe" or is_regression):
        return _feature_learner(name, base, backbone, distilled, space)
    if name == "linear-probe":
        from dsdistill.methods.linear_probe import LinearProbe

        return LinearProbe()
    if is_regression:
        return _ridge(name, distilled)
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


def _ridge(name: str, distilled: DistilledSet, *, sees_features: bool = False) -> "RidgeLearner":
    """Ridge regression with the kernel after `ridge:`, or the set's own."""
    from dsdistill.methods import stored_kernel

    remedy = (
        "if you trust that module, name it yourself with --learners ridge:{}; otherwise leave "
        "ridge out of --learners"
    )
    kernel = name.partition(":")[2]
    return stored_kernel.learner(
        distilled, kernel, name=name, remedy=remedy, sees_features=sees_features
    )


def _feature_learner(
    name: str,
    base: str,
    backbone: str,
    distilled: DistilledSet,
    space: Callable[[str], FeatureSpace],
) -> FeatureLearner:
    """A linear probe or ridge regression on the features of a backbone.

    Raises:
        UserError: If the set holds features itself, the backbone cannot be loaded, or the kernel
            takes images of several pixels only.
    """
    if not backbone:
        raise UserError(
            f"{name} names no backbone: write {name}BACKBONE, the folder of a run of kd train or a "
            "name with published weights"
        )
    if is_features(distilled.images.shape[1:]):
        raise UserError(f"the set holds features already: write {base} in place of {name}")
    if base == "linear-probe":
        from dsdistill.methods.linear_probe import LinearProbe

        return FeatureLearner(LinearProbe(), space(backbone))
    from dsdistill.kernels.networks import Engine

    regression = _ridge(base, distilled, sees_features=True)
    if regression.network.engine is Engine.EXACT_PLANES:
        raise UserError(
            f"{name} has the kernel {regression.network.name}, and features have no pixels to "
            f"convolve: write ridge:linear@{backbone} or ridge:fc@{backbone}"
        )
    return FeatureLearner(regression, space(backbone))
