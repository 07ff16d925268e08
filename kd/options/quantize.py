"""The options of `kd quantize`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from dsdistill.harness.help_page import Layout, Shown
from kd.models.quantised import bit_widths
from kd.options.shared import require

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class QuantizeOptions:
    """Round the weights and activations of a trained student to codes of a few bits.

    The training itself is not repeated: kd train --quantize trains with the rounding.
    """

    LAYOUT: ClassVar = Layout(
        groups={
            "Codes": "bits full_range",
            "Calibration": "range images",
            "Output": "out",
            "Code of your own": "trust_module",
            "Data and hardware": "data_root device",
        },
        examples=("kd quantize runs/student --bits w8a8 --out runs/int8",),
    )

    run: Annotated[tyro.conf.Positional[Path], Shown("RUN")]
    """Folder of a finished run of images"""

    bits: Annotated[str, Shown("w8a8|w4a8|w4a4|w2a2")] = "w8a8"
    """Bits of the weights (w) and of the activations (a), from 2 to 8; 8 in the first and the last
    layer"""

    full_range: bool = False
    """Let 8-bit weights take all codes from -127 to 127, and not those from -63 to 63, which CPUs
    without VNNI need; for GPUs and CPUs that have it"""

    range: Literal["mse", "percentile", "max"] = "mse"
    """Range of each layer's inputs: that with the smallest squared error, that without a ten
    thousandth of the values at either end, or from the smallest to the largest value"""

    images: int = 512
    """Training images that the inputs are seen on, spread over the classes"""

    out: Annotated[Path | None, Shown("DIR", "the next free runs/kd-<run>-<bits>-<n>")] = None
    """Folder of the quantised student, a run like that of a training"""

    trust_module: Annotated[str | None, Shown("NAME")] = None
    """Code that the run may name as its network, as module:attribute with its arguments; what only
    a file names is never imported"""

    data_root: Annotated[Path | None, Shown("DIR", "where they were in training")] = None
    """Folder of the named data sets"""

    device: Annotated[str, Shown("DEVICE")] = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N; latency is always measured on the
    CPU"""

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            UserError: With the option, the rule and the value.
        """
        bit_widths.parse("--bits", self.bits)
        require(self.images >= 1, "--images must be at least 1", self.images)
