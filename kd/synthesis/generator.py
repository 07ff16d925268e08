"""Images by a generator: a network from noise to images that a trained network finds plausible.

    loss = cross-entropy(network(x), its own most probable class)
           + balance · Σ p̄ log p̄ + bn · distance of statistics

The generator goes on learning while its images are kept: in the second half of the steps batches of
them are taken, evenly spaced, as a student that learned beside it would see them. No student takes
part, so that the images can be kept, looked at and trained on by the one trainer.

Source: DAFL, Chen et al. (2019), arXiv:1904.01186, without its term of activations, and with the
statistics of Yin et al. (2020), arXiv:1912.08795, as Fang et al. (2022), arXiv:2112.06253, add
them.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kd.data.batching import derive_seed
from kd.synthesis import plausibility
from kd.synthesis.plausibility import KnownNetwork
from kd.synthesis.settings import SynthesisSettings

NOISE = 100  # values that an image is made from
SLOPE = 0.2  # of LeakyReLU below zero


class ImageGenerator(nn.Module):
    """From noise to images: a linear layer, then two enlargements, each with a convolution.

    Batch norm has the statistics of the batch alone, so that images that are kept are those of a
    training step. The last layer ends between black and white where there are such.

    Args:
        known: Network of the images, for their shape and their bounds.
        width: Channels of the last hidden layer; the ones before have twice as many.
    """

    def __init__(self, known: KnownNetwork, width: int) -> None:
        super().__init__()
        h, w, c = known.shape
        self.start = (2 * width, math.ceil(h / 4), math.ceil(w / 4))
        self.sizes = ((math.ceil(h / 2), math.ceil(w / 2)), (h, w))
        self.bounds = known.bounds
        self.linear = nn.Linear(NOISE, math.prod(self.start))
        self.first = _norm(2 * width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(2 * width, channels, 3, padding=1), _norm(channels), nn.LeakyReLU(SLOPE)
            )
            for channels in (2 * width, width)
        )
        self.last = nn.Conv2d(width, c, 3, padding=1)
        self.scale = _norm(c)

    def forward(self, noise: Float[Tensor, "n z"]) -> Float[Tensor, "n c h w"]:
        x = self.first(self.linear(noise).unflatten(1, self.start))
        for block, size in zip(self.blocks, self.sizes, strict=True):
            x = block(F.interpolate(x, size))
        x = self.scale(self.last(x))
        if self.bounds is None:
            return x
        low, high = self.bounds
        return low + (high - low) * torch.sigmoid(x)


class Generation:
    """Training of a generator, step by step; each step is a function of its number and the state.

    Args:
        known: The network, frozen and in evaluation mode, on the device.
        settings: Numbers of the synthesis.
        seed: Seed of the generator's weights and of its noise.
        device: Device of the images.
    """

    def __init__(
        self, known: KnownNetwork, settings: SynthesisSettings, seed: int, device: torch.device
    ) -> None:
        self._known, self._settings, self._seed, self._device = known, settings, seed, device
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(derive_seed(seed, 0))
            self._generator = ImageGenerator(known, settings.width).to(device)
        self._parameters = list(self._generator.parameters())
        self._adam = torch.optim.Adam(self._parameters, lr=settings.lr)
        self.total = settings.steps
        h, w, c = known.shape
        self._images = torch.zeros(settings.images, c, h, w)
        self._kept_after = _schedule(settings)

    def step(self, number: int) -> float:
        """Take a step; return its loss."""
        made = self._generator(self._noise(number, 1))
        settings = self._settings
        logits, distance = self._known.look(made, settings.bn_weight or 0.0)
        own = F.cross_entropy(logits, logits.detach().argmax(1))
        balance = settings.balance_weight * plausibility.class_balance(logits)
        loss = own + balance + distance
        for parameter, gradient in zip(
            self._parameters, torch.autograd.grad(loss, self._parameters), strict=True
        ):
            parameter.grad = gradient
        self._adam.step()
        rows = self._kept_after.get(number)
        if rows is not None:
            with torch.no_grad():
                kept = self._generator(self._noise(number, 2))[: rows.stop - rows.start]
            self._images[rows] = kept.cpu()
        return loss.item()

    def pack(self) -> dict[str, np.ndarray]:
        """The state after a step, as arrays by name."""
        arrays = {"images": self._images.numpy()}
        arrays |= {f"weight.{k}": v.cpu().numpy() for k, v in self._generator.state_dict().items()}
        for i, parameter in enumerate(self._parameters):
            for name, value in self._adam.state[parameter].items():
                arrays[f"adam.{i}.{name}"] = value.cpu().numpy()
        return arrays

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore the state that `pack` gave."""
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        self._images = tensors["images"]
        weights = {name: tensors[f"weight.{name}"] for name in self._generator.state_dict()}
        self._generator.load_state_dict(weights)
        for i, parameter in enumerate(self._parameters):
            names = ("step", "exp_avg", "exp_avg_sq")
            moved = {name: tensors[f"adam.{i}.{name}"].to(self._device) for name in names[1:]}
            self._adam.state[parameter] = {"step": tensors[f"adam.{i}.step"], **moved}

    def images(self) -> Float[Tensor, "n c h w"]:
        """All images, once all steps are taken."""
        return self._images

    def _noise(self, number: int, purpose: int) -> Tensor:
        seed = derive_seed(self._seed, number, purpose)
        source = torch.Generator().manual_seed(seed)
        return torch.randn(self._settings.batch_size, NOISE, generator=source).to(self._device)


def _norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, track_running_stats=False)


def _schedule(settings: SynthesisSettings) -> dict[int, slice]:
    """The images that are kept after each step: evenly spaced over the second half, to the last."""
    steps, count = settings.steps, settings.batches
    half = steps - steps // 2
    return {
        steps - 1 - half * (count - 1 - batch) // count: settings.rows(batch)
        for batch in range(count)
    }
