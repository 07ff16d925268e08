"""Names of kernels on a command line, and convolutional networks as sequences of layers.

`CR-3xCRP-flatten` means a 3x3 convolution and a ReLU, then three times convolution, ReLU and 2x2
average pooling, then a Flatten; a dense readout always follows.
"""

import math
import re
from dataclasses import dataclass

from dsdistill.harness.errors import UserError

FEATURES = "features:"  # of the names of kernels of finite networks
HEADS = ("flatten", "gap")
_BLOCK = re.compile(r"(?:([1-9][0-9]?)x)?([CRP]+)")
SYNTAX = (
    "a sequence such as CR-3xCRP-flatten: blocks of C (3x3 convolution), R (ReLU) and P (2x2 "
    "average pooling), repeated by 3x, ending in flatten or gap (global average pooling)"
)


@dataclass(frozen=True)
class Stage:
    """Operations on a plane between two reads of neighbouring pixels."""

    conv: bool
    relu: bool


@dataclass(frozen=True)
class Architecture:
    """Layers in the NTK parameterisation, followed by a dense readout.

    Attributes:
        layers: Letters C, R and P, in order; no dashes, no repetitions.
        head: `flatten`, or `gap` for global average pooling.
        w_std, b_std: Deviations of weights (before division by the root of the fan-in) and biases.
    """

    layers: str
    head: str
    w_std: float = math.sqrt(2)
    b_std: float = 0.1

    @property
    def levels(self) -> tuple[tuple[Stage, ...], ...]:
        """Stages at each resolution, finest first."""
        return tuple(_split_stages(part) for part in self.layers.split("P"))

    @property
    def min_size(self) -> int:
        """Smallest height and width that the poolings allow, in pixels."""
        return 2 ** self.layers.count("P")


def is_finite(name: str) -> bool:
    """Whether the name of a kernel means the features of a finite network."""
    return name.startswith(FEATURES)


def is_code(name: str) -> bool:
    """Whether the name of a kernel names code that is imported: `module:attribute`."""
    return ":" in name and not is_finite(name)


def is_notation(text: str) -> bool:
    """Whether a kernel's name is meant as a sequence of layers."""
    return any(text == head or text.endswith(f"-{head}") for head in HEADS) or bool(
        re.fullmatch(r"[0-9xCRP-]+", text)
    )


def parse(text: str, *, w_std: float = math.sqrt(2), b_std: float = 0.1) -> Architecture:
    """Parse the notation of a network.

    Args:
        text: Notation such as `CR-3xCRP-flatten`.
        w_std, b_std: Deviations of weights and biases.

    Raises:
        UserError: If the text is not a sequence, or has no closed form; the message says how a
            sequence is written.
    """
    *blocks, head = text.split("-")
    matches = [_BLOCK.fullmatch(block) for block in blocks]
    if head not in HEADS or not all(matches):
        raise UserError(
            f"the kernel {text!r} is not {SYNTAX}; any other network can be given as "
            "module:attribute, where the attribute is a neural-tangents stax network"
        )
    layers = "".join(match[2] * int(match[1] or 1) for match in matches if match)
    if re.match("P*R", layers) or re.search("RP*R", layers):
        raise UserError(
            f"the kernel {text!r} has a ReLU without a convolution before it: its input is not "
            "Gaussian, and the kernel has no closed form"
        )
    return Architecture(layers, head, w_std, b_std)


def _split_stages(letters: str) -> tuple[Stage, ...]:
    """Split into stages: a convolution with a ReLU right after it, and any other ReLU by itself."""
    return tuple(Stage("C" in part, "R" in part) for part in re.findall("CR?|R", letters))
