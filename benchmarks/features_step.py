"""One KIP step with the features of finite networks and a bare JAX loop, in turn in one process.

The bare loop is what one writes first: XLA's own convolutions and gradients, all images at once,
targets and support shared out over the cores, the same pool of networks, Adam, nothing else.

    python benchmarks/features_step.py [--width 32] [--targets 1024] [--per-class 10] [--steps 10]
"""

import argparse
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from kip_step import random_examples

from dsdistill.kernels import networks
from dsdistill.kernels.features import BIAS
from dsdistill.methods import kip
from dsdistill.methods.initial_support import Support, draw_support
from dsdistill.methods.network_sources import NetworkPool
from dsdistill.methods.targets import TargetBatches
from dsdistill.parallel import devices


def main() -> None:
    devices.use_all()
    parser = argparse.ArgumentParser()
    for name, default in (("width", 32), ("targets", 1024), ("per-class", 10), ("steps", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    train = random_examples(20_000)
    support = draw_support(train, asked.per_class, noise=False, corruption=0, seed=0)
    network = networks.parse(f"features:convnet:{asked.width}")
    assert network.features is not None
    objective = kip.KipObjective((network,), 1e-2, source=NetworkPool(network.features))
    streams = {
        "ours": kip.distill(
            objective, support, train, steps=10**9, target_batch=asked.targets, seed=0
        ),
        "bare": bare_steps(objective, support, TargetBatches(train, asked.targets, 0)),
    }
    times: dict[str, list[float]] = {name: [] for name in streams}
    for name, stream in streams.items():
        next(stream)  # compiles
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{name}: peak memory so far {peak:.2f} GiB")
    for _ in range(asked.steps):  # in turn, so that a slow moment of the machine meets both
        for name, stream in streams.items():
            began = time.perf_counter()
            next(stream)
            times[name].append(time.perf_counter() - began)
    n = len(support.images) + asked.targets
    seconds = {name: float(np.median(each)) for name, each in times.items()}
    rates = {name: n / each for name, each in seconds.items()}
    print(
        f"width {asked.width}, {len(support.images)} support x {asked.targets} targets, 28x28x1: "
        f"ours {seconds['ours']:.3f} s, {rates['ours']:.0f} images/s; "
        f"bare {seconds['bare']:.3f} s, {rates['bare']:.0f} images/s; "
        f"ratio {rates['ours'] / rates['bare']:.2f}"
    )


def bare_steps(objective: kip.KipObjective, support: Support, batches: TargetBatches):
    """Steps of the same method in the plainest JAX."""
    source = objective.source
    assert isinstance(source, NetworkPool)
    images, labels = jnp.asarray(support.images), jnp.asarray(support.labels)
    state = source.initial_state(images.shape[1:], labels.shape[1])
    pool = [
        jax.tree.map(lambda leaf, i=i: leaf[i], (state.networks, state.heads))
        for i in range(source.size)
    ]
    outer, inner = optax.adam(0.04), optax.adam(source.learning_rate)
    moments, inner_moments = outer.init(images), [inner.init(member) for member in pool]

    def split_features(parameters, x):
        return devices.gather_rows(plain_features(parameters, devices.local_rows(x)))[: len(x)]

    def share(whole, real, x_t, y_t):
        images, member, moments, inner_moments = whole
        parameters = member[0]

        def loss(x_s):
            f, g = split_features(parameters, x_s), plain_features(parameters, x_t)
            k_ss, k_st = f @ f.T / f.shape[1] + BIAS**2, f @ g.T / f.shape[1] + BIAS**2
            k_ss = k_ss + 1e-2 * jnp.trace(k_ss) / len(k_ss) * jnp.eye(len(k_ss))
            predictions = k_st.T @ jax.scipy.linalg.solve(k_ss, labels, assume_a="pos")
            return 0.5 * jnp.sum(real * jnp.mean((predictions - y_t) ** 2, 1)) / batches.size

        value, slope = devices.total(jax.value_and_grad(loss)(images))
        change, moments = outer.update(slope, moments)
        moved: Any = optax.apply_updates(images, change)

        def training_loss(member):
            parameters, head = member
            rows = plain_features(parameters, devices.local_rows(moved))
            errors = rows @ head["weights"] + head["bias"] - devices.local_rows(labels)
            return 0.5 * jnp.mean(errors**2) / jax.device_count()

        slopes = devices.total(jax.grad(training_loss)(member))
        change, inner_moments = inner.update(slopes, inner_moments)
        return value, moved, optax.apply_updates(member, change), moments, inner_moments

    step = jax.jit(devices.shard_targets(share))
    for number in range(10**9):
        i = number % source.size
        whole = images, pool[i], moments, inner_moments[i]
        value, images, pool[i], moments, inner_moments[i] = step(
            whole, batches.size, *batches.draw(number)
        )
        yield float(value)


def plain_features(parameters, x):
    """Features by XLA's own operations, all images at once."""
    for block in parameters:
        x = jax.lax.conv_general_dilated(
            x, block["weights"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        mean, variance = x.mean((1, 2), keepdims=True), x.var((1, 2), keepdims=True)
        x = (x - mean) * jax.lax.rsqrt(variance + 1e-5) * block["scale"] + block["shift"]
        window = (1, 2, 2, 1)
        x = jax.lax.reduce_window(jax.nn.relu(x), 0.0, jax.lax.add, window, window, "VALID") / 4
    return x.reshape(len(x), -1)


if __name__ == "__main__":
    main()
