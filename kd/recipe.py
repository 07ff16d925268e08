"""The recipe: all that a training depends on besides data and networks, and the rules for it.

The lengths `warmup`, `cooldown` and `milestones` are in the unit of the recipe's whole length:
epochs where `epochs` is given, steps where `steps` is. A training of another length keeps their
shares.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from dsdistill.harness.errors import UserError
from kd import attack

Optimizer = Literal["sgd", "momentum", "adam", "adamw", "lamb", "lion", "muon"]
Schedule = Literal["cosine", "linear", "milestones", "constant"]
Precision = Literal["no", "bf16", "fp16", "mixed"]
Augment = Literal["none", "crop-flip", "imagenet", "specaugment", "words", "masked", "teacher"]
Metric = Literal[
    "accuracy",
    "nll",
    "macro_f1",
    "balanced_accuracy",
    "mean_average_precision",
    "micro_f1",
    "matthews",
    "pearson",
    "spearman",
    "entity_f1",
    "cosine",
    "robust_accuracy",
]

MOMENTUM_OPTIMIZERS: tuple[Optimizer, ...] = ("sgd", "momentum")
# Other texts than the data's, which are made before the training.
TEXT_AUGMENTS: tuple[Augment, ...] = ("words", "masked", "teacher")
COPYING_AUGMENTS: tuple[Augment, ...] = ("words", "masked")  # those of them that add copies
STREAMED_AUGMENTS: tuple[Augment, ...] = ("imagenet",)  # crops are cut from files during training
SPECAUGMENT_FIELDS = ("time_shift", "hide_bands", "hide_time")
VALIDATION_FIELDS = ("metric", "average_best", "patience", "validate_every")  # compare validations
SCHEDULE_FIELDS: Mapping[Schedule, tuple[str, ...]] = {  # of the recipe, used by one schedule only
    "cosine": ("final", "cooldown"),
    "linear": ("final", "cooldown"),
    "milestones": ("milestones", "decay"),
    "constant": (),
}


@dataclass(frozen=True)
class MetricDefinition:
    """What selects the best epoch.

    Attributes:
        sign: 1 if larger values are better, -1 if smaller ones are.
        needs_logits: Whether it is of probabilities, which only logits give.
    """

    sign: int
    needs_logits: bool


METRICS: Mapping[Metric, MetricDefinition] = {
    "accuracy": MetricDefinition(1, needs_logits=False),
    "nll": MetricDefinition(-1, needs_logits=True),
    "macro_f1": MetricDefinition(1, needs_logits=False),
    "balanced_accuracy": MetricDefinition(1, needs_logits=False),
    "mean_average_precision": MetricDefinition(1, needs_logits=False),
    "micro_f1": MetricDefinition(1, needs_logits=False),
    "matthews": MetricDefinition(1, needs_logits=False),
    "pearson": MetricDefinition(1, needs_logits=False),
    "spearman": MetricDefinition(1, needs_logits=False),
    "entity_f1": MetricDefinition(1, needs_logits=False),
    "cosine": MetricDefinition(1, needs_logits=False),
    "robust_accuracy": MetricDefinition(1, needs_logits=True),
}


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Recipe:
    """All that a training depends on beside its data and its networks."""

    epochs: int | None = _field(None, "Passes over the training images or texts")
    steps: int | None = _field(None, "Steps of the optimizer, instead of --epochs")
    batch_size: int = _field(64, "Images or texts per batch on each device")
    accumulate: int = _field(1, "Batches whose mean gradient makes one step")
    optimizer: Optimizer = _field(
        "sgd", "Optimizer by timm's name; sgd has Nesterov momentum, momentum the classical one"
    )
    lr: float = _field(0.05, "Largest learning rate of a step, however many devices share the step")
    momentum: float = _field(0.9, "Momentum of the optimizers sgd and momentum")
    weight_decay: float = _field(
        5e-4, "Decay of the weights; of norms and biases only with --decay-all True"
    )
    decay_all: bool = _field(False, "Decay norms and biases too")
    clip: float | None = _field(None, "Clip the gradient of a step at this norm")
    schedule: Schedule = _field("cosine", "Course of the learning rate after the warm-up")
    warmup: float = _field(
        0.0, "Length of the linear rise of the learning rate, in epochs, or in steps with --steps"
    )
    warmup_from: float = _field(0.01, "Share of --lr at which the rise begins")
    cooldown: float = _field(0.0, "Length at the last learning rate, in the unit of --warmup")
    final: float = _field(0.0, "Share of --lr at which the cosine or the line ends")
    milestones: tuple[float, ...] = _field(
        (), "Where the learning rate falls with --schedule milestones, in the unit of --warmup"
    )
    decay: float = _field(0.1, "Factor of the learning rate at each milestone")
    loss: str | None = _field(
        None, "Weighted terms, separated by commas, such as ce:0.1,kd:0.9,at:1000@layer2"
    )
    label_smoothing: float = _field(0.0, "Smoothing of the labels in cross-entropy")
    adversary: str | None = _field(
        None,
        "Attack on the student in every step, for the terms adv-ce, trades, ard, rslad and adaad: "
        "pgd:eps=8/255:steps=10:step=2/255, of pixels in [0, 1]; fractions are numbers too",
    )
    augment: Augment = _field(
        "none",
        "crop-flip: random shifts by --crop-padding and flips; imagenet: random crops of image "
        "files, read while training; of recordings, specaugment: random shifts in time, and a part "
        "of the mel bands and of the time hidden; of texts, words: copies with words hidden, "
        "replaced and left out; masked: copies with words that a masked language model expects; "
        "teacher: what the teacher writes, in place of the texts",
    )
    copies: int | None = _field(None, "Copies of each text with --augment words or masked")
    on_policy: float = _field(
        0.0, "Share of batches in which a causal student learns from texts of its own"
    )
    crop_padding: int = _field(4, "Largest shift of crop-flip in pixels")
    hflip: float = _field(0.5, "Probability of a horizontal flip")
    time_shift: float = _field(
        0.1, "Largest shift of a recording with specaugment, as a share of its length"
    )
    hide_bands: float = _field(0.2, "Largest share of the mel bands that specaugment hides")
    hide_time: float = _field(0.2, "Largest share of the time that specaugment hides")
    interpolation: str = _field(
        "random", "Interpolation of random crops: bilinear, bicubic, or random for both"
    )
    min_scale: float = _field(0.08, "Smallest share of an image's area in a random crop")
    auto_augment: str | None = _field(None, "Policy in timm's notation, such as rand-m7-mstd0.5")
    color_jitter: float | None = _field(
        None, "Strength of random changes of colour; not with --auto-augment"
    )
    random_erase: float = _field(0.0, "Probability that a part of an image becomes noise")
    repeats: int = _field(1, "Views of each image in one epoch (repeated augmentation)")
    crop_share: float = _field(
        0.875, "Side of the central crop in evaluation, as a share of the resized image"
    )
    mixup: float = _field(0.0, "Alpha of mixup; 0 turns it off")
    cutmix: float = _field(0.0, "Alpha of CutMix; 0 turns it off")
    mix_probability: float = _field(1.0, "Probability that a batch is mixed")
    mix_switch: float = _field(0.5, "Probability of CutMix where mixup is on too")
    ema: float | None = _field(
        None, "Average the weights with at most this decay, and save the average"
    )
    ema_ramp: float = _field(15.0, "The decay rises as 1 - exp(-X step / steps)")
    average_best: int = _field(1, "Save the mean of the weights of the N best epochs")
    metric: Metric = _field(
        "accuracy",
        "Validation metric that selects the best epoch: accuracy, nll, macro_f1, of images "
        "balanced_accuracy and under --adversary robust_accuracy, of several labels "
        "mean_average_precision, micro_f1 and macro_f1, of texts also matthews, pearson, spearman, "
        "entity_f1 and cosine",
    )
    validate_every: int | None = _field(None, "Epochs between validations")
    patience: int | None = _field(
        None, "Stop after N validations in a row without a better --metric"
    )
    precision: Precision = _field(
        "no",
        "Precision: no is float32 throughout; mixed is bf16 where the GPU has it, else fp16",
    )
    image_size: int | None = _field(None, "Resize all images to this height and width in pixels")
    student: str | None = _field(None, "")
    teacher: str | None = _field(None, "")
    gpu: bool = _field(False, "")

    @property
    def length(self) -> float:
        """Length of the training, in epochs or steps."""
        return self.steps if self.steps is not None else self.epochs or 0

    @property
    def has_momentum(self) -> bool:
        """Whether the optimizer has the recipe's `momentum`."""
        return self.optimizer in MOMENTUM_OPTIMIZERS

    @property
    def mixes_images(self) -> bool:
        """Whether images of a batch are mixed with one another."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def streams_files(self) -> bool:
        """Whether images are read from their files while the training goes on."""
        return self.augment in STREAMED_AUGMENTS

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
    counts = ("epochs", "steps", "batch_size", "accumulate", "repeats", "average_best", "copies")
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
    for name in (
        "hflip",
        "random_erase",
        "mix_probability",
        "mix_switch",
        "final",
        "warmup_from",
        "on_policy",
        *SPECAUGMENT_FIELDS,
    ):
        value = getattr(recipe, name)
        _require(0 <= value <= 1, name, "in [0, 1]", value)
    if recipe.warmup + recipe.cooldown >= recipe.length:
        raise UserError(
            f"--warmup {recipe.warmup:g} and --cooldown {recipe.cooldown:g} leave nothing of a "
            f"training of {recipe.length:g} {'steps' if recipe.steps is not None else 'epochs'}: "
            "shorten them"
        )
    if recipe.adversary is not None:
        attack.parse_adversary(recipe.adversary)
    if recipe.schedule == "milestones" and not recipe.milestones:
        raise UserError("--schedule milestones needs --milestones: give them")


def _check_used(recipe: Recipe, given: Mapping[str, Any]) -> None:
    """Refuse options that have no effect in this recipe."""
    mixed = recipe.mixes_images
    needs = {
        "momentum": (recipe.has_momentum, f"--optimizer {' or '.join(MOMENTUM_OPTIMIZERS)}"),
        "warmup_from": (recipe.warmup > 0, "--warmup"),
        "crop_padding": (recipe.augment == "crop-flip", "--augment crop-flip"),
        "hflip": (recipe.augment in ("crop-flip", "imagenet"), "--augment crop-flip or imagenet"),
        "copies": (recipe.augment in COPYING_AUGMENTS, "--augment words or masked"),
        "mix_probability": (mixed, "--mixup or --cutmix"),
        "mix_switch": (recipe.mixup > 0 and recipe.cutmix > 0, "--mixup and --cutmix"),
        "ema_ramp": (recipe.ema is not None, "--ema"),
        "decay_all": (recipe.weight_decay > 0, "--weight-decay"),
        "metric": (
            recipe.metric != "robust_accuracy" or recipe.adversary is not None,
            "--adversary, the attack that it is measured under",
        ),
    }
    for name in {name for names in SCHEDULE_FIELDS.values() for name in names}:
        users = [kind for kind, names in SCHEDULE_FIELDS.items() if name in names]
        needs[name] = (recipe.schedule in users, f"--schedule {' or '.join(users)}")
    needs |= dict.fromkeys(
        SPECAUGMENT_FIELDS, (recipe.augment == "specaugment", "--augment specaugment")
    )
    images = ("interpolation", "min_scale", "auto_augment", "color_jitter", "random_erase")
    needs |= dict.fromkeys(
        (*images, "repeats", "crop_share"), (recipe.streams_files, "--augment imagenet")
    )
    if "color_jitter" in given and recipe.auto_augment is not None:
        raise UserError("--color-jitter has no effect with --auto-augment: leave one of them out")
    for name in given:
        used, needed = needs.get(name, (True, ""))
        if not used:
            raise UserError(f"--{name.replace('_', '-')} has no effect without {needed}")


def _require(holds: bool, name: str, rule: str, got: object) -> None:
    if not holds:
        raise UserError(f"--{name.replace('_', '-')} must be {rule}, got {got}")
