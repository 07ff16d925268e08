"""Losses on a network's outputs.

All take outputs of any floating type, compute in float32 and average over the batch alone, so a
weight does not depend on the batch size.
"""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def logit_kl(
    student_logits: Float[Tensor, "n k"],
    teacher_logits: Float[Tensor, "n k"],
    *,
    temperature: float = 4.0,
) -> Float[Tensor, ""]:
    """T² · KL(teacher ‖ student) of temperature-softened predictions, batch mean.

    The factor T² keeps gradients on roughly the same scale for every T, so a loss weight tuned
    at one temperature carries over to another.

    Args:
        student_logits: Unnormalised log-probabilities.
        teacher_logits: Same shape; no gradient flows into them.
        temperature: T > 0; 1 gives the plain divergence, in nats.

    Raises:
        ValueError: If `temperature` is not positive.

    Source: Hinton, Vinyals and Dean (2015), arXiv:1503.02531, section 2.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    log_q = F.log_softmax(student_logits.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    # "mean" would also divide by k; "batchmean" divides by n only.
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def cross_entropy(
    logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"] | Float[Tensor, "n k"]
) -> Float[Tensor, ""]:
    """-Σ_k p_k log softmax(logits)_k in nats, batch mean.

    Args:
        logits: Unnormalised log-probabilities.
        labels: Class indices, or rows of probabilities p that sum to 1.
    """
    if labels.is_floating_point():
        labels = labels.float()
    return F.cross_entropy(logits.float(), labels)


def centred_mse(
    outputs: Float[Tensor, "n k"], labels: Int[Tensor, " n"] | Float[Tensor, "n k"]
) -> Float[Tensor, ""]:
    """½ Σ_k (outputs_k - y_k)², batch mean, for labels y whose rows are centred on 0.

    The sum over k is not divided by k, so the gradient of one output, and with it a good learning
    rate, does not depend on the number of classes.

    Args:
        outputs: Real-valued scores.
        labels: Class indices, taken as one-hot minus 1/k; or real-valued rows, as they are stored
            in a distilled set.

    Source: Nguyen, Chen and Lee (2021), arXiv:2011.00050, whose loss this is up to a factor k.
    """
    outputs = outputs.float()
    if not labels.is_floating_point():
        k = outputs.shape[-1]
        labels = F.one_hot(labels, k).float() - 1 / k
    return 0.5 * (outputs - labels.float()).square().sum(-1).mean()
