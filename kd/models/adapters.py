"""Images as one model sees them, turned into images as another model sees them.

A teacher evaluated with the student's normalisation is quietly wrong; here the data's `Preprocess`
is undone and the teacher's applied. In between, in the space of plain images, the resolution is
changed, and grayscale is repeated to the channels of a model of colour images. Everything is a
buffer: nothing here is ever trained.
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

    Exact but for `zca`, which forgets each image's mean and norm: an image comes back with mean 0
    before the channels are restored, and with the mean norm of the training images
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
        # First to the first value: the mean of equal ones is rounded, and a blank image must be 0.
        flat = flat - flat[:, :1]
        flat = flat - flat.mean(1, keepdim=True)
        flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return _unflatten(flat @ self.matrix, images)


class Adapter(nn.Module):
    """From the data's preprocessed space to a model's.

    A resize to other proportions distorts; what a bicubic one overshoots is not clipped, as it
    would be in files.

    Args:
        data: What was applied to the images.
        model: What the model wants applied; its number of channels is the data's, or the data's is
            1 and the channel is repeated.
        size: Height and width the model was trained with; resized to between the two maps.
        interpolation: Of the resize, which is antialiased.
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
    wanted: tuple[int, int],
    interpolation: Interpolation = "bilinear",
) -> nn.Module:
    """The identity where nothing differs, so that no rounding is added; an `Adapter` elsewhere.

    Args:
        data, model, interpolation: As of `Adapter`.
        size: Height and width of the data's images.
        wanted: Of the model's.
    """
    if data.same_as(model) and size == wanted:
        return nn.Identity()
    return Adapter(data, model, wanted, interpolation)


def check_channels(who: str, its: int, channels: int) -> None:
    """Refuse a model for other channels than the data's, unless grayscale can be repeated.

    Args:
        who: How the message calls the model.
        its: Channels of the model's images.
        channels: Of the data's.
    """
    if channels not in (1, its):
        raise UserError(
            f"{who} takes images of {its} channels, the data have {channels}: there is no way "
            "from one to the other"
        )


def _register_buffers(
    module: nn.Module, fitted: Preprocess, matrix: Float[np.ndarray, "d d"] | None
) -> None:
    mean = torch.tensor(fitted.mean)  # one value a channel, or an image
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
