"""Run a method on prepared input: what comes out, and the record of how it was made."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from dsdistill.commands import through_backbone
from dsdistill.commands.prepare import Prepared
from dsdistill.harness import machine, memory
from dsdistill.harness.data.datasets import Splits
from dsdistill.harness.data.labeled_images import Examples, centred_one_hot
from dsdistill.harness.evaluation.held_out import Predict
from dsdistill.harness.runs import progress, run_folder
from dsdistill.loops import kip_loop, timing
from dsdistill.loops.kip_loop import OnStep
from dsdistill.loops.label_solve_loop import accumulate_sums
from dsdistill.loops.plan import Plan
from dsdistill.methods import initial_support, label_solve, pyramid, ridge
from dsdistill.methods.initial_support import Support
from dsdistill.methods.kip import KipObjective
from dsdistill.methods.pixel_kip import PixelObjective
from dsdistill.options import KipOptions, LabelSolveOptions, RunOptions

EVALUATION_RIDGE = 1e-6  # relative; for Label Solve, whose `--ridge` is absolute
VERSIONS = ("dsdistill", "jax", "jaxlib", "numpy", "optax")


@dataclass(frozen=True, eq=False)
class Outcome:
    """Result of a method.

    Attributes:
        before: The support that it started from.
        images, labels: The distilled set.
        ridge: Ridge for prediction from the set, relative.
        fit: Fits the regression to a support's images and labels; it predicts from images.
        figures: Figures of the search by name, such as the chosen step.
        seconds: Duration of the search, summed over resumes.
        stopped: When and why the search ended early; None if it did not.
    """

    before: Support
    images: Float[np.ndarray, "n h w c"]
    labels: Float[np.ndarray, "n k"]
    ridge: float
    fit: Callable[[np.ndarray, np.ndarray], Predict]
    figures: Mapping[str, float]
    seconds: float
    stopped: str | None = None


def kip_outcome(
    options: KipOptions,
    run: run_folder.Run,
    prepared: Prepared,
    on_step: OnStep = lambda step, figures: None,
) -> Outcome:
    """Learn a support with KIP, from the run's last checkpoint if there is one.

    Args:
        options: Options that `prepared` was made from.
        run: Folder of metrics and checkpoints.
        prepared: Checked input.
        on_step: Called after each step with its number and its figures.

    Raises:
        UserError: If a step does not fit into memory, or the loss diverges.
        KeyboardInterrupt: If stopped by hand, after a checkpoint.
    """
    support = _support(options, prepared)
    phases, train, validation = prepared.phases, prepared.train, prepared.validation
    if prepared.encoder is not None:
        on_features = through_backbone.phases_on_features(
            options,
            run.folder / through_backbone.FEATURES_FILE if run.writes else None,
            prepared.encoder,
            phases[-1],
            prepared.splits,
        )
        phases, train, validation = on_features
    objective = phases[-1].objective
    train = objective.load_targets(train)
    plan = Plan(
        phases,
        _target_batch(options, run, prepared, support, train),
        options.seed,
        options.patience,
        min(options.validation_images, len(validation)),
        closing_images=_closing_images(options, prepared),
    )
    best, last = kip_loop.run_to_end(run, plan, support, train, validation, on_step)
    figures = {
        "best_step": best.step,
        "last_step": last.done,
        "validation_accuracy": best.accuracy,
        "validation_loss": best.loss,
    }
    stopped = None
    if last.done < plan.steps:
        waited = f"{options.patience} validation{'' if options.patience == 1 else 's'}"
        stopped = f"at step {last.done} of {plan.steps}: no lower validation loss in {waited}"
    fit = objective.fit_on_images if isinstance(objective, PixelObjective) else objective.fit
    assert options.ridge is not None
    return Outcome(
        support, best.images, best.labels, options.ridge, fit, figures, last.seconds, stopped
    )


def _support(options: KipOptions, prepared: Prepared) -> Support:
    """Draw the initial support, or take the set of `--init`."""
    if prepared.encoder is not None and options.init == "noise":
        return _noise_images(options, prepared)
    if prepared.init is None:
        return initial_support.draw_support(
            prepared.train,
            prepared.images_per_class,
            noise=options.init == "noise",
            corruption=options.corruption,
            seed=options.seed,
        )
    if initial_support.overlaps_validation(
        prepared.init, prepared.splits.digest, options.validation_fraction
    ):
        progress.say(
            "note: the set of --init was made with images that this run validates on, so its "
            "validation accuracy is too high: make the set with --validation-fraction "
            f"{options.validation_fraction:g}"
        )
    return initial_support.from_set(
        prepared.init,
        prepared.train.preprocess,
        corruption=options.corruption,
        seed=options.seed,
    )


def _noise_images(options: KipOptions, prepared: Prepared) -> Support:
    """Images of noise in [0, 1], of the colours of photographs."""
    classes, (h, w, c) = len(prepared.splits.train.classes), prepared.splits.train.shape
    n = prepared.images_per_class * classes
    levels = pyramid.noise(jax.random.key(options.seed), (n, h, w, c))
    labels = centred_one_hot(np.repeat(np.arange(classes), prepared.images_per_class), classes)
    return Support(np.asarray(pyramid.render(levels)), labels, np.zeros((n, h, w, 1), np.bool))


def _target_batch(
    options: KipOptions, run: run_folder.Run, prepared: Prepared, support: Support, train: Examples
) -> int:
    """Targets per step: as requested, or measured once per run to fit the requested duration."""
    assert options.target_batch is not None  # `with_defaults` has set it
    request = timing.parse_target_batch(options.target_batch)
    if isinstance(request, int):
        return request

    def measure() -> int:
        objective = prepared.phases[-1].objective
        assert isinstance(objective, KipObjective), "a time is refused with --features"
        size = timing.choose_target_batch(objective, support, train, request, seed=options.seed)
        progress.say(
            f"target batch: {size} images, for steps of {progress.format_duration(request)}"
        )
        return size

    return run.choose_once("target_batch", measure)


def _closing_images(options: KipOptions, prepared: Prepared) -> int:
    """Number of predictions at the end of a run, of the initial and the final support."""
    fresh = len(prepared.validation) if len(prepared.validation) > options.validation_images else 0
    return 2 * (fresh + len(prepared.splits.test))


def label_solve_outcome(
    options: LabelSolveOptions, run: run_folder.Run, prepared: Prepared
) -> Outcome:
    """Draw images and solve for their labels, from the run's last checkpoint if there is one.

    Args:
        options, run, prepared: As for `kip_outcome`.

    Raises:
        UserError: If the support's kernel is singular or does not fit into memory.
        KeyboardInterrupt: If stopped by hand, after a checkpoint.
    """
    support = initial_support.draw_support(
        prepared.train, prepared.images_per_class, noise=False, corruption=0, seed=options.seed
    )
    closing = len(prepared.splits.test)
    sums, seconds = accumulate_sums(run, prepared.network, support.images, prepared.train, closing)
    labels = label_solve.solve(prepared.network, support.images, sums, options.ridge)
    # The pixels stay; the solved labels are compared with the one-hot ones.
    fit = functools.partial(ridge.fit, prepared.network, ridge=EVALUATION_RIDGE)
    return Outcome(support, support.images, labels, EVALUATION_RIDGE, fit, {}, seconds)


def provenance(
    options: RunOptions,
    run: run_folder.Run,
    prepared: Prepared,
    outcome: Outcome,
    test_figures: Mapping[str, float],
) -> dict[str, Any]:
    """Record how a set was made, JSON-compatible, as its file stores it.

    Args:
        options, run, prepared: As for `kip_outcome`.
        outcome: What the method returned.
        test_figures: Figures on the test images by name; empty where there are none.
    """
    figures = {**test_figures, **outcome.figures}
    kernel = prepared.network.name
    if prepared.encoder is not None and isinstance(options, KipOptions):
        kernel += f" on the features of {through_backbone.short_name(options.features)}"
    return describe_run(run, prepared.splits, options.seed, figures, outcome.seconds, VERSIONS) | {
        "kernel": kernel,
        "engine": prepared.network.engine,
        "evaluation_ridge": outcome.ridge,
        "stopped": outcome.stopped,
        **({} if prepared.encoder is None else {"backbone": prepared.encoder.record()}),
    }


def describe_run(
    run: run_folder.Run,
    splits: Splits,
    seed: int,
    figures: Mapping[str, float],
    seconds: float,
    packages: Sequence[str],
) -> dict[str, Any]:
    """Record what every method records of a run, JSON-compatible.

    Args:
        run: The run.
        splits: Its data.
        seed: Seed of its random choices.
        figures: Figures by name; one that is not a number becomes None.
        seconds: Duration, summed over resumes.
        packages: Packages whose versions are recorded.
    """
    config = {k: v for k, v in run.config.items() if k not in ("data_root", run_folder.INPUTS_KEY)}
    return {
        "method": run.config[run_folder.COMMAND_KEY],
        "config": config,
        "data": {
            "name": splits.name,
            "source": run.config.get("data"),
            "sha256": splits.digest,
            "train": len(splits.train),
            "validation": len(splits.validation),
            "test": len(splits.test),
        },
        "inputs": run.config[run_folder.INPUTS_KEY],
        "seed": seed,
        "metrics": {k: None if v != v else v for k, v in figures.items()},
        "seconds": seconds,
        "peak_memory": memory.peak(),
        "machine": {
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "hosts": jax.process_count(),
            "platform": machine.describe(),
        },
        "versions": {name: metadata.version(name) for name in packages},
    }
