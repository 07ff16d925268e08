"""Losses on the tokens of sequences: logits, hidden states and attention, padding left out.

All take a mask (n, l) that is true at real tokens, outputs of any floating type, compute in
float32, and send no gradient into the teacher. Each is the mean over the real tokens of the batch:
a sum over them, divided by their number. So neither padding nor how sequences are put into batches
changes the sum over a data set, and a training weighs batches by their numbers of real tokens.
Most published code takes the mean over padding too; where that changes what a published weight
means, the function says so.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kd.losses.ranges import Flag, Range, Share, ShareBelowOne, Temperature
from kd.models.token_inputs import IGNORED

RelationHeads = Annotated[int, Range(0, 1024)]
# Queries, keys and values of a block for each head and token.
Projections = tuple[Float[Tensor, "n h l d"], Float[Tensor, "n h l d"], Float[Tensor, "n h l d"]]


def token_divergence(
    student_logits: Float[Tensor, "n l k"],
    teacher_logits: Float[Tensor, "n l k"],
    mask: Bool[Tensor, "n l"],
    labels: Int[Tensor, "n l"] | None = None,
    *,
    temperature: Temperature = 2.0,
    beta: Share = 0.0,
    skew: ShareBelowOne = 0.0,
    targets: Flag = 0,
) -> Float[Tensor, ""]:
    """T² times the divergence of the softened distributions of each token, in nats.

    With P the teacher's distribution and Q the student's, `beta` chooses the generalised
    Jensen-Shannon divergence β KL(P ‖ M) + (1 - β) KL(Q ‖ M), M = β P + (1 - β) Q; at its ends, as
    in GKD, β = 0 is KL(P ‖ Q), which covers all of the teacher's modes, and β = 1 is KL(Q ‖ P),
    which seeks one. `skew` α is KL(P ‖ α P + (1 - α) Q), bounded by -log α.

    Args:
        student_logits: Unnormalised log-probabilities of the vocabulary.
        teacher_logits: Same shape; no gradient flows into them.
        mask: Tokens that count.
        labels: Target at each position, as for `token_cross_entropy`; for `targets` alone.
        temperature: T > 0.
        beta: β in [0, 1].
        skew: α in [0, 1), with β = 0.
        targets: 1 counts the tokens with a target only: hidden ones, or those of a completion.

    Raises:
        ValueError: If shapes differ, a parameter is out of its range, both β and α are given, or
            `labels` are missing.

    Source: β: Agarwal et al. (2024), arXiv:2306.13649, whose code has no factor T²; here it keeps
    gradients on one scale for every T, as in `logit_kl`. α: Ko et al. (2024), arXiv:2402.03898,
    who take 0.1. DistilBERT's distillation loss is β = 0 and T = 2: Sanh et al. (2019),
    arXiv:1910.01108.
    """
    _check_pair(student_logits, teacher_logits, "logits")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if not 0 <= beta <= 1 or not 0 <= skew < 1:
        raise ValueError(f"beta must be in [0, 1] and skew in [0, 1), got {beta} and {skew}")
    if beta and skew:
        raise ValueError(f"skew needs beta 0, got skew {skew} and beta {beta}")
    if targets:
        if labels is None:
            raise ValueError("targets 1 needs labels")
        mask = mask & (labels != IGNORED)
    student, teacher = _real(student_logits, mask), _real(teacher_logits.detach(), mask)
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    if skew:
        mixture = _log_mixture(log_p, log_q, skew)
        divergence = _kl(log_p, mixture)
    elif beta == 0:
        divergence = _kl(log_p, log_q)
    elif beta == 1:
        divergence = _kl(log_q, log_p)
    else:
        mixture = _log_mixture(log_p, log_q, beta)
        divergence = beta * _kl(log_p, mixture) + (1 - beta) * _kl(log_q, mixture)
    return temperature**2 * _mean(divergence)


def token_cross_entropy(
    logits: Float[Tensor, "n l k"], labels: Int[Tensor, "n l"]
) -> Float[Tensor, ""]:
    """Cross-entropy of the tokens with a target, in nats, the mean over them.

    Args:
        logits: Unnormalised log-probabilities of the vocabulary at each position.
        labels: Target at each position, `IGNORED` where there is none: of a masked language model
            the tokens that were not chosen, of a causal one shifted by one and without padding.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if logits.shape[:2] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must have the same "
            "sequences and positions"
        )
    chosen = labels != IGNORED
    each = F.cross_entropy(logits[chosen].float(), labels[chosen], reduction="none")
    return _mean(each)


def hidden_states(
    student: Float[Tensor, "n l d"], teacher: Float[Tensor, "n l d"], mask: Bool[Tensor, "n l"]
) -> Float[Tensor, ""]:
    """Squared difference of hidden states, the mean over the d values of the real tokens.

    Args:
        student: Hidden states after the map to the teacher's width.
        teacher: Hidden states of the teacher; no gradient flows into them.
        mask: Tokens that count.

    Raises:
        ValueError: If the shapes differ.

    Source: Jiao et al. (2020), arXiv:1909.10351, equation 8. Their code takes the mean over
    padding too, so that short sequences in long batches count less.
    """
    _check_pair(student, teacher, "hidden states")
    difference = _real(student, mask) - _real(teacher.detach(), mask)
    return _mean(difference.square().mean(-1))


def hidden_cosine(
    student: Float[Tensor, "n l d"], teacher: Float[Tensor, "n l d"], mask: Bool[Tensor, "n l"]
) -> Float[Tensor, ""]:
    """1 - cos of the hidden states of a token, the mean over the real tokens.

    Args:
        student, teacher, mask: As for `hidden_states`.

    Raises:
        ValueError: If the shapes differ.

    Source: Sanh et al. (2019), arXiv:1910.01108, of the last block, with weight 1.
    """
    _check_pair(student, teacher, "hidden states")
    similarity = F.cosine_similarity(_real(student, mask), _real(teacher.detach(), mask), dim=-1)
    return _mean(1 - similarity)


def patient(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Squared distance of unit vectors of the first token, summed over d, mean over sequences.

    Args:
        student: Hidden states of [CLS] after a block.
        teacher: Those of the teacher's block that it learns from, same shape; no gradient flows
            into them.

    Raises:
        ValueError: If the shapes differ.

    Source: Sun et al. (2019), arXiv:1908.09355, equation 7: a sum over blocks, with weight 10 to
    1000. Their code takes the mean over blocks and over d, so that a weight of theirs is
    β / (d (M - 1)) here, and does not normalise unless asked to; its best runs on three tasks did
    not.
    """
    _check_pair(student, teacher, "hidden states")
    ours, theirs = (F.normalize(x.float(), dim=-1) for x in (student, teacher.detach()))
    return (ours - theirs).square().sum(-1).mean()


def attention_scores(
    student: Float[Tensor, "n h l l"],
    teacher: Float[Tensor, "n h l l"],
    mask: Bool[Tensor, "n l"],
    causal: bool = False,
) -> Float[Tensor, ""]:
    """Squared difference of attention scores before the softmax, over real queries and keys.

    For each real query it is the mean over heads and real keys, and of those the mean over all
    real queries.

    Args:
        student: Scores Q K^T / sqrt(d) of a block, one row for each query.
        teacher: Same shape; no gradient flows into them.
        mask: Tokens that count.
        causal: Whether the keys after a query are left out, which a causal model does not see.

    Raises:
        ValueError: If the shapes differ, such as for another number of heads.

    Source: Jiao et al. (2020), arXiv:1909.10351, equation 7. Their code takes the mean over all
    h l² entries, rows of padding included.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"attention scores {tuple(student.shape)} and {tuple(teacher.shape)} differ: student "
            "and teacher need as many heads"
        )
    squares = (student.float() - teacher.detach().float()).square()
    keys = _keys(mask, causal)
    # Masked entries may be -inf on both sides, and their difference no number.
    sums = torch.where(keys[:, None], squares, 0.0).sum(-1).mean(1)  # (n, l)
    return _mean((sums / keys.sum(-1).clamp_min(1))[mask])


def relations(
    student: tuple[Float[Tensor, "n h l d"], Float[Tensor, "n h l d"]],
    teacher: tuple[Float[Tensor, "n g l e"], Float[Tensor, "n g l e"]],
    mask: Bool[Tensor, "n l"],
    causal: bool = False,
    *,
    heads: RelationHeads = 0,
) -> Float[Tensor, ""]:
    """KL(teacher ‖ student) of the relations of tokens, softmax(a b^T / sqrt(d)) over real keys.

    Queries with keys give the attention itself, values with values MiniLM's value relation, and
    queries, keys or values with themselves those of its second version.

    Args:
        student: Two of the vectors of a block for each head and token, a and b.
        teacher: Those of the teacher's block; no gradient flows into them.
        mask: Tokens that count, as queries and as keys.
        causal: Whether the keys after a query are left out.
        heads: Number of relation heads, into which all vectors of a token are divided anew, so
            that student and teacher may differ in heads and width; 0: the heads as they are.

    Raises:
        ValueError: If the numbers of heads differ, or do not divide the width.

    Source: heads 0: Wang et al. (2020), arXiv:2002.10957, equations 6 and 8; else Wang et al.
    (2021), arXiv:2012.15828, section 3.1, with 48 heads. Both take the mean over heads and tokens.
    """
    ours = [_into_heads(x.float(), heads) for x in student]
    theirs = [_into_heads(x.detach().float(), heads) for x in teacher]
    if ours[0].shape[1] != theirs[0].shape[1]:
        raise ValueError(
            f"the student has {ours[0].shape[1]} heads and the teacher {theirs[0].shape[1]}: "
            "relations with heads above 0 divide both into as many"
        )
    keys = _keys(mask, causal)[:, None]
    log_q, log_p = (_log_relations(x[0], x[1], keys) for x in (ours, theirs))
    # Masked keys have no share on either side; their logarithms would give 0 times infinity.
    each = torch.where(keys, log_p.exp() * (log_p - log_q), 0.0)
    return _mean(each.sum(-1).mean(1)[mask])


def attention_relations(
    student: Projections,
    teacher: Projections,
    mask: Bool[Tensor, "n l"],
    causal: bool = False,
    *,
    heads: RelationHeads = 0,
    qk: Flag = 0,
) -> Float[Tensor, ""]:
    """MiniLM's loss of a block: the relations of its tokens, as in `relations`.

    With `qk` the attention of queries to keys and the relation of values, summed; without, the mean
    of the relations of queries, of keys and of values.

    Args:
        student: Queries, keys and values of the student's block.
        teacher: Those of the teacher's block; no gradient flows into them.
        mask: Tokens that count, as queries and as keys.
        causal: Whether the keys after a query are left out.
        heads: Number of relation heads; 0: the heads as they are.
        qk: 1 for the first version of MiniLM.

    Raises:
        ValueError: If the numbers of heads differ, or do not divide the width.

    Source: first version, heads 0 and qk 1: Wang et al. (2020), arXiv:2002.10957, section 3, of the
    last block. Second version, qk 0 and heads 48, 64 for large teachers: Wang et al. (2021),
    arXiv:2012.15828, section 3, of the last block of a base teacher, and of block 20 (from 0) of
    BERT-large or 18 of RoBERTa-large and XLM-R-large.
    """
    pairs = [(0, 1), (2, 2)] if qk else [(0, 0), (1, 1), (2, 2)]
    each = [
        relations((student[a], student[b]), (teacher[a], teacher[b]), mask, causal, heads=heads)
        for a, b in pairs
    ]
    return torch.stack(each).sum() / (1 if qk else len(pairs))


def _keys(mask: Bool[Tensor, "n l"], causal: bool) -> Bool[Tensor, "n l l"]:
    """The keys that each query of a text sees."""
    keys = mask[:, None, :].expand(-1, mask.shape[1], -1)
    return keys.tril() if causal else keys


def _log_relations(a: Tensor, b: Tensor, keys: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):
        scores = a @ b.transpose(-1, -2) / math.sqrt(a.shape[-1])
    least = torch.finfo(scores.dtype).min
    return F.log_softmax(scores.masked_fill(~keys, least), dim=-1)


def _into_heads(x: Tensor, heads: int) -> Tensor:
    if not heads:
        return x
    n, own, length, d = x.shape
    if own * d % heads:
        raise ValueError(f"{heads} relation heads do not divide {own * d} values of a token")
    flat = x.transpose(1, 2).reshape(n, length, heads, own * d // heads)
    return flat.transpose(1, 2)


def _real(x: Tensor, mask: Tensor) -> Tensor:
    """Rows of the real tokens, (m, k) in float32: what is padding is never computed."""
    return x[mask].float()


def _mean(each: Tensor) -> Tensor:
    """Mean; 0, with a gradient of 0, of none."""
    return each.sum() / max(each.numel(), 1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share P + (1 - share) Q)."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def _check_pair(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher {what} must have the same shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
