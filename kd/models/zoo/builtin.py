"""The networks that ship with the package: those of distillation papers on small images."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.errors import UserError
from kd.models.zoo import small
from kd.models.zoo.protocol import Shape


def convnet(shape: Shape, classes: int, width: int) -> nn.Module:
    """Three blocks of Conv 3x3, InstanceNorm, ReLU, AvgPool 2x2, then a linear layer.

    The default network of dataset distillation.

    Source: Gidaris and Komodakis (2018), arXiv:1804.09458; Zhao et al. (2021), arXiv:2006.05929.
    """
    h, w, channels = _check_size("convnet", shape)
    layers: list[nn.Module] = []
    for fan_in in (channels, width, width):
        # One group per channel: InstanceNorm with a scale and a shift.
        norm = nn.GroupNorm(width, width)
        layers += [nn.Conv2d(fan_in, width, 3, padding=1), norm, nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (h // 8) * (w // 8), classes))


def kip_convnet(shape: Shape, classes: int, width: int) -> nn.Module:
    """Conv 3x3, ReLU; three blocks of Conv 3x3, ReLU, AvgPool 2x2; then a linear layer.

    The finite network to which the KIP paper transfers its sets: no normalisation, and 1024
    channels. It starts as their infinite network does, in the standard parameterisation: weights
    N(0, 2 / fan-in) and biases N(0, 0.01), those of the last layer too.

    Source: Nguyen, Novak, Xiao and Lee (2021), arXiv:2107.13034, appendix; the `standard`
    parameterisation of neural-tangents.
    """
    h, w, channels = _check_size("kip-convnet", shape)
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(width * (h // 8) * (w // 8), classes)]
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert layer.bias is not None
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # variance 2 / fan-in
            nn.init.normal_(layer.bias, std=0.1)
    return nn.Sequential(*layers)


class NtkLinear(nn.Linear):
    """A linear layer in the NTK parameterisation: sqrt(2 / fan-in) W x + 0.1 b.

    W and b start as N(0, 1), so that the step of a weight, and with it the network's NTK, does not
    depend on the width.

    Source: Jacot et al. (2018), arXiv:1806.07572; deviations sqrt(2) and 0.1 as in Nguyen et al.
    (2021), arXiv:2011.00050.
    """

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.normal_(self.bias)

    def forward(self, input: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        scale = math.sqrt(2 / self.in_features)
        return F.linear(input, scale * self.weight, 0.1 * self.bias)


def kip_fc(shape: Shape, classes: int, width: int) -> nn.Module:
    """One hidden ReLU layer on the flattened image, in the NTK parameterisation.

    The finite network whose infinite form is `dsdistill`'s kernel `fc`, last layer included.

    Source: Nguyen, Chen and Lee (2021), arXiv:2011.00050.
    """
    hidden = NtkLinear(int(np.prod(shape)), width)
    return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), NtkLinear(width, classes))


def mlp(shape: Shape, classes: int, width: int) -> nn.Module:
    """Two hidden ReLU layers on the flattened image."""
    hidden = (nn.Linear(int(np.prod(shape)), width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, classes))


# Name -> (function, default width).
NETWORKS: Mapping[str, tuple[Callable[[Shape, int, int], nn.Module], int]] = {
    "convnet": (convnet, 128),
    "mlp": (mlp, 256),
    "kip-convnet": (kip_convnet, 1024),
    "kip-fc": (kip_fc, 1024),
    "small-resnet18": (small.resnet18, 64),
    "small-vgg11": (small.vgg11, 64),
    "small-vit": (small.vit, 192),
}


def network(name: str, shape: Shape, classes: int) -> nn.Module:
    """Build a freshly initialised network, with the width in its name.

    Raises:
        UserError: For a bad width, or images that are too small.
    """
    make, _ = NETWORKS[name.partition(":")[0]]
    return make(shape, classes, width(name))


def width(name: str) -> int:
    """The number after the colon, or the default.

    Raises:
        UserError: If it is not a positive whole number.
    """
    base, colon, text = name.partition(":")
    if not colon:
        return NETWORKS[base][1]
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"a width is a positive whole number, as in {base}:32, got {name!r}")
    return int(text)


def _check_size(name: str, shape: Shape) -> Shape:
    """Return the shape; refuse images too small to be halved three times."""
    h, w, _ = shape
    if min(h, w) < 8:
        raise UserError(
            f"{name} halves images three times and needs at least 8x8 pixels, got {h}x{w}: "
            "use mlp, or larger images"
        )
    return shape
