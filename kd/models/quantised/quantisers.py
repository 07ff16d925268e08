"""Fake quantisers: numbers rounded to multiples of a learned step, and kept in float32.

A value x becomes s clip(round(x / s), low, high): an integer code times the step s. Weights have a
step for each output channel and codes -high to high; the inputs of a layer have one step. Inputs
that are never negative have codes from 0; others are shifted by a whole number of codes, the zero
point -low, so that 0 stays exactly 0.

Source: Esser et al. (2020), arXiv:1902.08153, learned step size quantisation (LSQ). Deviations: a
step for each channel of the weights; no code -high - 1; the steps start where calibration puts
them, not at 2 mean|x| / sqrt(high); what is learned is the step relative to that start.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

SMALLEST_SHARE = 1e-6  # of the first step; keeps a step that is learned away from 0


class Quantiser(nn.Module):
    """Rounds a tensor to multiples of a learned step.

    The learned value is the step relative to its start. SGD then changes the step as in LSQ, and
    Adam, whose changes have the size of the rate whatever the gradient, changes it by that share.

    Attributes:
        scale: The learned value, 1 at the start; one, or one for each channel.
        start: The first step, of the same shape.
        bounds: Smallest and largest code; a buffer, so that a hash of the state covers it.
        per_channel: Whether the step is one of each slice along the first axis.
    """

    start: Tensor
    bounds: Tensor

    def __init__(
        self, start: Float[Tensor, " c"], low: int, high: int, *, per_channel: bool
    ) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones_like(start))
        self.register_buffer("start", start.clone())
        self.register_buffer("bounds", torch.tensor([low, high], device=start.device))
        self.per_channel = per_channel

    @property
    def step(self) -> Float[Tensor, " c"]:
        """The present step."""
        return self.scale.abs().clamp_min(SMALLEST_SHARE) * self.start

    @property
    def codes(self) -> tuple[int, int]:
        """Smallest and largest code."""
        low, high = self.bounds.tolist()
        return low, high

    def forward(self, values: Tensor) -> Tensor:
        shape = [-1, *[1] * (values.ndim - 1)] if self.per_channel else [-1]
        low, high = self.bounds.unbind()
        # Of the values that share a step, but of one image only.
        count = values[0].numel()
        gradient_scale = 1 / (self.start.square() * torch.sqrt(count * torch.maximum(high, -low)))
        wide = values if values.dtype == torch.float64 else values.float()
        result = fake_quantise(wide, self.step.view(shape), low, high, gradient_scale.view(shape))
        return result.to(values.dtype)


def fake_quantise(
    values: Float[Tensor, "..."],
    step: Float[Tensor, "..."],
    low: Int[Tensor, ""],
    high: Int[Tensor, ""],
    gradient_scale: Float[Tensor, "..."] | float = 1.0,
) -> Float[Tensor, "..."]:
    """step · clip(round(values / step), low, high), with the gradients of LSQ.

    Args:
        values: The values.
        step: Positive; broadcast to them.
        low, high: Smallest and largest code.
        gradient_scale: Factor of the gradient with respect to the step.

    Source: Esser et al. (2020), arXiv:1902.08153, equations 1 to 3.
    """
    return _LearnedStep.apply(values, step, low, high, gradient_scale)  # pyright: ignore


def first_weight_steps(
    weights: Float[Tensor, "c ..."], high: int, candidates: int = 40
) -> Float[Tensor, " c"]:
    """The step of each channel with the smallest squared error of its weights.

    Args:
        weights: Weights, with the output channels along the first axis.
        high: Largest code.
        candidates: Number of shares of the largest weight, from 1 down, that are tried.
    """
    rows = weights.detach().float().flatten(1)
    largest = rows.abs().amax(1)
    # A channel of zeros has any step; one far below the others may become zero.
    floor = 1e-5 * largest.max() if largest.max() > 0 else torch.ones_like(largest.max())
    top = largest.clamp_min(float(floor)) / high
    best, least = top, torch.full_like(top, math.inf)
    for share in torch.linspace(1, 1 / candidates, candidates):
        step = share * top
        codes = (rows / step[:, None]).round().clamp(-high, high)
        error = (codes * step[:, None] - rows).square().sum(1)
        better = error < least
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    return best


class _LearnedStep(torch.autograd.Function):
    """Keeps values and step alone for the backward pass, a fourth of what its formula keeps."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, step: Tensor, low: Tensor, high: Tensor, gradient_scale: Any
    ) -> Tensor:
        ctx.save_for_backward(values, step, low, high)
        ctx.gradient_scale = gradient_scale
        return torch.clamp(values / step, low, high).round() * step

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore
        values, step, low, high = ctx.saved_tensors
        ratio = values / step
        inside = (ratio >= low) & (ratio <= high)
        codes = torch.clamp(ratio, low, high).round()
        # d/ds: round(x / s) - x / s inside, low or high outside.
        of_step = gradient * torch.where(inside, codes - ratio, codes)
        of_step = of_step.sum_to_size(step.shape) * ctx.gradient_scale
        return gradient * inside, of_step, None, None, None
