"""Contrastive representation distillation: the loss, without the memory that it needs.

An image's student embedding must be told apart from the teacher's embeddings of k other images by
its likeness to the teacher's embedding of the same image, and the other way round. The embeddings
of the others come from a memory of all N training images, which is state and is kept elsewhere.
With unit rows throughout, and with column 0 of `indices` being the images of the batch themselves
and the other k columns drawn uniformly from range(N) with replacement (a draw may hit the image
itself, as in the authors' code), one step is

    student_scores = scores(student, teacher_memory, indices)   # the student against the teacher
    teacher_scores = scores(teacher, student_memory, indices)   # and the teacher against it
    on the first step alone, and then kept as part of the state:
        student_log_z = log_normaliser(student_scores, n_data=N)
        teacher_log_z = log_normaliser(teacher_scores, n_data=N)
    loss = crd(
        student_scores,
        teacher_scores,
        student_log_z=student_log_z,
        teacher_log_z=teacher_log_z,
        n_data=N,
    )
    then, without gradient, each memory row of the batch becomes the unit vector along
    momentum * row + (1 - momentum) * embedding, with momentum 0.5.

`student` and `teacher` are the outputs of two trained linear projectors (128 wide in the paper)
that end in a division by the norm. The teacher's projector is trained too, so here, unlike in the
other losses, gradients flow into `teacher`: detach the teacher's features before its projector.
Memories and normalisers get no gradient. Memories may start as random unit rows.

Published: k = 16384, temperature 0.07, momentum 0.5, weight 0.8.

Source: Tian, Krishnan and Isola (2020), arXiv:1910.10699.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def crd(
    student_scores: Float[Tensor, "n 1+k"],
    teacher_scores: Float[Tensor, "n 1+k"],
    *,
    student_log_z: Float[Tensor, ""] | float,
    teacher_log_z: Float[Tensor, ""] | float,
    n_data: int,
) -> Float[Tensor, ""]:
    """Noise-contrastive loss of both directions: sum over the 1 + k candidates, batch mean.

    With P = exp(score) / Z, the chance that a candidate is the true one rather than one of k draws
    from N is P / (P + k / N). The loss is minus the log-likelihood of that classification.

    Args:
        student_scores: From `scores`; column 0 is the positive, the other k ≥ 1 are negatives.
        teacher_scores: Same shape.
        student_log_z, teacher_log_z: From `log_normaliser`; constants for the gradient.
        n_data: N, the number of rows of the memories.

    Raises:
        ValueError: If the shapes differ, there is no negative or `n_data` is not positive.

    Source: Tian, Krishnan and Isola (2020), arXiv:1910.10699, section 3.1; this NCE form is
    equation 18. Computed with logarithms, so the authors' 1e-7 in the denominators is not needed.
    """
    if student_scores.shape != teacher_scores.shape or student_scores.shape[-1] < 2:
        raise ValueError(
            "crd needs two (n, 1 + k) arrays of scores with k ≥ 1, "
            f"got {tuple(student_scores.shape)} and {tuple(teacher_scores.shape)}"
        )
    _check_size(n_data)
    by_student = _direction(student_scores.float(), student_log_z, n_data)
    return by_student + _direction(teacher_scores.float(), teacher_log_z, n_data)


def scores(
    anchors: Float[Tensor, "n d"],
    memory: Float[Tensor, "N d"],
    indices: Int[Tensor, "n 1+k"],
    *,
    temperature: float = 0.07,
) -> Float[Tensor, "n 1+k"]:
    """⟨anchor, memory row⟩ / temperature for the rows that each anchor is compared with.

    All n N products are taken and the wanted ones picked: less memory than copying n (1 + k) rows
    as long as N < (1 + k) d, which is two million images for the published k and width.

    Args:
        anchors: Unit embeddings of the batch, of one network; gradients flow into them.
        memory: Unit embeddings of all images, of the other network; no gradient flows into them.
        indices: Rows of the memory; column 0 is the image itself.
        temperature: > 0.

    Raises:
        ValueError: If widths or batch sizes differ, or `temperature` is not positive.
    """
    if anchors.shape[-1] != memory.shape[-1] or len(anchors) != len(indices):
        raise ValueError(
            "anchors (n, d), memory (N, d) and indices (n, 1 + k) do not fit, "
            f"got {tuple(anchors.shape)}, {tuple(memory.shape)} and {tuple(indices.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; the paper has 0.07")
    # Autocast would compute the product in half precision, whatever the type of the rows.
    with torch.autocast(anchors.device.type, enabled=False):
        products = anchors.float() @ memory.detach().float().T
    return products.gather(-1, indices.long()) / temperature


def log_normaliser(scores: Float[Tensor, "n 1+k"], *, n_data: int) -> Float[Tensor, ""]:
    """log Z with Z = N · mean exp(score): the scores become probabilities of mean 1 / N.

    The authors estimate it once, from the first batch, positives included, and keep it.

    Args:
        scores: From `scores`.
        n_data: N, the number of rows of the memory.

    Returns:
        A constant in float32, without gradient.

    Raises:
        ValueError: If `n_data` is not positive.
    """
    _check_size(n_data)
    scores = scores.detach().float()
    return scores.flatten().logsumexp(0) + math.log(n_data / scores.numel())


def _direction(
    scores: Float[Tensor, "n 1+k"], log_z: Tensor | float, n_data: int
) -> Float[Tensor, ""]:
    if isinstance(log_z, Tensor):
        log_z = log_z.detach().float()
    k = scores.shape[-1] - 1
    # P / (P + k/N) is the logistic function of log P - log(k/N).
    logits = scores - log_z - math.log(k / n_data)
    positive, negatives = F.softplus(-logits[:, 0]), F.softplus(logits[:, 1:])
    return (positive + negatives.sum(-1)).mean()


def _check_size(n_data: int) -> None:
    if n_data < 1:
        raise ValueError(f"n_data must be the number of training images, got {n_data}")
