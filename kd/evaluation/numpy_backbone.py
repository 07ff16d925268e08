"""A backbone of `kd` for the harness: NumPy images in [0, 1] in, NumPy features out."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from kd.data import batching
from kd.evaluation import backbones
from kd.evaluation.backbones import Backbone
from kd.evaluation.features import resize_plain
from kd.models.zoo.protocol import Shape
from kd.parallel import engine

VERSIONED_PACKAGES = ("torch", "timm", "torchvision")


@dataclass(frozen=True, eq=False)
class NumpyBackbone:
    """A frozen backbone as a function from images in [0, 1] to features.

    Images are resized as `kd features` does with those of an array.

    Attributes:
        name: Name in messages and reports.
        backbone: The network, on its device.
        device: Device of the network.
        identity: All that the features depend on besides the images, JSON-compatible.
    """

    name: str
    backbone: Backbone
    device: torch.device
    identity: Mapping[str, Any]

    @property
    def width(self) -> int:
        """Number of values d of a feature."""
        return self.backbone.width

    @property
    def accelerator(self) -> str | None:
        """Name of the GPU; None on the CPU."""
        on_cpu = self.device.type == "cpu"
        return None if on_cpu else torch.cuda.get_device_name(self.device)

    def __call__(self, images: Float[np.ndarray, "n h w c"], /) -> Float[np.ndarray, "n d"]:
        with torch.inference_mode(), engine.deterministic():
            pixels = batching.to_nchw(images).to(self.device)
            return self.backbone(resize_plain(pixels, self.backbone.inputs)).float().cpu().numpy()


def load(
    name: str,
    shape: Shape,
    *,
    label: str | None = None,
    device: str = "cpu",
    typed: Iterable[str] = (),
) -> NumpyBackbone:
    """Load the embedding of a trained network.

    Args:
        name: As in `backbones.load`.
        shape: Height, width and channels of the images.
        label: Name in messages and reports; by default `name`.
        device: `cpu`, `auto`, `cuda` or `cuda:N`.
        typed: Names that the user has typed, as for `saved_models.load_run`.

    Raises:
        UserError: If there is no such network or device, it has no trained weights, or it does not
            take images of the shape.
    """
    with engine.temporary(device) as on:
        target = on.device
    backbone = backbones.load(name, backbones.EMBEDDING, shape, typed=typed)
    versions = {package: version(package) for package in VERSIONED_PACKAGES}
    identity = backbone.record() | {"device": target.type, "versions": versions}
    return NumpyBackbone(label or name, backbone.to(target), target, identity)
