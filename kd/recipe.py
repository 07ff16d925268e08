"""The recipe: all that a training depends on besides data and networks, and the rules for it.

The lengths `warmup`, `cooldown` and `milestones` are in the unit of the recipe's whole length:
epochs where `epochs` is given, steps where `steps` is. A training of another length keeps their
shares.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from dsdistill.harness.errors import UserError

Optimizer = Literal["sgd", "momentum", "adam", "adamw", "lamb", "lion", "muon"]
Schedule = Literal["cosine", "milestones", "constant"]
Precision = Literal["no", "bf16", "fp16", "mixed"]
Augment = Literal["none", "crop-flip", "imagenet"]
Metric = Literal["accuracy", "nll"]


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Recipe:
    """All that a training depends on beside its data and its networks."""

    epochs: int | None = _field(None, "passes over the training images")
    steps: int | None = _field(None, "steps of the optimizer, in place of --epochs")
    batch_size: int = _field(64, "images on one device at once")
    accumulate: int = _field(1, "batches whose mean gradient makes one step")
    optimizer: Optimizer = _field(
        "sgd", "timm's names; sgd: Nesterov momentum, momentum: classical"
    )
    lr: float = _field(0.05, "largest learning rate, of a step, however many devices share it")
    momentum: float = _field(0.9, "of sgd and momentum")
    weight_decay: float = _field(5e-4, "of weights; norms and biases only with --decay-all")
    decay_all: bool = _field(False, "decay norms and biases too")
    clip: float | None = _field(None, "largest norm of a step's gradient")
    schedule: Schedule = _field("cosine", "of the learning rate after the warm-up")
    warmup: float = _field(0.0, "linear rise of the learning rate, in epochs (or steps)")
    warmup_from: float = _field(0.01, "share of --lr where the rise begins")
    cooldown: float = _field(0.0, "stretch at the last learning rate, in epochs (or steps)")
    final: float = _field(0.0, "share of --lr where the cosine ends")
    milestones: tuple[float, ...] = _field((), "where the rate falls, in epochs (or steps)")
    decay: float = _field(0.1, "factor of the learning rate at each milestone")
    loss: str | None = _field(None, "weighted terms, such as ce:0.1,kd:0.9:temperature=4")
    label_smoothing: float = _field(0.0, "of the labels in cross-entropy")
    augment: Augment = _field(
        "none", "crop-flip: shifts by --crop-padding and flips; imagenet: random crops of files"
    )
    crop_padding: int = _field(4, "pixels of crop-flip")
    hflip: float = _field(0.5, "probability of a horizontal flip")
    interpolation: str = _field("random", "of random crops: random, bilinear, bicubic")
    min_scale: float = _field(0.08, "smallest share of an image in a random crop")
    auto_augment: str | None = _field(None, "timm's string, such as rand-m7-mstd0.5")
    color_jitter: float | None = _field(None, "strength; off where --auto-augment is given")
    random_erase: float = _field(0.0, "probability that a part of an image becomes noise")
    repeats: int = _field(1, "views of an image in one epoch (repeated augmentation)")
    crop_share: float = _field(0.875, "side of the central crop in evaluation: 224 of 256")
    mixup: float = _field(0.0, "alpha of mixup; 0: none")
    cutmix: float = _field(0.0, "alpha of CutMix; 0: none")
    mix_probability: float = _field(1.0, "of mixing a batch")
    mix_switch: float = _field(0.5, "probability of CutMix where both are on")
    ema: float | None = _field(None, "largest decay of the averaged weights, which are then saved")
    ema_ramp: float = _field(15.0, "the decay rises as 1 - exp(-ramp step / steps)")
    average_best: int = _field(1, "mean of the weights of so many best epochs")
    metric: Metric = _field("accuracy", "what the best epoch has the best of, on validation images")
    validate_every: int | None = _field(
        None,
        "epochs between validations; by default 1, or so many that short epochs make at most 40 "
        "validations",
    )
    patience: int | None = _field(
        None, "stop after so many validations in a row without a better --metric"
    )
    precision: Precision = _field("no", "mixed: bf16 where the GPU has it, else fp16")
    image_size: int | None = _field(None, "images are resized to this height and width")
    student: str | None = _field(None, "")
    teacher: str | None = _field(None, "")
    gpu: bool = _field(False, "")

    @property
    def length(self) -> float:
        """Length of the training, in epochs or steps."""
        return self.steps if self.steps is not None else self.epochs or 0

    def total_steps(self, steps_per_epoch: int) -> int:
        """Number of steps of the whole training."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return self.epochs * steps_per_epoch

    def in_steps(self, length: float, steps_per_epoch: int) -> int:
        """Convert a length from the recipe's unit to steps."""
        return round(length if self.steps is not None else length * steps_per_epoch)


NOT_OPTIONS = ("student", "teacher", "gpu")  # fields without an option of the same meaning
OPTIONS = tuple(f for f in fields(Recipe) if f.name not in NOT_OPTIONS)


def override(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    """Replace the fields of a recipe that the user gave.

    A training of another length keeps the shares of its warm-up, cool-down and milestones, unless
    they are given too.

    Args:
        recipe: The recipe.
        given: Values by the name of the field.

    Raises:
        UserError: For a value that breaks a rule, or an option without effect.
    """
    if "epochs" in given and "steps" in given:
        raise UserError("--epochs and --steps both set the length of a training: give one of them")
    lengths: dict[str, Any] = {}
    for unit, other in (("epochs", "steps"), ("steps", "epochs")):
        if unit in given:
            factor = given[unit] / recipe.length
            lengths = {name: getattr(recipe, name) * factor for name in ("warmup", "cooldown")}
            lengths |= {"milestones": tuple(m * factor for m in recipe.milestones), other: None}
    changed = replace(recipe, **lengths | dict(given))
    _check(changed)
    _check_used(changed, given)
    return changed


def _check(recipe: Recipe) -> None:
    counts = ("epochs", "steps", "batch_size", "accumulate", "repeats", "average_best")
    for name in (*counts, "validate_every", "patience"):
        value = getattr(recipe, name)
        _require(value is None or value >= 1, name, "at least 1", value)
    for name in ("lr", "clip", "min_scale", "crop_share"):
        value = getattr(recipe, name)
        _require(value is None or 0 < value < float("inf"), name, "positive and finite", value)
    for name in ("weight_decay", "warmup", "cooldown", "mixup", "cutmix", "crop_padding"):
        value = getattr(recipe, name)
        _require(0 <= value < float("inf"), name, "0 or more", value)
    for name in ("label_smoothing", "momentum", "ema"):
        value = getattr(recipe, name)
        _require(value is None or 0 <= value < 1, name, "in [0, 1)", value)
    for name in ("hflip", "random_erase", "mix_probability", "mix_switch", "final", "warmup_from"):
        value = getattr(recipe, name)
        _require(0 <= value <= 1, name, "in [0, 1]", value)
    if recipe.warmup + recipe.cooldown >= recipe.length:
        raise UserError(
            f"--warmup {recipe.warmup:g} and --cooldown {recipe.cooldown:g} leave nothing of a "
            f"training of {recipe.length:g} {'steps' if recipe.steps is not None else 'epochs'}: "
            "shorten them"
        )
    if recipe.schedule == "milestones" and not recipe.milestones:
        raise UserError("--schedule milestones needs --milestones: give them")


def _check_used(recipe: Recipe, given: Mapping[str, Any]) -> None:
    """Refuse options that have no effect in this recipe."""
    files, sgd = recipe.augment == "imagenet", recipe.optimizer in ("sgd", "momentum")
    mixed = recipe.mixup > 0 or recipe.cutmix > 0
    needs = {
        "momentum": (sgd, "--optimizer sgd or momentum"),
        "milestones": (recipe.schedule == "milestones", "--schedule milestones"),
        "decay": (recipe.schedule == "milestones", "--schedule milestones"),
        "final": (recipe.schedule == "cosine", "--schedule cosine"),
        "cooldown": (recipe.schedule == "cosine", "--schedule cosine"),
        "warmup_from": (recipe.warmup > 0, "--warmup"),
        "crop_padding": (recipe.augment == "crop-flip", "--augment crop-flip"),
        "hflip": (recipe.augment != "none", "--augment"),
        "mix_probability": (mixed, "--mixup or --cutmix"),
        "mix_switch": (recipe.mixup > 0 and recipe.cutmix > 0, "--mixup and --cutmix"),
        "ema_ramp": (recipe.ema is not None, "--ema"),
        "decay_all": (recipe.weight_decay > 0, "--weight-decay"),
    }
    images = ("interpolation", "min_scale", "auto_augment", "color_jitter", "random_erase")
    needs |= dict.fromkeys((*images, "repeats", "crop_share"), (files, "--augment imagenet"))
    if "color_jitter" in given and recipe.auto_augment is not None:
        raise UserError("--color-jitter has no effect with --auto-augment: leave one of them out")
    for name in given:
        used, needed = needs.get(name, (True, ""))
        if not used:
            raise UserError(f"--{name.replace('_', '-')} has no effect without {needed}")


def _require(holds: bool, name: str, rule: str, got: object) -> None:
    if not holds:
        raise UserError(f"--{name.replace('_', '-')} must be {rule}, got {got}")
