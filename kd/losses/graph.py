"""A loss on how the embeddings of a graph's nodes relate to those of their neighbours."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def local_structure(
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "n m"],
    neighbours: Int[Tensor, "e 2"],
    *,
    sigma: float = 1.0,
) -> Float[Tensor, ""]:
    """KL(teacher ‖ student) of how much a node resembles each of its neighbours, mean over nodes.

    The probability of neighbour j of node i is the softmax over its neighbours of the Gaussian
    similarity exp(-|h_i - h_j|² / (2 σ² s)). Unchanged when a side is rotated, shifted or scaled.
    Published weight: 100.

    Args:
        student: Embeddings of the nodes.
        teacher: Embeddings of the same nodes; no gradient flows into them.
        neighbours: A node and its neighbour, for each edge in both directions.
        sigma: Width σ > 0 of the similarity.

    Raises:
        ValueError: If the number of rows differs, or `sigma` is not positive.

    Source: Yang et al. (2020), arXiv:2003.10477, section 4, with the RBF kernel. Deviations: the
    divergence is taken from the teacher, as in the other losses here; s, the mean squared distance
    over all edges of a side, makes σ independent of the scale of the embeddings (the authors take
    σ = 100 and s = 1); the mean is over the nodes that have neighbours.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            "student and teacher must be embeddings (n, d) of the same nodes, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    if not len(neighbours):
        return 0 * student.float().sum()
    log_q = _log_probabilities(student.float(), neighbours, sigma)
    log_p = _log_probabilities(teacher.detach().float(), neighbours, sigma)
    nodes = neighbours[:, 0].unique().numel()
    return (log_p.exp() * (log_p - log_q)).sum() / nodes


def _log_probabilities(
    rows: Float[Tensor, "n d"], neighbours: Int[Tensor, "e 2"], sigma: float
) -> Float[Tensor, " e"]:
    """Logarithm of the probability of each pair, which sum to 1 over the neighbours of a node."""
    node, other = neighbours.T
    squares = (rows[node] - rows[other]).square().sum(1)
    mean = squares.mean()
    similarity = (-squares / (2 * sigma**2 * torch.where(mean > 0, mean, 1.0))).exp()
    # Similarities lie in [0, 1], so their exponentials need no shift.
    total = torch.zeros(len(rows), device=rows.device).index_add(0, node, similarity.exp())
    return similarity - total.log()[node]
