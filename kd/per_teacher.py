"""Numbers that are told of teachers: once for all of them, or once for each, with commas between.

`--teacher-mean 0.5 0.5 0.5` is for all, `--teacher-mean 0.5 0.5 0.5 , 0.3 0.3 0.3` for two, and
`--teacher-image-size ,224` for the second alone, as `--class-map` has it.
"""

import math
from collections.abc import Sequence

from dsdistill.harness.errors import UserError

Told = Sequence[float | str] | float | str  # numbers, and texts with commas in them
Numbers = tuple[float, ...]


def read(option: str, told: Told | None, count: int | None = None) -> tuple[Numbers | None, ...]:
    """The numbers of each teacher; None where nothing is told.

    Args:
        option: As the user wrote it, for messages.
        told: What stands after it.
        count: Number of teachers; None where it does not matter yet.

    Raises:
        UserError: If something is no number, or there are as many groups as neither one nor
            teachers.
    """
    if told is None:
        return (None,) * (1 if count is None else count)
    words = [told] if isinstance(told, str | int | float) else told
    groups = [_numbers(option, part) for part in " ".join(map(str, words)).split(",")]
    if count is None or len(groups) == count:
        return tuple(groups)
    if len(groups) != 1:
        raise UserError(
            f"{option} is given for {len(groups)} teachers, and there are {count}: give it once "
            "for all, or for each, with nothing between the commas where it is not needed"
        )
    return (groups[0],) * count


def read_sizes(option: str, told: Told | None, count: int | None = None) -> tuple[int | None, ...]:
    """The height and width in pixels of each teacher's images; as `read`.

    Raises:
        UserError: If one is no positive whole number.
    """
    sizes = []
    for numbers in read(option, told, count):
        if numbers is not None and not (len(numbers) == 1 and numbers[0] >= 1):
            raise UserError(f"{option} must be one number of at least 1 for a teacher, got {told}")
        if numbers is not None and numbers[0] != int(numbers[0]):
            raise UserError(f"{option} must be a whole number, got {numbers[0]:g}")
        sizes.append(None if numbers is None else int(numbers[0]))
    return tuple(sizes)


def _numbers(option: str, text: str) -> Numbers | None:
    try:
        found = tuple(map(float, text.split()))
    except ValueError:
        found = (math.nan,)
    if not all(map(math.isfinite, found)):
        raise UserError(f"{option} must be numbers, with commas between teachers, got {text!r}")
    return found or None
