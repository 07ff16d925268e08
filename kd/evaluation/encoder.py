"""A backbone as a differentiable function of arrays: images to features, gradients back."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kd.data import batching
from kd.evaluation.backbones import Backbone
from kd.models.networks import resize
from kd.parallel import engine

Pullback = Callable[[Float[np.ndarray, "n d"]], Float[np.ndarray, "n h w c"]]
CHUNK = 128  # images at a time


class Encoder:
    """Images in [0, 1] to the features of a backbone, in chunks of bounded memory.

    Args:
        backbone: The network, on the device.
        device: Its device.
    """

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        self._backbone, self._device = backbone, device
        self.size = backbone.inputs.size[0]
        self.width = backbone.width

    def __call__(self, images: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n d"]:
        """Features of images of any size, which are resized to that of the backbone."""
        with torch.inference_mode(), engine.deterministic():
            return np.concatenate(
                [self._forward(chunk)[1].cpu().numpy() for chunk in _chunks(images)]
            )

    def with_pullback(
        self, images: Float[np.ndarray, "n h w c"]
    ) -> tuple[Float[np.ndarray, "n d"], Pullback]:
        """Features, and the function from their gradient to that of the images.

        Of more than one chunk, the activations are not kept: each is evaluated again.
        """
        chunks = _chunks(images)
        if len(chunks) == 1:
            with engine.deterministic():
                inputs, rows = self._forward(chunks[0], differentiable=True)
            return rows.detach().cpu().numpy(), lambda slope: self._backward(inputs, rows, slope)

        def pullback(slope: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n h w c"]:
            slopes, start = [], 0
            for chunk in chunks:
                with engine.deterministic():
                    inputs, rows = self._forward(chunk, differentiable=True)
                slopes.append(self._backward(inputs, rows, slope[start : start + len(chunk)]))
                start += len(chunk)
            return np.concatenate(slopes)

        return self(images), pullback

    def _forward(
        self, images: Float[np.ndarray, "n h w c"], *, differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:
        inputs = batching.to_nchw(images).to(self._device).requires_grad_(differentiable)
        return inputs, self._backbone(resize(inputs, self._backbone.inputs.size)).float()

    def _backward(
        self, inputs: Tensor, rows: Tensor, slope: Float[np.ndarray, "n d"]
    ) -> Float[np.ndarray, "n h w c"]:
        with engine.deterministic():
            given = torch.from_numpy(np.ascontiguousarray(slope)).to(rows)
            [images] = torch.autograd.grad(rows, inputs, given)
        return images.permute(0, 2, 3, 1).cpu().numpy()


def _chunks(images: Float[np.ndarray, "n h w c"]) -> list[Float[np.ndarray, "m h w c"]]:
    return [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
