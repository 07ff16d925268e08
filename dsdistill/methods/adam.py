"""Adam for KIP: down the gradient, with a learning rate of its own for images and for labels.

Source: Kingma and Ba (2015), arXiv:1412.6980, as optax has it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from dsdistill.kernels.networks import InfiniteNetwork
from dsdistill.methods.optimizer import LearnedArrays, StepProblem
from dsdistill.parallel import devices

SCALE = optax.scale_by_adam()  # the learning rates are applied afterwards, see `Adam.move`


@dataclass(frozen=True)
class Adam:
    """Adam, as the papers of KIP use it; an `Optimizer`.

    Attributes:
        learning_rate: How far the first step moves every pixel.
        label_learning_rate: The same for labels, whose scale differs; None: as the images.
    """

    learning_rate: float = 0.04
    label_learning_rate: float | None = None

    @property
    def differentiates_kernel(self) -> bool:
        return True

    def check_network(self, network: InfiniteNetwork) -> None:
        """Every kernel has a gradient."""

    def check_memory(self, support: Float[Any, "n h w c"], targets: int) -> None:
        """Kernel matrices are evaluated in tiles that fit."""

    def initial_state(self, learned: LearnedArrays) -> Any:
        return SCALE.init(learned)

    def step(
        self, problem: StepProblem, state: Any, factor: Float[Array, ""], key: PRNGKeyArray
    ) -> tuple[Array, LearnedArrays, Any]:
        value, gradient = devices.total(jax.value_and_grad(problem.loss)(problem.learned))
        gradient["images"] = gradient["images"] * ~problem.frozen
        return value, *self.move(problem.learned, gradient, state, factor)

    def move(
        self, learned: LearnedArrays, gradient: LearnedArrays, state: Any, factor: Array
    ) -> tuple[Any, Any]:
        """The values after a step along this gradient, and the state after it."""
        change: Any
        change, state = SCALE.update(gradient, state)
        label_rate = self.label_learning_rate
        rates = {
            "images": self.learning_rate,
            "labels": self.learning_rate if label_rate is None else label_rate,
        }
        steps: Any = {
            name: jax.tree.map(lambda x, rate=rates[name]: -rate * factor * x, change[name])
            for name in learned
        }
        return optax.apply_updates(learned, steps), state

    def evaluate_tile(
        self, network: InfiniteNetwork, gram: Callable[[Array, Array], Array]
    ) -> Callable[[Array, Array], Any]:
        def value_and_gradient(x1: Array, x2: Array) -> Any:
            value, pullback = jax.vjp(lambda x: gram(x, x2), x1)
            return value, pullback(value)

        return value_and_gradient

    def remedy(self, *, learn_labels: bool) -> str:
        rates = f"--learning-rate (now {self.learning_rate:g})"
        if learn_labels and self.label_learning_rate is not None:
            rates += f" or --label-learning-rate (now {self.label_learning_rate:g})"
        return f"lower {rates}"
