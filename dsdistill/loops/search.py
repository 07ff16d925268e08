"""The long part of a run: checkpointed and resumable, and of KIP's supports the best is chosen."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress, run_folder
from dsdistill.kernels.networks import InfiniteNetwork
from dsdistill.loops import selection, timing
from dsdistill.loops.phases import Plan, Snapshot, announce, snapshots
from dsdistill.loops.selection import Candidate, Scorer
from dsdistill.methods import kip, label_solve
from dsdistill.methods.initial_support import Support
from dsdistill.parallel import hosts

SECONDS_BETWEEN_CHECKPOINTS = 10.0  # seconds
SNAPSHOT_FIELDS = (
    "done",
    "seconds",
    "lowest",
    "stale",
    "limit",
    "high",
)  # of a snapshot, in a checkpoint


def search_support(
    run: run_folder.Run, plan: Plan, support: Support, train: Examples, validation: Examples
) -> tuple[Candidate, Snapshot]:
    """Run KIP to the end, from the run's last checkpoint if there is one.

    Returns:
        The best support, with its figures on all validation images, and the state at the end.

    Raises:
        UserError: If a step does not fit into memory, before anything is computed; if the loss is
            not finite, or stays far above what it was at first, after a checkpoint of the last good
            step.
        RuntimeError, ValueError: If another host is lost, see `hosts.LOST_HOST_ERRORS`; after
            the same.
        KeyboardInterrupt: After a checkpoint of the last whole step.
    """
    sample = selection.subset(validation, plan.validation_images, plan.seed)
    judge = _make_scorer(plan, sample)
    found = hosts.load_checkpoint(run)
    for phase in plan.phases:
        kip.check_memory(phase.objective, support, train, plan.target_batch)
    restored = _restore_snapshot(run, found, plan, support) if found else None
    announce(plan, len(support.images), train, restored.done if restored else 0)
    last = good = restored or _first_snapshot(plan, support, judge)
    saved = time.monotonic()
    stream = snapshots(plan, support, train, judge, last)
    with (
        _metrics(run, last.done) as write,
        contextlib.closing(stream),
        hosts.watch_for_stop() as stopping,
    ):
        try:
            for reached, figures in stream:
                write(reached.done, **figures)
                last = reached  # a stop in between repeats the step, and writes its line
                if stopping(last.done):
                    raise KeyboardInterrupt
                if last.high:
                    continue  # perhaps diverging: not worth keeping yet
                good = last
                if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                    _save(run, last)
                    saved = time.monotonic()
        except (UserError, *hosts.LOST_HOST_ERRORS):
            _save(run, good)
            raise
        except KeyboardInterrupt:
            _save(run, last)
            raise
    _save(run, last)
    return _choose_candidate(plan, last, sample, validation), last


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
        KeyboardInterrupt, RuntimeError, ValueError: As `search_support`; after a checkpoint of
            the last whole chunk.
    """
    last, spent = _restore_sums(run, len(support), train)
    _announce_sums(network, len(support), train, last.done, closing_images)
    said = False  # the expected duration by the run itself
    saved, began = time.monotonic(), time.monotonic() - spent

    def save() -> None:
        if not last.done:
            return  # nothing to go on from
        arrays = {name: np.asarray(getattr(last, name)) for name in ("gram_tt", "gram_ty")}
        run.save_state(arrays, {"done": last.done, "seconds": time.monotonic() - began})

    with (
        _metrics(run, last.done) as write,
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
                if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                    save()
                    saved = time.monotonic()
                if stopping(chunk):
                    raise KeyboardInterrupt
        except (KeyboardInterrupt, *hosts.LOST_HOST_ERRORS):
            save()
            raise
    save()
    return last, time.monotonic() - began


@contextlib.contextmanager
def _metrics(run: run_folder.Run, done: int) -> Iterator[Callable[..., None]]:
    """What records the figures of a step, after those that are done."""
    if not run.writes:
        yield lambda step, **figures: None
        return
    with run_folder.Metrics(run.folder, resume_from=done if run.resumed else None) as metrics:
        yield metrics.write


def _announce_sums(
    network: InfiniteNetwork, n: int, train: Examples, done: int, closing_images: int
) -> None:
    """Say how long Label Solve will take before it begins, if its first two chunks take long."""
    left = len(train) - done
    soon = min(2 * label_solve.chunk_size(network, n, train), left)
    tile = timing.time_tile(network, train, n * soon, "forward")
    if tile is not None:
        seconds = n * (left + closing_images) * tile.seconds / tile.pairs
        progress.announce_duration(seconds, "tile", *tile)


def _restore_sums(run: run_folder.Run, n: int, train: Examples) -> tuple[label_solve.Sums, float]:
    """The sums of the last checkpoint and the seconds they took; nothing summed without one."""
    found = hosts.load_checkpoint(run)
    if found is None:
        return label_solve.Sums(0, np.zeros((0, 0)), np.zeros((0, 0))), 0.0
    arrays, meta = found
    with _explain_mismatch(run):
        done, seconds = int(meta["done"]), float(meta["seconds"])
        gram_tt, gram_ty = arrays["gram_tt"], arrays["gram_ty"]
        _require(0 <= done <= len(train), f"{done} of {len(train)} targets are done")
        k = len(train.data.classes)
        _require(gram_tt.shape == (n, n) and gram_ty.shape == (n, k), "the sums' shapes are others")
    return label_solve.Sums(done, gram_tt, gram_ty), seconds


@contextlib.contextmanager
def _explain_mismatch(run: run_folder.Run) -> Iterator[None]:
    """Say in one line that a checkpoint is not of this run."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise run_folder.RunError(
            f"{run.folder / run_folder.CHECKPOINT} is not of this run or of another version "
            f"({reason}){run_folder.REMEDY}"
        ) from error


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _make_scorer(plan: Plan, validation: Examples, unit: str | None = None) -> Scorer:
    objective = plan.phases[-1].objective
    return selection.scorer(objective.networks[0], objective.ridge, validation, unit=unit)


def _choose_candidate(
    plan: Plan, last: Snapshot, sample: Examples, validation: Examples
) -> Candidate:
    """The better of the best and the last, by all validation images."""
    if len(sample) == len(validation):
        return last.best
    images, labels = np.asarray(last.state.images), np.asarray(last.state.labels)
    end = replace(last.best, step=last.done, images=images, labels=labels)
    candidates = [last.best] if last.best.step == last.done else [last.best, end]
    return selection.choose_final(candidates, _make_scorer(plan, validation, "validation images"))


def _save(run: run_folder.Run, snapshot: Snapshot) -> None:
    best = snapshot.best
    arrays = {"best.images": best.images, "best.labels": best.labels}
    for i, leaf in enumerate(jax.tree.leaves(snapshot.state)):
        arrays[f"state.{i}"] = np.asarray(leaf)
    counts = {name: getattr(snapshot, name) for name in SNAPSHOT_FIELDS}
    figures = {"step": best.step, "accuracy": best.accuracy, "loss": best.loss}
    run.save_state(arrays, counts | {"best": figures})


def _first_snapshot(plan: Plan, support: Support, judge: Scorer) -> Snapshot:
    state = kip.initial_state(plan.phases[0].objective, support)
    return Snapshot(0, state, judge(0, state.images, state.labels), 0.0)


def _restore_snapshot(
    run: run_folder.Run, found: hosts.Checkpoint, plan: Plan, support: Support
) -> Snapshot:
    """That of a checkpoint.

    Raises:
        RunError: If it is not one of this run.
    """
    state = kip.initial_state(plan.phases[0].objective, support)
    arrays, meta = found
    leaves, structure = jax.tree.flatten(state)
    with _explain_mismatch(run):
        stored = [arrays[f"state.{i}"] for i in range(len(leaves))]
        for i, (old, new) in enumerate(zip(stored, leaves, strict=True)):
            same = old.shape == np.shape(new) and old.dtype == np.asarray(new).dtype
            _require(same, f"state.{i} is {old.dtype} {old.shape}")
        best = Candidate(images=arrays["best.images"], labels=arrays["best.labels"], **meta["best"])
        _require(best.images.shape == support.images.shape, "the best images' shape is another")
        _require(best.labels.shape == support.labels.shape, "the best labels' shape is another")
        counts = {name: meta[name] for name in SNAPSHOT_FIELDS}
        _require(all(type(x) in (int, float) for x in counts.values()), "a figure is no number")
        _require(type(meta["done"]) is int and 0 <= meta["done"] <= plan.steps, "done is another")
    state = jax.tree.unflatten(structure, [jnp.asarray(array) for array in stored])
    return Snapshot(state=state, best=best, **counts)
