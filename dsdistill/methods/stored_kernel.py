"""Regression and Label Solve with the kernel that a distilled set was made for."""

import collections
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from dsdistill.harness import lists
from dsdistill.harness.data import origin, provenance
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.errors import UserError
from dsdistill.kernels import networks, notation
from dsdistill.kernels.networks import InfiniteNetwork
from dsdistill.methods import label_solve
from dsdistill.methods.ridge import MAX_TRAINING_IMAGES, RidgeLearner

DEFAULT_RIDGE = 1e-6  # relative; for a set that states no ridge
DEFAULT_KERNEL = "fc"  # for a set that was made without a kernel


def learner(
    distilled: DistilledSet,
    kernel: str | InfiniteNetwork = "",
    *,
    name: str = "ridge",
    remedy: str,
    sees_features: bool = False,
) -> RidgeLearner:
    """Kernel ridge regression with the set's own ridge, and its kernel or another one.

    Args:
        distilled: The set.
        kernel: A kernel or its name, in place of the set's own.
        name: Name of the learner in reports.
        remedy: How the user names a kernel that is code, for the message; it has `{}` in the place
            of its name.
        sees_features: Whether it will see the features of a backbone in place of images.

    Raises:
        UserError: If the set states values that cannot be used, its kernel is a module (a file may
            not choose the code that runs here), or one on the features of a backbone.
    """
    source = origin.read_provenance(distilled)
    depth: int | None = None
    std: dict[str, Any] = {}
    if not kernel:
        if source.backbone is not None and not sees_features:
            own = source.backbone == provenance.OWN_MODULE
            learners = "" if own else f"use ridge@{source.backbone} as a learner, or "
            raise UserError(
                "the set was made through a backbone, and its kernel sees features and no pixels: "
                f"{learners}name a kernel of pixels"
            )
        needed = ("kernel", "depth", "w_std", "b_std")
        provenance.require_usable(
            "the distilled set", source, [f"config.{part}" for part in needed]
        )
        # Of several kernels, the one that validated.
        own = DEFAULT_KERNEL if source.backbone is None else "linear"  # that of a selection
        kernel = lists.parse_names("--kernel", source.judge or own)[0]
        if notation.is_code(kernel):
            raise UserError(
                f"the distilled set was made with the kernel {kernel}, which is code, and a file "
                f"may not choose the code that runs here: {remedy.format(kernel)}"
            )
        depth = source.depth
        known = {"w_std": source.w_std, "b_std": source.b_std}
        std = {part: value for part, value in known.items() if value is not None}
    network = networks.parse(kernel, depth, **std) if isinstance(kernel, str) else kernel
    provenance.require_usable("the distilled set", source, ["evaluation_ridge"])
    value = DEFAULT_RIDGE if source.ridge is None else source.ridge
    provenance.require_usable("the distilled set", source, ["config.support_flips"])
    flips = bool(source.support_flips)
    identity = {"kernel": network.name, "ridge": value, **std} | ({"flips": True} if flips else {})
    return RidgeLearner(
        network,
        value,
        name,
        limit=MAX_TRAINING_IMAGES if network.feature_map is None else None,
        flips=flips,
        # The code of a user's network may change while its name stays: such results are not cached.
        identity=None if notation.is_code(network.name) else identity,
    )


def label_solver(
    distilled: DistilledSet, train: Examples, ridge: float, *, remedy: str
) -> tuple[Callable[[Examples], Float[np.ndarray, "n k"]], Any]:
    """Label Solve with the set's own kernel, for any images.

    Args:
        distilled: The set.
        train: All targets, whose labels are fitted.
        ridge: Absolute ridge of the solve.
        remedy: As for `learner`.

    Returns:
        The function from drawn images to their labels, and what it depends on besides both, JSON-
            compatible; None if that is not known.
    """
    own = learner(distilled, remedy=remedy)
    network = own.network

    def sums(support: Float[np.ndarray, "n h w c"]) -> label_solve.Sums:
        return collections.deque(label_solve.accumulate(network, support, train), maxlen=1)[0]

    @functools.cache
    def shared_sums() -> label_solve.Sums:  # those of a map are the same for every support
        return sums(train.images(slice(0, 1)))

    def solve(drawn: Examples) -> Float[np.ndarray, "n k"]:
        support = drawn.images()
        whole = sums(support) if network.feature_map is None else shared_sums()
        return label_solve.solve(network, support, whole, ridge)

    return solve, None if own.identity is None else {"kernel": own.identity, "ridge": ridge}
