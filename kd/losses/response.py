"""Losses on a network's outputs.

All take outputs of any floating type, compute in float32, return a float32 scalar averaged over
the batch alone, so a weight does not depend on the batch size, and send no gradient into the
teacher. The last axis holds the k classes.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kd.losses.ranges import Factor, Share, ShareBelowOne, Temperature


def logit_kl(
    student_logits: Float[Tensor, "n k"],
    teacher_logits: Float[Tensor, "n k"],
    *,
    temperature: Temperature = 4.0,
) -> Float[Tensor, ""]:
    """T² · KL(teacher ‖ student) of temperature-softened predictions, batch mean.

    The factor T² keeps gradients on roughly the same scale for every T, so a loss weight tuned
    at one temperature carries over to another.

    Args:
        student_logits: Unnormalised log-probabilities.
        teacher_logits: Same shape; no gradient flows into them.
        temperature: T > 0; 1 gives the plain divergence, in nats.

    Raises:
        ValueError: If `temperature` is not positive, or the shapes differ.

    Source: Hinton, Vinyals and Dean (2015), arXiv:1503.02531, section 2.
    """
    student, teacher = _prepare_pair(student_logits, teacher_logits)
    return _softened_kl(student, teacher, temperature)


def cross_entropy(
    logits: Float[Tensor, "n k"],
    labels: Int[Tensor, " n"] | Float[Tensor, "n k"],
    class_weights: Float[Tensor, " k"] | None = None,
    *,
    smoothing: ShareBelowOne = 0.0,
) -> Float[Tensor, ""]:
    """-Σ_k w_k p_k log softmax(logits)_k in nats, batch mean.

    The sum over the batch is divided by n, not by the sum of the labels' weights as torch's
    `weight=` divides indices: so the mean of several batches is that of their images.

    Args:
        logits: Unnormalised log-probabilities.
        labels: Class indices, or rows of probabilities p that sum to 1.
        class_weights: Weights w on the device of the logits; None for 1.
        smoothing: Share ε of each label that is spread evenly over all k classes, the right one
            included: p becomes (1 - ε) p + ε / k, for indices and for rows alike.

    Raises:
        ValueError: If `smoothing` is outside [0, 1).

    Source: smoothing, Szegedy et al. (2016), arXiv:1512.00567, section 7.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1), got {smoothing}; use 0 for none")
    if labels.is_floating_point():
        labels = labels.float()
    if class_weights is None:
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    options = {"weight": class_weights, "label_smoothing": smoothing}
    return F.cross_entropy(logits.float(), labels, reduction="none", **options).mean()


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


def dkd(
    student_logits: Float[Tensor, "n k"],
    teacher_logits: Float[Tensor, "n k"],
    labels: Int[Tensor, " n"],
    *,
    alpha: Factor = 1.0,
    beta: Factor = 8.0,
    temperature: Temperature = 4.0,
) -> Float[Tensor, ""]:
    """T² · (α KL of target against rest + β KL among the other classes), batch mean.

    `logit_kl` is this with α = 1 and β = 1 - p, where p is the teacher's probability of the
    target: a sure teacher mutes what it knows of the other classes. A constant β does not.

    Args:
        student_logits: Unnormalised log-probabilities of k > 2 classes.
        teacher_logits: Same shape; no gradient flows into them.
        labels: Class indices. Mixed or soft labels have no one target class.
        alpha, beta: Weights of the two parts. The authors take β from 2 to 8 on CIFAR-100, and 0.5
            or 2 on ImageNet at T = 1; they ramp the loss up over the first epochs, which is left
            to the caller.
        temperature: T > 0.

    Raises:
        ValueError: If labels are not indices, k ≤ 2, `temperature` is not positive, both weights
            are 0, or the shapes differ.

    Source: Zhao et al. (2022), arXiv:2203.08679, section 3.
    """
    student, teacher = _prepare_pair(student_logits, teacher_logits)
    _check_targets(labels, student.shape[-1])
    _check_temperature(temperature)
    if not (alpha or beta):
        raise ValueError("alpha and beta are both 0: nothing is left of dkd")
    target_q, others_q = _split(student / temperature, labels)
    target_p, others_p = _split(teacher / temperature, labels)
    target_part = F.kl_div(target_q, target_p, reduction="batchmean", log_target=True)
    others_part = F.kl_div(others_q, others_p, reduction="batchmean", log_target=True)
    return temperature**2 * (alpha * target_part + beta * others_part)


def dist(
    student_logits: Float[Tensor, "n k"],
    teacher_logits: Float[Tensor, "n k"],
    *,
    inter: Factor = 1.0,
    intra: Factor = 1.0,
    temperature: Temperature = 1.0,
) -> Float[Tensor, ""]:
    """T² · weighted sum of 1 - Pearson correlation over rows and over columns of the predictions.

    The student must rank the classes of an image, and the images of a batch for a class, as the
    teacher does; the probabilities need not agree. That suits a teacher far stronger than its
    student. Published weight: 2, beside cross-entropy with weight 1; T = 4 on CIFAR-100.

    A row or column without spread has no correlation and counts as 0; its gradient is bounded.

    Args:
        student_logits: Unnormalised log-probabilities.
        teacher_logits: Same shape; no gradient flows into them.
        inter: Weight of the rows (between classes), averaged over n.
        intra: Weight of the columns (within a class), averaged over k; needs n ≥ 2.
        temperature: T > 0 of both softmaxes.

    Raises:
        ValueError: If `intra` is not 0 for a batch of one, both weights are 0, `temperature` is
            not positive, or the shapes differ.

    Source: Huang et al. (2022), arXiv:2205.10536, section 3. The factor T² is in the authors'
    code. They add 1e-8 to the product of the norms instead of treating rows without spread.
    """
    student, teacher = _prepare_pair(student_logits, teacher_logits)
    _check_temperature(temperature)
    if not (inter or intra):
        raise ValueError("inter and intra are both 0: nothing is left of dist")
    if intra and len(student) < 2:
        raise ValueError("intra compares images: it needs a batch of 2 or more, got 1; set intra=0")
    q = F.softmax(student / temperature, dim=-1)
    p = F.softmax(teacher / temperature, dim=-1)
    loss = inter * (1 - _pearson(q, p).mean())
    if intra:
        loss = loss + intra * (1 - _pearson(q.T, p.T).mean())
    return temperature**2 * loss


def standardised_kl(
    student_logits: Float[Tensor, "n k"],
    teacher_logits: Float[Tensor, "n k"],
    *,
    temperature: Temperature = 2.0,
) -> Float[Tensor, ""]:
    """`logit_kl` of logits brought to mean 0 and deviation 1 in each row, batch mean.

    The student then need not match the range of a larger teacher's logits. Published weights: 9,
    with cross-entropy 0.1. A row without spread becomes zeros, with a bounded gradient.

    Args:
        student_logits: Unnormalised log-probabilities; gradients flow through mean and deviation.
        teacher_logits: Same shape; no gradient flows into them.
        temperature: T > 0, applied after the standardisation.

    Raises:
        ValueError: If `temperature` is not positive, or the shapes differ.

    Source: Sun et al. (2024), arXiv:2403.01427. The deviation divides by k, as in the paper; the
    authors' code divides by k - 1, which is a temperature higher by √(k / (k - 1)).
    """
    student, teacher = _prepare_pair(student_logits, teacher_logits)
    return _softened_kl(standardise(student), standardise(teacher), temperature)


def standardise(logits: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Bring each row to mean 0 and deviation 1, in float32; a row without spread becomes zeros."""
    # A centred row of length √k has deviation 1.
    return logits.shape[-1] ** 0.5 * _centred_unit(logits.float())


def logit_mse(
    student_logits: Float[Tensor, "n k"], teacher_logits: Float[Tensor, "n k"]
) -> Float[Tensor, ""]:
    """Squared difference of logits, mean over batch and classes.

    For rows that are centred on 0 this is twice the limit of `logit_kl` as T → ∞.

    Args:
        student_logits: Unnormalised log-probabilities.
        teacher_logits: Same shape; no gradient flows into them.

    Raises:
        ValueError: If the shapes differ.

    Source: Kim et al. (2021), arXiv:2105.08919, whose equation sums over classes; the division by
    k is in the authors' code, and makes weights comparable between data sets.
    """
    return F.mse_loss(*_prepare_pair(student_logits, teacher_logits))


def hard_distillation(
    student_logits: Float[Tensor, "n k"], teacher_logits: Float[Tensor, "n k"]
) -> Float[Tensor, ""]:
    """Cross-entropy of the student with the teacher's top class as the label, batch mean.

    DeiT gives this to a second head behind a distillation token, with weight ½ against ½ for the
    labels. Its soft variant is `logit_kl`, with T = 3 and weight 0.1 in the paper.

    Args:
        student_logits: Unnormalised log-probabilities, in DeiT those of the distillation head.
        teacher_logits: Same shape; only their argmax is used, so no gradient flows into them.

    Raises:
        ValueError: If the shapes differ.

    Source: Touvron et al. (2021), arXiv:2012.12877, section 4.
    """
    student, teacher = _prepare_pair(student_logits, teacher_logits)
    return F.cross_entropy(student, teacher.argmax(dim=-1))


def function_matching(
    student_logits: Float[Tensor, "n k"], teacher_logits: Float[Tensor, "n k"]
) -> Float[Tensor, ""]:
    """KL(teacher ‖ student) at temperature 1, batch mean.

    Args:
        student_logits: Unnormalised log-probabilities.
        teacher_logits: Same shape; no gradient flows into them.

    Raises:
        ValueError: If the shapes differ.

    Source: Beyer et al. (2022), arXiv:2106.05237, section 3.
    """
    return logit_kl(student_logits, teacher_logits, temperature=1)


def self_distillation(
    head_logits: Float[Tensor, "n k"],
    student_logits: Float[Tensor, "n k"],
    labels: Int[Tensor, " n"] | Float[Tensor, "n k"],
    class_weights: Float[Tensor, " k"] | None = None,
    *,
    alpha: Share = 0.3,
    temperature: Temperature = 3.0,
) -> Float[Tensor, ""]:
    """(1 - alpha) CE(head, labels) + alpha T² KL(student ‖ head), batch mean.

    A classifier on a shallow layer learns from the labels and from the last layer. Deviation: no
    loss between shallow and deep features.

    Args:
        head_logits: Unnormalised log-probabilities of the shallow classifier.
        student_logits: Those of the whole network; same shape, no gradient flows into them.
        labels: Class indices, or rows of probabilities that sum to 1.
        class_weights: As in `cross_entropy`, for the part that the labels teach.
        alpha: Share of the part that the last layer teaches.
        temperature: T > 0 of that part.

    Raises:
        ValueError: If `temperature` is not positive, or the shapes differ.

    Source: Zhang et al. (2019), "Be your own teacher", arXiv:1905.08094, equations 1 to 3.
    """
    ce = cross_entropy(head_logits, labels, class_weights)
    kl = logit_kl(head_logits, student_logits, temperature=temperature)
    return (1 - alpha) * ce + alpha * kl


def _prepare_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, the teacher without gradient."""
    # Broadcasting would otherwise hide a teacher with other classes.
    if student.shape != teacher.shape:
        raise ValueError(
            "student and teacher logits must have one shape, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}; map the classes first"
        )
    return student.float(), teacher.detach().float()


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _check_targets(labels: Tensor, classes: int) -> None:
    if labels.is_floating_point() or labels.ndim != 1:
        raise ValueError(
            f"dkd needs class indices (n,), got {labels.dtype} labels of shape "
            f"{tuple(labels.shape)}; switch mixup and CutMix off, or use logit_kl"
        )
    if classes <= 2:
        raise ValueError(f"dkd needs more than 2 classes, got {classes}; use logit_kl")


def _softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    _check_temperature(temperature)
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    # "mean" would also divide by k; "batchmean" divides by n only.
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (target, rest), (n, 2), and of the others among themselves, (n, k-1)."""
    log_p = F.log_softmax(logits, dim=-1)
    target = labels.long()[:, None]
    columns = torch.arange(logits.shape[-1] - 1, device=logits.device)
    others = log_p.gather(-1, columns + (columns >= target))  # (n, k-1): all but the target
    rest = others.logsumexp(dim=-1, keepdim=True)
    return torch.cat([log_p.gather(-1, target), rest], dim=-1), others - rest


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    """Correlation of each row of x with that row of y."""
    return (_centred_unit(x) * _centred_unit(y)).sum(-1)


def _centred_unit(rows: Tensor) -> Tensor:
    """Rows with mean 0 and length 1; rows that are constant up to rounding become 0."""
    centred = rows - rows.mean(dim=-1, keepdim=True)
    norm = centred.norm(dim=-1, keepdim=True)
    size = rows.detach().norm(dim=-1, keepdim=True)
    # What rounding leaves of a constant row must not be blown up to length 1, gradient included.
    return centred / torch.where(norm > 1e-6 * size, norm, size.clamp_min(1))
