"""Bits of the weights and of the activations of a quantised network, as options name them."""

import re
from dataclasses import dataclass

from dsdistill.harness.errors import UserError

LARGEST, SMALLEST = 8, 2  # bits; codes are stored as int8 and uint8
OUTER = 8  # bits of the first and of the last layer, which few bits would hurt most


@dataclass(frozen=True)
class BitWidths:
    """Numbers of bits, `w4a8` for 4 of the weights and 8 of the activations.

    Attributes:
        weights, inputs: Bits of the weights, and of the inputs of layers.
        full_range: Whether 8-bit weights take all codes from -127 to 127, or those from -63 to 63.
            CPUs without VNNI add two products of an input and a weight in 16 bits: up to
            2 * 255 * 127 = 64770 saturates at 32767, and up to 2 * 255 * 63 = 32130 does not.
    """

    weights: int
    inputs: int
    full_range: bool = False

    @property
    def text(self) -> str:
        """The name of the option's value."""
        return f"w{self.weights}a{self.inputs}"

    @property
    def outer(self) -> "BitWidths":
        """Bits of the first and of the last layer."""
        return BitWidths(OUTER, OUTER, self.full_range)

    @property
    def largest_weight_code(self) -> int:
        """Largest code of a weight; the smallest is its negative."""
        reduced = self.weights == LARGEST and not self.full_range
        return 2 ** (self.weights - 1 - reduced) - 1

    @property
    def input_codes(self) -> int:
        """Number of codes of an input."""
        return 2**self.inputs


def parse(option: str, text: str, *, full_range: bool = False) -> BitWidths:
    """Read a value such as `w8a8`.

    Args:
        option: The option, for the message.
        text: Its value.
        full_range: As in `BitWidths`.

    Raises:
        UserError: If it is none, or a number of bits is out of range.
    """
    match = re.fullmatch(r"w(\d+)a(\d+)", text)
    bits = [int(number) for number in match.groups()] if match else []
    if not bits or not all(SMALLEST <= number <= LARGEST for number in bits):
        raise UserError(
            f"{option} must be wNaM, N bits of the weights and M of the activations from "
            f"{SMALLEST} to {LARGEST}, such as w8a8 or w4a4, got {text}"
        )
    return BitWidths(*bits, full_range=full_range)
