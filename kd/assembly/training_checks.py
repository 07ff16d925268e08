"""Loss, recipe, scheme and images of a training that do not fit each other, refused."""

from dsdistill.harness import shell
from dsdistill.harness.errors import UserError
from kd.assembly.training_parts import (
    ONE_CLASS_METRICS,
    TrainingParts,
    judging_attacks,
    training_attack,
)
from kd.data.data_source import DataSource
from kd.data.files.file_source import FileSource
from kd.evaluation import multi_label_scoring, robustness
from kd.objectives import loss_checks
from kd.objectives.adversary import bounds_after
from kd.options import TrainOptions
from kd.recipe import Recipe
from kd.training import optimization


def check(parts: TrainingParts, options: TrainOptions) -> None:
    """Refuse parts of a training that do not fit each other.

    Args:
        parts: The parts.
        options: The options that they were assembled from.

    Raises:
        UserError: With the option that does not fit.
    """
    recipe, classes = parts.recipe, max(len(parts.source.classes), 1)
    _check_label_kind(parts, options)
    _check_augment(recipe, parts.source)
    _check_attacks(parts, options)
    if options.transfer is not None:
        loss_checks.check_unlabelled(parts.terms)
    elif not parts.source.classes:
        loss_checks.check_unlabelled(parts.terms, options.data)
    if not parts.student.has_head and recipe.mixes_images:
        raise UserError(
            "--mixup and --cutmix mix labels, and --head none has none: add --mixup 0 --cutmix 0"
        )
    _check_pairs(recipe, parts)
    loss_checks.check_teaching(
        parts.terms,
        recipe,
        alone=parts.learns_alone(options),
        weighted=options.teacher_weights is not None,
    )
    teachers, peers = bool(parts.teachers), bool(parts.peers)
    loss_checks.check_students(parts.terms, recipe, teachers=teachers, peers=peers)
    if recipe.mixes_images and recipe.batch_size % 2:
        raise UserError(
            "--mixup and --cutmix pair the images of a batch: --batch-size must be even, got "
            f"{recipe.batch_size}"
        )
    loss_checks.check(
        parts.terms, classes=classes, batch_size=recipe.batch_size, mixed=recipe.mixes_images
    )
    optimization.check_optimizer(recipe)


def _check_label_kind(parts: TrainingParts, options: TrainOptions) -> None:
    """Refuse what does not go with images that have any number of labels, and the reverse."""
    several, recipe = parts.source.has_several_labels, parts.recipe
    known = multi_label_scoring.METRICS if several else ONE_CLASS_METRICS
    if recipe.metric not in known:
        of = "images with any number of labels" if several else "images of one class each"
        raise UserError(f"--metric {recipe.metric} is no figure of {of}: use {', '.join(known)}")
    if not several:
        return
    given = [name for name in _ONE_CLASS_OPTIONS if getattr(options, name) not in (None, "alike")]
    given += ["head"] if options.head == "none" else []
    given += [name for name in ("adversary", "mixup", "cutmix") if getattr(recipe, name)]
    if given:
        raise UserError(
            f"{shell.flag(given[0])} needs images of one class each, and an image of "
            f"{parts.source.name} has any number of labels: leave it out"
        )


# Options that need one class an image.
_ONE_CLASS_OPTIONS = ("transfer", "teacher_data", "teacher_weights", "robust", "prune", "quantize")


def _check_augment(recipe: Recipe, source: DataSource | FileSource) -> None:
    """Refuse augmentation that is for the other kind of data, images or recordings."""
    if recipe.augment == "specaugment" and source.mel is None:
        raise UserError(
            f"--augment specaugment is for recordings, and {source.name} holds images: use "
            "--augment crop-flip"
        )
    if recipe.augment == "crop-flip" and recipe.hflip > 0 and source.mel is not None:
        raise UserError(
            "--augment crop-flip plays half of the recordings backwards: use --augment "
            "specaugment, or add --hflip 0"
        )


def _check_attacks(parts: TrainingParts, options: TrainOptions) -> None:
    """Refuse attacks that do not fit the loss, the images or the processes."""
    preprocess, other = parts.student.preprocess, None
    if parts.peers:
        other = "--peers"
    elif parts.source.distilled is not None:
        other = "a distilled set, whose images are no pixels in [0, 1]"
    elif parts.on.is_fsdp2:
        other = "FSDP, which takes the student apart"
    against = loss_checks.check_adversary(parts.terms, parts.recipe.adversary, other=other)
    trained = training_attack(parts.recipe)
    if against is not None and trained is not None:
        bounds_after(preprocess, trained.eps)
    robustness.check(judging_attacks(parts, options), preprocess, len(parts.source.classes))


def _check_pairs(recipe: Recipe, parts: TrainingParts) -> None:
    """Refuse augmentation that the teachers' own pictures cannot follow."""
    if parts.teacher_data is None:
        return
    own, theirs = parts.source, parts.teacher_data.source
    moving = [term.name for term in parts.terms if term.definition.against == "moving teacher"]
    if moving:
        raise UserError(
            f"--loss {moving[0]} shows the teacher images that change with the student, and "
            "--teacher-data has no such ones: use rslad or ard"
        )
    if recipe.augment == "specaugment" and theirs.mel is None:
        raise UserError(
            "--augment specaugment shifts recordings, and --teacher-data holds images, which do "
            "not follow: leave it out"
        )
    if recipe.cutmix > 0 and own.shape[:2] != theirs.shape[:2]:
        raise UserError(
            "--cutmix pastes one rectangle into images of one size, and those of --teacher-data "
            f"are {theirs.shape[0]}x{theirs.shape[1]}, not {own.shape[0]}x{own.shape[1]}: use "
            "--mixup"
        )
