"""The poorer view of an image that a student gets, while its teacher sees the whole image.

    gray            the brightness of colour images, in one channel
    size:N          the shorter side shrunk to N pixels, antialiased
    channels:0,1    some of the channels, by number from 0
    edges           the length of Sobel's gradient of the brightness, in one channel
    gray,size:8     several, one after the other

A view stands in front of the student's network and is a part of it: whoever uses the student gives
it whole images. It works on preprocessed images: `gray` weights their channels by their deviations,
so that its values are proportional to the brightness of the pixels, up to a constant.

Source: generalised distillation, Lopez-Paz et al. (2016), arXiv:1511.03643; learning with
privileged information, Vapnik and Vashist (2009).
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError, unknown_name
from kd.models.zoo.protocol import Shape

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2
SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
KINDS = ("gray", "size:N", "channels:0,1", "edges")


@dataclass(frozen=True)
class ViewInput:
    """The images that a step of a view gets.

    Attributes:
        shape: Height, width and channels.
        deviations: Standard deviation by which each channel was divided.
    """

    shape: Shape
    deviations: tuple[float, ...]


@dataclass(frozen=True)
class ViewStep:
    """One step of a view: at most one change of the channels, then at most one of the size.

    Attributes:
        output: The images that it gives.
        weights: Weights (o, c) of the channels; None for images whose channels stay.
        edges: Whether the images become the length of their gradient.
        size: Height and width to which images are resized; None for images that keep theirs.
    """

    output: ViewInput
    weights: tuple[tuple[float, ...], ...] | None = None
    edges: bool = field(default=False, kw_only=True)
    size: tuple[int, int] | None = field(default=None, kw_only=True)


class StudentView(nn.Module):
    """Maps preprocessed images to the view of them that a student's network gets.

    Attributes:
        text: The view as it was written.
        output_shape: Height, width and channels of the images that it gives.
    """

    code: Tensor
    sobel: Tensor

    def __init__(self, text: str, steps: tuple[ViewStep, ...]) -> None:
        super().__init__()
        self.text, self.steps = text, steps
        self.output_shape = steps[-1].output.shape
        # A buffer, so that a hash of the state of a student covers its view.
        self.register_buffer("code", torch.tensor(list(text.encode()), dtype=torch.uint8))
        for number, step in enumerate(steps):
            weights = None if step.weights is None else torch.tensor(step.weights)
            self.register_buffer(f"weights_{number}", weights)
        self.register_buffer("sobel", torch.tensor(SOBEL))

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o H W"]:
        for number, step in enumerate(self.steps):
            if step.weights is not None:
                weights = getattr(self, f"weights_{number}")
                images = F.conv2d(images, weights[:, :, None, None].to(images.dtype))
            if step.edges:
                images = self._edges(images)
            if step.size is not None:
                images = F.interpolate(
                    images, step.size, mode="bilinear", antialias=True, align_corners=False
                )
        return images

    def _edges(self, images: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n 1 h w"]:
        """Length of Sobel's gradient, in units of the image per pixel; the border is repeated."""
        sobel = self.sobel.to(images.dtype) / 8
        kernels = torch.stack([sobel, sobel.T])[:, None]  # (2, 1, 3, 3)
        gradient = F.conv2d(F.pad(images, [1] * 4, mode="replicate"), kernels)
        # The root has an infinite slope at 0, where flat images are.
        return (gradient.square().sum(1, keepdim=True) + 1e-12).sqrt()


def parse(text: str, shape: Shape, preprocess: Preprocess) -> StudentView:
    """Read a view for images of a shape.

    Args:
        text: The view, as in the module's docstring.
        shape: Height, width and channels of the images.
        preprocess: What was done to them.

    Raises:
        UserError: If the text is no view, or these images have none such.
    """
    if preprocess.whiten is not None:
        raise UserError(
            f"--student-view {text} is of pixels, which --preprocess {preprocess.kind} mixes: "
            "leave one of them out"
        )
    images = ViewInput(shape, tuple(map(float, preprocess.std)))
    steps: list[ViewStep] = []
    for part in _split(text):
        steps.append(_read_step(part, images))
        images = steps[-1].output
    return StudentView(text, tuple(steps))


def _split(text: str) -> list[str]:
    """Split a view into its steps; a number alone belongs to the channels before it."""
    parts: list[str] = []
    for part in text.split(","):
        if part.strip().isdecimal() and parts and parts[-1].startswith("channels:"):
            parts[-1] += f",{part.strip()}"
        else:
            parts.append(part.strip())
    return parts


def _read_step(part: str, images: ViewInput) -> ViewStep:
    name, _, value = part.partition(":")
    if name == "size":
        return _shrink(part, value, images)
    if name == "channels":
        return _choose_channels(part, value, images)
    if part == "gray":
        return _brightness(part, images)
    if part == "edges":
        if images.shape[2] == 1:
            return ViewStep(replace(images, deviations=(1.0,)), edges=True)
        step = _brightness(part, images)
        return replace(step, output=replace(step.output, deviations=(1.0,)), edges=True)
    raise unknown_name("student view", part, KINDS)


def _brightness(part: str, images: ViewInput) -> ViewStep:
    """Mean of the channels by their share of the brightness of pixels as they were at first."""
    h, w, c = images.shape
    if c != 3:
        raise UserError(f"--student-view {part} needs images of 3 channels, got {c}: leave it out")
    weights = np.array(LUMA) * np.array(images.deviations)
    total = float(weights.sum())
    return ViewStep(ViewInput((h, w, 1), (total,)), (tuple((weights / total).tolist()),))


def _choose_channels(part: str, value: str, images: ViewInput) -> ViewStep:
    h, w, c = images.shape
    numbers = [int(n) if n.isdecimal() else -1 for n in value.split(",")]
    if not all(0 <= n < c for n in numbers) or len({*numbers}) < len(numbers):
        raise UserError(
            f"--student-view {part} must name different channels from 0 to {c - 1}: channels:0, say"
        )
    weights = tuple(tuple(np.eye(c)[n].tolist()) for n in numbers)
    deviations = tuple(images.deviations[n] for n in numbers)
    return ViewStep(ViewInput((h, w, len(numbers)), deviations), weights)


def _shrink(part: str, value: str, images: ViewInput) -> ViewStep:
    h, w, c = images.shape
    shorter = min(h, w)
    if not value.isdecimal() or not 1 <= int(value) <= shorter:
        raise UserError(
            f"--student-view {part} must have a shorter side from 1 to {shorter}, that of the "
            f"images: size:{max(shorter // 2, 1)}, say"
        )
    size = (round(h * int(value) / shorter), round(w * int(value) / shorter))
    # Images that are as small already stay as they are, to the bit.
    return ViewStep(replace(images, shape=(*size, c)), size=None if size == (h, w) else size)
