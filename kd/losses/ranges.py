"""Ranges of the parameters of losses: annotations that a command line is checked against.

The losses themselves refuse what has no meaning, such as a temperature of 0. These ranges are
narrower: outside them a value overflows float32, or leaves no gradient to speak of.
"""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`.

    Attributes:
        low, high: The ends.
        below: Whether `high` itself is outside.
    """

    low: float
    high: float
    below: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        return f"in [{self.low:g}, {self.high:g}{')' if self.below else ']'}"


Temperature = Annotated[float, Range(0.01, 1000)]
Factor = Annotated[float, Range(0, 1e6)]  # of a part of a loss
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, below=True)]
Floor = Annotated[float, Range(1e-12, 1)]  # against a division by 0, or its logarithm
