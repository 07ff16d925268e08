"""Adversaries of a student: images that an attack changed, for terms of losses and for figures.

`perturb` is the attack. It is pure: the network keeps its mode, its buffers and its gradients.
`Adversary` is an attack in a training step, on what the terms of the loss are robust against.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError
from kd.attack import STEP_SHARE, Pgd
from kd.data.batching import Batch, derive_seed
from kd.losses import ensemble, response
from kd.models.zoo.modes import evaluation_mode

Images = Float[Tensor, "n c h w"]
Logits = Float[Tensor, "n k"]
# Loss of the network's outputs for the changed images, and of these images.
AttackLoss = Callable[[Any, Images], Float[Tensor, ""]]
Start = Literal["uniform", "normal"]
# What an attack in a training drives the student away from: the labels, the teacher's answers for
# the clean images, the student's own answers for these, or the teacher's for the changed images.
Against = Literal["labels", "teacher", "itself", "moving teacher"]

NORMAL_START = 0.001  # standard deviation, of pixels in [0, 1]
PIXELWISE = ("standardise", "centre", "none")  # preprocessing that scales and shifts channels
SEED_KEY = 19  # separates the draws of an attack from others that follow from a step's seed


@dataclass(frozen=True, eq=False)
class Bounds:
    """How far an attack may change images that a network takes.

    One unit of pixels, from black to white, is `high - low`.

    Attributes:
        eps: Largest change of a pixel value, of pixels in [0, 1].
        low, high: Black and white in the space of the images: a number, or one for each channel
            (c, 1, 1).
    """

    eps: float
    low: float | Tensor = 0.0
    high: float | Tensor = 1.0

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Black and white as tensors on a device."""
        low, high = (torch.as_tensor(x, dtype=torch.float32) for x in (self.low, self.high))
        return low.to(device), high.to(device)

    def box(self, images: Images) -> tuple[Images, Images]:
        """The smallest and the largest value that each pixel may get.

        Values that lie outside of black and white already, as noise in place of an erased part
        does, move inwards alone.
        """
        low, high = self.to(images.device)
        reach = self.eps * (high - low)
        smallest = torch.maximum(images - reach, torch.minimum(images, low))
        return smallest, torch.minimum(images + reach, torch.maximum(images, high))


def bounds_after(preprocess: Preprocess, eps: float) -> Bounds:
    """The bounds in the space of preprocessed images.

    Args:
        preprocess: Preprocessing of the images that the network takes.
        eps: Largest change of a pixel value, of pixels in [0, 1].

    Raises:
        UserError: If the preprocessing mixes pixels, so that a ball of pixels is none after it.
    """
    if preprocess.kind not in PIXELWISE:
        raise UserError(
            f"an attack changes pixels, and the preprocessing {preprocess.kind} mixes them: train "
            "a student with --preprocess standardise"
        )
    mean, std = (torch.from_numpy(x)[:, None, None] for x in (preprocess.mean, preprocess.std))
    return Bounds(eps, -mean / std, (1 - mean) / std)


def perturb(
    network: nn.Module,
    images: Images,
    loss: AttackLoss,
    bounds: Bounds,
    *,
    steps: int = 10,
    step: float | None = None,
    start: Start = "uniform",
    generator: torch.Generator | None = None,
) -> Images:
    """Change images so that a loss of the network's outputs rises: projected gradient ascent.

    x⁰ = x + noise; xⁱ⁺¹ = Π(xⁱ + step · sign ∇ₓ loss(f(xⁱ), xⁱ)), Π onto `bounds`.

    The network runs in evaluation mode and in float32, whatever the autocast around the call; its
    modes, its buffers and the gradients of its parameters are the same afterwards. Networks that
    several processes wrap are given bare: the attack waits for no other process.

    Args:
        network: Network of the images.
        images: Images as the network takes them.
        loss: Scalar of the outputs and the changed images; a sum or mean over the images.
        bounds: How far the images may be changed.
        steps: Number of steps.
        step: Change of a pixel value in one step, of pixels in [0, 1]; None is a quarter of `eps`.
        start: Noise of the start: uniform over the whole range of `eps`, or normal with a standard
            deviation of 0.001.
        generator: Source of this noise, on the device of the images; None is torch's global one.

    Returns:
        The changed images, without a graph.

    Source: Madry et al. (2018), arXiv:1706.06083; the normal start, Zhang et al. (2019),
    arXiv:1901.08573.
    """
    images = images.detach()
    low, high = bounds.to(images.device)
    smallest, largest = bounds.box(images)
    stride = (STEP_SHARE * bounds.eps if step is None else step) * (high - low)
    noise = torch.empty_like(images)
    if start == "uniform":
        noise.uniform_(-bounds.eps, bounds.eps, generator=generator)
    else:
        noise.normal_(0, NORMAL_START, generator=generator)
    moved = (images + noise * (high - low)).clamp(smallest, largest)
    float32 = torch.autocast(images.device.type, enabled=False)
    with evaluation_mode(network), torch.enable_grad(), float32:
        for _ in range(steps):
            moved.requires_grad_()
            # Of the images alone: no hook of a parameter runs, such as those that add gradients up
            # over processes.
            (gradient,) = torch.autograd.grad(loss(network(moved), moved), moved)
            moved = (moved.detach() + stride * gradient.sign()).clamp(smallest, largest)
    return moved.detach()


@dataclass(frozen=True, eq=False)
class Adversary:
    """An attack on a student in each step of its training.

    Attributes:
        attack: The attack.
        bounds: How far it may change the images.
        against: What the student is driven away from.
    """

    attack: Pgd
    bounds: Bounds
    against: Against

    @property
    def needs_answers(self) -> bool:
        """Whether the attack knows the teachers' answers for the clean images."""
        return self.against == "teacher"

    @property
    def asks_teachers(self) -> bool:
        """Whether the teachers answer for the changed images, which nothing can store."""
        return self.against == "moving teacher"

    def change(
        self,
        batch: Batch,
        student: nn.Module,
        teachers: Sequence[nn.Module] = (),
        answers: Logits | None = None,
        *,
        by_label: bool = False,
    ) -> Images:
        """The images of a batch, changed; the same for the same seed of torch's generator.

        The draws leave this generator as it was, so that those of the networks after it do not
        depend on the attack.

        Args:
            batch: The batch.
            student: The student, not wrapped.
            teachers: The teachers, in evaluation mode.
            answers: Their logits together for the clean images, where `needs_answers`.
            by_label: Whether teachers that answer for the changed images are weighted by how well
                they know the label there, as in the loss.
        """
        images = batch.images
        generator = torch.Generator(images.device)
        generator.manual_seed(derive_seed(torch.initial_seed(), SEED_KEY))
        return perturb(
            student,
            images,
            self._loss(batch, student, teachers, answers, by_label),
            self.bounds,
            steps=self.attack.steps,
            step=self.attack.step_size,
            start="uniform" if self.against == "labels" else "normal",
            generator=generator,
        )

    def _loss(
        self,
        batch: Batch,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        answers: Logits | None,
        by_label: bool,
    ) -> AttackLoss:
        if self.against == "labels":
            return label_loss(batch.labels_or_shares)
        if self.against == "moving teacher":
            labels = batch.labels_or_shares if by_label else None
            return lambda outputs, images: _divergence(
                outputs, _mean_answer(teachers, images, labels)
            )
        if self.against == "itself":
            float32 = torch.autocast(batch.images.device.type, enabled=False)
            with evaluation_mode(student), torch.no_grad(), float32:
                answers = student(batch.images)
        assert answers is not None
        fixed = answers.detach().float().log_softmax(-1)
        return lambda outputs, images: _divergence(outputs, fixed)


def label_loss(labels: Tensor) -> AttackLoss:
    """The cross-entropy of the labels, as what an attack drives up."""
    return lambda outputs, images: response.cross_entropy(outputs, labels)


def _mean_answer(teachers: Sequence[nn.Module], images: Images, labels: Tensor | None) -> Logits:
    """Logarithm of the mean of the teachers' probabilities, with its gradient into the images.

    Args:
        teachers: The teachers.
        images: The images.
        labels: Labels by which teachers are weighted, with weights that count as constants; None
            weights them alike.
    """
    each = torch.stack([teacher(images).float().log_softmax(-1) for teacher in teachers])
    if labels is None:
        return each.logsumexp(0) - math.log(len(each))
    weights = ensemble.label_weights([*each], labels)
    return (each + weights.log()[..., None]).logsumexp(0)


def _divergence(outputs: Logits, log_p: Logits) -> Float[Tensor, ""]:
    """KL(p ‖ softmax(outputs)), batch mean, with its gradient into both."""
    log_q = outputs.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
