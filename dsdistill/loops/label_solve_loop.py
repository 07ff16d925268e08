"""A Label Solve run: the sums over all targets, in chunks, with checkpoints and resume."""

import time

import numpy as np
from jaxtyping import Float

from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.runs import progress, run_folder
from dsdistill.kernels.networks import InfiniteNetwork
from dsdistill.loops import checkpoints, timing
from dsdistill.loops.checkpoints import explain_mismatch, metrics_writer, require
from dsdistill.methods import label_solve
from dsdistill.parallel import hosts


def accumulate_sums(
    run: run_folder.Run,
    network: InfiniteNetwork,
    support: Float[np.ndarray, "n h w c"],
    train: Examples,
    closing_images: int = 0,
) -> tuple[label_solve.Sums, float]:
    """Label Solve's sums over all targets, from the run's last checkpoint if there is one.

    Args:
        run, network, support, train: What is summed up, and where it is kept.
        closing_images: Images that are predicted afterwards, for the expected duration.

    Returns:
        The sums, and the seconds spent in this and all earlier starts.

    Raises:
        KeyboardInterrupt, RuntimeError, ValueError: If it is stopped by hand or another host is
            lost; after a checkpoint of the last whole chunk.
    """
    rows = label_solve.sum_size(network, support)
    last, spent = _restore_sums(run, rows, train)
    _announce_sums(network, len(support), train, last.done, closing_images)
    said = False  # the expected duration by the run itself
    saved, began = time.monotonic(), time.monotonic() - spent

    def save() -> None:
        if not last.done:
            return  # nothing to go on from
        arrays = {name: np.asarray(getattr(last, name)) for name in ("gram_tt", "gram_ty")}
        run.save_state(arrays, {"done": last.done, "seconds": time.monotonic() - began})

    with (
        metrics_writer(run, last.done) as write,
        progress.bar(len(train), "targets", start=last.done) as show,
        hosts.watch_for_stop() as stopping,
    ):
        start = last if last.done else None
        marks = [(last.done, time.monotonic())]
        try:
            stream = label_solve.accumulate(network, support, train, start)
            for chunk, last in enumerate(stream):
                marks = [*marks[-2:], (last.done, time.monotonic())]
                targets, seconds = (b - a for a, b in zip(*marks[-2:], strict=True))
                pairs = len(support) * targets
                if len(marks) == 3 and not said:  # the first chunk compiled
                    said = True
                    images = len(train) - last.done + closing_images
                    progress.announce_duration(images / targets * seconds, "chunk", seconds, pairs)
                write(last.done, pairs_per_second=pairs / seconds)
                rate = progress.format_amount(pairs / seconds)
                show(last.done, **{"pairs/s": rate})
                if time.monotonic() - saved > checkpoints.SECONDS_BETWEEN_CHECKPOINTS:
                    save()
                    saved = time.monotonic()
                if stopping(chunk):
                    raise KeyboardInterrupt
        except (KeyboardInterrupt, *hosts.LOST_HOST_ERRORS):
            save()
            raise
    save()
    return last, time.monotonic() - began


def _announce_sums(
    network: InfiniteNetwork, n: int, train: Examples, done: int, closing_images: int
) -> None:
    """Say how long Label Solve will take before it begins, if its first two chunks take long."""
    if network.feature_map is not None:  # no pairs of images are evaluated
        return
    left = len(train) - done
    soon = min(2 * label_solve.chunk_size(network, n, train), left)
    tile = timing.time_tile(network, train, n * soon)
    if tile is not None:
        seconds = n * (left + closing_images) * tile.seconds / tile.pairs
        progress.announce_duration(seconds, "tile", *tile)


def _restore_sums(
    run: run_folder.Run, rows: int, train: Examples
) -> tuple[label_solve.Sums, float]:
    """The sums of the last checkpoint and the seconds they took; nothing summed without one."""
    found = hosts.load_checkpoint(run)
    if found is None:
        return label_solve.Sums(0, np.zeros((0, 0)), np.zeros((0, 0))), 0.0
    arrays, meta = found
    with explain_mismatch(run):
        done, seconds = int(meta["done"]), float(meta["seconds"])
        gram_tt, gram_ty = arrays["gram_tt"], arrays["gram_ty"]
        require(0 <= done <= len(train), f"{done} of {len(train)} targets are done")
        k = len(train.data.classes)
        shapes = (gram_tt.shape, gram_ty.shape)
        require(shapes == ((rows, rows), (rows, k)), "the sums' shapes are others")
    return label_solve.Sums(done, gram_tt, gram_ty), seconds
