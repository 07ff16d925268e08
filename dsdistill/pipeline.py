"""One distillation run: a data set in, a run's folder out.

load -> fit preprocessing -> distil -> read the test set once -> save the picture and the set
"""

import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Float

from dsdistill import kip, label_solve, ridge
from dsdistill.harness import artifact, datasets, labeled, memory, pictures, preprocess, runs
from dsdistill.harness.datasets import Splits
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluate import accuracy
from dsdistill.harness.labeled import Examples
from dsdistill.kernels import gram, networks
from dsdistill.options import Kip, LabelSolve, Source
from dsdistill.search import accumulated, search

EVALUATION_RIDGE = 1e-6  # relative, for Label Solve, whose own ridge is absolute
NOT_STORED = ("out", "resume")  # options that say where the run is, not what it is
VERSIONS = ("dsdistill", "jax", "jaxlib", "numpy", "optax")
FREE = ("data_root",)  # the data may have moved between start and resume

Options = TypeVar("Options", bound=Source)


@dataclass(frozen=True, eq=False)
class Setting:
    """What every method starts from, once all of the input has been checked."""

    splits: Splits
    train: Examples
    validation: Examples
    network: networks.Network


@dataclass(frozen=True, eq=False)
class Result:
    """What every method ends with.

    Attributes:
        before: The images at the start.
        images, labels: The distilled set.
        ridge: For prediction from it, relative.
        figures: Of the search, such as the step that was chosen.
        seconds: Of the search, over all starts.
    """

    before: Float[np.ndarray, "n h w c"]
    images: Float[np.ndarray, "n h w c"]
    labels: Float[np.ndarray, "n k"]
    ridge: float
    figures: Mapping[str, float]
    seconds: float


def run_kip(options: Kip) -> Path:
    """Run `dsdistill kip` and return the run's folder.

    Raises:
        UserError: For input that breaks a rule, or a loss that is not finite.
        KeyboardInterrupt: After a checkpoint, if stopped by hand.
    """
    _check_kip(options)
    return _run(options, "kip", _kip)


def run_label_solve(options: LabelSolve) -> Path:
    """Run `dsdistill ls` and return the run's folder.

    Raises:
        UserError: For input that breaks a rule.
        KeyboardInterrupt: After a checkpoint, if stopped by hand.
    """
    return _run(options, "ls", _label_solve)


def _run(
    options: Options,
    method: str,
    distil: Callable[[Options, runs.Run, Setting], Result],
) -> Path:
    _check(options)
    stem = f"{method}-{Path(options.data).stem}"
    folder = options.out or runs.next_free(stem)
    if options.resume:
        run, options = _reopened(folder, options, method)
        setting = _setting(options)
    else:
        runs.check_free(folder, artifact.FILE)
        setting = _setting(options)  # wrong input leaves no folder behind
        run = runs.start(folder, _stored(options, method), result=artifact.FILE)
    return _finish(options, run, setting, distil(options, run, setting))


def _setting(options: Source) -> Setting:
    network = networks.parse(options.kernel, options.depth)
    splits = datasets.load(
        options.data,
        root=options.data_root,
        image_size=options.image_size,
        validation_fraction=options.validation_fraction,
    )
    labeled.check_per_class(splits.train, options.images_per_class)
    gram.plan(network, 1, 1, splits.train.shape, gradient=isinstance(options, Kip))  # may refuse
    fitted = preprocess.fit(options.preprocess, splits.train.chunks, splits.train.shape)
    train, validation = Examples(splits.train, fitted), Examples(splits.validation, fitted)
    return Setting(splits, train, validation, network)


def _kip(options: Kip, run: runs.Run, setting: Setting) -> Result:
    objective = kip.Objective(
        setting.network,
        options.ridge,
        options.learning_rate,
        options.learn_labels,
        options.augment,
    )
    support = kip.initial_support(
        setting.train,
        options.images_per_class,
        noise=options.init == "noise",
        corruption=options.corruption,
        seed=options.seed,
    )
    best, seconds = search(
        run,
        objective,
        support,
        setting.train,
        setting.validation,
        steps=options.steps,
        target_batch=options.target_batch,
        seed=options.seed,
    )
    figures = {
        "best_step": best.step,
        "validation_accuracy": best.accuracy,
        "validation_loss": best.loss,
    }
    return Result(support.images, best.images, best.labels, options.ridge, figures, seconds)


def _label_solve(options: LabelSolve, run: runs.Run, setting: Setting) -> Result:
    support = kip.initial_support(
        setting.train, options.images_per_class, noise=False, corruption=0, seed=options.seed
    )
    sums, seconds = accumulated(run, setting.network, support.images, setting.train)
    labels = label_solve.solve(setting.network, support.images, sums, options.ridge)
    # The pixels stay; the natural labels are what the solved ones are compared with.
    return Result(support.images, support.images, labels, EVALUATION_RIDGE, {}, seconds)


def _finish(options: Source, run: runs.Run, setting: Setting, result: Result) -> Path:
    """Read the test set, for the first time, and write what the run has found."""
    splits, fitted = setting.splits, setting.train.preprocess
    classes = splits.train.classes
    hard = np.repeat(np.arange(len(classes)), options.images_per_class)
    natural = labeled.centred_one_hot(hard, len(classes))
    test = Examples(splits.test, fitted)
    figures = {
        "test_accuracy": _accuracy(setting, result.images, result.labels, result.ridge, test),
        "initial_test_accuracy": _accuracy(setting, result.before, natural, result.ridge, test),
        **result.figures,
    }
    provenance = {
        "method": run.config["command"],
        "config": {k: v for k, v in run.config.items() if k != "data_root"},
        "kernel": setting.network.name,
        "engine": setting.network.engine,
        "evaluation_ridge": result.ridge,
        "data": {
            "name": splits.name,
            "source": run.config["data"],
            "sha256": splits.digest,
            "train": len(splits.train),
            "validation": len(splits.validation),
            "test": len(splits.test),
        },
        "seed": options.seed,
        "metrics": {k: None if v != v else v for k, v in figures.items()},
        "seconds": result.seconds,
        "peak_memory": memory.peak(),
        "machine": {"device": jax.devices()[0].device_kind, "platform": platform.platform()},
        "versions": {name: metadata.version(name) for name in VERSIONS},
    }
    distilled = artifact.Distilled(result.images, result.labels, fitted, classes, provenance)
    picture = run.folder / "distilled.png"
    pictures.write_grid(picture, result.before, result.images, hard, classes, fitted)
    artifact.save(run.folder / artifact.FILE, distilled)
    return run.folder


def _accuracy(
    setting: Setting, images: np.ndarray, labels: np.ndarray, strength: float, test: Examples
) -> float:
    return accuracy(ridge.fit(setting.network, images, labels, strength), test)


def _stored(options: Source, method: str) -> dict[str, Any]:
    """The options as they stand in `config.json`: paths hold from every folder."""
    named = {name: v for name, v in asdict(options).items() if name not in NOT_STORED}
    if options.data not in datasets.NAMES and Path(options.data).expanduser().exists():
        named["data"] = str(Path(options.data).expanduser().resolve())
    paths = {name: str(v) for name, v in named.items() if isinstance(v, Path)}
    return {"command": method} | named | paths


def _reopened(folder: Path, options: Options, method: str) -> tuple[runs.Run, Options]:
    """The run to resume, and the options that it was started with."""
    run = runs.start(
        folder,
        _stored(options, method),
        result=artifact.FILE,
        resume=True,
        defaults=_stored(type(options)(), method) | {"command": None},
        free=FREE,
    )
    named = {k: v for k, v in run.config.items() if k != "command"}
    root = Path(named.pop("data_root"))
    return run, replace(options, **named, data_root=root)


def _check(options: Source) -> None:
    if options.resume and options.out is None:
        raise UserError("--resume needs --out, the folder of the run to continue")
    if options.seed < 0:
        raise UserError(f"--seed must not be negative, got {options.seed}")
    if options.images_per_class < 1:
        raise UserError(f"--images-per-class must be at least 1, got {options.images_per_class}")
    ridge_value = getattr(options, "ridge", 1.0)
    if not ridge_value > 0:
        raise UserError(f"--ridge must be positive, got {ridge_value}")


def _check_kip(options: Kip) -> None:
    if options.steps < 1:
        raise UserError(f"--steps must be at least 1, got {options.steps}")
    if options.target_batch < 1:
        raise UserError(f"--target-batch must be at least 1, got {options.target_batch}")
    if not 0 < options.learning_rate < float("inf"):
        raise UserError(f"--learning-rate must be positive, got {options.learning_rate}")
    if not 0 <= options.corruption <= 1:
        raise UserError(f"--corruption must be a fraction in [0, 1], got {options.corruption}")
