"""What the options of several commands share."""

from collections.abc import Mapping
from typing import Annotated, Any

from dsdistill.harness.errors import UserError
from dsdistill.harness.help_page import Shown
from kd import per_teacher

NamesArg = Annotated[str | None, Shown("NAME,...")]
DEFAULT_WORKERS = 2  # processes that read image files, where nothing else is asked for
# What a file of weights cannot say.
TEACHER_INPUT_OPTIONS = ("teacher_image_size", "teacher_mean", "teacher_std")


def teacher_inputs(values: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """What is told of each teacher, as arguments of `teachers.load`.

    Args:
        values: Options, by name; those of `TEACHER_INPUT_OPTIONS` count, where they are there.
        count: Number of teachers.

    Raises:
        UserError: If there are as many values as neither one nor teachers.
    """
    size, mean, std = (values.get(name) for name in TEACHER_INPUT_OPTIONS)
    sizes = per_teacher.read_sizes("--teacher-image-size", size, count)
    means = per_teacher.read("--teacher-mean", mean, count)
    deviations = per_teacher.read("--teacher-std", std, count)
    return [
        {"image_size": size, "mean": mean, "std": std}
        for size, mean, std in zip(sizes, means, deviations, strict=True)
    ]


def require(holds: bool, rule: str, got: object) -> None:
    """Refuse a value for which a rule does not hold.

    Args:
        holds: Whether it does.
        rule: The rule, for the message.
        got: The value, for the message.

    Raises:
        UserError: If it does not hold.
    """
    if not holds:
        raise UserError(f"{rule}, got {got}")


def option_name(name: str) -> str:
    """The option of a field, as it is typed."""
    return "--" + name.replace("_", "-")
