"""What KIP asks of an optimizer: how a step moves the support, and what it needs for that.

An optimizer is a frozen value. `adam.Adam` follows the gradient, `gauss_newton.GaussNewton` solves
for the step that fits the batch best.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Array, Bool, Float, PRNGKeyArray

from dsdistill.kernels.networks import InfiniteNetwork
from dsdistill.methods.outer_loss import OuterLoss

LearnedArrays = dict[str, Array]  # `images`, and `labels` where they are learned


@dataclass(frozen=True, eq=False)
class StepProblem:
    """One device's part of one step.

    Attributes:
        network: The network whose kernel predicts the targets.
        ridge: Relative to the mean of the diagonal of the support's kernel.
        support: `images` and `labels` before the step.
        learned: Those of them that move.
        frozen: Pixels that stay.
        x_t, y_t: Targets and their labels.
        weights: Weight of each target in the mean; 0 for those that fill up a device's share.
        targets: Number of targets on all devices.
        loss: This device's part of the loss, as a function of other values of `learned`.
        outer: The loss as a function of the predictions.
    """

    network: InfiniteNetwork
    ridge: float
    support: LearnedArrays
    learned: LearnedArrays
    frozen: Bool[Array, "n h w c"]
    x_t: Float[Array, "m h w c"]
    y_t: Float[Array, "m k"]
    weights: Float[Array, " m"]
    targets: int
    loss: Callable[[LearnedArrays], Array]
    outer: OuterLoss


class Optimizer(Protocol):
    """How a step of KIP moves the support."""

    @property
    def differentiates_kernel(self) -> bool:
        """Whether a step takes the gradient of kernel matrices, which tiles are planned for."""
        ...

    def check_network(self, network: InfiniteNetwork) -> None:
        """Refuse a network whose kernel cannot be optimised in this way.

        Raises:
            UserError: With what can.
        """
        ...

    def check_memory(self, support: Float[Any, "n h w c"], targets: int) -> None:
        """Refuse steps that cannot fit into memory, before anything is computed.

        Raises:
            UserError: With what they need.
        """
        ...

    def initial_state(self, learned: LearnedArrays) -> Any:
        """What the first step starts from; its `count` is the number of steps so far, 0."""
        ...

    def step(
        self, problem: StepProblem, state: Any, factor: Float[Array, ""], key: PRNGKeyArray
    ) -> tuple[Array, LearnedArrays, Any]:
        """One step; inside `devices.shard_targets`.

        Args:
            problem: This device's part of it.
            state: What the step before left.
            factor: What the schedule leaves of the learning rates, in [0, 1].
            key: Randomness of this step.

        Returns:
            The loss before the step, the values after it, and the state of the next step.
        """
        ...

    def evaluate_tile(
        self, network: InfiniteNetwork, gram: Callable[[Array, Array], Array]
    ) -> Callable[[Array, Array], Any]:
        """What a step computes of one tile of a kernel matrix, to be timed.

        Args:
            network: The network of the kernel.
            gram: Its kernel matrix.
        """
        ...

    def remedy(self, *, learn_labels: bool) -> str:
        """What to do beside raising --ridge if the loss diverges: options with their values."""
        ...
