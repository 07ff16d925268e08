"""Networks by name: built in, or any of timm's; freshly initialised or pretrained."""

import difflib
import logging
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.errors import UserError, unknown
from dsdistill.harness.preprocess import Preprocess

Shape = tuple[int, int, int]  # height, width, channels of an image


class Classifier(nn.Module):
    """A network that takes images of the data's size, whatever size it was made for.

    Attributes:
        network: What is trained and saved.
        size: Height and width to which images are resized first (bilinear, antialiased); None
            for a network that takes them as they are. The resize has neither weights nor buffers.
    """

    def __init__(self, network: nn.Module, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.network = network
        self.size = size

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.network(resize(images, self.size))


def convnet(shape: Shape, classes: int, width: int) -> nn.Module:
    """Three blocks of Conv 3x3, InstanceNorm, ReLU, AvgPool 2x2, then a linear layer.

    The default network of dataset distillation.

    Source: Gidaris and Komodakis (2018), arXiv:1804.09458; Zhao et al. (2021), arXiv:2006.05929.
    """
    h, w, channels = shape
    if min(h, w) < 8:
        raise UserError(
            f"convnet halves images three times and needs at least 8x8 pixels, got {h}x{w}: "
            "use --student mlp or a larger --image-size"
        )
    layers: list[nn.Module] = []
    for fan_in in (channels, width, width):
        # One group a channel: InstanceNorm with a scale and a shift.
        norm = nn.GroupNorm(width, width)
        layers += [nn.Conv2d(fan_in, width, 3, padding=1), norm, nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (h // 8) * (w // 8), classes))


def mlp(shape: Shape, classes: int, width: int) -> nn.Module:
    """Two hidden ReLU layers on the flattened image."""
    hidden = (nn.Linear(int(np.prod(shape)), width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, classes))


# Name -> (function, default width).
BUILT_IN: Mapping[str, tuple[Callable[[Shape, int, int], nn.Module], int]] = {
    "convnet": (convnet, 128),
    "mlp": (mlp, 256),
}


def build(
    name: str, shape: Shape, classes: int, *, seed: int = 0, pretrained: bool = False
) -> Classifier:
    """A freshly initialised or a pretrained classifier.

    Args:
        name: `convnet`, `mlp`, with a width as `convnet:32`; or a timm name.
        shape: Of the images it will be given.
        classes: Number of outputs.
        seed: Of the initial weights.
        pretrained: Load timm's published weights; the last layer is new if `classes` differs.

    Raises:
        UserError: For an unknown name, a bad width, images of a size the network cannot take, or
            weights that cannot be had.
    """
    base, _, width = name.partition(":")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if base not in BUILT_IN:
            return _timm(name, shape, classes, pretrained)
        if pretrained:
            raise UserError(f"{base} has no published weights: leave --pretrained out")
        make, default = BUILT_IN[base]
        return Classifier(make(shape, classes, _width(name, width) if ":" in name else default))


def check_name(name: str) -> None:
    """Refuse a name that `build` does not know, with the nearest known ones."""
    base, colon, width = name.partition(":")
    if base in BUILT_IN:
        if colon:
            _width(name, width)
        return
    if "/" in name:
        raise UserError(f"there is no folder {name}")
    import timm  # slow to import, so only for a name that is not built in

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.6)
        raise UserError(f"{unknown('network', name, [*BUILT_IN, *near])}, or any timm name")


def published(name: str, channels: int) -> tuple[Preprocess, int]:
    """The normalisation of a timm model's published weights, and their number of classes.

    For other than three channels every channel gets the mean of theirs, since timm sums or
    repeats the first layer's weights then.

    Raises:
        UserError: If the name is unknown, or no weights were published.
    """
    check_name(name)
    if name.partition(":")[0] in BUILT_IN:
        raise UserError(f"{name} has no published weights: train it with `kd train` first")
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise UserError(f"timm has no published weights for {name}")
    mean, std = (np.asarray(values, np.float32) for values in (config.mean, config.std))
    if channels != len(mean):
        mean, std = (np.full(channels, v.mean(), np.float32) for v in (mean, std))
    return Preprocess("standardise", mean, std), config.num_classes


def parameters(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in network.parameters())


def resize(
    images: Float[Tensor, "n c h w"], size: tuple[int, int] | None
) -> Float[Tensor, "n c H W"]:
    """Bilinear and antialiased; the images themselves if `size` is None or theirs."""
    if size is None or images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)


def _width(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        base = name.partition(":")[0]
        raise UserError(f"a width is a positive whole number, as in {base}:32, got {name!r}")
    return int(text)


def _timm(name: str, shape: Shape, classes: int, pretrained: bool) -> Classifier:
    check_name(name)
    import timm

    # The hub logs every retry of a download; what matters is in the error below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        network = timm.create_model(
            name, pretrained=pretrained, in_chans=shape[-1], num_classes=classes
        )
    except Exception as error:  # hub, network, file and timm's own errors share no base class
        what = "get pretrained weights for" if pretrained else "make"
        raise UserError(f"cannot {what} timm model {name!r}: {_first_line(error)}") from error
    config = timm.get_pretrained_cfg(name)
    size = config.input_size[1:] if config is not None and config.fixed_input_size else None
    classifier = Classifier(network, size)
    _try(classifier, name, shape)
    return classifier


def _try(classifier: Classifier, name: str, shape: Shape) -> None:
    """Refuse a network that cannot take images of this size, now and not after an hour."""
    h, w, c = shape
    was = classifier.training
    try:
        with torch.no_grad():
            classifier.eval()(torch.zeros(1, c, h, w))
    except Exception as error:  # timm's networks raise whatever they like
        raise UserError(
            f"{name} cannot take {h}x{w} images ({_first_line(error)}): use a larger --image-size"
        ) from error
    classifier.train(was)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
