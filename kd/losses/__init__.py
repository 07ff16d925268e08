"""Losses as pure functions: float32 inside, batch mean, no gradient into a teacher.

    kd.losses.kd(student_logits, teacher_logits, temperature=4)

Each has a short name, that of its term in a loss such as `ce:0.1,kd:0.9`, with `_` for `-`. They
are imported at their first use, with PyTorch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd.losses.contrastive import crd
    from kd.losses.feature import attention_transfer as at
    from kd.losses.feature import fitnet, mgd, vid
    from kd.losses.feature import hierarchical_context as review
    from kd.losses.feature import log_sum as srd
    from kd.losses.relation import correlation_congruence as cc
    from kd.losses.relation import probabilistic_transfer as pkt
    from kd.losses.relation import rkd_angle, rkd_distance
    from kd.losses.relation import similarity_preserving as sp
    from kd.losses.response import centred_mse as mse
    from kd.losses.response import cross_entropy as ce
    from kd.losses.response import dist, dkd
    from kd.losses.response import function_matching as fm
    from kd.losses.response import hard_distillation as hard
    from kd.losses.response import logit_kl as kd
    from kd.losses.response import logit_mse as logits
    from kd.losses.response import self_distillation as heads
    from kd.losses.response import standardised_kl as ls

_FUNCTIONS = {
    "at": "feature.attention_transfer",
    "cc": "relation.correlation_congruence",
    "ce": "response.cross_entropy",
    "crd": "contrastive.crd",
    "dist": "response.dist",
    "dkd": "response.dkd",
    "fitnet": "feature.fitnet",
    "fm": "response.function_matching",
    "hard": "response.hard_distillation",
    "heads": "response.self_distillation",
    "kd": "response.logit_kl",
    "logits": "response.logit_mse",
    "ls": "response.standardised_kl",
    "mgd": "feature.mgd",
    "mse": "response.centred_mse",
    "pkt": "relation.probabilistic_transfer",
    "review": "feature.hierarchical_context",
    "rkd_angle": "relation.rkd_angle",
    "rkd_distance": "relation.rkd_distance",
    "sp": "relation.similarity_preserving",
    "srd": "feature.log_sum",
    "vid": "feature.vid",
}
__all__ = [
    "at",
    "cc",
    "ce",
    "crd",
    "dist",
    "dkd",
    "fitnet",
    "fm",
    "hard",
    "heads",
    "kd",
    "logits",
    "ls",
    "mgd",
    "mse",
    "pkt",
    "review",
    "rkd_angle",
    "rkd_distance",
    "sp",
    "srd",
    "vid",
]


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, _, function = _FUNCTIONS[name].partition(".")
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), function)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
