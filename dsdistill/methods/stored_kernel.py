"""The kernel ridge regression that a distilled set was made for, as its file states it."""

from typing import Any

from dsdistill.harness import lists
from dsdistill.harness.data import origin, provenance
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.errors import UserError
from dsdistill.kernels import networks, notation
from dsdistill.kernels.networks import InfiniteNetwork
from dsdistill.methods.ridge import RidgeLearner

DEFAULT_RIDGE = 1e-6  # relative; for a set that states no ridge
DEFAULT_KERNEL = "fc"  # for a set that was made without a kernel


def learner(
    distilled: DistilledSet,
    kernel: str | InfiniteNetwork = "",
    *,
    name: str = "ridge",
    remedy: str,
) -> RidgeLearner:
    """Kernel ridge regression with the set's own ridge, and its kernel or another one.

    Args:
        distilled: The set.
        kernel: A kernel or its name, in place of the set's own.
        name: Name of the learner in reports.
        remedy: How the user names a kernel that is code, for the message; it has `{}` in the place
            of its name.

    Raises:
        UserError: If the set states values that cannot be used, or its kernel is a module: a file
            may not choose the code that runs here.
    """
    source = origin.read_provenance(distilled)
    depth: int | None = None
    std: dict[str, Any] = {}
    if not kernel:
        needed = ("kernel", "depth", "w_std", "b_std")
        provenance.require_usable(
            "the distilled set", source, [f"config.{part}" for part in needed]
        )
        # Of several kernels, the one that validated.
        kernel = lists.parse_names("--kernel", source.judge or DEFAULT_KERNEL)[0]
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
    # The code of a user's network may change while its name stays: such results are not cached.
    is_cached = not notation.is_code(network.name)
    provenance.require_usable("the distilled set", source, ["config.support_flips"])
    flips = {"flips": True} if source.support_flips else {}
    identity = {"kernel": network.name, "ridge": value, **std, **flips} if is_cached else None
    return RidgeLearner(network, value, name, identity=identity, **flips)
