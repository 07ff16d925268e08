"""Images as one model sees them, turned into images as another model sees them.

A teacher evaluated with the student's normalisation is quietly wrong; here the data's `Preprocess`
is undone and the teacher's applied. Everything is a buffer: nothing here is ever trained.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.preprocess import Preprocess
from kd.networks import resize


class Undo(nn.Module):
    """`Preprocess.invert` for NCHW tensors.

    Exact for `none` and `standardise`. ZCA forgets each image's mean and norm, so an image comes
    back with mean 0 before the channels are restored, and with the mean norm of the training
    images (`Preprocess.contrast`).
    """

    mean: Tensor
    std: Tensor
    matrix: Tensor | None

    def __init__(self, fitted: Preprocess) -> None:
        super().__init__()
        _register(self, fitted, fitted.unwhiten)
        self.contrast = fitted.contrast

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        if self.matrix is not None:
            images = _unflatten(_flatten(images) @ self.matrix * self.contrast, images)
        return images * self.std + self.mean


class Apply(nn.Module):
    """`Preprocess.apply` for NCHW tensors with values in [0, 1]."""

    mean: Tensor
    std: Tensor
    matrix: Tensor | None

    def __init__(self, fitted: Preprocess) -> None:
        super().__init__()
        _register(self, fitted, fitted.whiten)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        x = (images - self.mean) / self.std
        if self.matrix is None:
            return x
        flat = _flatten(x)
        flat = flat - flat.mean(1, keepdim=True)
        flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return _unflatten(flat @ self.matrix, images)


class Adapter(nn.Module):
    """From the data's preprocessed space to a model's.

    Args:
        data: What was applied to the images.
        model: What the model wants applied.
        size: Height and width the model was trained with; resized to between the two maps.
    """

    def __init__(self, data: Preprocess, model: Preprocess, size: tuple[int, int]) -> None:
        super().__init__()
        self.undo = Undo(data)
        self.apply_model = Apply(model)
        self.size = size

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c H W"]:
        return self.apply_model(resize(self.undo(images), self.size))


def adapter(
    data: Preprocess, model: Preprocess, size: tuple[int, int], wanted: tuple[int, int]
) -> nn.Module:
    """The identity where nothing differs, so that no rounding is added; an `Adapter` elsewhere."""
    if data.same_as(model) and size == wanted:
        return nn.Identity()
    return Adapter(data, model, wanted)


def _register(
    module: nn.Module, fitted: Preprocess, matrix: Float[np.ndarray, "d d"] | None
) -> None:
    module.register_buffer("mean", torch.tensor(fitted.mean).view(1, -1, 1, 1))
    module.register_buffer("std", torch.tensor(fitted.std).view(1, -1, 1, 1))
    module.register_buffer("matrix", None if matrix is None else torch.tensor(matrix))


def _flatten(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    # The whitening matrices belong to images flattened as (h, w, c).
    return images.permute(0, 2, 3, 1).flatten(1)


def _unflatten(flat: Float[Tensor, "n d"], like: Float[Tensor, "n c h w"]) -> Tensor:
    n, c, h, w = like.shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)
