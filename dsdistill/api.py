"""The library: arrays in, a distilled set out.

    import dsdistill

    small = dsdistill.kip(images, labels, images_per_class=10)
    chosen = dsdistill.select(images, labels, images_per_class=10, features="runs/backbone")
    predict = small.predictor()
    report = dsdistill.evaluate(small, train=(images, labels), test=(x, y), learners=["ridge"])

Nothing is written unless a path is given. Images are channels last, uint8 or floats in [0, 1];
labels are integers or names. Progress goes to standard error; `progress=False` silences it.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dsdistill.commands import evaluate as evaluation
from dsdistill.commands import (
    evaluation_parts,
    outcomes,
    prepare,
    select_images,
    through_backbone,
    training_data,
)
from dsdistill.commands import select as selection
from dsdistill.commands.outcomes import Outcome
from dsdistill.commands.prepare import Prepared
from dsdistill.distilled import Distilled, Kernel, as_network, load
from dsdistill.harness import paths
from dsdistill.harness.data import arrays, datasets, distilled_set, origin
from dsdistill.harness.data.arrays import ArrayLike
from dsdistill.harness.data.datasets import Splits
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.data.labeled_images import LabeledImages
from dsdistill.harness.errors import UserError, name_arguments
from dsdistill.harness.evaluation import controls as control_sets
from dsdistill.harness.evaluation.protocol import Learner
from dsdistill.harness.evaluation.result_cache import ResultCache
from dsdistill.harness.reports import report as reports
from dsdistill.harness.reports.report import Report
from dsdistill.harness.reports.write import write_report
from dsdistill.harness.runs import progress as progress_display
from dsdistill.harness.runs import run_folder
from dsdistill.harness.runs.options import Storage
from dsdistill.harness.runs.run_folder import Run
from dsdistill.kernels import neural_tangents, notation
from dsdistill.kernels.neural_tangents import NeuralTangents
from dsdistill.loops.kip_loop import OnStep
from dsdistill.methods import initial_support, stored_kernel
from dsdistill.options import (
    EARLIER,
    EvaluateOptions,
    KipOptions,
    LabelSolveOptions,
    RunOptions,
    SelectOptions,
    with_defaults,
)
from dsdistill.parallel import devices, hosts

Pair = tuple[ArrayLike, ArrayLike]  # images and labels
DATA_NAME = "arrays"  # name of a caller's data in provenance and reports
# How messages of the commands read to who calls a function.
_PHRASES = {"--resume goes on": "the same call goes on", "--out": "checkpoint"}
_TEXTS = ("preprocess", "networks", "outer", "optimizer", "schedule", "by")
# Options about files, hosts and backbones are the commands' alone.
_FILE_OPTIONS = ("data", "data_root", "image_size", "channels", "out", "resume", "hosts")
STORAGE = Storage(unstored=(*_FILE_OPTIONS, "features", *through_backbone.OPTIONS), free=())


def kip(
    images: ArrayLike,
    labels: ArrayLike,
    *,
    images_per_class: int | None = None,
    kernel: Kernel = KipOptions.kernel,
    networks: Literal["fresh", "pool"] | None = None,
    steps: int | None = None,
    validation: Pair | None = None,
    validation_fraction: float = KipOptions.validation_fraction,
    classes: Sequence[str] | None = None,
    preprocess: Literal["standardise", "zca", "none", "centre"] | None = None,
    init: str | os.PathLike[str] | DistilledSet = KipOptions.init,
    outer: Literal["mse", "ce"] | None = None,
    optimizer: Literal["adam", "gauss-newton"] = KipOptions.optimizer,
    learning_rate: float | None = None,
    label_learning_rate: float | None = None,
    learn_labels: bool = KipOptions.learn_labels,
    support_flips: bool = KipOptions.support_flips,
    schedule: Literal["constant", "cosine"] | None = None,
    target_batch: int | str | None = None,
    damping: float = KipOptions.damping,
    ridge: float = KipOptions.ridge,
    depth: int | None = None,
    w_std: float = KipOptions.w_std,
    b_std: float = KipOptions.b_std,
    augment: str | None = None,
    warm_up: str | None = None,
    corruption: float = KipOptions.corruption,
    patience: int | None = None,
    validation_images: int = KipOptions.validation_images,
    seed: int = KipOptions.seed,
    checkpoint: str | os.PathLike[str] | None = None,
    on_step: OnStep = lambda step, figures: None,
    progress: bool = True,
) -> Distilled:
    """Learn a few images with Kernel Inducing Points.

    Gradient descent changes the images until kernel ridge regression on them predicts the labels
    of the training images. The step with the lowest validation error is returned. The same
    arguments give the same set on the same devices, and with `use_all_cores` that of
    `dsdistill kip`, whose `--help` says more of each.

    Args:
        images: (n, h, w) or (n, h, w, 1 or 3), uint8 or floats in [0, 1].
        labels: (n,) integers or names.
        images_per_class: Size of the distilled set; by default 10, or that of `init`.
        kernel: `fc`, `conv`, `convnet`, `convnet3`, `myrtle`, a sequence such as
            `CR-3xCRP-flatten`; or a network of neural-tangents, as a `stax` triple, a kernel
            function, or `module:attribute`, whose module is imported. Of several names, separated
            by commas, each step draws one. `features:convnet` or `features:convnet:WIDTH`: features
            of finite networks.
        networks: Where the steps take those from: `fresh` random ones for every step, or a `pool`
            that is trained on the set meanwhile, the default.
        steps: Steps of the optimizer; by default 1000 of adam, 100 of gauss-newton.
        validation: Images and labels that choose the best step; give them to `evaluate` too. By
            default a share of the training images, the same for every seed and for `evaluate`.
        validation_fraction: That share; 0 keeps the last step.
        classes: Class names in label order; by default the distinct labels, sorted.
        preprocess: Normalisation of the pixels; by default centre for features (images of one pixel
            and neither 1 nor 3 channels), zca for colour and a convolutional kernel where it fits
            into memory, else standardise.
        init: `real` images, `noise`, or a distilled set (or its path), whose labels are kept.
        outer: Loss of the predicted training images: `mse` (the default), the squared error, as in
            the papers, or `ce`, the cross-entropy of the predictions times the scale that fits them
            best.
        optimizer: `adam`, as in the papers, or `gauss-newton`, which needs far fewer steps.
        learning_rate: Rate of adam (0.04), or the part of a step of gauss-newton taken (0.3).
        label_learning_rate: Rate of adam for the labels; by default that of the images.
        learn_labels: Whether to learn the labels too.
        support_flips: Whether mirror images of the distilled ones count as further images.
        schedule: Course of the rates; by default constant for adam, cosine for gauss-newton.
        target_batch: Training images per step (5000, or 1000), or the time of a step, such as "2s".
        damping: Damping of gauss-newton, relative to the mean curvature.
        ridge: Ridge of the regression, relative to the mean of the kernel's diagonal.
        depth: Hidden layers or blocks of the kernel.
        w_std, b_std: Standard deviation of the network's weights and biases.
        augment: Random changes of the target images before their normalisation: `flip`, `shift`,
            `rotate`, or `all`.
        warm_up: Cheaper kernel to begin with, `KERNEL` or `KERNEL:STEPS`.
        corruption: Share of each image's pixels that stay noise.
        patience: Validations in a row without a better one that end the search; None for no end.
        validation_images: Validation images that judge during the search; at its end all do.
        seed: Seed of all random choices.
        checkpoint: Folder of the run. The same call again goes on from where it was stopped, to
            the bit, and returns the finished set at once. It refuses other data and arguments.
        on_step: Called after each step with its number and its figures by name, such as `loss`.
        progress: Whether to show progress on standard error.

    Raises:
        UserError: If an argument breaks a rule, or the loss diverges; a ValueError of one line.
        KeyboardInterrupt: If stopped; with `checkpoint` after saving the last step.

    Source: Nguyen, Chen and Lee (2021), arXiv:2011.00050.
    """
    given = locals()
    with _call(progress):
        if validation is not None and validation_fraction != KipOptions.validation_fraction:
            raise UserError("validation_fraction has no effect with validation: leave it out")
        start = _initial_set(init)
        options = _options(KipOptions, given | {"init": "real" if start else init})
        splits = _splits(images, labels, classes, validation, validation_fraction)
        digest = training_data.digest(start) if start else None
        prepared = prepare.prepare_arrays(
            options,
            splits,
            start,
            digest,
            network=as_network(kernel),
            chosen=_stored_choices(checkpoint),
        )

        def search(run: Run) -> Outcome:
            return outcomes.kip_outcome(options, run, prepared, on_step)

        return _distil("kip", options, prepared, search, checkpoint)


def label_solve(
    images: ArrayLike,
    labels: ArrayLike,
    *,
    images_per_class: int | None = None,
    kernel: Kernel = LabelSolveOptions.kernel,
    classes: Sequence[str] | None = None,
    preprocess: Literal["standardise", "zca", "none", "centre"] | None = None,
    ridge: float = LabelSolveOptions.ridge,
    depth: int | None = None,
    w_std: float = LabelSolveOptions.w_std,
    b_std: float = LabelSolveOptions.b_std,
    validation_fraction: float = LabelSolveOptions.validation_fraction,
    seed: int = LabelSolveOptions.seed,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Distilled:
    """Keep a few real images and solve for their labels with Label Solve.

    The labels are those with which kernel ridge regression fits all training images best.

    Args:
        images, labels, images_per_class, kernel, classes, preprocess, depth, w_std, b_std, seed,
            checkpoint, progress: As for `kip`.
        ridge: Ridge of the solve: absolute, divided by the number of images.
        validation_fraction: Share of the images to leave out; nothing is chosen, so 0 by default.

    Raises:
        UserError: If an argument breaks a rule; a ValueError of one line.
        KeyboardInterrupt: If stopped; with `checkpoint` after saving the last chunk.

    Source: Nguyen, Chen and Lee (2021), arXiv:2011.00050, section 3.
    """
    given = locals()
    with _call(progress):
        options = _options(LabelSolveOptions, given)
        splits = _splits(images, labels, classes, None, validation_fraction)
        prepared = prepare.prepare_arrays(
            options, splits, network=as_network(kernel), chosen=_stored_choices(checkpoint)
        )

        def solve(run: Run) -> Outcome:
            return outcomes.label_solve_outcome(options, run, prepared)

        return _distil("ls", options, prepared, solve, checkpoint)


def select(
    images: ArrayLike,
    labels: ArrayLike,
    *,
    features: str | Callable[[np.ndarray], np.ndarray],
    images_per_class: int | None = None,
    by: Literal["ridge", "centre", "crops"] = SelectOptions.by,
    validation: Pair | None = None,
    validation_fraction: float = SelectOptions.validation_fraction,
    classes: Sequence[str] | None = None,
    ridge: float = SelectOptions.ridge,
    sweeps: int | None = None,
    crops: int | None = None,
    candidates: int | None = None,
    layer: str = SelectOptions.layer,
    device: str = SelectOptions.device,
    seed: int = SelectOptions.seed,
    progress: bool = True,
) -> Distilled:
    """Choose real images, or crops of them, by the features of a trained network.

    No pixel is optimised and every label is hard: what a distilled set has to beat.

    Args:
        images, labels, images_per_class, classes, progress: As for `kip`.
        features: The network that sees the images: the folder of a run of `kd train`, a network
            with published weights, `module:attribute`, which is imported; or a function from
            (m, h, w, c) float32 images in [0, 1] to (m, d) features.
        by: `ridge`: the images from which ridge regression on the features predicts all training
            images best; `centre`: those whose mean feature follows that of their class; `crops`:
            as RDED, four crops in each image (not with a function).
        validation: Images and labels that judge the set. By default a share of the training images,
            the same for every seed and for `evaluate`.
        validation_fraction: That share.
        ridge: Ridge of the regression, relative to the mean of the kernel's diagonal.
        sweeps: How often `ridge` tries to exchange every image; by default 5.
        crops: Random crops of each image; by default 5.
        candidates: Images of each class whose crops are scored; by default 300.
        layer: Layer whose output is the feature.
        device: Where the network computes: `auto`, `cpu`, `cuda` or `cuda:N`.
        seed: Seed of the crops, and of the random images that the set is compared with.

    Returns:
        The set, with pixels in [0, 1]. Its `figures` are accuracies of ridge regression on the
            features of the set (`validation_accuracy`), of random images and of all.

    Raises:
        UserError: If an argument breaks a rule; a ValueError of one line.
    """
    with _call(progress):
        if validation is not None and validation_fraction != SelectOptions.validation_fraction:
            raise UserError("validation_fraction has no effect with validation: leave it out")
        name, function = (features, None) if isinstance(features, str) else (None, features)
        if function and by == "crops":
            raise UserError('by="crops" needs the name of a network, got a function')
        options = select_images.with_defaults(
            SelectOptions(
                DATA_NAME,
                features=name,
                images_per_class=images_per_class,
                by=by,
                ridge=ridge,
                sweeps=sweeps,
                crops=crops,
                candidates=candidates,
                layer=layer,
                device=device,
                validation_fraction=validation_fraction,
                seed=seed,
            )
        )
        select_images.check(options)
        splits = _splits(images, labels, classes, validation, validation_fraction)
        return Distilled.wrap(selection.select_arrays(options, splits, function))


def evaluate(
    distilled: DistilledSet,
    *,
    train: Pair,
    test: Pair,
    validation: Pair | None = None,
    also: Mapping[str, DistilledSet] | None = None,
    learners: Sequence[str | Learner] = ("ridge", "convnet"),
    controls: Sequence[str] = tuple(EvaluateOptions.controls.split(",")),
    seeds: int = EvaluateOptions.seeds,
    steps: int | None = None,
    augment: Literal["none", "crop", "crop-flip"] = "none",
    teacher: Callable[[np.ndarray], np.ndarray] | None = None,
    trust_module: str | None = None,
    device: str = EvaluateOptions.device,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Report:
    """Measure what learners reach on a distilled set, and on controls of the same size.

    Each learner is trained the same way on the set, on random images, coresets and all training
    images. Validation images choose learning rates; the test images are read once per training.

    Args:
        distilled: The set.
        train: Images and labels that the set was distilled from.
        test: Images and labels that neither the set nor any learner has seen.
        validation: Images and labels held out of the training. By default the share of the training
            images that was held out when the set was made, or a tenth.
        also: Further sets of the same data by their names in the report, to be compared with the
            first one; their images are brought to its preprocessing.
        learners: `ridge` (with the set's own kernel), `ridge:KERNEL`, `linear-probe`, `convnet:32`,
            `mlp`, `resnet18`, `kip-fc`, `centred:NAME` and any student of `kd train`;
            `linear-probe@BACKBONE` and `ridge:KERNEL@BACKBONE`, on the features of a run of `kd
            train` or a network with published weights; or any `Learner`.
        controls: Of `random`, `k-means`, `herding`, `full`, `random-soft` (with `teacher`) and
            `random-solved`; empty for none.
        seeds: Trainings of each learner on each set of images.
        steps: Steps of every training of a network.
        augment: Train networks also with these random changes of the images.
        teacher: Function from preprocessed (m, h, w, c) images to (m, k) logits, whose labels of
            the distilled images are a further arm.
        trust_module: Code that the run of a backbone may name as its network, as
            `module:attribute`.
        device: `cpu`, `cuda` or `cuda:N`, for networks.
        out: Folder of the report page, its plots and figures; a stopped call goes on in it.
        progress: Whether to show progress on standard error.

    Returns:
        The report: `rows` with the accuracy of each learner on each kind of data, `scores`,
            `notes`, and all single `results`.

    Raises:
        UserError: If an argument breaks a rule, before anything is trained; a ValueError of one
            line.
    """
    folder = None if out is None else Path(out)
    with _call(progress):
        options = EvaluateOptions(
            Path("the distilled set"),
            controls=",".join(controls),
            seeds=seeds,
            steps=steps,
            augment=augment,
            trust_module=trust_module,
            device=device,
        )
        names = evaluation_parts.parse_controls(options)
        if folder is not None and (folder / reports.FILE_NAME).exists():
            raise UserError(f"{folder} already holds a report: choose another out")
        fraction = origin.validation_fraction(distilled)
        splits = _splits(*train, distilled.classes, validation, fraction, test)
        origin.check_same_data(Path("the set"), distilled, splits, "train")
        for name, other in (also or {}).items():
            if training_data.is_reserved(name):
                raise UserError(f"also cannot name a set {name!r}, as other data of a report are")
            origin.check_same_data(Path(name), other, splits, "train")
        if validation is None:
            _note_seen_validation(distilled, len(train[1]))
        parsed = _learners(learners, distilled, splits, options)
        if not parsed:
            raise UserError("learners must name at least one")
        parts = evaluation_parts.combine(
            distilled,
            splits,
            parsed,
            names,
            teacher=teacher,
            augment=augment != "none",
            further=also or {},
        )
        began = time.monotonic()
        cache = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            cache = ResultCache(folder / "results", shared_arms=control_sets.CONTROLS)
        results = evaluation.run_trainings(parts, list(range(seeds)), cache)
        report = evaluation.build_report(parts, results, time.monotonic() - began)
        if folder is not None:
            evaluation.draw_images(folder, parts)
            write_report(folder, report)
        return report


class ImageData(NamedTuple):
    """A data set as arrays.

    Attributes:
        train, test: (n, h, w, c) images and (n,) class indices.
        validation: The data's own validation part; None where it has none.
        classes: Class names, in the order of the indices.
    """

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray] | None
    classes: tuple[str, ...]


def load_data(
    data: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    channels: Literal[1, 3] | None = None,
    root: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> ImageData:
    """Read a folder of images, an `.npz` file or a named data set into arrays.

    Args:
        data: A folder with one folder of images per class, an `.npz` file, or `digits`, `mnist`,
            `fashion-mnist`, `cifar10`, `cifar100` or `svhn`. Without a test part, a fifth of the
            images becomes one.
        image_size: Height and width in pixels to which images are resized.
        channels: 1 makes all images grayscale, 3 makes them colour.
        root: Folder of the named data sets, downloaded when missing; by default `DSDISTILL_DATA`.
        progress: Whether to say what was read as what.

    Raises:
        UserError: If the data are missing or unreadable; a ValueError of one line.
    """
    with _call(progress):
        splits = datasets.load(
            os.fspath(data),
            root=paths.data_root() if root is None else Path(root),
            image_size=image_size,
            validation_fraction=0,
            channels=channels,
        )
        train, validation, test = (
            (part.images(), part.labels) for part in (splits.train, splits.validation, splits.test)
        )
        own = validation if splits.brings_validation else None
        return ImageData(train, test, own, splits.train.classes)


def load_neural_tangents() -> NeuralTangents:
    """Import neural-tangents, which by itself does not import on current JAX.

    Returns:
        Its modules: `stax`, whose networks are kernels for `kip`, and `nt`.

    Raises:
        UserError: If it is not installed; it comes with the extra `tangents`.
    """
    return neural_tangents.load()


def use_all_cores() -> None:
    """Let JAX compute on every core; to be called once, before JAX computes anything.

    XLA runs most loops on one core, so each core becomes a device. The commands always do this; a
    library leaves such a setting of the whole process to its caller.
    """
    devices.use_all()


@contextlib.contextmanager
def _call(progress: bool) -> Iterator[None]:
    """The surroundings of a call from Python: silent if asked, messages about arguments."""
    with progress_display.silenced(not progress), name_arguments(_PHRASES, _TEXTS):
        yield


def _options(kind: type[Any], given: Mapping[str, Any]) -> Any:
    """The options of a command from the arguments of the same names."""
    names = {field.name for field in fields(kind)} - set(STORAGE.unstored)
    network = as_network(given["kernel"])
    if network is not None:
        for name in ("depth", "w_std", "b_std"):
            if given[name] != getattr(kind, name):
                raise UserError(f"{name} has no effect on a network of your own: leave it out")
    kernel = given["kernel"] if network is None else network.name
    values = {name: given[name] for name in names} | {"kernel": kernel, "data": DATA_NAME}
    return with_defaults(kind(**values))


def _learners(
    given: Sequence[str | Learner],
    distilled: DistilledSet,
    splits: Splits,
    options: EvaluateOptions,
) -> list[Learner]:
    """Learners by their names; `ridge` with the kernel that the set was just made with."""
    network = distilled.network if isinstance(distilled, Distilled) else None
    ready: dict[str, Learner] = {}
    if network is not None and notation.is_code(network.name):
        ready["ridge"] = stored_kernel.learner(distilled, network, remedy="")
    names = [each for each in given if isinstance(each, str) and each not in ready]
    made = evaluation_parts.make_learners(names, distilled, splits, options)
    ready |= zip(names, made, strict=True)
    return [ready[each] if isinstance(each, str) else each for each in given]


def _note_seen_validation(distilled: DistilledSet, count: int) -> None:
    """Say it where the validation images are among those that the set was made of.

    Args:
        distilled: The set.
        count: Number of training images, before any are held out.
    """
    data = distilled.provenance.get("data")
    if isinstance(data, Mapping) and data.get("train") == count:
        progress_display.say(
            "note: the set was made of all training images, including the validation images held "
            "out here: give others as validation"
        )


def _initial_set(init: str | os.PathLike[str] | DistilledSet) -> DistilledSet | None:
    """The set that a search starts from; None for real images and noise."""
    if isinstance(init, DistilledSet):
        return init
    return None if init in initial_support.INIT_NAMES else initial_support.load(str(init))[0]


def _splits(
    images: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str] | None,
    validation: Pair | None,
    fraction: float,
    test: Pair | None = None,
) -> Splits:
    """A caller's arrays as training, validation and test images."""
    if not 0 <= fraction < 1:
        raise UserError(f"validation_fraction must be in [0, 1), got {fraction}")
    train = arrays.labeled_images(images, labels, classes)
    own = None if validation is None else _part("validation", validation, train)
    none = train.select(np.zeros(0, np.int64))
    held_out = none if test is None else _part("test", test, train)
    return datasets.split(DATA_NAME, train, own, held_out, fraction)


def _part(name: str, pair: Pair, train: LabeledImages) -> LabeledImages:
    """Images of another part, with the classes and the shape of the training images."""
    part = arrays.labeled_images(*pair, train.classes)
    if part.shape != train.shape:
        raise UserError(f"{name} images must be {train.shape}, as in train, got {part.shape}")
    return part


def _distil(
    method: str,
    options: RunOptions,
    prepared: Prepared,
    search: Callable[[Run], Outcome],
    checkpoint: str | os.PathLike[str] | None,
) -> Distilled:
    """Run a method, in the folder of a checkpoint if there is one, and assemble its set."""
    options = replace(options, images_per_class=prepared.images_per_class)
    config = {run_folder.COMMAND_KEY: method} | STORAGE.to_json(options)
    folder = None if checkpoint is None else Path(checkpoint)
    result = None if folder is None else folder / distilled_set.FILE_NAME
    if result is not None and result.exists():
        return replace(_finished(result, config, prepared), network=prepared.network)
    with _open_run(folder, config, prepared.chosen) as run, run.clean_up_on_error():
        run.require_same(prepared.digests())
        outcome = search(run)
        record = outcomes.provenance(options, run, prepared, outcome, {})
        classes, fitted = prepared.splits.train.classes, prepared.train.preprocess
        distilled = Distilled(
            outcome.images, outcome.labels, fitted, classes, record, network=prepared.network
        )
        if result is not None and run.writes:
            distilled.save(result)
        return distilled


def _stored_choices(checkpoint: str | os.PathLike[str] | None) -> Mapping[str, Any] | None:
    """What the run of a checkpoint's folder has chosen; None if a call begins a new run."""
    return None if checkpoint is None else run_folder.stored_choices(Path(checkpoint))


def _open_run(folder: Path | None, config: Mapping[str, Any], chosen: Mapping[str, Any]) -> Run:
    """The run of a folder, new or to be continued; one without a folder writes nothing."""
    new = run_folder.with_choices(config, chosen)
    if folder is None:
        return run_folder.in_memory(new)
    resume = (folder / "config.json").exists()
    config = config if resume else new
    return hosts.open_run(
        lambda: run_folder.start(
            folder, config, result=distilled_set.FILE_NAME, resume=resume, earlier=EARLIER
        )
    )


def _finished(file: Path, config: Mapping[str, Any], prepared: Prepared) -> Distilled:
    """The set of a finished run, if it was made from the same data with the same arguments."""
    distilled = load(file)
    stored = distilled.provenance.get("config")
    stored = stored if isinstance(stored, Mapping) else {}
    stored = {k: v for k, v in stored.items() if k != run_folder.CHOSEN_KEY}
    stored = run_folder.complete(stored, config, EARLIER)
    if stored != run_folder.in_memory(config).config or (
        distilled.provenance.get("inputs") != prepared.digests()
    ):
        raise UserError(
            f"{file} is the result of other data or arguments: choose another checkpoint"
        )
    return distilled
