"""Encode logits for storage: all in float32, or the largest probabilities in half precision.

At ImageNet's 1000 classes the 32 largest take 132 bytes per view, all logits 4000.

Source of sparse stored logits: Shen and Xing (2021), arXiv:2112.01528.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

MAX_UINT16_CLASSES = 65535  # largest number of classes with uint16 indices
StoredLogits = dict[str, Tensor]
TensorForms = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class TopProbabilities(NamedTuple):
    """The largest probabilities of n rows.

    Attributes:
        log_probs: Natural logarithms in float16, the largest first.
        indices: Their classes in uint16, or in int32 above 65535 classes.
        tail: Sum of all other probabilities, in float32.
    """

    log_probs: Float[Tensor, "n top"]
    indices: Int[Tensor, "n top"]
    tail: Float[Tensor, " n"]


def compress(logits: Float[Tensor, "n k"], top: int) -> TopProbabilities:
    """Keep the `top` largest log-probabilities of each row, and the sum of the other probabilities.

    Args:
        logits: Logits on any device, of any precision; the result is on the CPU.
        top: Number of classes to keep; above k, all are kept.
    """
    log_probs = logits.detach().float().log_softmax(1)
    kept, indices = log_probs.topk(min(top, log_probs.shape[1]))
    # A sum, not 1 minus the others: for a confident teacher the difference is rounding error.
    tail = log_probs.scatter(1, indices, -math.inf).exp().sum(1)
    half = kept.clamp(torch.finfo(torch.float16).min, 0).half()
    return TopProbabilities(
        half.cpu(), indices.cpu().to(_index_type(log_probs.shape[1])), tail.cpu()
    )


def expand(stored: TopProbabilities, classes: int) -> Float[Tensor, "n k"]:
    """Expand to float32 log-probabilities over all classes, the tail spread evenly over the rest.

    As logits at temperature 1 they are exact up to float16, a relative 2⁻¹¹ of each stored
    logarithm, and up to the even spread. At higher temperatures the spread weighs more.

    Args:
        stored: Result of `compress`.
        classes: Number of classes k.
    """
    n, top = stored.log_probs.shape
    # A tail too small for float32 becomes its smallest number: log 0 is not a finite logit.
    tail = stored.tail.clamp_min(torch.finfo(torch.float32).tiny)
    rest = (tail / max(classes - top, 1)).log()[:, None].expand(n, classes)
    return rest.scatter(1, _as_int64(stored.indices), stored.log_probs.float())


def encode(logits: Float[Tensor, "n k"], top: int | None) -> StoredLogits:
    """Encode logits as stored tensors: `compress`ed, or all logits if `top` is None."""
    if top is None:
        return {"logits": logits.detach().float().cpu()}
    return compress(logits, top)._asdict()


def decode(stored: StoredLogits, classes: int) -> Float[Tensor, "n k"]:
    """Decode stored tensors to logits, or to `expand`ed log-probabilities."""
    return stored["logits"] if "logits" in stored else expand(TopProbabilities(**stored), classes)


def expected_forms(rows: int, classes: int, top: int | None) -> TensorForms:
    """Dtypes and shapes of the tensors that `encode` returns for `rows` rows."""
    if top is None:
        return {"logits": (torch.float32, (rows, classes))}
    shape = (rows, min(top, classes))
    return {
        "log_probs": (torch.float16, shape),
        "indices": (_index_type(classes), shape),
        "tail": (torch.float32, (rows,)),
    }


def are_valid(stored: StoredLogits, classes: int) -> bool:
    """Whether a file's values can be a teacher's logits, so that `decode` cannot fail."""
    numbers = [value for value in stored.values() if value.is_floating_point()]
    if not all(bool(torch.isfinite(value).all()) for value in numbers):
        return False
    if "logits" in stored:
        return True
    indices = _as_int64(stored["indices"])
    inside = bool(((indices >= 0) & (indices < classes)).all())
    return inside and bool((stored["tail"] >= 0).all() and (stored["log_probs"] <= 0).all())


def select_rows(stored: StoredLogits, rows: Int[Tensor, " m"]) -> StoredLogits:
    """Select rows of stored tensors."""
    return {name: _as_signed(value)[rows].view(value.dtype) for name, value in stored.items()}


def join_rows(parts: list[StoredLogits]) -> StoredLogits:
    """Concatenate the rows of several parts."""
    first = parts[0]
    return {n: torch.cat([_as_signed(p[n]) for p in parts]).view(first[n].dtype) for n in first}


def _index_type(classes: int) -> torch.dtype:
    return torch.uint16 if classes <= MAX_UINT16_CLASSES else torch.int32


def _as_signed(values: Tensor) -> Tensor:
    """View uint16 as int16, which torch can join and index: it supports uint16 only in part."""
    return values.view(torch.int16) if values.dtype == torch.uint16 else values


def _as_int64(indices: Int[Tensor, "n top"]) -> Int[Tensor, "n top"]:
    wide = _as_signed(indices).to(torch.int64)
    return wide & 0xFFFF if indices.dtype == torch.uint16 else wide
