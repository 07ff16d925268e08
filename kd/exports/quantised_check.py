"""Whether the file of a quantised student answers as the student does, in two ways of running it.

Without optimisations a runtime computes what the student computes, in another order of float32
sums. A sum that lies between two codes may then be rounded to the other one. So the median over
images must agree as closely as in float32, and the largest difference within `BOUND`. By default a
runtime replaces layers between integers by integer kernels, which round biases and outputs: there
the largest difference must stay within `BOUND`, and nearly all images keep their class. The class
alone is no check: it can be right on all images where outputs are wrong by a seventh of their
range.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsdistill.harness.errors import UserError
from kd.data import batching
from kd.exports import export_check, quantised_formats
from kd.exports.checked_export import RELATIVE_TOLERANCE
from kd.exports.export_check import ReferenceOutputs
from kd.exports.export_formats import INPUT_NAME
from kd.models.saved_models import Model

Runner = Callable[[Tensor], Tensor]
Outputs = Float[np.ndarray, "n k"]

BOUND = 0.03  # largest difference of any output, as a share of their range
LEAST_AGREEMENT = 0.99  # share of images whose largest output stays the same
OWN_ROUNDING = 4  # median difference, in those between the student in float32 and in float64
REAL_IMAGES = 400  # one image that two classes share almost equally must not decide


@dataclass(frozen=True)
class QuantisedAgreement:
    """Agreement of a quantised student's file with the student.

    Attributes:
        median_difference: Median over images of the largest absolute difference of an output,
            without optimisations.
        median_tolerance: Largest one that counts as agreement.
        default_largest_difference: Largest difference in a runtime's default session; None where
            there is no other.
        default_argmax_agreement: Share of images with the same largest output there.
    """

    median_difference: float
    median_tolerance: float
    default_largest_difference: float | None = None
    default_argmax_agreement: float | None = None


def check(
    path: Path, file_format: str, plain: Outputs, model: Model, reference: ReferenceOutputs
) -> QuantisedAgreement:
    """Compare a file with the student.

    Args:
        path: The file.
        file_format: Its format.
        plain: Its outputs without optimisations, for all reference images.
        model: The student.
        reference: Images and the student's outputs.

    Raises:
        UserError: If they disagree.
    """
    expected = np.concatenate(reference.expected)
    span = float(np.ptp(expected))
    median = float(np.median(_differences(plain, expected)))
    own = float(np.median(_differences(_in_float64(model, reference), expected)))
    tolerance = max(RELATIVE_TOLERANCE * span, OWN_ROUNDING * own)
    if not median <= tolerance:
        raise UserError(
            f"as {file_format} the quantised student would answer differently, by {median:.2g} for "
            f"half of the images where rounding explains {tolerance:.2g}: nothing was written; use "
            "another --format"
        )
    if file_format != "onnx":
        return QuantisedAgreement(median, tolerance)
    default = export_check.run(_session(path), reference)
    largest, same = float(_differences(default, expected).max()), _agreement(default, reference)
    if not (largest <= BOUND * span and same >= LEAST_AGREEMENT):
        precise = export_check.run(_session(path, precise=True), reference)
        saturates = float(_differences(precise, expected).max()) <= BOUND * span
        raise UserError(_disagreement(largest / span, same, saturates=saturates))
    return QuantisedAgreement(median, tolerance, largest, same)


def _disagreement(share: float, same: float, *, saturates: bool) -> str:
    measured = (
        f"in onnxruntime's default session the outputs differ by up to {100 * share:.2g} % of "
        f"their range, where {100 * BOUND:.2g} % are allowed, and {100 * same:.1f} % of the images "
        f"keep their class, where {100 * LEAST_AGREEMENT:.0f} % must"
    )
    if saturates:
        return (
            f"{measured}, and with session.x64quantprecision they agree: this CPU has no VNNI, and "
            "sums of two 8-bit products saturate at 16 bits: nothing was written; quantize without "
            "--full-range, or export on a CPU with VNNI"
        )
    return f"{measured}: nothing was written; use more bits, or --format pt2"


def _session(path: Path, *, precise: bool = False) -> Runner:
    return quantised_formats.run_onnx(path, INPUT_NAME, precise=precise)


def _differences(actual: Outputs, expected: Outputs) -> Float[np.ndarray, " n"]:
    """Largest absolute difference of the outputs of each image."""
    return np.abs(actual - expected).max(1)


def _agreement(actual: Outputs, reference: ReferenceOutputs) -> float:
    """Share of the last kind of images, real ones where there are any, with the same class."""
    expected = reference.expected[-1]
    return float((actual[-len(expected) :].argmax(1) == expected.argmax(1)).mean())


def _in_float64(model: Model, reference: ReferenceOutputs) -> Outputs:
    """The student's outputs, with all sums in float64."""
    wide = copy.deepcopy(model.classifier).double()
    with torch.inference_mode():
        parts = [
            wide(batching.to_nchw(model.preprocess.apply(images)).double()).float().numpy()
            for images in reference.batches
        ]
    return np.concatenate(parts)
