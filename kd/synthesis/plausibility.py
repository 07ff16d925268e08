"""How plausible a trained network finds images: the terms by which images are made from it.

Source: DeepInversion, Yin et al. (2020), arXiv:1912.08795; DAFL, Chen et al. (2019),
arXiv:1904.01186.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Images = Float[Tensor, "n c h w"]


@dataclass(frozen=True, eq=False)
class KnownNetwork:
    """A trained network from which images are made, and what is known of its images.

    Attributes:
        network: Network of images (n, c, h, w) to outputs (n, k), in evaluation mode.
        shape: Height, width and channels of an image.
        classes: Number of classes k.
        temperature: softmax(outputs / temperature) are its probabilities.
        bounds: Black and white, each (c, 1, 1), where the images have such; else None.
    """

    network: nn.Module
    shape: tuple[int, int, int]
    classes: int
    temperature: float = 1.0
    bounds: tuple[Tensor, Tensor] | None = None

    def logits(self, images: Images) -> Float[Tensor, "n k"]:
        """Logits of its probabilities."""
        return self.network(images) / self.temperature

    def look(
        self, images: Images, bn_weight: float
    ) -> tuple[Float[Tensor, "n k"], Float[Tensor, ""]]:
        """Logits, and the weighted distance of the images' statistics from those of the training.

        Args:
            images: A batch.
            bn_weight: Weight of the distance; at 0 it is not measured.
        """
        if not bn_weight or not self.has_batch_norm:
            return self.logits(images), images.new_zeros(())
        with measure_statistics(self.network) as distances:
            logits = self.logits(images)
        return logits, bn_weight * torch.stack(distances).sum()

    @property
    def has_batch_norm(self) -> bool:
        """Whether it has layers that keep the mean and the variance of their training inputs."""
        return bool(batch_norm_layers(self.network))


def batch_norm_layers(network: nn.Module) -> list[_BatchNorm]:
    """The layers that keep the mean and the variance of their inputs in training."""
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None]


@contextmanager
def measure_statistics(network: nn.Module) -> Iterator[list[Float[Tensor, ""]]]:
    """Compare the statistics of a batch with those that batch norm layers have kept.

    ‖μ - μ̂‖₂ + ‖σ² - σ̂²‖₂ of the inputs of each layer; μ̂ and σ̂² are the running averages of the
    training. Norms, not their squares, as in the authors' code; σ² divides by n - 1, as the running
    average does, and in their code by n.

    Yields:
        A list to which each layer adds its distance in a forward pass inside the block.

    Source: Yin et al. (2020), equation 4.
    """
    distances: list[Tensor] = []

    def compare(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        variance, mean = torch.var_mean(x, [axis for axis in range(x.ndim) if axis != 1])
        distances.append((mean - layer.running_mean).norm() + (variance - layer.running_var).norm())

    hooks = [layer.register_forward_pre_hook(compare) for layer in batch_norm_layers(network)]
    try:
        yield distances
    finally:
        for hook in hooks:
            hook.remove()


def total_variation(images: Images) -> Float[Tensor, ""]:
    """Sum of the norms of the differences of neighbours in four directions, over the whole batch.

    Source: Yin et al. (2020), in their code.
    """
    pairs = (
        (images[..., :, 1:], images[..., :, :-1]),
        (images[..., 1:, :], images[..., :-1, :]),
        (images[..., 1:, 1:], images[..., :-1, :-1]),
        (images[..., 1:, :-1], images[..., :-1, 1:]),
    )
    norms = [(one - other).norm() for one, other in pairs if one.numel()]
    return torch.stack(norms).sum() if norms else images.new_zeros(())


def class_balance(logits: Float[Tensor, "n k"]) -> Float[Tensor, ""]:
    """Σ p̄ log p̄, the negative entropy of the mean probabilities: least where classes are even.

    Source: Chen et al. (2019), equation 6.
    """
    mean = F.softmax(logits, 1).mean(0)
    return torch.xlogy(mean, mean).sum()


def clamp(images: Images, known: KnownNetwork) -> Images:
    """Images whose pixels lie between black and white, where the network has such."""
    if known.bounds is None:
        return images
    low, high = known.bounds
    return torch.minimum(torch.maximum(images, low), high)
