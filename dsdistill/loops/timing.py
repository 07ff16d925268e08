"""How long steps take: the size of a target batch from a time, and what a run will cost."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.errors import UserError
from dsdistill.kernels import gram
from dsdistill.kernels.networks import Engine, InfiniteNetwork
from dsdistill.methods import kip
from dsdistill.methods.initial_support import Support
from dsdistill.methods.optimizer import Optimizer
from dsdistill.parallel import devices, hosts

SMALLEST_BATCH_PER_CLASS = 4  # images a class of the smallest batch that is timed
GROWTH = 4  # from one timed batch to the next
FLOAT64_COST = 2.5  # of the time of a pair with a target: a pair within the support, in float64
FORWARD_COST = 0.35  # of a step's time for a pair of images, where no gradient is needed
MAX_QUICK_SECONDS = 0.3  # seconds: a step that takes less is timed three times
TILE_SIDES = {Engine.EXACT_PLANES: 16, Engine.NEURAL_TANGENTS: 4}  # images a side of the timed tile
# Such tiles of work need not be announced: the first steps say soon what they take.
MIN_ANNOUNCED_TILES = 30
SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0}


def parse_target_batch(target_batch: int | str) -> int | float:
    """A `--target-batch`: a number of targets (int), or the seconds of a step (float).

    Raises:
        UserError: If it is neither, or not positive.
    """
    text = str(target_batch)
    found = re.fullmatch(r"([0-9]*\.?[0-9]+) ?(ms|s|min)", text)
    if not found and not re.fullmatch(r"-?[0-9]+", text):
        raise UserError(
            "--target-batch must be a number of images, or the time of a step such as 2s, "
            f"500ms or 1min, got {text!r}"
        )
    value = float(found[1]) * SECONDS[found[2]] if found else int(text)
    if not value > 0:
        raise UserError(f"--target-batch must be at least 1, or a positive time, got {text}")
    return value


def choose_target_batch(
    objective: kip.KipObjective, support: Support, train: Examples, seconds: float, *, seed: int
) -> int:
    """The targets of a step that takes about so long, once it is compiled.

    Steps of a few sizes are timed, each about four times as large as the one before, until one
    takes a quarter of the time. The line through the last two gives the batch.

    Args:
        objective: Of several networks the mean time counts.
        support, train, seed: As in `kip.distill`.
        seconds: Wanted.

    Returns:
        A multiple of the number of classes, at least one a class, at most the training set.
    """
    k = len(train.data.classes)

    def timed(targets: int) -> float:
        return step_seconds(objective, support, train, targets, seed=seed)

    size = min(SMALLEST_BATCH_PER_CLASS * k, len(train))
    times = {size: timed(size)}
    while len(times) < 2 or times[size] < seconds / 4:
        size *= GROWTH
        if size > len(train):
            break
        times[size] = timed(size)
    wanted = int(_interpolate_size(times, seconds))
    return max(min(wanted, len(train)) // k * k, k)


def step_seconds(
    objective: kip.KipObjective, support: Support, train: Examples, targets: int, *, seed: int
) -> float:
    """What a step of so many targets takes once it is compiled, in the mean of the networks.

    Args:
        objective, support, train, seed: As in `kip.distill`.
    """
    each = [
        _time_step(replace(objective, networks=(network,)), support, train, targets, seed)
        for network in objective.networks
    ]
    return sum(each) / len(each)


def _interpolate_size(times: dict[int, float], seconds: float) -> float:
    """The size that takes so long, on the line through the last two of (size, time)."""
    *before, (m, t) = times.items()
    if not before:
        return m
    m1, t1 = before[-1]
    # Two quick steps can take the same time but for chance, and then the line is flat.
    slope = max((t - t1) / (m - m1), 0.1 * t / m)
    return m + (seconds - t) / slope


def _time_step(
    objective: kip.KipObjective, support: Support, train: Examples, targets: int, seed: int
) -> float:
    """The time of one step after compiling; of quick ones, the least of three."""
    stream = kip.distill(objective, support, train, steps=4, target_batch=targets, seed=seed)
    with contextlib.closing(stream):
        return _fastest_step(stream)


def _fastest_step(stream: Iterator[kip.Step]) -> float:
    next(stream)  # compiles
    best = float("inf")
    for step in stream:
        seconds = hosts.decide(lambda step=step: step.seconds)
        best = min(best, seconds)
        if seconds > MAX_QUICK_SECONDS:
            break
    return best


class Timing(NamedTuple):
    """A small part of a Gram matrix that was evaluated on every device, all at the same time."""

    seconds: float
    pairs: int


def time_tile(
    network: InfiniteNetwork, train: Examples, pairs: float, optimizer: Optimizer | None = None
) -> Timing | None:
    """What a tile takes once it is compiled, to announce long work before it begins.

    Args:
        network: Whose kernel.
        train: The tile's images are the first ones of these.
        pairs: Of images, that are evaluated until the work says by itself what it takes.
        optimizer: What evaluates them in its steps; None: they are predicted, without a gradient.

    Returns:
        None if so many pairs do not take long.
    """
    side = min(TILE_SIDES.get(network.engine, 0), len(train))
    if pairs <= MIN_ANNOUNCED_TILES * side**2 or not side:
        return None
    images = train.images(np.arange(side))
    # Small as it is, a tile of any network of neural-tangents may have to be divided.
    gradient = optimizer is not None and optimizer.differentiates_kernel
    plan = gram.plan_tile(network, side, side, images.shape[1:], gradient=gradient)

    def matrix(x1: Array, x2: Array) -> Array:
        return gram.gram(network.kernel, x1, x2, plan)

    work = matrix if optimizer is None else optimizer.evaluate_tile(network, matrix)
    run = jax.jit(devices.everywhere(work))
    _, *times = (_time_call(run, images) for _ in range(3))  # the first one compiles
    return Timing(min(times), side**2 * jax.device_count())


def _time_call(run: Callable[..., Any], images: np.ndarray) -> float:
    began = time.monotonic()
    jax.block_until_ready(run(images, images))
    return time.monotonic() - began


class StepTimer:
    """Seconds a step, known once every network has made a step that did not compile."""

    def __init__(self, networks: int) -> None:
        self._times: list[list[float]] = [[] for _ in range(networks)]

    def seconds(self, step: kip.Step) -> float | None:
        """The mean over the networks, this step included; None while one of them is not known."""
        times = self._times[step.network]
        times.append(step.seconds)
        # The first one compiles. The latest ones tell what is to come.
        del times[1:-5]
        warm = [sum(t[1:]) / len(t[1:]) for t in self._times if len(t) > 1]
        return sum(warm) / len(warm) if len(warm) == len(self._times) else None


def prediction_seconds(images: int, support: int, seconds: float, pairs: int) -> float:
    """Seconds that it takes to predict so many images, by the step that was measured.

    Args:
        images: To predict, each from a support of `support` images.
        seconds, pairs: Of a step with the gradient, or of a tile of one.
    """
    return FORWARD_COST * images * support * seconds / pairs
