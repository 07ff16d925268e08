"""Make images from a network, step by step, by either method."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsdistill.harness.errors import UserError
from kd.synthesis.generator import Generation
from kd.synthesis.inversion import Inversion
from kd.synthesis.plausibility import KnownNetwork
from kd.synthesis.settings import SynthesisSettings


class Synthesis(Protocol):
    """Images in the making.

    Attributes:
        total: Number of steps.
    """

    total: int

    def step(self, number: int) -> float:
        """Take the step of a number from 0 to `total` - 1; return its loss."""
        ...

    def pack(self) -> dict[str, np.ndarray]:
        """The state after a step, as arrays by name."""
        ...

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore the state that `pack` gave."""
        ...

    def images(self) -> Float[Tensor, "n c h w"]:
        """All images, once all steps are taken."""
        ...


@dataclass(frozen=True, eq=False)
class Judgement:
    """What the network makes of images.

    Attributes:
        probabilities: Its probabilities.
        statistics_distance: Distance of the images' statistics from those of its training, in
            batches; None without batch norm layers.
    """

    probabilities: Float[np.ndarray, "n k"]
    statistics_distance: float | None

    @property
    def classes(self) -> Int[np.ndarray, " n"]:
        """The most probable class of each image."""
        return self.probabilities.argmax(1)

    @property
    def confidence(self) -> float:
        """Mean of the largest probability."""
        return float(self.probabilities.max(1).mean())


def begin(
    known: KnownNetwork, settings: SynthesisSettings, seed: int, device: torch.device
) -> Synthesis:
    """Begin to make images.

    Args:
        known: The network, in evaluation mode, on the device.
        settings: Numbers from `settings.fit`.
        seed: Seed of all random choices.
        device: Device of the images.
    """
    method = Inversion if settings.method == "inversion" else Generation
    return method(known, settings, seed, device)


def run(synthesis: Synthesis, after: Callable[[int, float], None], start: int = 0) -> None:
    """Take all steps that are left.

    Args:
        synthesis: Images in the making.
        after: Called after each step with the number of steps taken and the loss.
        start: Number of steps taken before.

    Raises:
        UserError: If a loss is not finite.
    """
    for number in range(start, synthesis.total):
        loss = synthesis.step(number)
        if not math.isfinite(loss):
            raise UserError(f"the loss is not finite at step {number + 1}: use a smaller --lr")
        after(number + 1, loss)


@torch.no_grad()
def judge(
    known: KnownNetwork,
    images: Float[Tensor, "n c h w"],
    settings: SynthesisSettings,
    device: torch.device,
) -> Judgement:
    """Let the network judge images, in the batches that they were made in.

    Args:
        known: The network, in evaluation mode, on the device.
        images: The images.
        settings: Numbers of the synthesis.
        device: Device of the network.
    """
    logits, distances = [], []
    for batch in range(settings.batches):
        own, distance = known.look(images[settings.rows(batch)].to(device), 1.0)
        logits.append(own.cpu())
        distances.append(distance.item())
    probabilities = torch.cat(logits).double().softmax(1).numpy()
    measured = float(np.mean(distances)) if known.has_batch_norm else None
    return Judgement(probabilities, measured)
