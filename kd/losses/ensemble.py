"""Several teachers as one: the mean of their tempered probabilities, also weighted by label."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def combined_logits(
    logits: Sequence[Float[Tensor, "n k"]],
    *,
    temperature: float,
    weights: Float[Tensor, "m n"] | None = None,
) -> Float[Tensor, "n k"]:
    """T · log Σ_i w_i softmax(l_i / T): logits whose softmax at T is the teachers' weighted mean.

    Any loss at this temperature that takes one teacher's logits thereby takes several. At another
    temperature the result is not a mean.

    Args:
        logits: One tensor per teacher, all of one shape; no gradient flows into them.
        temperature: T > 0.
        weights: w_i for each image, such as `label_weights`; None: 1/m for m teachers.

    Returns:
        Logits in float32; for a single teacher its logits, up to a shift of each row.

    Raises:
        ValueError: If there are no logits, their shapes differ, or `temperature` is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    stacked = _stack(logits)  # (m, n, k)
    log_p = F.log_softmax(stacked / temperature, dim=-1)
    m, n = stacked.shape[:2]
    if weights is None:
        weights = log_p.new_full((m, n), 1 / m)
    # In logarithms: a class that all teachers rule out would be log 0.
    return temperature * torch.logsumexp(log_p + weights.log()[..., None], dim=0)


def combined_binary_logits(
    logits: Sequence[Float[Tensor, "n k"]], *, temperature: float
) -> Float[Tensor, "n k"]:
    """Logits whose sigmoid at T is the mean of the teachers' probabilities of each class.

    Args:
        logits: One tensor per teacher, all of one shape; no gradient flows into them.
        temperature: T > 0.

    Raises:
        ValueError: If there are no logits, their shapes differ, or `temperature` is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    scaled = _stack(logits) / temperature  # (m, n, k)
    # log p - log (1 - p) of the means, in logarithms: a sure teacher's σ rounds to 0 or 1.
    yes, no = (F.logsigmoid(sign * scaled).logsumexp(0) for sign in (1, -1))
    return temperature * (yes - no)


def mean_logits(
    logits: Sequence[Float[Tensor, "n k"]],
    *,
    weights: Float[Tensor, "m n"] | None = None,
) -> Float[Tensor, "n k"]:
    """Σ_i w_i l_i, for losses that compare the logits themselves.

    A squared distance to it has the gradient of the mean squared distance to each teacher.

    Args:
        logits, weights: As in `combined_logits`.

    Returns:
        Logits in float32; for a single teacher its logits.

    Raises:
        ValueError: If there are no logits, or their shapes differ.
    """
    stacked = _stack(logits)  # (m, n, k)
    return stacked.mean(0) if weights is None else (weights[..., None] * stacked).sum(0)


def label_weights(
    logits: Sequence[Float[Tensor, "n k"]], labels: Int[Tensor, " n"] | Float[Tensor, "n k"]
) -> Float[Tensor, "m n"]:
    """w_i = (1 - softmax_i(CE_i)) / (m - 1): a teacher that knows the label better weighs more.

    The cross-entropies CE_i are at temperature 1; for each image the weights of the m teachers sum
    to 1, and none exceeds 1/(m - 1). A single teacher has weight 1.

    Args:
        logits: One tensor per teacher, all of one shape; no gradient flows into them.
        labels: Class indices, or rows of probabilities.

    Raises:
        ValueError: If there are no logits, or their shapes differ.

    Source: Zhang, Chen and Wang (2022), arXiv:2201.00007, equation 2 (CA-MKD).
    """
    stacked = _stack(logits)
    m = len(stacked)
    if m == 1:
        return stacked.new_ones(stacked.shape[:2])
    if labels.is_floating_point():
        labels = labels.float()
    errors = torch.stack([F.cross_entropy(each, labels, reduction="none") for each in stacked])
    return (1 - errors.softmax(0)) / (m - 1)


def _stack(logits: Sequence[Float[Tensor, "n k"]]) -> Float[Tensor, "m n k"]:
    shapes = {tuple(each.shape) for each in logits}
    if len(shapes) != 1:
        raise ValueError(f"teachers' logits must be of one shape, got {sorted(shapes) or 'none'}")
    return torch.stack([each.detach().float() for each in logits])
