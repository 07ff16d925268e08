"""Prepare `kip --features`: the images as pixels and, in the run's folder, as features.

The backbone is one of `kd`, which is imported only here and only when it is asked for.
"""

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dsdistill.commands import option_ranges
from dsdistill.harness import shell
from dsdistill.harness.data import preprocess
from dsdistill.harness.data.datasets import Splits
from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import run_folder
from dsdistill.harness.runs.run_folder import Run
from dsdistill.loops.plan import Objective, Phase
from dsdistill.methods.adam import Adam
from dsdistill.methods.kip import KipObjective
from dsdistill.methods.pixel_kip import Encoder, PixelObjective
from dsdistill.options import KipOptions
from dsdistill.parallel import launchers

FEATURES_FILE = "features.npz"  # in the folder of a run that is not finished
UNKNOWN_SIZE = 224  # pixels, of a backbone that does not say its own
# Options that mean something only with a backbone.
OPTIONS = ("layer", "views", "real_views", "min_scale", "device", "trust_module")


class FeaturePhases(NamedTuple):
    """A run's phases and its data, as features.

    Attributes:
        phases: The phases, which learn pixels.
        train, validation: Features of the images, those of further views among the former.
    """

    phases: tuple[Phase, ...]
    train: Examples
    validation: Examples


def absolute_name(features: str) -> str:
    """A backbone's name that holds in every working directory."""
    from kd.evaluation import backbones

    return backbones.absolute_name(features)


def short_name(features: str | None) -> str:
    """The name of a network, or of the folder of its run, whose path may differ on resume."""
    if features is None:
        return "a function"
    return Path(features).name if Path(features).is_dir() else features


@contextlib.contextmanager
def features_file(run: Run) -> Iterator[Path | None]:
    """The file of a run's features, which is removed when the run is finished.

    A run in memory has none.

    An error of the input before the first checkpoint removes it too: no part of a run is left that
    cannot be continued.

    Args:
        run: The run, whose folder is locked.
    """
    if not run.writes:
        yield None
        return
    file = run.folder / FEATURES_FILE
    try:
        yield file
    except UserError:
        if not run.resumed and not (run.folder / run_folder.CHECKPOINT).exists():
            file.unlink(missing_ok=True)
        raise
    file.unlink(missing_ok=True)


def is_code(features: str | None) -> bool:
    """Whether the name of a backbone is that of code, which is imported."""
    if features is None or ":" not in features:
        return False
    from kd.evaluation import backbones

    return backbones.is_code(features)


def check_unused(options: KipOptions) -> None:
    """Refuse options of a backbone where there is none.

    Raises:
        UserError: With the first of them.
    """
    for name in OPTIONS:
        if getattr(options, name) != getattr(KipOptions, name):
            raise UserError(
                f"{shell.flag(name)} needs --features: leave it out, or name a backbone"
            )


def require_one_host(options: KipOptions) -> None:
    """Refuse a backbone on several hosts before these wait for one another.

    Raises:
        UserError: If the line, or the launcher of the command, names several.
    """
    if options.features is not None and launchers.parse(options.hosts) is not None:
        raise _several_hosts()


def _several_hosts() -> UserError:
    return UserError("--features works on one host: start the command once, with --hosts none")


def load(options: KipOptions) -> tuple[Encoder, KipOptions]:
    """Load the backbone, and complete the size and the channels of the images by its own.

    Raises:
        UserError: If there is no such backbone, or an option does not go with one.
    """
    from kd.evaluation import encoder

    assert options.features is not None
    _check(options)
    side = options.image_size or UNKNOWN_SIZE
    loaded = encoder.load(
        options.features,
        options.layer,
        (side, side, 3),
        device=options.device,
        convertible=True,
        typed=[options.features],
        trust_module=options.trust_module,
    )
    height, width = loaded.input_size
    if options.image_size is None and height != width:
        raise UserError(
            f"the backbone {options.features} takes images of {height}x{width}, and distilled "
            "images are square: set --image-size"
        )
    channels = options.channels or loaded.channels
    if channels > loaded.channels:
        raise UserError(
            f"the backbone {options.features} takes grayscale images: leave --channels out"
        )
    return loaded, replace(options, image_size=options.image_size or height, channels=channels)


def is_module(network: Any) -> bool:
    """Whether a caller's own network is a torch module, which differentiates."""
    torch = sys.modules.get("torch")  # without it there are no modules
    return torch is not None and isinstance(network, torch.nn.Module)


@contextlib.contextmanager
def frozen(network: Any) -> Iterator[None]:
    """Hold a caller's own module in evaluation mode; anything else stays as it is."""
    if not is_module(network):
        yield
        return
    from kd.evaluation import own_backbone

    with own_backbone.freeze(network):
        yield


def load_own(module: Any, shape: tuple[int, int, int], *, differentiable: bool) -> Encoder:
    """A caller's own module, which is held by `frozen`, as an encoder of images of a shape.

    Raises:
        UserError: If it cannot take such images, or gives no features of them.
    """
    from kd.evaluation import own_backbone

    return own_backbone.encoder(module, shape, differentiable=differentiable)


def load_for(options: KipOptions, shape: tuple[int, int, int], module: Any) -> Encoder:
    """Load the backbone for images that are at hand, which it sees at the size that it takes.

    Args:
        options: The options.
        shape: Height, width and channels of the images.
        module: A caller's own module, in place of the one that the options name; or None.

    Raises:
        UserError: If there is no such backbone, an option does not go with one, the images are not
            square, or it takes images of other channels.
    """
    from kd.evaluation import encoder

    assert options.features is not None
    _check(options)
    height, width, _ = shape
    if height != width:
        raise UserError(
            f"--features learns square images, got {height}x{width}: crop or resize them first"
        )
    if module is not None:
        return load_own(module, shape, differentiable=True)
    return encoder.load(
        options.features,
        options.layer,
        shape,
        device=options.device,
        typed=[options.features],
        trust_module=options.trust_module,
    )


def phases_on_features(
    options: KipOptions,
    file: Path | None,
    encoder: Encoder,
    regression: Phase,
    splits: Splits,
) -> FeaturePhases:
    """Extract the features of all images, in memory or into the run's folder, or read them there.

    Args:
        options: The options, with the size of the images.
        file: Where they are kept, in the folder of the run; None for memory.
        encoder: The backbone.
        regression: The phase as one on features.
        splits: The images as pixels.

    Raises:
        UserError: If the features do not fit on the disk, or the kernel cannot take them.
        KeyboardInterrupt: If stopped, after the features so far are safe.
    """
    stored = encoder.extract(
        file,
        splits,
        views=options.real_views,
        min_scale=options.min_scale,
        seed=options.seed,
    )
    plain = stored.part("train")
    assert plain is not None
    train, validation = stored.with_views(plain), stored.part("validation")
    fitted = preprocess.fit("centre", train.chunks, train.shape)
    objective = regression.objective
    assert isinstance(objective, KipObjective)
    assert isinstance(objective.optimizer, Adam)
    pixels: Objective = PixelObjective(
        objective,
        objective.optimizer,
        encoder,
        fitted,
        options.views,
        options.min_scale,
    )
    empty = plain.select(np.zeros(0, np.int64)) if validation is None else validation
    return FeaturePhases(
        (Phase(pixels, regression.steps),), Examples(train, fitted), Examples(empty, fitted)
    )


def _check(options: KipOptions) -> None:
    """Refuse options that are for images seen by a kernel of pixels."""
    if options.optimizer != "adam":
        raise UserError("--features needs --optimizer adam: leave gauss-newton out")
    for name, given, why in (
        ("--warm-up", options.warm_up, "a warm-up is for kernels of pixels"),
        ("--augment", options.augment, "--views and --real-views draw crops and flips"),
        ("--preprocess", options.preprocess, "pixels stay as they are, and features are centred"),
        ("--support-flips", options.support_flips or None, "views are flipped already"),
        ("--corruption", options.corruption or None, "all pixels are learned"),
    ):
        if given is not None:
            raise UserError(f"{name} does not go with --features: {why}")
    if not isinstance(options.target_batch, int):
        raise UserError(
            "--target-batch must be a number of images with --features, got "
            f"{options.target_batch!r}"
        )
    option_ranges.require_at_least(options, {"views": 1, "real_views": 1})
    if not 0 < options.min_scale <= 1 or math.isnan(options.min_scale):
        raise UserError(f"--min-scale must be in (0, 1], got {options.min_scale:g}")
    if jax.process_count() > 1:
        raise _several_hosts()
