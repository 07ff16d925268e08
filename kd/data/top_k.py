"""Logits as they are stored: all in float32, or the largest probabilities in half precision.

At ImageNet's 1000 classes the 32 largest take 132 bytes a view, all logits 4000.

Source of storing sparse answers: Shen and Xing (2021), arXiv:2112.01528.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

MAX_UINT16_CLASSES = 65535  # the most classes that have uint16 indices
StoredLogits = dict[str, Tensor]
TensorForms = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class TopProbabilities(NamedTuple):
    """The largest probabilities of some rows.

    Attributes:
        log_probs: float16, natural logarithms, the largest first.
        indices: Their classes; uint16, or int32 above 65535 classes.
        tail: float32, the sum of all other probabilities.
    """

    log_probs: Float[Tensor, "n top"]
    indices: Int[Tensor, "n top"]
    tail: Float[Tensor, " n"]


def compress(logits: Float[Tensor, "n k"], top: int) -> TopProbabilities:
    """The `top` largest log-probabilities of each row; the probabilities that are left are summed.

    Args:
        logits: On any device, of any precision; the result is on the CPU.
        top: More than k keep all.
    """
    log_probs = logits.detach().float().log_softmax(1)
    kept, indices = log_probs.topk(min(top, log_probs.shape[1]))
    # Summed, not 1 minus the others: of a confident teacher that would leave rounding errors.
    tail = log_probs.scatter(1, indices, -math.inf).exp().sum(1)
    half = kept.clamp(torch.finfo(torch.float16).min, 0).half()
    return TopProbabilities(
        half.cpu(), indices.cpu().to(_index_type(log_probs.shape[1])), tail.cpu()
    )


def expand(stored: TopProbabilities, classes: int) -> Float[Tensor, "n k"]:
    """float32 log-probabilities over all classes, the tail spread evenly over those not stored.

    As logits at temperature 1 they are exact up to float16, a relative 2⁻¹¹ of each stored
    logarithm, and to the even spread. At higher temperatures the spread weighs more.

    Args:
        stored: As `compress` made it.
        classes: k.
    """
    n, top = stored.log_probs.shape
    # A tail too small for float32 becomes its smallest number: the logarithm of 0 is no logit.
    tail = stored.tail.clamp_min(torch.finfo(torch.float32).tiny)
    rest = (tail / max(classes - top, 1)).log()[:, None].expand(n, classes)
    return rest.scatter(1, _as_int64(stored.indices), stored.log_probs.float())


def encode(logits: Float[Tensor, "n k"], top: int | None) -> StoredLogits:
    """What is written: `compress`ed logits, or all of them if `top` is None."""
    if top is None:
        return {"logits": logits.detach().float().cpu()}
    return compress(logits, top)._asdict()


def decode(stored: StoredLogits, classes: int) -> Float[Tensor, "n k"]:
    """Logits, or `expand`ed log-probabilities, of what `encode` gave."""
    return stored["logits"] if "logits" in stored else expand(TopProbabilities(**stored), classes)


def expected_forms(rows: int, classes: int, top: int | None) -> TensorForms:
    """Types and shapes of what `encode` gives for so many rows."""
    if top is None:
        return {"logits": (torch.float32, (rows, classes))}
    shape = (rows, min(top, classes))
    return {
        "log_probs": (torch.float16, shape),
        "indices": (_index_type(classes), shape),
        "tail": (torch.float32, (rows,)),
    }


def are_valid(stored: StoredLogits, classes: int) -> bool:
    """Whether the values of a stranger's file can be answers, so that `decode` cannot fail."""
    numbers = [value for value in stored.values() if value.is_floating_point()]
    if not all(bool(torch.isfinite(value).all()) for value in numbers):
        return False
    if "logits" in stored:
        return True
    indices = _as_int64(stored["indices"])
    inside = bool(((indices >= 0) & (indices < classes)).all())
    return inside and bool((stored["tail"] >= 0).all() and (stored["log_probs"] <= 0).all())


def select_rows(stored: StoredLogits, rows: Int[Tensor, " m"]) -> StoredLogits:
    """Some of the rows."""
    return {name: _as_signed(value)[rows].view(value.dtype) for name, value in stored.items()}


def join_rows(parts: list[StoredLogits]) -> StoredLogits:
    """The rows of several parts, one after the other."""
    first = parts[0]
    return {n: torch.cat([_as_signed(p[n]) for p in parts]).view(first[n].dtype) for n in first}


def _index_type(classes: int) -> torch.dtype:
    return torch.uint16 if classes <= MAX_UINT16_CLASSES else torch.int32


def _as_signed(values: Tensor) -> Tensor:
    """The same bits in a type that torch can join and index: it knows uint16 only in part."""
    return values.view(torch.int16) if values.dtype == torch.uint16 else values


def _as_int64(indices: Int[Tensor, "n top"]) -> Int[Tensor, "n top"]:
    wide = _as_signed(indices).to(torch.int64)
    return wide & 0xFFFF if indices.dtype == torch.uint16 else wide
