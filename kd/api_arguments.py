"""The arguments of `kd.distill`, checked and resolved to a recipe."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from types import UnionType
from typing import Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from dsdistill.harness.errors import UserError, unknown_name
from kd import recipes
from kd.objectives import terms
from kd.objectives.terms import LossOfLogits
from kd.recipe import VALIDATION_FIELDS, Metric, Precision, Recipe, Schedule, override
from kd.training import user_optimizer
from kd.training.rounds import Callback
from kd.training.user_optimizer import Every, UserOptimizer

# Fields of a recipe that an optimizer of the user's own takes the place of.
OPTIMIZER_FIELDS = (
    *("lr", "momentum", "weight_decay", "decay_all", "schedule", "warmup", "warmup_from"),
    *("cooldown", "final", "milestones", "decay"),
)
# Figures of a round, beside the terms of the loss.
RESERVED = (
    *("epoch", "epochs", "step", "steps", "lr", "loss", "images", "seconds"),
    *("images_per_second", "name", "self"),
)
# How messages of the command line read to who calls `distill`.
PHRASES = {
    "raise --batch-size, or train on more images": "use larger batches",
    "raise --batch-size": "use larger batches",
    "--batch-size must be at least": "batches must have at least",
    "choose another loss, student or --batch-size": "choose another loss or student, or larger "
    "batches",
    "leave --mixup and --cutmix out": "give the labels as class numbers",
    "add --teacher, --peers or --mean-teacher": "give one, or a loss such as ce:1",
    "start anew in another folder": "give another checkpoint, or delete it to start anew",
}
TEXTS = ("device", "precision", "metric", "optimizer", "schedule")  # arguments that are texts


class RecipeFields(TypedDict, total=False):
    """Fields of a `Recipe` that `distill` takes as arguments; None is the recipe's value."""

    epochs: int | None
    steps: int | None
    accumulate: int | None
    lr: float | None
    momentum: float | None
    weight_decay: float | None
    decay_all: bool | None
    clip: float | None
    schedule: Schedule | None
    warmup: float | None
    warmup_from: float | None
    cooldown: float | None
    final: float | None
    milestones: Sequence[float] | None
    decay: float | None
    label_smoothing: float | None
    adversary: str | None
    ema: float | None
    ema_ramp: float | None
    average_best: int | None
    metric: Metric | None
    validate_every: int | None
    patience: int | None
    precision: Precision | None


def refuse_validation_fields(given: Mapping[str, Any]) -> None:
    """Refuse fields that compare validations, where there are no validation images.

    Raises:
        UserError: If one is given.
    """
    for name in VALIDATION_FIELDS:
        if name in given:
            raise UserError(f"{name} has no effect without validation: give validation=")


def check_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """The callbacks as a tuple: of one, of several, or of none.

    Raises:
        UserError: If one cannot be called.
    """
    if callbacks is None or callable(callbacks):
        return () if callbacks is None else (callbacks,)
    several = tuple(callbacks) if isinstance(callbacks, Iterable) else (callbacks,)
    for each in several:
        if not callable(each):
            raise UserError(f"callbacks must be functions of a kd.Round, got {each!r}")
    return several


def check_extra_losses(losses: Any) -> dict[str, LossOfLogits]:
    """The user's own losses by name.

    Raises:
        UserError: If one is no function, or has the name of a term or a figure.
    """
    if not isinstance(losses, Mapping | None):
        raise UserError(f"extra_losses must be functions by name, got {losses!r}")
    for name, function in (losses or {}).items():
        if not isinstance(name, str) or not name.isidentifier():
            raise UserError(f"extra_losses: a name must be letters, digits and _, got {name!r}")
        if name in RESERVED or name.startswith(("validation_", "best_")):
            raise UserError(f"extra_losses: {name} is the name of another figure: choose another")
        if name in terms.TERMS:
            raise UserError(f"extra_losses: {name} is the name of a term: choose another")
        if not callable(function):
            raise UserError(f"extra_losses: {name} must be a function, got {function!r}")
    return dict(losses or {})


def build_optimizer(
    optimizer: object,
    scheduler: LRScheduler | None,
    every: Every,
    student: nn.Module,
    given: Mapping[str, Any],
) -> UserOptimizer | None:
    """The user's own optimizer; None for one by name.

    Args:
        optimizer, scheduler, every: Arguments of `distill`.
        student: The network that it trains.
        given: Fields of the recipe that were given.

    Raises:
        UserError: If they do not fit together.
    """
    if every not in ("epoch", "step"):
        raise UserError(f"scheduler_every must be 'epoch' or 'step', got {every!r}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        if scheduler is not None:
            raise UserError("scheduler needs optimizer, the torch optimizer that it was made for")
        return None
    for name in OPTIMIZER_FIELDS:
        if name in given:
            raise UserError(
                f"{name} has no effect on an optimizer of your own: set it there, or in scheduler"
            )
    start = getattr(scheduler, "last_epoch", 0)
    own = UserOptimizer(optimizer, scheduler, every, start)
    user_optimizer.check(own, student)
    return own


_HINTS = get_type_hints(Recipe)


def check_fields(given: Mapping[str, Any], extra: Sequence[str] = ()) -> dict[str, Any]:
    """Select the fields of a recipe that were given, those that are not None.

    Args:
        given: Values by name.
        extra: Fields that are known beside those of `RecipeFields`.

    Raises:
        UserError: For an unknown name, or a value of another type.
    """
    known, values = (*RecipeFields.__annotations__, *extra), {}
    for name, value in given.items():
        if name not in known:
            raise unknown_name("argument of kd.distill", name, known)
        if value is None:
            continue
        value = tuple(value) if isinstance(value, list) else value
        if not _fits(value, _HINTS[name]):
            kind = _HINTS[name]
            literal = get_origin(kind) is Literal
            rule = f"one of {', '.join(get_args(kind))}" if literal else f"of type {_name(kind)}"
            raise UserError(f"{name} must be {rule}, got {value!r}")
        values[name] = value
    return values


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a recipe's field."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(each, args[0]) for each in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def _name(hint: Any) -> str:
    return str(hint).replace(" | None", "") if get_args(hint) else hint.__name__


def resolve_recipe(
    recipe: str | Recipe | None,
    given: Mapping[str, Any],
    student: nn.Module,
    own: UserOptimizer | None,
) -> Recipe:
    """Resolve the recipe of a training.

    What it says of images has no effect, for they are the loader's; with an optimizer of the user's
    own, neither has what it says of the optimizer. Every epoch is validated unless it says other.

    Args:
        recipe: Name or value of a recipe; None for the default of the student's kind.
        given: Fields that the user gave.
        student: The network that is trained.
        own: The user's own optimizer.

    Raises:
        UserError: For an unknown name, or values that break a rule.
    """
    layer_norm = any(isinstance(module, nn.LayerNorm) for module in student.modules())
    if recipe is None:
        base = recipes.default(distilled=False, layer_norm=layer_norm)
    elif isinstance(recipe, str):
        base = recipes.by_name(recipe)
    else:
        base = recipe
    if not isinstance(base, Recipe):
        raise UserError(f"recipe must be a name or a kd.Recipe, got {recipe!r}")
    if base.epochs is None and base.steps is None:
        unit = next((name for name in ("epochs", "steps") if name in given), None)
        if unit is None:
            raise UserError("recipe has no length: give epochs or steps")
        base = replace(base, **{unit: given[unit]})
    kept, plain = {*RecipeFields.__annotations__, "optimizer", "loss"}, Recipe()
    of_images = [f.name for f in fields(base) if f.name not in kept]
    base = replace(base, **{name: getattr(plain, name) for name in of_images})
    if own is not None:
        neutral = {name: getattr(plain, name) for name in OPTIMIZER_FIELDS}
        base = replace(base, **neutral, optimizer=plain.optimizer)
    if base.validate_every is None:
        base = replace(base, validate_every=1)
    return override(base, given)
