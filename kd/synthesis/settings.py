"""Numbers of a synthesis: defaults for each method, and what is refused. Imports no framework."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from dsdistill.harness import shell
from dsdistill.harness.errors import UserError

Method = Literal["inversion", "generator"]
METHODS: tuple[Method, ...] = get_args(Method)
IMAGES = 1000
# Where nothing is given; None where it depends on the network.
DEFAULTS: Mapping[Method, Mapping[str, Any]] = {
    "inversion": {
        "steps": 500,
        "batch_size": 256,
        "lr": 0.1,
        "bn_weight": 10.0,
        "tv_weight": 2.5e-5,
    },
    "generator": {
        "steps": 2000,
        "batch_size": 128,
        "lr": 1e-3,
        "bn_weight": None,
        "balance_weight": 5.0,
        "width": 64,
    },
}
GENERATOR_BN_WEIGHT = 1.0  # for a network with batch norm
MIN_BATCH = 2  # images of which a variance can be taken


@dataclass(frozen=True)
class SynthesisSettings:
    """Numbers of a synthesis; those that its method does not use are 0.

    Attributes:
        method: How the images are made.
        images: Number of images.
        steps: Steps of the optimizer: for each batch of images, or of the generator.
        batch_size: Largest number of images in a batch.
        lr: Learning rate of Adam.
        bn_weight: Weight of the distance from the statistics of the batch norm layers; None until
            `fit` knows whether there are such layers.
        tv_weight: Weight of the total variation of the images.
        balance_weight: Weight of the balance of the classes.
        width: Channels of the generator's last hidden layer.
    """

    method: Method
    images: int
    steps: int
    batch_size: int
    lr: float
    bn_weight: float | None
    tv_weight: float = 0.0
    balance_weight: float = 0.0
    width: int = 0

    @property
    def batches(self) -> int:
        """Number of batches that the images are made in."""
        return math.ceil(self.images / self.batch_size)

    def rows(self, batch: int) -> slice:
        """The images of a batch; sizes of batches differ by at most one."""
        n, count = self.images, self.batches
        return slice(n * batch // count, n * (batch + 1) // count)


def resolve(method: Method, images: int, given: Mapping[str, Any]) -> SynthesisSettings:
    """Fill in the defaults of a method, and refuse what it does not use or values out of range.

    Args:
        method: One of `METHODS`.
        images: Number of images.
        given: Values by name of the field; None where nothing is given.

    Raises:
        UserError: With the option, the rule and the value.
    """
    if method not in METHODS:
        raise UserError(f"--method must be {' or '.join(METHODS)}, got {method}")
    defaults = DEFAULTS[method]
    for name, value in given.items():
        if value is not None and name not in defaults:
            other = next(m for m in METHODS if m != method)
            raise UserError(
                f"{shell.flag(name)} is for --method {other} and has no effect with {method}: "
                "leave it out"
            )
    chosen = {
        name: default if (v := given.get(name)) is None else v for name, default in defaults.items()
    }
    for name in ("steps", "width"):
        if chosen.get(name, 1) < 1:
            raise UserError(f"{shell.flag(name)} must be at least 1, got {chosen[name]}")
    if images < MIN_BATCH:
        raise UserError(f"--images must be at least {MIN_BATCH}, got {images}")
    if chosen["batch_size"] < MIN_BATCH:
        raise UserError(
            f"--batch-size must be at least {MIN_BATCH}, for a mean and a variance, got "
            f"{chosen['batch_size']}"
        )
    if not 0 < chosen["lr"] < float("inf"):
        raise UserError(f"--lr must be positive, got {chosen['lr']}")
    for name in ("bn_weight", "tv_weight", "balance_weight"):
        value = chosen.get(name)
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"{shell.flag(name)} must be 0 or more, got {value}")
    settings = SynthesisSettings(method=method, images=images, **chosen)
    if method == "generator" and settings.steps < 2 * settings.batches:
        raise UserError(
            "--method generator keeps one batch after a step, in the second half of them: "
            f"{images} images in batches of {settings.batch_size} need --steps "
            f"{2 * settings.batches} or more, got {settings.steps}"
        )
    return settings


def fit(
    settings: SynthesisSettings, *, who: str, classes: int, has_batch_norm: bool
) -> SynthesisSettings:
    """Fill in what depends on the network, and refuse what it cannot give.

    Args:
        settings: Numbers from `resolve`.
        who: Name of the network, for messages.
        classes: Number of its classes.
        has_batch_norm: Whether it has batch norm layers with the statistics of its training.

    Raises:
        UserError: If there are fewer images than classes, or no statistics that a term needs.
    """
    if settings.images < classes:
        raise UserError(
            f"--images must be at least {classes}, one for each class of {who}, got "
            f"{settings.images}"
        )
    weight = settings.bn_weight
    if weight is None:
        weight = GENERATOR_BN_WEIGHT if has_batch_norm else 0.0
    if weight > 0 and not has_batch_norm:
        other = "" if settings.method == "generator" else ", or --method generator"
        raise UserError(
            f"{who} has no batch norm layers, whose statistics tell --method {settings.method} "
            f"what images look like: add --bn-weight 0, with which images teach far less{other}"
        )
    return replace(settings, bn_weight=weight)
