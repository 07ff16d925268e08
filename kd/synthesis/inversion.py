"""Images by inversion: pixels that a network calls a class and that fit its batch norm layers.

    loss = cross-entropy(network(x), class) + bn · distance of statistics + tv · total variation

Every batch starts as noise and is optimised by itself, with Adam at a rate that falls to 0 by a
cosine; in each step the images are shifted by up to two pixels. Classes follow each other, so that
each batch, whose statistics are compared, has all of them.

Source: DeepInversion, Yin et al. (2020), arXiv:1912.08795. Deviations: pixels stay between black
and white, images are not flipped, and the rate falls.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kd.data.batching import derive_seed
from kd.synthesis import plausibility
from kd.synthesis.plausibility import KnownNetwork
from kd.synthesis.settings import SynthesisSettings

SHIFT = 2  # pixels, in both directions
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, by their names in torch


class Inversion:
    """Inversion of a network, step by step; each step is a function of its number and the state.

    Args:
        known: The network, frozen and in evaluation mode, on the device.
        settings: Numbers of the synthesis.
        seed: Seed of the noise and of the shifts.
        device: Device of the images.
    """

    def __init__(
        self, known: KnownNetwork, settings: SynthesisSettings, seed: int, device: torch.device
    ) -> None:
        self._known, self._settings, self._seed, self._device = known, settings, seed, device
        self.total = settings.batches * settings.steps
        h, w, c = known.shape
        self._images = torch.zeros(settings.images, c, h, w)
        self._begin(0)

    @property
    def classes(self) -> Tensor:
        """The class that each image is made for."""
        return torch.arange(self._settings.images) % self._known.classes

    def step(self, number: int) -> float:
        """Take a step; return its loss."""
        steps = self._settings.steps
        batch, inner = divmod(number, steps)
        if inner == 0 and batch > 0:
            self._begin(batch)
        self._adam.param_groups[0]["lr"] = self._rate(inner)
        labels = self.classes[self._settings.rows(batch)].to(self._device)
        loss = self._loss(self._pixels, labels, derive_seed(self._seed, batch, inner, 1))
        (self._pixels.grad,) = torch.autograd.grad(loss, self._pixels)
        self._adam.step()
        with torch.no_grad():
            self._pixels.copy_(plausibility.clamp(self._pixels, self._known))
            if inner == steps - 1:
                self._images[self._settings.rows(batch)] = self._pixels.cpu()
        return loss.item()

    def pack(self) -> dict[str, np.ndarray]:
        """The state after a step, as arrays by name."""
        state = self._adam.state[self._pixels]
        return {
            "images": self._images.numpy(),
            "pixels": self._pixels.detach().cpu().numpy(),
            "step": state["step"].cpu().numpy(),
            **{name: state[name].cpu().numpy() for name in MOMENTS},
        }

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore the state that `pack` gave."""
        self._images = torch.from_numpy(arrays["images"].copy())
        self._optimise(torch.from_numpy(arrays["pixels"].copy()))
        moments = {name: torch.from_numpy(arrays[name].copy()) for name in MOMENTS}
        self._adam.state[self._pixels] = {
            "step": torch.from_numpy(arrays["step"].copy()),
            **{name: moment.to(self._device) for name, moment in moments.items()},
        }

    def images(self) -> Float[Tensor, "n c h w"]:
        """All images, once all steps are taken."""
        return self._images

    def _begin(self, batch: int) -> None:
        generator = torch.Generator().manual_seed(derive_seed(self._seed, batch, 0))
        noise = torch.randn(self._images[self._settings.rows(batch)].shape, generator=generator)
        self._optimise(noise)

    def _optimise(self, pixels: Tensor) -> None:
        self._pixels = pixels.to(self._device).requires_grad_()
        self._adam = torch.optim.Adam([self._pixels], lr=self._settings.lr)

    def _rate(self, inner: int) -> float:
        return self._settings.lr * (1 + math.cos(math.pi * inner / self._settings.steps)) / 2

    def _loss(self, pixels: Tensor, labels: Tensor, seed: int) -> Tensor:
        settings = self._settings
        source = torch.Generator().manual_seed(seed)
        shifts = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=source).tolist()
        shifted = torch.roll(pixels, shifts, (2, 3))
        logits, distance = self._known.look(shifted, settings.bn_weight or 0.0)
        variation = settings.tv_weight * plausibility.total_variation(shifted)
        return F.cross_entropy(logits, labels) + distance + variation
