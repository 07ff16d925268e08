"""Losses of adversaries: images that an attack on the student has changed, and a discriminator.

Those of changed images take the student's logits for them; `kd.objectives.adversary` makes these.
All are batch means in float32, and none divides by the number of classes, as the authors' code of
ARD, RSLAD and AdaAD does: their weights are those of the papers' formulas.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kd.losses.ranges import Temperature
from kd.losses.response import logit_kl


def rslad(
    student_logits: Float[Tensor, "n k"],
    teacher_logits: Float[Tensor, "n k"],
    *,
    temperature: Temperature = 1.0,
) -> Float[Tensor, ""]:
    """T² · KL(T(x) ‖ S(x')): the student answers x' as the teacher answers the clean image.

    The attack raises KL(T(x) ‖ S(x')). The paper's loss is 5/6 of this and 1/6 of KL(T(x) ‖ S(x)).

    Args:
        student_logits: Logits of the student for the changed images.
        teacher_logits: Logits of the teacher for the clean ones; no gradient flows into them.
        temperature: T > 0.

    Source: Zi et al. (2021), arXiv:2108.07969, equation 5; their code adds 1e-5 to probabilities.
    """
    return logit_kl(student_logits, teacher_logits, temperature=temperature)


def ard(
    student_logits: Float[Tensor, "n k"],
    teacher_logits: Float[Tensor, "n k"],
    *,
    temperature: Temperature = 30.0,
) -> Float[Tensor, ""]:
    """T² · KL(T(x) ‖ S(x')), as `rslad`, with an attack that raises the labels' cross-entropy.

    The paper's loss is α of this and 1 - α of the clean images' cross-entropy, mostly with α = 1.

    Args:
        student_logits, teacher_logits, temperature: As for `rslad`.

    Source: Goldblum et al. (2020), arXiv:1905.09747, equation 3. In their code the attack moves the
    averages of batch norm; here it does not.
    """
    return logit_kl(student_logits, teacher_logits, temperature=temperature)


def adaad(
    student_logits: Float[Tensor, "n k"],
    teacher_logits: Float[Tensor, "n k"],
    *,
    temperature: Temperature = 1.0,
) -> Float[Tensor, ""]:
    """T² · KL(T(x') ‖ S(x')): both answer the changed image.

    The attack raises KL(T(x') ‖ S(x')), with its gradient through both networks: x' is where they
    disagree. The authors use it alone.

    Args:
        student_logits: Logits of the student for the changed images.
        teacher_logits: Logits of the teacher for the same; no gradient flows into them.
        temperature: T > 0.

    Source: Huang et al. (2023), "Boosting accuracy and robustness of student models via adaptive
    adversarial distillation", CVPR.
    """
    return logit_kl(student_logits, teacher_logits, temperature=temperature)


def trades(
    student_logits: Float[Tensor, "n k"], clean_logits: Float[Tensor, "n k"]
) -> Float[Tensor, ""]:
    """KL(S(x) ‖ S(x')): the student answers x' as it answers the clean image.

    The attack raises the same. The paper's loss is 6 of this and the clean images' cross-entropy.

    Args:
        student_logits: Logits of the student for the changed images.
        clean_logits: Its logits for the clean ones; gradient flows into both.

    Raises:
        ValueError: If the shapes differ.

    Source: Zhang et al. (2019), arXiv:1901.08573, equation 5.
    """
    if student_logits.shape != clean_logits.shape:
        raise ValueError(
            "both logits must have one shape, "
            f"got {tuple(student_logits.shape)} and {tuple(clean_logits.shape)}"
        )
    log_q, log_p = (x.float().log_softmax(-1) for x in (student_logits, clean_logits))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def discrimination(
    teacher_scores: Float[Tensor, "n 1"], student_scores: Float[Tensor, "n 1"]
) -> Float[Tensor, ""]:
    """-log σ(D(t)) - log(1 - σ(D(s))): a discriminator tells the teacher's vectors from others.

    The discriminator lowers it, and the student, behind a reversed gradient, raises it: one step of
    one optimizer trains both. It is 2 log 2 where nothing tells them apart.

    Args:
        teacher_scores, student_scores: Scores D of the discriminator, logits of "the teacher's".

    Source: Goodfellow et al. (2014), arXiv:1406.2661; for distillation Xu et al. (2018),
    arXiv:1709.00513, whose discriminator names the class too; the reversed gradient, Ganin and
    Lempitsky (2015), arXiv:1409.7495.
    """
    teacher = F.softplus(-teacher_scores.float()).mean()
    return teacher + F.softplus(student_scores.float()).mean()
