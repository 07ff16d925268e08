"""One KIP step against the reference implementation's, in turn in one process.

The reference is the step of the authors' notebook: neural-tangents' kernel of the same network,
float64 throughout, a full backward pass through `jax.grad`.

    python benchmarks/kip_step.py [--steps 30]
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from dsdistill.harness.data.preprocess import identity
from dsdistill.kernels import networks, neural_tangents
from dsdistill.methods import kip
from dsdistill.methods.initial_support import Support, draw_support
from dsdistill.methods.targets import TargetBatches


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    steps = parser.parse_args().steps
    train = random_examples(54_000)
    support = draw_support(train, 10, noise=False, corruption=0, seed=0)
    ours = our_steps(train, support, 2 * steps)
    reference = reference_steps(train, support)
    for stream in (ours, reference):
        next(stream)  # compiles
    times: dict[str, list[float]] = {"ours": [], "reference": []}
    for _ in range(steps):  # in turn, so that a slow moment of the machine meets both
        for name, stream in (("ours", ours), ("reference", reference)):
            began = time.perf_counter()
            next(stream)
            times[name].append(time.perf_counter() - began)
    mine, theirs = (1e3 * float(np.median(times[name])) for name in ("ours", "reference"))
    print(f"{len(support.images)} support x 5000 targets, 28x28x1, fc depth 1, {steps} steps")
    print(f"ours {mine:.1f} ms, reference {theirs:.1f} ms, ratio {mine / theirs:.2f}")


def random_examples(n: int) -> Examples:
    """Images of the size of Fashion-MNIST; a step's time does not depend on their pixels."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((n, 28, 28, 1), np.float32)
    classes = tuple(map(str, range(10)))
    return Examples(
        LabeledImages(images, rng.integers(0, 10, n), classes), identity(1), is_preprocessed=True
    )


def our_steps(train: Examples, support: Support, steps: int):
    objective = kip.KipObjective((networks.parse("fc"),))
    yield from kip.distill(objective, support, train, steps=steps, target_batch=5000, seed=0)


def reference_steps(train: Examples, support: Support):
    """The notebook's step: one function of the support in float64, differentiated as a whole."""
    import optax

    stax = neural_tangents.load().stax
    dense = {"W_std": networks.W_STD, "b_std": networks.B_STD}
    layers = [stax.Flatten(), stax.Dense(1, **dense), stax.Relu(), stax.Dense(1, **dense)]
    kernel = stax.serial(*layers)[2]
    adam = optax.adam(0.04)

    def loss(x_s, y_s, x_t, y_t):
        k_ss, k_ts = kernel(x_s, x_s, "ntk"), kernel(x_t, x_s, "ntk")
        n = len(k_ss)
        regular = k_ss + kip.KipObjective.ridge * jnp.trace(k_ss) / n * jnp.eye(n)
        predicted = k_ts @ jax.scipy.linalg.solve(regular, y_s, assume_a="pos")
        return 0.5 * jnp.mean((predicted - y_t) ** 2)

    @jax.jit
    def update(x_s, y_s, moments, x_t, y_t):
        gradient = jax.grad(loss)(x_s, y_s, x_t, y_t)
        change, moments = adam.update(gradient, moments)
        return optax.apply_updates(x_s, change), moments

    batches = TargetBatches(train, 5000, 0)
    with jax.enable_x64(True):
        x_s, y_s = (
            jnp.asarray(support.images, jnp.float64),
            jnp.asarray(support.labels, jnp.float64),
        )
        moments = adam.init(x_s)
    step = 0
    while True:
        x_t, y_t = batches.draw(step)
        with jax.enable_x64(True):
            x_t, y_t = jnp.asarray(x_t, jnp.float64), jnp.asarray(y_t, jnp.float64)
            x_s, moments = update(x_s, y_s, moments, x_t, y_t)
            jax.block_until_ready(x_s)
        step += 1
        yield


if __name__ == "__main__":
    main()
