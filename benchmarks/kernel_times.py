"""The exact convolutional kernel against neural-tangents: milliseconds a pair of images.

    python benchmarks/kernel_times.py            every case, and growth: about an hour on two cores
    python benchmarks/kernel_times.py convnet3   the cases whose name contains the word

For each case both engines compute the kernel of unit Gaussian images, and its gradient with
respect to the first set, in float32, by turns in one process, each free to use every core. A time
is the shortest of `REPEATS`. neural-tangents gets its time both on one device, whose operations
XLA spreads over the cores, and with its targets shared out over one device for each core as ours
are; the shorter one counts. Results are appended to --out as they come. On a machine with a GPU
both run there, on more images.
"""

import argparse
import functools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsdistill.parallel import devices

devices.use_all()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from dsdistill.kernels import (  # noqa: E402
    networks,
    neural_tangents,
    notation,
)

REPEATS = 3
ON_CPU = jax.default_backend() == "cpu"
DEVICE = jax.devices()[0].device_kind
CASES = {  # notation, image shape, images on both sides: ours, and theirs
    "convnet3 28x28x1": ("3xCRP-flatten", (28, 28, 1), (8, 128), (4, 8)),
    "convnet3 32x32x3": ("3xCRP-flatten", (32, 32, 3), (8, 64), (4, 8)),
    "convnet 28x28x1": ("CR-3xCRP-flatten", (28, 28, 1), (8, 64), (4, 4)),
    "convnet 32x32x3": ("CR-3xCRP-flatten", (32, 32, 3), (8, 64), (4, 4)),
    "myrtle5 32x32x3": ("CR-2xCRP-CR-gap", (32, 32, 3), (2, 32), (2, 4)),
}
if not ON_CPU:  # enough to fill it; of the slowest case fewer
    counts = dict.fromkeys(CASES, ((8, 4096), (8, 32)))
    counts["myrtle5 32x32x3"] = (8, 1024), (4, 16)
    CASES = {name: (*case[:2], *counts[name]) for name, case in CASES.items()}
LARGE = "3xCRP-flatten", (28, 28, 1), 100  # of the memory and growth measurements


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("only", nargs="?", default="")
    parser.add_argument("--out", type=Path, default=Path("kernels.jsonl"))
    parser.add_argument("--grow", type=int, help="internal: one Gram matrix of so many targets")
    options = parser.parse_args()
    if options.grow:
        grow(options.grow)
        return
    for name, case in CASES.items():
        if options.only in name:
            record(options.out, {"case": name, "device": DEVICE} | compare(*case))
    if not options.only:
        for targets in (500, 5000, 50000):
            done = subprocess.run(
                [sys.executable, __file__, "--grow", str(targets)], capture_output=True, check=True
            )
            record(options.out, json.loads(done.stdout))


def compare(text: str, shape: tuple[int, int, int], mine: Any, theirs: Any) -> dict[str, float]:
    """Times of both engines, in milliseconds a pair, and their ratios."""
    ours = networks.parse(text).kernel
    rival = stax_kernel(notation.parse(text))
    fast = measured(ours, images(mine[0], shape, 0), images(mine[1], shape, 1))
    x1, x2 = images(theirs[0], shape, 0), images(theirs[1], shape, 1)
    rivals = [rival, devices.shard_kernel(rival)] if jax.local_device_count() > 1 else [rival]
    slow = [measured(engine, x1, x2) for engine in rivals]
    best = {key: min(times[key] for times in slow) for key in ("forward", "gradient")}
    return {
        **{f"{key}_ms": fast[key] for key in best},
        "compile_s": fast["compile_s"],
        **{f"neural_tangents_{key}_ms": value for key, value in best.items()},
        **{f"{key}_ratio": best[key] / fast[key] for key in best},
    }


def measured(kernel: Callable[..., Any], x1: jax.Array, x2: jax.Array) -> dict[str, float]:
    """Milliseconds a pair, forward and with the gradient given the cotangent; compile time."""
    pairs = len(x1) * len(x2)
    forward = jax.jit(kernel)
    both = jax.jit(lambda x1, x2, g: pulled(kernel, x1, x2, g))
    began = time.perf_counter()
    compiled = both.lower(x1, x2, jnp.ones((len(x1), len(x2)))).compile()
    compile_s = time.perf_counter() - began
    cotangent = jax.random.normal(jax.random.key(2), (len(x1), len(x2)))
    return {
        "forward": 1e3 * shortest(forward, x1, x2) / pairs,
        "gradient": 1e3 * shortest(compiled, x1, x2, cotangent) / pairs,
        "compile_s": compile_s,
    }


def pulled(kernel: Callable[..., Any], x1: Any, x2: Any, cotangent: Any) -> Any:
    """Value and gradient with respect to the first set."""
    value, pull = jax.vjp(lambda x1: kernel(x1, x2), x1)
    return value, pull(cotangent)[0]


def shortest(function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of the fastest of some calls, after one that may compile."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return min(times)


def grow(targets: int) -> None:
    """One Gram matrix of 100 x `targets` with its gradient: time a pair and peak memory."""
    text, shape, support = LARGE
    kernel = networks.parse(text).kernel
    both = jax.jit(functools.partial(pulled, kernel))
    x1, x2 = images(support, shape, 0), images(targets, shape, 1)
    compiled = both.lower(x1, x2, jnp.ones((support, targets))).compile()
    cotangent = jnp.ones((support, targets))
    began = time.perf_counter()
    jax.block_until_ready(compiled(x1, x2, cotangent))
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if not ON_CPU:
        peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    print(
        json.dumps(
            {
                "case": f"convnet3 28x28x1, {support} x {targets}, value and gradient",
                "device": DEVICE,
                "gradient_ms": 1e3 * seconds / support / targets,
                "peak_gib": peak,
            }
        )
    )


def images(n: int, shape: tuple[int, int, int], seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (n, *shape))


def stax_kernel(network: notation.Architecture) -> Callable[..., Any]:
    """The same network in neural-tangents."""
    stax = neural_tangents.load().stax
    std = {"W_std": network.w_std, "b_std": network.b_std}
    layers = {
        "C": stax.Conv(1, (3, 3), padding="SAME", **std),
        "R": stax.Relu(),
        "P": stax.AvgPool((2, 2), strides=(2, 2)),
    }
    head = stax.Flatten() if network.head == "flatten" else stax.GlobalAvgPool()
    kernel = stax.serial(*(layers[c] for c in network.layers), head, stax.Dense(1, **std))[2]
    return lambda x1, x2: kernel(x1, x2, "ntk")


def record(path: Path, row: dict[str, Any]) -> None:
    line = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
    print(json.dumps(line), flush=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
