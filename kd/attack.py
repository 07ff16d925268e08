"""Attacks on a network as options name them: `pgd:eps=8/255:steps=10`, `autoattack:images=1000`.

    attack = NAME [:PARAMETER=VALUE ...]

An attack may change every pixel value, in [0, 1], by up to `eps`, and the result stays in [0, 1].
"""

from dataclasses import dataclass, fields
from typing import Any

from dsdistill.harness import lists
from dsdistill.harness.errors import UserError, unknown_name
from kd import numbers

EPS = 8 / 255  # of the published figures on CIFAR-10
TRAINING_STEPS, JUDGING_STEPS = 10, 20  # steps of PGD where none are given
STEP_SHARE = 1 / 4  # of eps: 2/255 for 8/255
JUDGED_IMAGES = 1000  # test images that are attacked; each costs hundreds of passes


@dataclass(frozen=True)
class Pgd:
    """Projected gradient ascent of a loss, by the signs of the gradient.

    Attributes:
        eps: Largest change of a pixel value, in (0, 1].
        steps: Number of steps.
        step: Change of a pixel value in one step; None is a quarter of `eps`.
        images: Number of test images that are attacked, spread evenly over them.

    Source: Madry et al. (2018), arXiv:1706.06083.
    """

    eps: float = EPS
    steps: int = TRAINING_STEPS
    step: float | None = None
    images: int = JUDGED_IMAGES

    @property
    def step_size(self) -> float:
        """Change of a pixel value in one step."""
        return STEP_SHARE * self.eps if self.step is None else self.step

    def __str__(self) -> str:
        return f"pgd:eps={self.eps:.4g}:steps={self.steps}:step={self.step_size:.4g}"


@dataclass(frozen=True)
class AutoAttack:
    """The standard version of AutoAttack, an ensemble of four attacks without parameters.

    Attributes:
        eps, images: As for `Pgd`.

    Source: Croce and Hein (2020), arXiv:2003.01690.
    """

    eps: float = EPS
    images: int = JUDGED_IMAGES

    def __str__(self) -> str:
        return f"autoattack:eps={self.eps:.4g}"


Attack = Pgd | AutoAttack
KINDS: dict[str, type[Attack]] = {"pgd": Pgd, "autoattack": AutoAttack}


def parse_adversary(text: str) -> Pgd:
    """Parse the attack that a student is trained against.

    Args:
        text: Value of `--adversary`.

    Raises:
        UserError: If it is no PGD, or a parameter is unknown or out of its range.
    """
    option = f"--adversary {text}"
    name, values = _split(option, text)
    if name != "pgd":
        raise unknown_name("attack of --adversary", name, ("pgd",))
    return Pgd(**_read(option, values, ("eps", "steps", "step")))


def parse_robust(text: str, *, eps: float | None = None) -> tuple[Attack, ...]:
    """Parse the attacks that a student is judged under, separated by commas.

    Args:
        text: Value of `--robust`.
        eps: Largest change of a pixel value where an attack does not say it; None is `EPS`.

    Raises:
        UserError: For an unknown attack or parameter, or a value out of its range.
    """
    attacks: list[Attack] = []
    for piece in lists.parse_names("--robust", text):
        option = f"--robust {piece}"
        name, values = _split(option, piece)
        if name not in KINDS:
            raise unknown_name("attack of --robust", name, KINDS)
        defaults: dict[str, Any] = {"eps": EPS if eps is None else eps}
        if name == "pgd":
            defaults["steps"] = JUDGING_STEPS
        known = [field.name for field in fields(KINDS[name])]
        attacks.append(KINDS[name](**defaults | _read(option, values, known)))
    return tuple(attacks)


def _split(option: str, text: str) -> tuple[str, dict[str, str]]:
    name, *rest = text.split(":")
    values: dict[str, str] = {}
    for part in rest:
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"{option}: a parameter is NAME=VALUE, such as eps=8/255, got {part!r}")
        if key in values:
            raise UserError(f"{option}: {key} occurs twice: give it once")
        values[key] = value
    return name, values


def _read(option: str, values: dict[str, str], known: list[str] | tuple[str, ...]) -> dict:
    read: dict[str, float | int] = {}
    for key, text in values.items():
        if key not in known:
            raise unknown_name(f"parameter of {option.partition(':')[0]}", key, known)
        try:
            value = numbers.parse(text)
        except ValueError as error:
            raise UserError(
                f"{option}: {key} must be a number such as 0.03 or 8/255, got {text!r}"
            ) from error
        if key in ("eps", "step"):
            if not 0 < value <= 1:
                raise UserError(f"{option}: {key} is of pixels in [0, 1]: above 0 and at most 1")
            read[key] = value
        else:
            if not 1 <= value <= 1e6 or value != int(value):
                raise UserError(f"{option}: {key} must be a whole number of at least 1, got {text}")
            read[key] = int(value)
    return read
