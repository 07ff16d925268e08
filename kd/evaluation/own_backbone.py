"""A caller's own module as a backbone: images in [0, 1] to features, nothing added to it."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.data import provenance
from dsdistill.harness.errors import UserError, first_line
from kd.data import teacher_cache
from kd.data.files.transforms import Views
from kd.evaluation import backbones
from kd.evaluation.backbones import InputRecord
from kd.evaluation.encoder import Encoder
from kd.models.zoo.protocol import Shape
from kd.parallel import engine
from kd.training import borrowing

freeze = borrowing.freeze


@dataclass(frozen=True, eq=False)
class OwnBackbone:
    """A module that maps images in [0, 1] to features, for images of one size.

    It computes where it is, in the type of its parameters.

    Attributes:
        module: The module.
        shape: Height, width and channels of its images.
        width: Number of values d of a feature.
        device: Device of the module.
        probe: SHA-256 of its features of images of noise, to three digits.
    """

    module: nn.Module
    shape: Shape
    width: int
    device: torch.device
    probe: str

    @property
    def inputs(self) -> InputRecord:
        return InputRecord(self.shape[:2], "bilinear", 1.0)

    @property
    def channels(self) -> int:
        return self.shape[2]

    def __call__(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        return self.module(images.to(_dtype(self.module)))

    def views(self, **random: Any) -> Views:
        """As `Backbone.views`."""
        return backbones.views(self.inputs, self.channels, **random)

    def record(self) -> dict[str, Any]:
        """All that its features depend on besides the images, JSON-compatible.

        Equal weights may be those of another function, so the features of noise belong to it.
        """
        return {
            "backbone": provenance.OWN_MODULE,
            "weights_sha256": teacher_cache.fingerprint(self.module),
            "features_sha256": self.probe,
            "preprocess": backbones.describe_inputs(self.inputs),
        }


def encoder(module: nn.Module, shape: Shape, *, differentiable: bool) -> Encoder:
    """A module as an encoder.

    Args:
        module: Maps (m, c, h, w) float images in [0, 1] to (m, d) features; frozen, as by
            `borrowing.freeze`.
        shape: Height, width and channels of the images.
        differentiable: Whether gradients are carried back to the images.

    Raises:
        UserError: If it cannot take such images, gives no features, or its tensors are on several
            devices; with `differentiable` also if its features have no gradient.
    """
    device = borrowing.device_of(module)
    h, w, c = shape
    noise = torch.rand(2, c, h, w, generator=torch.Generator().manual_seed(0)).to(device)
    images = noise.to(_dtype(module)).requires_grad_(differentiable)
    try:
        with torch.set_grad_enabled(differentiable), engine.deterministic():
            rows = module(images)
    except Exception as error:  # a module may raise anything
        raise UserError(
            f"the module of --features cannot take images {tuple(noise.shape)}, channels first and "
            f"in [0, 1]: {first_line(error)}"
        ) from error
    _check(rows, differentiable=differentiable)
    digits = [f"{value:.3g}" for value in rows.detach().double().flatten().tolist()]
    probe = hashlib.sha256(repr(digits).encode()).hexdigest()
    return Encoder(
        provenance.OWN_MODULE, OwnBackbone(module, shape, rows.shape[1], device, probe), device
    )


def _check(rows: object, *, differentiable: bool) -> None:
    """Refuse what are no features of two images."""
    if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != 2:
        got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise UserError(
            f"the module of --features must give features (2, d) of 2 images, got {got}: add a "
            "layer that pools or flattens"
        )
    if differentiable and not rows.requires_grad:
        raise UserError(
            "the features of the module of --features have no gradient in the images: let it "
            "compute without torch.no_grad and detach"
        )


def _dtype(module: nn.Module) -> torch.dtype:
    """Type of the parameters of a module; float32 for one without."""
    kinds = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(kinds, torch.float32)
