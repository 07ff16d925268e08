"""How long steps take: the size of a target batch from a time, and what a run will cost."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace

from dsdistill import hosts, kip
from dsdistill.harness.errors import UserError
from dsdistill.harness.labeled import Examples
from dsdistill.start import Support

SMALL = 4  # images a class of the smallest batch that is timed
GROWTH = 4  # from one timed batch to the next
FORWARD = 0.35  # of a step's time for a pair of images, where no gradient is needed
QUICK = 0.3  # seconds: a step that takes less is timed three times
SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0}


def parse(target_batch: int | str) -> int | float:
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


def target_batch(
    objective: kip.Objective, support: Support, train: Examples, seconds: float, *, seed: int
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

    size = min(SMALL * k, len(train))
    times = {size: timed(size)}
    while len(times) < 2 or times[size] < seconds / 4:
        size *= GROWTH
        if size > len(train):
            break
        times[size] = timed(size)
    wanted = int(_on_line(times, seconds))
    return max(min(wanted, len(train)) // k * k, k)


def step_seconds(
    objective: kip.Objective, support: Support, train: Examples, targets: int, *, seed: int
) -> float:
    """What a step of so many targets takes once it is compiled, in the mean of the networks.

    Args:
        objective, support, train, seed: As in `kip.distill`.
    """
    each = [
        _seconds(replace(objective, networks=(network,)), support, train, targets, seed)
        for network in objective.networks
    ]
    return sum(each) / len(each)


def _on_line(times: dict[int, float], seconds: float) -> float:
    """The size that takes so long, on the line through the last two of (size, time)."""
    *before, (m, t) = times.items()
    if not before:
        return m
    m1, t1 = before[-1]
    # Two quick steps can take the same time but for chance, and then the line is flat.
    slope = max((t - t1) / (m - m1), 0.1 * t / m)
    return m + (seconds - t) / slope


def _seconds(
    objective: kip.Objective, support: Support, train: Examples, targets: int, seed: int
) -> float:
    """The time of one step after compiling; of quick ones, the least of three."""
    stream = kip.distill(objective, support, train, steps=4, target_batch=targets, seed=seed)
    with contextlib.closing(stream):
        return _least(stream)


def _least(stream: Iterator[kip.Step]) -> float:
    next(stream)  # compiles
    best = float("inf")
    for step in stream:
        seconds = hosts.decided(lambda step=step: step.seconds)
        best = min(best, seconds)
        if seconds > QUICK:
            break
    return best


class Pace:
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


def predicting(images: int, support: int, seconds: float, pairs: int) -> float:
    """Seconds that it takes to predict so many images, by the step that was measured.

    Args:
        images: To predict, each from a support of `support` images.
        seconds, pairs: Of a step with the gradient.
    """
    return FORWARD * images * support * seconds / pairs
