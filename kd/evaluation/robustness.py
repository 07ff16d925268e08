"""Accuracy of a network under attack: PGD of its own, and AutoAttack where it is installed.

An attack knows the network whole. An image counts as right under an attack if it is right as it is
and as the attack has changed it; only images that are right are attacked.
"""

import copy
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from kd.attack import Attack, Pgd
from kd.data.batching import EvaluationBatches, derive_seed
from kd.losses import response
from kd.models.zoo.modes import evaluation_mode
from kd.objectives.adversary import Bounds, bounds_after, perturb
from kd.parallel.engine import Engine

GROUP = 128  # images that are attacked at a time
DLR_CLASSES = 4  # AutoAttack's loss of targets compares four logits
MAX_TARGETS = 9  # of AutoAttack's standard version


@dataclass(frozen=True)
class Robustness:
    """Accuracies under attack.

    Attributes:
        images: Number of images that were attacked.
        clean: Share of them that are right as they are.
        accuracy: Share of them that are right under every attack.
        attacks: For each attack the share that are right under it.
    """

    images: int
    clean: float
    accuracy: float
    attacks: dict[str, float]


def check(attacks: Sequence[Attack], preprocess: Preprocess, classes: int) -> None:
    """Refuse attacks that cannot be run here.

    Args:
        attacks: The attacks.
        preprocess: Preprocessing of the images that the network takes.
        classes: Number of classes.

    Raises:
        UserError: If the preprocessing mixes pixels, AutoAttack is not installed, or there are too
            few classes for it.
    """
    for attack in attacks:
        bounds_after(preprocess, attack.eps)
        if isinstance(attack, Pgd):
            continue
        if importlib.util.find_spec("pyautoattack") is None:
            raise UserError(
                "--robust autoattack needs pyautoattack: pip install 'dsdistill[robust]', or use "
                "--robust pgd"
            )
        if classes < DLR_CLASSES:
            raise UserError(
                f"--robust autoattack needs {DLR_CLASSES} classes or more, and the data have "
                f"{classes}: use --robust pgd"
            )


def measure(
    network: nn.Module,
    batches: EvaluationBatches,
    attacks: Sequence[Attack],
    preprocess: Preprocess,
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> Robustness:
    """Measure the accuracy under each attack and under all of them.

    Args:
        network: Network of preprocessed images (n, c, h, w), whose mode is restored.
        batches: Images with labels.
        attacks: The attacks, all on the same images: the smallest number that one of them asks for.
        preprocess: Preprocessing of the images.
        temperature: T > 0; softmax(outputs / T) are the network's probabilities.
        seed: Seed of the attacks.
    """
    limit = min(attack.images for attack in attacks)
    total = sum(len(batch) for batch in batches.in_order())
    rows = _spread(total, limit)
    right = {str(attack): 0 for attack in attacks}
    clean = withstood = 0
    with progress.bar(len(rows), "images attacked") as show:
        for number, (images, labels) in enumerate(_groups(batches, rows)):
            every = _is_right(network, images, labels)
            clean += int(every.sum())
            for attack in attacks:
                bounds = bounds_after(preprocess, attack.eps)
                draws = derive_seed(seed, number)
                flags = withstands(network, images, labels, attack, bounds, temperature, draws)
                right[str(attack)] += int(flags.sum())
                every &= flags
            withstood += int(every.sum())
            show(min((number + 1) * GROUP, len(rows)))
    shares = {name: count / len(rows) for name, count in right.items()}
    return Robustness(len(rows), clean / len(rows), withstood / len(rows), shares)


def validation_accuracy(
    network: nn.Module,
    batches: EvaluationBatches,
    attack: Pgd,
    preprocess: Preprocess,
    on: Engine,
) -> float:
    """Accuracy under PGD on all images; each process attacks its share of the batches.

    Args:
        network: Network of preprocessed images, whose mode is restored.
        batches: All images, the same in every process.
        attack: The attack.
        preprocess: Preprocessing of the images.
        on: The processes.
    """
    bounds = bounds_after(preprocess, attack.eps)
    sums = torch.zeros(2, dtype=torch.float64, device=on.device)
    mine = range(on.process_index, 1 << 62, on.num_processes)
    for number, batch in zip(
        mine, batches.in_order(on.process_index, on.num_processes), strict=False
    ):
        flags = withstands(network, batch.images, batch.labels, attack, bounds, 1.0, number)
        sums += torch.stack([flags.sum(), torch.tensor(len(batch), device=on.device)]).double()
    totals: Any = on.reduce(sums)
    return float(totals[0] / totals[1])


def withstands(
    network: nn.Module,
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    attack: Attack,
    bounds: Bounds,
    temperature: float = 1.0,
    seed: int = 0,
) -> Bool[Tensor, " n"]:
    """Whether each image is right as it is, and as an attack has changed it.

    Args:
        network: Network of the images, whose mode is restored.
        images: Images as the network takes them.
        labels: Their classes.
        attack: The attack.
        bounds: How far it may change them.
        temperature: T > 0; softmax(outputs / T) are the network's probabilities.
        seed: Seed of the attack.
    """
    right = _is_right(network, images, labels)
    if not right.any():
        return right
    chosen = images[right], labels[right]
    if isinstance(attack, Pgd):
        changed = _run_pgd(network, *chosen, attack, bounds, temperature, seed)
    else:
        changed = _run_autoattack(network, *chosen, bounds, temperature, seed)
    right[right.clone()] = _is_right(network, changed, labels[right])
    return right


def _is_right(network: nn.Module, images: Tensor, labels: Tensor) -> Bool[Tensor, " n"]:
    with evaluation_mode(network), torch.no_grad():
        return network(images).argmax(1) == labels


def _run_pgd(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: Pgd,
    bounds: Bounds,
    temperature: float,
    seed: int,
) -> Tensor:
    return perturb(
        network,
        images,
        lambda outputs, changed: response.cross_entropy(outputs / temperature, labels),
        bounds,
        steps=attack.steps,
        step=attack.step_size,
        generator=torch.Generator(images.device).manual_seed(seed),
    )


def _run_autoattack(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    bounds: Bounds,
    temperature: float,
    seed: int,
) -> Tensor:
    """The images as the standard version of AutoAttack has changed them."""
    from pyautoattack import AutoAttack as Ensemble

    # A copy: one of the attacks adds up gradients of parameters.
    of_pixels = _OfPixels(copy.deepcopy(network), bounds, temperature, images.device)
    of_pixels.eval().requires_grad_(False)
    with torch.random.fork_rng():
        # pyautoattack takes a 32-bit seed.
        options = {"eps": bounds.eps, "seed": seed % (1 << 31), "device": images.device}
        ensemble = Ensemble(of_pixels, norm="Linf", version="standard", **options)
        with torch.no_grad():
            classes = of_pixels(of_pixels.to_pixels(images[:1])).shape[1]
        targets = min(MAX_TARGETS, classes - 1)
        ensemble.apgd_targeted.n_target_classes = targets
        ensemble.fab.n_target_classes = targets
        changed, _ = ensemble.run_standard_evaluation(
            of_pixels.to_pixels(images), labels, batch_size=GROUP
        )
    return of_pixels.from_pixels(changed.detach())


class _OfPixels(nn.Module):
    """A network as a function of pixels in [0, 1] with logits."""

    def __init__(
        self, network: nn.Module, bounds: Bounds, temperature: float, device: torch.device
    ) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature
        self.low, self.high = bounds.to(device)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(self.from_pixels(pixels)).float() / self.temperature

    def from_pixels(self, pixels: Tensor) -> Tensor:
        return self.low + pixels * (self.high - self.low)

    def to_pixels(self, images: Tensor) -> Tensor:
        return ((images - self.low) / (self.high - self.low)).clamp(0, 1)


def _spread(total: int, count: int) -> Int[np.ndarray, " m"]:
    """Rows spread evenly: images of a folder stand class by class."""
    count = min(total, count)
    return np.arange(count) * total // max(count, 1)


def _groups(
    batches: EvaluationBatches, rows: Int[np.ndarray, " m"]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of these rows and their labels, `GROUP` at a time."""
    kept: list[tuple[Tensor, Tensor]] = []
    first = waiting = 0
    for batch in batches.in_order():
        mine = rows[(rows >= first) & (rows < first + len(batch))] - first
        first += len(batch)
        index = torch.from_numpy(mine).to(batch.labels.device)
        for part in index.split(GROUP):
            kept.append((batch.images[part], batch.labels[part]))
            waiting += len(part)
        while waiting >= GROUP or (first > rows[-1] and waiting):
            images, labels = (torch.cat(x) for x in zip(*kept, strict=True))
            yield images[:GROUP], labels[:GROUP]
            kept = [(images[GROUP:], labels[GROUP:])]
            waiting = len(labels) - len(labels[:GROUP])
