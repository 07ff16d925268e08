"""A quantised network with integer codes, for export: each rounding is an operator of its own.

Where training rounds a number and keeps it in float32, a program for others quantises it to an
integer and dequantises that again (QDQ). A runtime may compute with the integers between a
dequantisation, a layer and the next quantisation. Weights are stored as int8, whatever their bits.
"""

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kd.models.networks import Classifier
from kd.models.quantised import batch_norm_folding, quantised_network
from kd.models.quantised.batch_norm_folding import Affine
from kd.models.quantised.bit_widths import BitWidths

LARGEST_CODE = 255  # of uint8
REDUCED_CODE = BitWidths(8, 8).largest_weight_code
OPSET = 13  # the first with a scale for each channel


@dataclass(frozen=True)
class Rounding:
    """How the inputs of a layer are rounded: codes from 0 to `largest`, times a step.

    Attributes:
        step: Difference between values of neighbouring codes.
        zero_point: Code of 0.
        largest: Largest code.
    """

    step: float
    zero_point: int
    largest: int

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value."""
        return -self.zero_point * self.step, (self.largest - self.zero_point) * self.step


class Dialect(Protocol):
    """How a kind of program writes quantisation."""

    def round_inputs(self, inputs: Tensor, rounding: Rounding) -> Tensor:
        """Quantise and dequantise."""
        ...

    def expand_weights(self, codes: Tensor, scale: Tensor, zero_points: Tensor) -> Tensor:
        """Dequantise, with a scale for each slice along the first axis."""
        ...


class OnnxDialect:
    """The operators of ONNX; they are symbols that only its exporter understands."""

    def round_inputs(self, inputs: Tensor, rounding: Rounding) -> Tensor:
        if rounding.largest < LARGEST_CODE:  # uint8 saturates by itself at 255 alone
            inputs = inputs.clamp(*rounding.bounds)
        scale = torch.tensor(rounding.step)
        zero_point = torch.tensor(rounding.zero_point, dtype=torch.uint8)
        codes = _onnx("QuantizeLinear", (inputs, scale, zero_point), torch.uint8, inputs.shape)
        parts = codes, scale, zero_point
        return _onnx("DequantizeLinear", parts, torch.float32, inputs.shape)

    def expand_weights(self, codes: Tensor, scale: Tensor, zero_points: Tensor) -> Tensor:
        parts = codes, scale, zero_points
        return _onnx("DequantizeLinear", parts, torch.float32, codes.shape, axis=0)


class TorchDialect:
    """The operators that torch's compilers recognise, which torchao registers."""

    def round_inputs(self, inputs: Tensor, rounding: Rounding) -> Tensor:
        operators = torch.ops.quantized_decomposed
        parts = rounding.step, rounding.zero_point, 0, rounding.largest, torch.uint8
        codes = operators.quantize_per_tensor.default(inputs, *parts)
        return operators.dequantize_per_tensor.default(codes, *parts)

    def expand_weights(self, codes: Tensor, scale: Tensor, zero_points: Tensor) -> Tensor:
        return torch.ops.quantized_decomposed.dequantize_per_channel.default(
            codes, scale, zero_points, 0, -128, 127, torch.int8
        )


class _ExpandedWeight(nn.Module):
    """Makes a weight of its codes, in a dialect."""

    scale: Tensor
    zero_points: Tensor

    def __init__(self, scale: Float[Tensor, " c"], dialect: Dialect) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_points", torch.zeros_like(scale, dtype=torch.int8))
        self.dialect = dialect

    def forward(self, codes: Tensor) -> Tensor:
        return self.dialect.expand_weights(codes, self.scale, self.zero_points)


@dataclass(frozen=True)
class _Codes:
    """The codes of a layer's weight, the step of each channel, the bias, and the largest code."""

    codes: Int8[Tensor, "c ..."]
    scale: Float[Tensor, " c"]
    bias: Float[Tensor, " c"] | None
    largest: int

    def times(self, norm: Affine) -> "_Codes":
        """Fold a batch norm into them."""
        factor = norm.factor
        sign = factor.sign().to(torch.int8).view(-1, *[1] * (self.codes.ndim - 1))
        # A channel of factor 0 has codes 0, and keeps its scale: a scale must be positive.
        scale = torch.where(factor == 0, self.scale, self.scale * factor.abs())
        bias = norm.shift if self.bias is None else self.bias * factor + norm.shift
        return _Codes(self.codes * sign, scale, bias, self.largest)


def build(classifier: Classifier, images: Tensor, dialect: Dialect) -> Classifier:
    """A copy of a quantised classifier with codes for weights, and batch norms folded.

    Args:
        classifier: The classifier, whose network has quantisers.
        images: Two of its images, to find batch norms that follow a convolution.
        dialect: How quantisation is written.
    """
    coded = copy.deepcopy(classifier).cpu().eval()
    network = coded.network
    plain = classifier.with_network(quantised_network.float_copy(network)).eval()
    norms = batch_norm_folding.find_pairs(plain, images)
    weights: dict[int, nn.Parameter] = {}  # a weight that several layers share is stored once
    for name, layer in quantised_network.quantised_layers(network).items():
        rounding, codes = _rounding(layer), _codes(layer)
        original = quantised_network.trained_weight(layer)
        norm = norms.get(f"network.{name}", "").removeprefix("network.")
        module = network.get_submodule(norm) if norm else None
        left = None if module is None else batch_norm_folding.rest(module)
        if left is not None:
            assert isinstance(module, nn.BatchNorm2d)
            codes = codes.times(batch_norm_folding.affine(module))
            network.set_submodule(norm, left)
        stored = _frozen(codes.codes)
        weight = stored if left is not None else weights.setdefault(id(original), stored)
        quantised_network.detach(layer)
        _rewrite(layer, weight, codes, rounding, dialect)
    return coded


def _rounding(layer: nn.Module) -> Rounding:
    _, quantiser = quantised_network.quantisers(layer)
    low, high = quantiser.codes
    return Rounding(quantiser.step.item(), -low, high - low)


def _codes(layer: nn.Module) -> _Codes:
    quantiser, _ = quantised_network.quantisers(layer)
    weight = quantised_network.trained_weight(layer).detach()
    step, (low, high) = quantiser.step.detach(), quantiser.codes
    shaped = step.view(-1, *[1] * (weight.ndim - 1))
    codes = (weight / shaped).clamp(low, high).round().to(torch.int8)
    bias = getattr(layer, "bias", None)
    return _Codes(codes, step, None if bias is None else bias.detach(), high)


def _rewrite(
    layer: nn.Module, weight: nn.Parameter, codes: _Codes, rounding: Rounding, dialect: Dialect
) -> None:
    """Let a layer in float32 compute with codes."""
    layer.register_parameter("weight", weight)
    expanded = _ExpandedWeight(codes.scale, dialect)
    parametrize.register_parametrization(layer, "weight", expanded, unsafe=True)
    few = codes.largest < REDUCED_CODE or rounding.largest < LARGEST_CODE
    _place_bias(layer, codes.bias, apart=few)

    def round_first(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return dialect.round_inputs(inputs[0], rounding), *inputs[1:]

    layer.register_forward_pre_hook(round_first)


def _place_bias(layer: nn.Module, bias: Tensor | None, *, apart: bool) -> None:
    """Give a layer its bias; `apart`, as an addition of its own.

    onnxruntime rounds the bias of a layer with codes to multiples of the product of both steps. Of
    8 bits that is one unit of thousands, of 2 bits an error of several percent.
    """
    if bias is None or not apart:
        layer.register_parameter("bias", None if bias is None else _frozen(bias))
        return
    layer.register_parameter("bias", None)
    channels = [-1, 1, 1] if isinstance(layer, nn.Conv2d) else [-1]
    layer.register_parameter("added_bias", _frozen(bias.view(channels)))

    def add_bias(layer: Any, _: Any, outputs: Tensor) -> Tensor:
        return outputs + layer.added_bias

    layer.register_forward_hook(add_bias)


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _onnx(operator: str, parts: tuple[Tensor, ...], dtype: torch.dtype, shape: Any, **more: int):
    """One operator of ONNX, as a symbol."""
    attributes: Any = more
    return torch.onnx.ops.symbolic(
        operator, parts, attributes, dtype=dtype, shape=shape, version=OPSET
    )
