"""Convert images from one model's preprocessing to another's.

A teacher evaluated with the student's normalisation is quietly wrong; here the data's `Preprocess`
is undone and the teacher's applied. In between, in the space of plain images, the resolution is
changed, and grayscale is repeated to the channels of a model of colour images. All tensors are
buffers: nothing here is ever trained.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError
from kd.models.networks import repeat_channels, resize
from kd.models.zoo.protocol import Interpolation


class InversePreprocessLayer(nn.Module):
    """`Preprocess.invert` for NCHW tensors.

    Exact for every kind except `zca`, which discards each image's mean and norm: the restored image
    has mean 0 before the channels are rescaled, and the mean norm of the training images
    (`Preprocess.contrast`).
    """

    mean: Tensor
    std: Tensor
    matrix: Tensor | None

    def __init__(self, fitted: Preprocess) -> None:
        super().__init__()
        _register_buffers(self, fitted, fitted.unwhiten)
        self.contrast = fitted.contrast

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        if self.matrix is not None:
            images = _unflatten(_flatten(images) @ self.matrix * self.contrast, images)
        return images * self.std + self.mean


class PreprocessLayer(nn.Module):
    """`Preprocess.apply` for NCHW tensors with values in [0, 1]."""

    mean: Tensor
    std: Tensor
    matrix: Tensor | None

    def __init__(self, fitted: Preprocess) -> None:
        super().__init__()
        _register_buffers(self, fitted, fitted.whiten)
        self.normalised = fitted.kind == "zca"

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        x = (images - self.mean) / self.std
        if self.matrix is None:
            return x
        flat = _flatten(x)
        if not self.normalised:
            return _unflatten(flat @ self.matrix, images)
        # Subtract the first value before the mean: the mean of equal values is rounded, and a blank
        # image must become exactly 0.
        flat = flat - flat[:, :1]
        flat = flat - flat.mean(1, keepdim=True)
        flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return _unflatten(flat @ self.matrix, images)


class Adapter(nn.Module):
    """Map images from the data's preprocessed space to a model's.

    A resize to other proportions distorts. Values that a bicubic resize overshoots are not clipped,
    as they would be in image files.

    Args:
        data: Preprocessing that was applied to the images.
        model: Preprocessing that the model expects, for as many channels as the data have, or for
            more if the data have 1, which is then repeated.
        size: Height and width that the model was trained with; images are resized to it between
            the two preprocessings.
        interpolation: Interpolation of the resize, which is antialiased.
    """

    def __init__(
        self,
        data: Preprocess,
        model: Preprocess,
        size: tuple[int, int],
        interpolation: Interpolation = "bilinear",
    ) -> None:
        super().__init__()
        self.undo = InversePreprocessLayer(data)
        self.apply_model = PreprocessLayer(model)
        self.size = size
        self.interpolation: Interpolation = interpolation
        self.channels = None if len(model.std) == len(data.std) else len(model.std)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n C H W"]:
        plain = resize(self.undo(images), self.size, self.interpolation)
        return self.apply_model(repeat_channels(plain, self.channels))


def build_adapter(
    data: Preprocess,
    model: Preprocess,
    size: tuple[int, int],
    model_size: tuple[int, int],
    interpolation: Interpolation = "bilinear",
) -> nn.Module:
    """Build an `Adapter`, or the identity where nothing differs, so that no rounding is added.

    Args:
        data, model, interpolation: As in `Adapter`.
        size: Height and width of the data's images.
        model_size: Height and width of the model's images.
    """
    if data.same_as(model) and size == model_size:
        return nn.Identity()
    return Adapter(data, model, model_size, interpolation)


def check_channels(who: str, model_channels: int, channels: int) -> None:
    """Refuse a model for other channels than the data's, unless grayscale can be repeated.

    Args:
        who: Name of the model in messages.
        model_channels: Channels of the model's images.
        channels: Channels of the data's images.

    Raises:
        UserError: If the channels differ and the data are not grayscale.
    """
    if channels not in (1, model_channels):
        raise UserError(
            f"{who} takes images of {model_channels} channels, the data have {channels}, and only "
            "grayscale can be converted: choose another model"
        )


def _register_buffers(
    module: nn.Module, fitted: Preprocess, matrix: Float[np.ndarray, "d d"] | None
) -> None:
    mean = torch.tensor(fitted.mean)  # one value per channel, or one image
    mean = mean.permute(2, 0, 1)[None] if mean.ndim == 3 else mean.view(1, -1, 1, 1)
    module.register_buffer("mean", mean)
    module.register_buffer("std", torch.tensor(fitted.std).view(1, -1, 1, 1))
    module.register_buffer("matrix", None if matrix is None else torch.tensor(matrix))


def _flatten(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    # The whitening matrices belong to images flattened as (h, w, c).
    return images.permute(0, 2, 3, 1).flatten(1)


def _unflatten(flat: Float[Tensor, "n d"], like: Float[Tensor, "n c h w"]) -> Tensor:
    n, c, h, w = like.shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)
