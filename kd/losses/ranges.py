"""Ranges of the parameters of losses: annotations that a command line is checked against.

The losses themselves refuse values without meaning, such as a temperature of 0. These ranges are
narrower: values outside them overflow float32, or leave hardly any gradient.
"""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`.

    Attributes:
        low, high: Smallest and largest number.
        excludes_high: Whether `high` itself is outside.
    """

    low: float
    high: float
    excludes_high: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value and (
            value < self.high if self.excludes_high else value <= self.high
        )

    def __str__(self) -> str:
        return f"in [{self.low:g}, {self.high:g}{')' if self.excludes_high else ']'}"


Temperature = Annotated[float, Range(0.01, 1000)]
Factor = Annotated[float, Range(0, 1e6)]  # weight of a part of a loss
Share = Annotated[float, Range(0, 1)]
Flag = Annotated[int, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, excludes_high=True)]
Floor = Annotated[float, Range(1e-12, 1)]  # avoids a division by 0, or the logarithm of 0
