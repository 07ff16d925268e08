"""Where each step of KIP with a kernel of features takes its networks from.

Fixed networks would be overfitted. `FreshNetworks` draws random ones for every step (RFAD).
`NetworkPool` keeps a few, and trains the one that a step has used on the distilled set, so that
the images serve networks of every age between random and trained (FRePo).

Source: Loo, Hasani, Amini and Rus (2022), arXiv:2210.12067; Zhou, Nezhadarya and Ba (2022),
arXiv:2206.00719, algorithm 1. Deviations: the pool's networks start with staggered ages, and each
training step sees the whole set.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dsdistill.kernels.features import FeatureNetwork, Parameters
from dsdistill.parallel import devices

POOL_SIZE, POOL_LIFETIME, POOL_RATE = 10, 100, 3e-4  # FRePo's
FRESH_NETWORKS = 8  # RFAD's


class NetworkSource(Protocol):
    """Where each step takes its networks from."""

    @property
    def network(self) -> FeatureNetwork:
        """Architecture of the networks."""
        ...

    def initial_state(self, shape: tuple[int, ...], classes: int) -> Any:
        """What is kept from step to step, a pytree; the same at every start of a run.

        Args:
            shape: Height, width and channels of an image.
            classes: Number of classes.
        """
        ...

    def draw(self, state: Any, key: PRNGKeyArray, channels: int) -> Parameters:
        """Parameters of a step's networks, stacked along a first axis."""
        ...

    def train(
        self,
        state: Any,
        key: PRNGKeyArray,
        images: Float[Array, "n h w c"],
        labels: Float[Array, "n k"],
    ) -> Any:
        """The state after a step, inside `devices.shard_targets`.

        Args:
            state: The state that `draw` was given.
            key: The key that `draw` was given.
            images, labels: The support after the step.
        """
        ...


@dataclass(frozen=True)
class FreshNetworks:
    """Random networks, drawn anew for every step.

    Attributes:
        network: Their architecture.
        count: Number of networks in a step's kernel.
    """

    network: FeatureNetwork
    count: int = FRESH_NETWORKS

    def initial_state(self, shape: tuple[int, ...], classes: int) -> Any:
        return ()

    def draw(self, state: Any, key: PRNGKeyArray, channels: int) -> Parameters:
        return self.network.draw_networks(key, self.count, channels)

    def train(self, state: Any, key: PRNGKeyArray, images: Array, labels: Array) -> Any:
        return state


class Pool(NamedTuple):
    """Networks of a pool, each array stacked along a first axis.

    Attributes:
        networks: Parameters of the features.
        heads: Weights and bias of the linear readouts.
        moments: Moments of Adam for both.
        ages: Number of training steps of each network.
    """

    networks: Parameters
    heads: dict[str, Array]
    moments: Any
    ages: Int[Array, " p"]


@dataclass(frozen=True)
class NetworkPool:
    """A pool of networks that are trained on the distilled set meanwhile.

    Each step draws one. Afterwards that one makes a step of Adam on the mean squared error of its
    outputs for the distilled images, and after `lifetime` of them it starts anew.

    Attributes:
        network: Architecture of its networks.
        seed: Seed of the first networks.
        size: Number of networks.
        lifetime: Training steps of a network before it is drawn anew.
        learning_rate: Rate of Adam.
    """

    network: FeatureNetwork
    seed: int = 0
    size: int = POOL_SIZE
    lifetime: int = POOL_LIFETIME
    learning_rate: float = POOL_RATE

    def initial_state(self, shape: tuple[int, ...], classes: int) -> Pool:
        make = functools.partial(self._member, shape=shape, classes=classes)
        members = jax.vmap(make)(jax.random.split(jax.random.key(self.seed), self.size))
        # Staggered, so that the pool has networks of all ages at any time.
        ages = jnp.arange(self.size, dtype=jnp.int32) * self.lifetime // self.size
        return members._replace(ages=ages)

    def draw(self, state: Pool, key: PRNGKeyArray, channels: int) -> Parameters:
        i = self._position(key)
        return jax.tree.map(lambda leaf: leaf[i][None], state.networks)

    def train(
        self,
        state: Pool,
        key: PRNGKeyArray,
        images: Float[Array, "n h w c"],
        labels: Float[Array, "n k"],
    ) -> Pool:
        i = self._position(key)
        member = jax.tree.map(lambda leaf: leaf[i], state)
        n, classes = labels.shape
        shares = devices.local_rows(images), devices.local_rows(labels)
        weights = devices.local_mask(n) / n

        def loss(learned: tuple[Parameters, dict[str, Array]]) -> Array:
            networks, head = learned
            rows = self.network.features(networks, shares[0])
            outputs = jnp.matmul(rows, head["weights"], precision="highest") + head["bias"]
            return 0.5 * (weights @ jnp.mean((outputs - shares[1]) ** 2, axis=1))

        learned = member.networks, member.heads
        gradient = devices.total(jax.grad(loss)(learned))
        change, moments = self._adam().update(gradient, member.moments)
        after: Any = optax.apply_updates(learned, change)
        trained = Pool(after[0], after[1], moments, member.ages + 1)
        renewed = self._member(jax.random.fold_in(key, 1), images.shape[1:], classes)
        is_old = trained.ages >= self.lifetime
        member = jax.tree.map(functools.partial(jnp.where, is_old), renewed, trained)
        return jax.tree.map(lambda leaf, new: leaf.at[i].set(new), state, member)

    def _position(self, key: PRNGKeyArray) -> Int[Array, ""]:
        return jax.random.randint(key, (), 0, self.size, jnp.int32)

    def _member(self, key: PRNGKeyArray, shape: tuple[int, ...], classes: int) -> Pool:
        """One untrained network, as the pool keeps it; its readout starts at 0."""
        networks = self.network.initial_parameters(key, shape[-1])
        d = self.network.dimension(shape)
        heads = {
            "weights": jnp.zeros((d, classes), jnp.float32),
            "bias": jnp.zeros(classes, jnp.float32),
        }
        moments = self._adam().init((networks, heads))
        return Pool(networks, heads, moments, jnp.zeros((), jnp.int32))

    def _adam(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate)
