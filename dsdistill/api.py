"""The library: arrays in, a distilled set out.

    import dsdistill

    small = dsdistill.kip(images, labels, images_per_class=10)
    chosen = dsdistill.select(images, labels, images_per_class=10, features="runs/backbone")
    predict = small.predictor()
    report = dsdistill.evaluate(small, train=(images, labels), test=(x, y), learners=["ridge"])

Nothing is written unless a path is given. Images are channels last, uint8 or floats in [0, 1];
labels are integers or names. Progress goes to standard error; `progress=False` silences it.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from dsdistill import api_runs
from dsdistill.api_data import DATA_NAME, Pair, as_splits, call
from dsdistill.api_data import ImageData as ImageData
from dsdistill.api_data import load_data as load_data
from dsdistill.api_evaluation import evaluate as evaluate
from dsdistill.commands import outcomes, prepare, select_images, through_backbone, training_data
from dsdistill.commands import select as selection
from dsdistill.commands.outcomes import Outcome
from dsdistill.distilled import Distilled, Kernel, as_network
from dsdistill.distilled import load as load
from dsdistill.harness.data import provenance
from dsdistill.harness.data.arrays import ArrayLike
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs.run_folder import Run
from dsdistill.kernels import neural_tangents
from dsdistill.kernels.neural_tangents import NeuralTangents
from dsdistill.loops.kip_loop import OnStep
from dsdistill.methods import initial_support
from dsdistill.options import (
    KipOptions,
    LabelSolveOptions,
    SelectOptions,
)
from dsdistill.parallel import devices


def kip(
    images: ArrayLike,
    labels: ArrayLike,
    *,
    images_per_class: int | None = None,
    kernel: Kernel = KipOptions.kernel,
    networks: Literal["fresh", "pool"] | None = None,
    features: str | os.PathLike[str] | Callable[..., Any] | None = None,
    layer: str = KipOptions.layer,
    views: int = KipOptions.views,
    real_views: int = KipOptions.real_views,
    min_scale: float = KipOptions.min_scale,
    device: str = KipOptions.device,
    trust_module: str | None = None,
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
    ridge: float | None = None,
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
        features: Distil through this network, whose features the kernel sees in place of pixels:
            the folder of a run of `kd train`, a network with published weights,
            `module:attribute`, which is imported; or a torch module from (m, c, h, w) images in
            [0, 1] to (m, d) features, which is not changed. The set has pixels in [0, 1].
        layer: Layer whose output is the feature, of a network by its name.
        views: Random crops and flips of each distilled image in a step, with `features`.
        real_views: Views of each training image whose features are targets: the plain image and
            random crops and flips.
        min_scale: Smallest share of an image's area in a random crop.
        device: Where a network by its name computes: `auto`, `cpu`, `cuda` or `cuda:N`. A module
            computes where it is.
        trust_module: Code that the run may name as its network, as `module:attribute`.
        steps: Steps of the optimizer; by default 1000 of adam, 100 of gauss-newton, 400 with
            `features`.
        validation: Images and labels that choose the best step; give them to `evaluate` too. By
            default a share of the training images, the same for every seed and for `evaluate`.
        validation_fraction: That share; 0 keeps the last step.
        classes: Class names in label order; by default the distinct labels, sorted.
        preprocess: Normalisation of the pixels; by default centre for features (images of one pixel
            and neither 1 nor 3 channels), zca for colour and a convolutional kernel where it fits
            into memory, else standardise.
        init: `real` images, `noise`, or a distilled set (or its path), whose labels are kept.
        outer: Loss of the predicted training images: `mse`, the squared error, as in the papers, or
            `ce`, the default with `features`, the cross-entropy of the predictions times the scale
            that fits them best.
        optimizer: `adam`, as in the papers, or `gauss-newton`, which needs far fewer steps.
        learning_rate: Rate of adam (0.04, or 0.05 with `features`), or the part of a step of
            gauss-newton taken (0.3).
        label_learning_rate: Rate of adam for the labels; by default that of the images.
        learn_labels: Whether to learn the labels too.
        support_flips: Whether mirror images of the distilled ones count as further images.
        schedule: Course of the rates; by default constant for adam, cosine for gauss-newton and
            with `features`.
        target_batch: Training images per step (5000, or 1000), or the time of a step, such as "2s".
        damping: Damping of gauss-newton, relative to the mean curvature.
        ridge: Ridge of the regression, relative to the mean of the kernel's diagonal (1e-6, or 0.01
            with `features`).
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
    with call(progress), through_backbone.frozen(features):
        if validation is not None and validation_fraction != KipOptions.validation_fraction:
            raise UserError("validation_fraction has no effect with validation: leave it out")
        start = _initial_set(init)
        backbone, module = _backbone(KipOptions, given)
        if module is not None and not through_backbone.is_module(module):
            raise UserError(
                "features must be a network's name, the folder of a run or a torch module, whose "
                f"gradient is needed, got {type(module).__name__}"
            )
        named = {"init": "real" if start else init, "features": backbone}
        options = api_runs.complete_options(KipOptions, given | named)
        splits = as_splits(images, labels, classes, validation, validation_fraction)
        digest = training_data.digest(start) if start else None
        prepared = prepare.prepare_arrays(
            options,
            splits,
            start,
            digest,
            network=as_network(kernel),
            chosen=api_runs.stored_choices(checkpoint),
            module=module,
        )

        def search(run: Run) -> Outcome:
            return outcomes.kip_outcome(options, run, prepared, on_step)

        return api_runs.distil("kip", options, prepared, search, checkpoint)


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
    with call(progress):
        options = api_runs.complete_options(LabelSolveOptions, given)
        splits = as_splits(images, labels, classes, None, validation_fraction)
        prepared = prepare.prepare_arrays(
            options, splits, network=as_network(kernel), chosen=api_runs.stored_choices(checkpoint)
        )

        def solve(run: Run) -> Outcome:
            return outcomes.label_solve_outcome(options, run, prepared)

        return api_runs.distil("ls", options, prepared, solve, checkpoint)


def select(
    images: ArrayLike,
    labels: ArrayLike,
    *,
    features: str | os.PathLike[str] | Callable[..., Any],
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
    trust_module: str | None = None,
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
            as RDED, four crops in each image (for a network by its name).
        validation: Images and labels that judge the set. By default a share of the training images,
            the same for every seed and for `evaluate`.
        validation_fraction: That share.
        ridge: Ridge of the regression, relative to the mean of the kernel's diagonal.
        sweeps: How often `ridge` tries to exchange every image; by default 5.
        crops: Random crops of each image; by default 5.
        candidates: Images of each class whose crops are scored; by default 300.
        layer, device, trust_module: As for `kip`.
        seed: Seed of the crops, and of the random images that the set is compared with.

    Returns:
        The set, with pixels in [0, 1]. Its `figures` are accuracies of ridge regression on the
            features of the set (`validation_accuracy`), of random images and of all.

    Raises:
        UserError: If an argument breaks a rule; a ValueError of one line.
    """
    given = locals()
    with call(progress), through_backbone.frozen(features):
        if validation is not None and validation_fraction != SelectOptions.validation_fraction:
            raise UserError("validation_fraction has no effect with validation: leave it out")
        name, own = _backbone(SelectOptions, given)
        if own and by == "crops":
            raise UserError('by="crops" needs the name of a network, got a module or a function')
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
                trust_module=trust_module,
                validation_fraction=validation_fraction,
                seed=seed,
            )
        )
        select_images.check(options)
        splits = as_splits(images, labels, classes, validation, validation_fraction)
        return Distilled.wrap(selection.select_arrays(options, splits, own))


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


def _backbone(
    kind: type[Any], given: Mapping[str, Any]
) -> tuple[str | None, Callable[..., Any] | None]:
    """The name of the backbone of a call, and a caller's own module or function in its place.

    Args:
        kind: Class of the options, which has their defaults.
        given: Arguments of the call by name.

    Raises:
        UserError: If an argument is for networks by their names, and this one has none.
    """
    features = given["features"]
    if features is None or isinstance(features, str | os.PathLike):
        return None if features is None else os.fspath(features), None
    for name in ("layer", "device", "trust_module"):
        if given[name] != getattr(kind, name):
            raise UserError(
                f"{name} is for networks by their names, and features are a module or a function, "
                "which computes what and where it does: leave it out"
            )
    return provenance.OWN_MODULE if through_backbone.is_module(features) else None, features


def _initial_set(init: str | os.PathLike[str] | DistilledSet) -> DistilledSet | None:
    """The set that a search starts from; None for real images and noise."""
    if isinstance(init, DistilledSet):
        return init
    return None if init in initial_support.INIT_NAMES else initial_support.load(str(init))[0]
