"""Losses on features of a layer: maps (n, c, h, w), or embeddings (n, d).

All take features of any floating type, compute in float32, return a float32 scalar averaged over
the batch, and send no gradient into the teacher. Student and teacher have one shape unless a
function says otherwise: a trained projector in front of the loss sees to that. Each function
names the reduction that its published weight belongs to.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kd.losses.ranges import Floor, Range

PYRAMID = 4, 2, 1  # sides of the pooled maps of `hierarchical_context`


def fitnet(
    student: Float[Tensor, "n *features"], teacher: Float[Tensor, "n *features"]
) -> Float[Tensor, ""]:
    """Squared difference, mean over all entries.

    The mean makes the loss independent of the size of the map. It is the form that the published
    weight of 100 belongs to.

    Args:
        student: Features after the regressor (a 1x1 convolution) to the teacher's channels.
        teacher: Same shape; no gradient flows into them.

    Raises:
        ValueError: If the shapes differ.

    Source: Romero et al. (2015), arXiv:1412.6550, section 2.2, who take half the squared norm and
    train the lower layers first. Mean, weight and joint training: Tian et al. (2020),
    arXiv:1910.10699, whose CIFAR-100 comparison made this variant the usual one.
    """
    return F.mse_loss(*_prepare_pair(student, teacher))


def attention_transfer(
    student: Float[Tensor, "n c h w"], teacher: Float[Tensor, "n m h w"]
) -> Float[Tensor, ""]:
    """Squared difference of unit attention maps, mean over batch and the h · w places.

    The attention map of an image is the mean over channels of the squared features, divided by
    its norm, so channels may differ and the scale of the features does not matter.

    The published weight of 1000 belongs to this mean, for each pair of layers. As the squared
    norm of the difference is h · w times the mean over places, it amounts to a weight of
    1000 / (h · w) on that norm: 15.6 on maps of 8 x 8.

    Args:
        student: Maps.
        teacher: Maps of the same height and width; no gradient flows into them.

    Raises:
        ValueError: If batch, height or width differ.

    Source: Zagoruyko and Komodakis (2017), arXiv:1612.03928, section 3.1. The equation there has
    the norm of the difference; the square and the mean are in the authors' code.
    """
    _check_positions(student, teacher)
    return F.mse_loss(_attention(student.float()), _attention(teacher.detach().float()))


def hierarchical_context(
    student: Float[Tensor, "n c h w"],
    teacher: Float[Tensor, "n c h w"],
) -> Float[Tensor, ""]:
    """Weighted mean of the mean squared errors of a pair of maps and of its average-pooled copies.

    The whole map has weight 1, and each coarser copy, 4 x 4, 2 x 2 and 1 x 1, half the weight of
    the one before it; the weights are divided by their sum. Copies as large as the map are left
    out. ReviewKD sums this over its stages, with weight 1 on ImageNet and 0.6 to 8 on CIFAR-100.

    Args:
        student: Maps after attention-based fusion, which is the projector's part.
        teacher: Same shape; no gradient flows into them.

    Raises:
        ValueError: If the shapes differ.

    Source: Chen et al. (2021), arXiv:2104.09044; sizes and weights as in the authors' code, which
    compares a copy with the height alone, where this takes the shorter side.
    """
    student, teacher = _prepare_pair(student, teacher)
    loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    for level in PYRAMID:
        if level < min(student.shape[-2:]):
            weight /= 2
            total += weight
            coarse = F.adaptive_avg_pool2d(student, level), F.adaptive_avg_pool2d(teacher, level)
            loss = loss + weight * F.mse_loss(coarse[0], coarse[1])
    return loss / total


def vid(
    mean: Float[Tensor, "n c h w"],
    raw_variance: Float[Tensor, " c"],
    teacher: Float[Tensor, "n c h w"],
    *,
    minimum: Floor = 1e-5,
) -> Float[Tensor, ""]:
    """½ ((t - mean)² / v + log v) with v = softplus(raw_variance) + minimum, mean over all entries.

    The negative log-likelihood of the teacher's features under a Gaussian that the student
    predicts, without the constant ½ log 2π: the lower it is, the more the student's features say
    about the teacher's. It can be negative. Published weight: 1.

    Args:
        mean: The student's prediction of the teacher's maps, from a trained regressor.
        raw_variance: Trained, one for each channel. The authors start at a variance of 5, which
            is log(exp(5 - minimum) - 1) here.
        teacher: Same shape as `mean`; no gradient flows into them.
        minimum: Smallest variance, > 0.

    Raises:
        ValueError: If the shapes do not fit or `minimum` is not positive.

    Source: Ahn et al. (2019), arXiv:1904.05835. The mean over entries, where the paper has a sum,
    is that of Tian et al. (2020), arXiv:1910.10699, to which the weight belongs.
    """
    mean, teacher = _prepare_pair(mean, teacher)
    if raw_variance.shape != mean.shape[1:2]:
        raise ValueError(
            f"raw_variance must hold one value for each of {mean.shape[1]} channels, "
            f"got shape {tuple(raw_variance.shape)}"
        )
    if not minimum > 0:
        raise ValueError(f"minimum must be positive, got {minimum}; the paper's code has 1e-5")
    variance = (F.softplus(raw_variance.float()) + minimum)[:, None, None]
    return 0.5 * ((teacher - mean).square() / variance + variance.log()).mean()


def log_sum(
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "n d"],
    *,
    alpha: Annotated[float, Range(1, 16)] = 4.0,
    norm_eps: Floor = 1e-4,
    floor: Floor = 1e-5,
) -> Float[Tensor, ""]:
    """log Σ_d |s - t|^α of batch-normalised embeddings, with the batch mean inside the logarithm.

    A power above 2 lets the few worst entries lead, and the logarithm keeps the step size as the
    difference shrinks, which helps a student much smaller than its teacher. The gradient does not
    vanish near the optimum before the sum is as small as `floor`. The value can be negative.
    Published weight: 2 on ImageNet, beside cross-entropy and `logit_kl` at T = 1, each 1.

    Args:
        student: Pooled features after a linear projector; each column is brought to mean 0 and
            variance 1 over the batch, without running averages or a learned scale.
        teacher: Same shape, normalised alike; no gradient flows into them.
        alpha: Power of the difference, ≥ 1.
        norm_eps: Added to the variances.
        floor: Added inside the logarithm: equal features give log(floor), not -∞.

    Raises:
        ValueError: If the shapes differ, n < 2, `alpha` < 1 or `floor` is not positive.

    Source: Miles and Mikolajczyk (2024), arXiv:2303.11098. Their code sums over the batch where
    this takes the mean: the gradient is the same, and the value is lower by log n. In it, `floor`
    belongs to the variant for transformers alone.
    """
    student, teacher = _prepare_pair(student, teacher)
    if len(student) < 2:
        raise ValueError(f"log_sum normalises over the batch: it needs 2 rows, got {len(student)}")
    if not (alpha >= 1 and floor > 0):
        raise ValueError(f"alpha must be ≥ 1 and floor positive, got {alpha} and {floor}")
    gap = _batch_normalised(student, norm_eps) - _batch_normalised(teacher, norm_eps)
    return (gap.abs().pow(alpha).sum(-1).mean() + floor).log()


def mgd(
    generated: Float[Tensor, "n c h w"], teacher: Float[Tensor, "n c h w"]
) -> Float[Tensor, ""]:
    """Squared difference, summed over c, h and w, batch mean.

    The student's masked features must regenerate the teacher's; mask and generator are the
    projector's part. The published weights, 7e-5 for classification (channels masked with
    probability 0.15) and 2e-5 for detection (places, 0.65), belong to this sum: the loss grows
    with c · h · w.

    Args:
        generated: What the generator made of the student's masked features.
        teacher: Same shape; no gradient flows into them.

    Raises:
        ValueError: If the shapes differ.

    Source: Yang et al. (2022), arXiv:2205.01529.
    """
    generated, teacher = _prepare_pair(generated, teacher)
    return (generated - teacher).square().flatten(1).sum(-1).mean()


def _prepare_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, the teacher without gradient."""
    # Broadcasting would otherwise hide features that do not match.
    if student.shape != teacher.shape:
        raise ValueError(
            "student and teacher features must have one shape, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}; put a projector in front"
        )
    return student.float(), teacher.detach().float()


def _check_positions(student: Tensor, teacher: Tensor) -> None:
    theirs, ours = (tuple(maps.shape[i] for i in (0, 2, 3)) for maps in (teacher, student))
    if ours != theirs:
        raise ValueError(
            f"attention_transfer needs maps that agree in (n, h, w), got {ours} and {theirs}; "
            "resize the student's maps first"
        )


def _attention(maps: Float[Tensor, "n c h w"]) -> Float[Tensor, "n hw"]:
    """Mean squared feature at each place, with length 1 for each image."""
    return F.normalize(maps.square().mean(1).flatten(1), dim=-1)


def _batch_normalised(rows: Float[Tensor, "n d"], eps: float) -> Float[Tensor, "n d"]:
    """Columns with mean 0 and variance 1, the variance divided by n as in a batch norm layer."""
    variance, mean = torch.var_mean(rows, dim=0, correction=0)
    return (rows - mean) * (variance + eps).rsqrt()
