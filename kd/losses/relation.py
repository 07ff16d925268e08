"""Losses on how the embeddings of a batch relate to each other.

All compare a student's (n, d) with a teacher's (n, m) embeddings of the same n images; the widths
may differ, so no projector is needed. They take any floating type, compute in float32, return a
float32 scalar, and send no gradient into the teacher. Each is a mean over the pairs or triples of
the batch, those of an image with itself included, as in the published code that the weights
belong to.

All are unchanged when all embeddings of a side are multiplied by one number. Rows are therefore
first divided by the largest entry of the batch: nothing overflows, and one small number says for
every input which vectors are zero. A zero vector has no direction; it stays zero, and its gradient
is bounded, so equal rows and dead units do no harm.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kd.losses.ranges import Factor, Floor, Range


def rkd_distance(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n m"]) -> Float[Tensor, ""]:
    """Smooth L1 distance of the pairwise distances, each divided by the mean of the non-zero ones.

    Mean over n² pairs. Unchanged when a side is rotated, shifted or scaled. Published weight: 25,
    with 50 for `rkd_angle`.

    Args:
        student: Embeddings of n ≥ 2 images.
        teacher: Embeddings of the same images; no gradient flows into them.

    Raises:
        ValueError: If n < 2 or the number of rows differs.

    Source: Park et al. (2019), arXiv:1904.05068, section 3.2.1. The authors' code counts equal
    rows with a distance of 1e-6 in the mean; here they are left out.
    """
    student, teacher = _embeddings(student, teacher, at_least=2)
    return F.smooth_l1_loss(_distances(student), _distances(teacher))


def rkd_angle(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n m"]) -> Float[Tensor, ""]:
    """Smooth L1 distance of the cosines of all angles that three images make.

    Mean over n³ triples. Unchanged when a side is rotated, shifted or scaled. Published weight:
    50. Takes memory for n² d + n³ numbers: 200 MB for 256 images and 512 features.

    Args:
        student: Embeddings of n ≥ 3 images.
        teacher: Embeddings of the same images; no gradient flows into them.

    Raises:
        ValueError: If n < 3 or the number of rows differs.

    Source: Park et al. (2019), arXiv:1904.05068, section 3.2.2.
    """
    student, teacher = _embeddings(student, teacher, at_least=3)
    return F.smooth_l1_loss(_cosines_of_angles(student), _cosines_of_angles(teacher))


def similarity_preserving(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "n m"]
) -> Float[Tensor, ""]:
    """Squared difference of the Gram matrices with rows of length 1, mean over n² pairs.

    Unchanged when a side is rotated or scaled. Published weight: 3000.

    Args:
        student: Embeddings of n ≥ 2 images; the paper takes flattened maps of a late layer.
        teacher: Embeddings of the same images; no gradient flows into them.

    Raises:
        ValueError: If n < 2 or the number of rows differs.

    Source: Tung and Mori (2019), arXiv:1907.09682, section 3.
    """
    student, teacher = _embeddings(student, teacher, at_least=2)
    return F.mse_loss(_unit(_gram(student)), _unit(_gram(teacher)))


def probabilistic_transfer(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "n m"], *, floor: Floor = 1e-7
) -> Float[Tensor, ""]:
    """KL(teacher ‖ student) of the probabilities that one image picks another, mean over n² pairs.

    p_ij is (1 + cos(i, j)) / 2 divided by its sum over j. Unchanged when a side is rotated, or any
    row is scaled. The published weight of 30000 belongs to the mean over pairs, which divides the
    mean divergence of a row once more by n.

    Args:
        student: Embeddings of n ≥ 2 images.
        teacher: Embeddings of the same images; no gradient flows into them.
        floor: Added to both probabilities in the logarithm, as opposite images have 0.

    Raises:
        ValueError: If n < 2, the number of rows differs or `floor` is not positive.

    Source: Passalis and Tefas (2018), arXiv:1803.10837, with the cosine kernel; mean and floor as
    in the authors' code.
    """
    student, teacher = _embeddings(student, teacher, at_least=2)
    if not floor > 0:
        raise ValueError(f"floor must be positive, got {floor}; the authors' code has 1e-7")
    q, p = _pick_probabilities(student), _pick_probabilities(teacher)
    return (p * ((p + floor) / (q + floor)).log()).mean()


def correlation_congruence(
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "n m"],
    *,
    gamma: Annotated[float, Range(1e-3, 10)] = 0.4,
    order: Annotated[int, Range(1, 20)] = 2,
) -> Float[Tensor, ""]:
    """Squared difference of Gaussian kernel matrices of unit embeddings, mean over n² pairs.

    On the unit sphere exp(-γ |x - y|²) = exp(-2γ) Σ_p (2γ x·y)^p / p!; the sum stops at `order`.
    Unchanged when a side is rotated, or any row is scaled. The weight of 0.02 that comparisons
    quote belongs to another form of the loss, not to this one; 100 has been used with this one.

    Args:
        student: Embeddings of n ≥ 2 images.
        teacher: Embeddings of the same images; no gradient flows into them.
        gamma: Inverse width γ > 0 of the kernel.
        order: Last power of the cosine, ≥ 1.

    Raises:
        ValueError: If n < 2, the number of rows differs, or `gamma` or `order` is too small.

    Source: Peng et al. (2019), arXiv:1904.01802. Only the term between images; the paper adds it
    to `logit_kl` and draws its batches so that classes repeat.
    """
    student, teacher = _embeddings(student, teacher, at_least=2)
    if not (gamma > 0 and order >= 1):
        raise ValueError(f"gamma must be positive and order ≥ 1, got {gamma} and {order}")
    return F.mse_loss(_gaussian(student, gamma, order), _gaussian(teacher, gamma, order))


def instance_graph(
    students: Sequence[Float[Tensor, "n _"]],
    teachers: Sequence[Float[Tensor, "n _"]],
    *,
    transformation: Factor = 1.0,
) -> Float[Tensor, ""]:
    """Squared difference of the graphs of a batch in several layers, and of their changes.

    The graph of a layer has an edge A_ij = |f_i - f_j|² / max between all images. The loss is the
    mean over the layers of |A_S - A_T|², and `transformation` times the mean over neighbouring
    layers of |(A'_S - A_S) - (A'_T - A_T)|², each a mean over n² pairs. Unchanged when a layer of a
    side is rotated, shifted or scaled. Weight in a public reproduction: 5, with 5 for the changes.

    Args:
        students: Embeddings of n ≥ 2 images in one or more layers, from first to last.
        teachers: Those of the teacher in as many layers; no gradient flows into them.
        transformation: Factor of the changes, which one layer does not have.

    Raises:
        ValueError: If there are no layers or other ones, n < 2, or the number of rows differs.

    Source: Liu et al. (2019), "Knowledge Distillation via Instance Relationship Graph", CVPR, the
    edges and their transformation. Deviations: the vertices, a squared error of the logits there,
    are the loss `logits`; how the vertices change, which needs layers of one shape, is left out.
    """
    if not students or len(students) != len(teachers):
        raise ValueError(
            f"students and teachers must have as many layers, one or more, got {len(students)} "
            f"and {len(teachers)}"
        )
    pairs = [_embeddings(s, t, at_least=2) for s, t in zip(students, teachers, strict=True)]
    ours = torch.stack([_edges(student) for student, _ in pairs])
    theirs = torch.stack([_edges(teacher) for _, teacher in pairs])
    loss = F.mse_loss(ours, theirs)
    if len(pairs) > 1 and transformation:
        loss = loss + transformation * F.mse_loss(ours.diff(dim=0), theirs.diff(dim=0))
    return loss


def _edges(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Squared distances, divided by the largest."""
    # By differences: a Gram matrix would lose the small distances to cancellation.
    squares = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    largest = squares.amax()
    return squares / torch.where(largest > 0, largest, 1.0)


def _embeddings(student: Tensor, teacher: Tensor, *, at_least: int) -> tuple[Tensor, Tensor]:
    """Both in float32 with entries up to 1, the teacher without gradient."""
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            "student and teacher must be embeddings (n, d) of the same images, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}; pool or flatten maps first"
        )
    if len(student) < at_least:
        raise ValueError(
            f"this loss needs {at_least} images or more in a batch, got {len(student)}; "
            "raise the batch size or drop the last, smaller batch"
        )
    return _rescaled(student.float()), _rescaled(teacher.detach().float())


def _rescaled(rows: Tensor) -> Tensor:
    # The losses do not change with the scale, so taking it as a constant leaves gradients exact.
    largest = rows.detach().abs().amax()
    return rows / torch.where(largest > 0, largest, 1.0)


def _unit(vectors: Float[Tensor, "*n d"], *, smallest: float = 1e-12) -> Float[Tensor, "*n d"]:
    """Vectors of length 1; those no longer than `smallest` are left as they are."""
    norm = vectors.norm(dim=-1, keepdim=True)
    return vectors / torch.where(norm > smallest, norm, 1.0)


def _gram(rows: Float[Tensor, "*n k d"]) -> Float[Tensor, "*n k k"]:
    # Autocast would compute the product in half precision, whatever the type of the rows.
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ rows.mT


def _distances(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Divided by the mean of those that are not zero."""
    # By differences: a Gram matrix would lose the small distances to cancellation.
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (distances > 0).sum().clamp_min(1)
    return distances / torch.where(mean > 0, mean, 1.0)


def _cosines_of_angles(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n n n"]:
    """Entry i, j, k is the cosine at i of the angle between j and k; 0 where two of them agree."""
    differences = rows[None] - rows[:, None]  # (i, j, d): from i to j
    # Entries are at most 1 in size, so a difference of 1e-6 is about what float32 resolves.
    return _gram(_unit(differences, smallest=1e-6))


def _pick_probabilities(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    # Rounding can bring a cosine just below -1.
    similarity = ((1 + _gram(_unit(rows))) / 2).clamp_min(0)
    return similarity / similarity.sum(-1, keepdim=True)


def _gaussian(rows: Float[Tensor, "n d"], gamma: float, order: int) -> Float[Tensor, "n n"]:
    cosines = _gram(_unit(rows))
    series = torch.ones_like(cosines)
    for p in range(1, order + 1):
        series = series + (2 * gamma * cosines) ** p / math.factorial(p)
    return math.exp(-2 * gamma) * series
