"""Losses of images with any number of labels: each class is a question of its own, yes or no.

The probability of a class is the sigmoid of its logit. All compute in float32 and are means over
the batch and over the k classes, so neither a weight nor a good learning rate depends on k; none
sends a gradient into the teacher.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kd.losses.ranges import Temperature


def binary_cross_entropy(
    logits: Float[Tensor, "n k"],
    labels: Float[Tensor, "n k"],
    class_weights: Float[Tensor, " k"] | None = None,
) -> Float[Tensor, ""]:
    """-[w_k y_k log σ(z_k) + (1 - y_k) log σ(-z_k)] in nats, mean over classes and batch.

    Args:
        logits: Logits z of the classes.
        labels: For each class whether the image has it, 0 or 1, or a probability y.
        class_weights: Weights w of the images that have a class, on the device of the logits, as
            torch's `pos_weight`; None for 1.
    """
    return F.binary_cross_entropy_with_logits(
        logits.float(), labels.float(), pos_weight=class_weights
    )


def binary_kl(
    student_logits: Float[Tensor, "n k"],
    teacher_logits: Float[Tensor, "n k"],
    *,
    temperature: Temperature = 1.0,
) -> Float[Tensor, ""]:
    """T² · KL(teacher ‖ student) of each class's two answers, mean over classes and batch.

    With p = σ(t_k / T) of the teacher and q = σ(s_k / T) of the student it is the mean of
    p log(p / q) + (1 - p) log((1 - p) / (1 - q)). The factor T² keeps gradients on roughly the same
    scale for every T, as in `kd.losses.response.logit_kl`.

    Args:
        student_logits: Logits of the classes.
        teacher_logits: Same shape; no gradient flows into them.
        temperature: T > 0.

    Raises:
        ValueError: If `temperature` is not positive, or the shapes differ.

    Source: multi-label logits distillation, Yang et al. (2023), arXiv:2308.06453, whose code sums
    over the classes, knows no temperature, and adds it with weight 10 to a cross-entropy that is
    summed over the batch too.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student and teacher logits must have one shape, "
            f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    student = student_logits.float() / temperature
    teacher = teacher_logits.detach().float() / temperature
    p = teacher.sigmoid()
    # log σ(z) and log σ(-z) are the logarithms of both answers, exact where σ rounds to 0 or 1.
    yes = p * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = (1 - p) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return temperature**2 * (yes + no).mean()
