"""Ranges of the inputs of layers, from what a network sees on a few images.

Three rules: `max`, from the smallest to the largest value; `percentile`, which leaves out a small
share at either end; `mse`, the range whose rounded values have the smallest squared error.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

RangeRule = Literal["mse", "percentile", "max"]
LEFT_OUT = 1e-4  # share of the values outside the range at either end, by the rule `percentile`
SAMPLES = 2**15  # values of each layer that are kept from a batch
CANDIDATES = 40  # ranges that the rule `mse` compares


@dataclass(eq=False)
class InputSample:
    """What one layer's inputs were.

    Attributes:
        low, high: Smallest and largest value.
        values: Some values of each batch, drawn at random.
    """

    low: float = float("inf")
    high: float = float("-inf")
    values: list[Float[Tensor, " n"]] = field(default_factory=list)

    def add(self, inputs: Tensor, generator: torch.Generator) -> None:
        """Add the inputs of a batch."""
        flat = inputs.detach().float().flatten()
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        if len(flat) > SAMPLES:
            rows = torch.randint(len(flat), (SAMPLES,), generator=generator)
            flat = flat[rows.to(flat.device)]
        self.values.append(flat.cpu())


@dataclass(frozen=True)
class InputRange:
    """Codes of a layer's inputs.

    Attributes:
        step: Difference between values of neighbouring codes.
        low, high: Smallest and largest code; low is 0 for inputs that are never negative.
    """

    step: float
    low: int
    high: int


def observe(
    network: nn.Module, run: Callable[[Tensor], object], batches: Iterable[Tensor]
) -> dict[str, InputSample]:
    """Run a network on images, and sample the inputs of its convolutions and linear layers.

    Args:
        network: The network, in evaluation mode.
        run: Calls it, or a classifier around it.
        batches: Its images.

    Returns:
        A sample for each layer that was called, in the order of the calls, by its name.
    """
    samples: dict[str, InputSample] = {}
    generator = torch.Generator().manual_seed(0)

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs:  # none are named
                samples.setdefault(name, InputSample()).add(inputs[0], generator)

        return hook

    hooks = [
        layer.register_forward_pre_hook(record(name))
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and not parametrize.is_parametrized(layer)
    ]
    try:
        with torch.no_grad():
            for images in batches:
                run(images)
    finally:
        for hook in hooks:
            hook.remove()
    return samples


def choose_range(sample: InputSample, codes: int, rule: RangeRule) -> InputRange:
    """Choose the range of a layer's inputs.

    Args:
        sample: What the inputs were.
        codes: Number of codes.
        rule: `mse`, `percentile` or `max`.
    """
    values = torch.cat(sample.values)
    if rule == "max":
        return _range(sample.low, sample.high, codes)
    if rule == "percentile":
        ends = torch.tensor([LEFT_OUT, 1 - LEFT_OUT])
        # Not torch.quantile, which refuses more than 16 million values.
        places = (ends * (len(values) - 1)).round().long()
        low, high = values.sort().values[places].tolist()
        return _range(low, high, codes)
    shares = torch.linspace(1, 1 / CANDIDATES, CANDIDATES).tolist()
    ranges = [_range(share * sample.low, share * sample.high, codes) for share in shares]
    return min(ranges, key=lambda one: _squared_error(values, one))


def _range(low: float, high: float, codes: int) -> InputRange:
    """The range of so many codes that holds two values and 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    if high == low:  # only zeros were seen
        high = 1.0
    step = (high - low) / (codes - 1)
    zero_point = min(max(round(-low / step), 0), codes - 1)
    return InputRange(step, -zero_point, codes - 1 - zero_point)


def _squared_error(values: Float[Tensor, " n"], chosen: InputRange) -> float:
    codes = (values / chosen.step).round().clamp(chosen.low, chosen.high)
    return float((codes * chosen.step - values).square().mean())
