"""The losses by their names in `--loss`, where a hyphen is an underscore here: `rkd_distance`.

What a network has to bring besides, such as a projector that fits the student's features to the
teacher's, is the caller's part here; `--loss` makes and trains it. `crd` is the loss of two arrays
of scores, which `kd.losses.contrastive` explains; `heads` is the loss of one shallow classifier.
Those of tokens take a mask of the real ones, see `kd.losses.token`.
"""

from kd.losses.adversarial import adaad, ard, rslad, trades
from kd.losses.adversarial import discrimination as adv
from kd.losses.contrastive import crd
from kd.losses.feature import attention_transfer as at
from kd.losses.feature import fitnet, mgd, vid
from kd.losses.feature import hierarchical_context as review
from kd.losses.feature import log_sum as srd
from kd.losses.multi_label import binary_cross_entropy as bce
from kd.losses.multi_label import binary_kl as mld
from kd.losses.relation import correlation_congruence as cc
from kd.losses.relation import instance_graph as irg
from kd.losses.relation import probabilistic_transfer as pkt
from kd.losses.relation import rkd_angle, rkd_distance
from kd.losses.relation import similarity_preserving as sp
from kd.losses.response import centred_mse as mse
from kd.losses.response import cross_entropy as adv_ce
from kd.losses.response import cross_entropy as ce
from kd.losses.response import dist, dkd
from kd.losses.response import function_matching as fm
from kd.losses.response import hard_distillation as hard
from kd.losses.response import logit_kl as kd
from kd.losses.response import logit_mse as logits
from kd.losses.response import self_distillation as heads
from kd.losses.response import standardised_kl as ls
from kd.losses.token import attention_relations as relations
from kd.losses.token import attention_scores as scores
from kd.losses.token import hidden_cosine as cosine
from kd.losses.token import hidden_states as hidden
from kd.losses.token import patient
from kd.losses.token import token_cross_entropy as clm
from kd.losses.token import token_cross_entropy as mlm
from kd.losses.token import token_divergence as tokens

__all__ = [
    "adaad",
    "adv",
    "adv_ce",
    "ard",
    "at",
    "bce",
    "cc",
    "ce",
    "clm",
    "cosine",
    "crd",
    "dist",
    "dkd",
    "fitnet",
    "fm",
    "hard",
    "heads",
    "hidden",
    "irg",
    "kd",
    "logits",
    "ls",
    "mgd",
    "mld",
    "mlm",
    "mse",
    "patient",
    "pkt",
    "relations",
    "review",
    "rkd_angle",
    "rkd_distance",
    "rslad",
    "scores",
    "sp",
    "srd",
    "tokens",
    "trades",
    "vid",
]
