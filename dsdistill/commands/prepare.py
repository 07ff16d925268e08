"""Check the options of a run and turn them into values, before anything is written.

All rules on the input are checked here, so that a wrong command line leaves no folder behind.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsdistill.commands import option_ranges, through_backbone
from dsdistill.harness import lists
from dsdistill.harness.data import datasets, feature_file, labeled_images, preprocess
from dsdistill.harness.data.datasets import Splits
from dsdistill.harness.data.distilled_set import DistilledSet
from dsdistill.harness.data.labeled_images import Examples
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from dsdistill.kernels import gram, networks
from dsdistill.kernels.networks import Engine, InfiniteNetwork
from dsdistill.loops import timing
from dsdistill.loops.plan import Phase
from dsdistill.methods import augment, initial_support, kip
from dsdistill.methods.adam import Adam
from dsdistill.methods.gauss_newton import GaussNewton
from dsdistill.methods.network_sources import FreshNetworks, NetworkPool, NetworkSource
from dsdistill.methods.optimizer import Optimizer
from dsdistill.methods.outer_loss import OUTER_LOSSES
from dsdistill.methods.pixel_kip import Encoder
from dsdistill.options import KipOptions, LabelSolveOptions, RunOptions
from dsdistill.parallel import hosts

DEFAULT_IMAGES_PER_CLASS = 10
MIN_SINGULAR_RIDGE = 1e-3  # for a support of more images than a linear kernel has values
WARM_UP_DIVISOR = 4  # a warm-up has a quarter of the steps by default
# What a run has chosen about its images. Runs of earlier versions lack these entries: colour was
# whitened for every kernel, directions that no image has anything in were amplified by ZCA, and
# preprocessed images were augmented. They are continued so.
PREPROCESS_KEY = "preprocess"  # the kind, for colour and features without --preprocess
UNSPANNED_KEY, KEPT = "unspanned", "kept"  # of ZCA with fewer images than pixel values
AUGMENTED_KEY, RAW = "augmented", "raw"


@dataclass(frozen=True, eq=False)
class Prepared:
    """Checked input of a method.

    Attributes:
        splits: The data.
        train, validation: The images with their preprocessing.
        network: The network whose kernel validates, predicts and is stored: the first of several.
        images_per_class: Images per class of the distilled set.
        init: The distilled set that a KIP run starts from; None if it starts from images or noise.
        init_sha256: SHA-256 of that set.
        phases: Phases of a KIP run; empty for other methods.
        networks: All networks of the run.
        chosen: What the run has chosen about its images, for its `config.json`.
        encoder: The backbone of `kip --features`, whose images are pixels in [0, 1].
        completed: Options that were open and follow from the backbone.
    """

    splits: Splits
    train: Examples
    validation: Examples
    network: InfiniteNetwork
    images_per_class: int
    init: DistilledSet | None
    init_sha256: str | None
    phases: tuple[Phase, ...]
    networks: tuple[InfiniteNetwork, ...]
    chosen: Mapping[str, Any]
    encoder: Encoder | None = None
    completed: Mapping[str, Any] = field(default_factory=dict)

    def digests(self) -> dict[str, str]:
        """SHA-256 of all that the run depends on by readable names, for `Run.require_same`."""
        modules = {
            f"module of the kernel {network.name}": network.module_sha256
            for network in self.networks
            if network.module_sha256 is not None
        }
        functions = {
            f"the kernel {network.name}": _kernel_digest(network, self.splits.train.shape)
            for network in self.networks
            if network.name.startswith(networks.OBJECT_PREFIX)
        }
        init = {} if self.init_sha256 is None else {"set of --init": self.init_sha256}
        backbone = {}
        if self.encoder is not None:
            record = self.encoder.record()
            backbone = {"weights of the backbone": record["weights_sha256"]}
            backbone |= feature_file.layer_hash("the backbone", record)
            if "features_sha256" in record:  # of a module, whose code has no name
                backbone["features of the module"] = record["features_sha256"]
        return self.splits.digests() | modules | functions | init | backbone


def prepare(options: RunOptions, chosen: Mapping[str, Any] | None = None) -> Prepared:
    """Check the options, load the data and fit the preprocessing.

    Args:
        options: Options without open defaults, as `options.with_defaults` returns them.
        chosen: What the run has chosen when it was started; None for a new run.

    Raises:
        UserError: If a rule is broken; the message is about the first.
    """
    kernels, phases = _parse(options, chosen)
    init = init_sha256 = None
    if isinstance(options, KipOptions) and options.init not in initial_support.INIT_NAMES:
        init, init_sha256 = initial_support.load(options.init)
    encoder = None
    if isinstance(options, KipOptions) and options.features is not None:
        feature_file.refuse(options.data)
        encoder, options = through_backbone.load(options)
    splits = datasets.load(
        options.data,
        root=options.data_root,
        image_size=options.image_size,
        validation_fraction=options.validation_fraction,
        channels=options.channels,
        classes=init.classes if init else None,
    )
    require_test_images(options.data, splits)
    return _assemble(options, kernels, phases, splits, init, init_sha256, chosen, encoder)


def prepare_arrays(
    options: RunOptions,
    splits: Splits,
    init: DistilledSet | None = None,
    init_sha256: str | None = None,
    *,
    network: InfiniteNetwork | None = None,
    chosen: Mapping[str, Any] | None = None,
    module: Any = None,
) -> Prepared:
    """Check the options against data that are at hand, and fit the preprocessing.

    Args:
        options: Options without open defaults; those that say where the data are have no effect.
        splits: The data; the test part may be empty.
        init: The distilled set that a KIP run starts from, in place of the option.
        init_sha256: SHA-256 of that set.
        network: The network, in place of the option.
        chosen: As for `prepare`.
        module: A caller's own module as the backbone, in place of the option's.

    Raises:
        UserError: If a rule is broken; the message is about the first.
    """
    kernels, phases = _parse(options, chosen, network)
    encoder = None
    if isinstance(options, KipOptions) and options.features is not None:
        encoder = through_backbone.load_for(options, splits.train.shape, module)
    return _assemble(options, kernels, phases, splits, init, init_sha256, chosen, encoder)


def _kernel_digest(network: InfiniteNetwork, shape: tuple[int, int, int]) -> str:
    """SHA-256 of a kernel's values for three images of noise, to four digits, on any machine."""
    images = np.random.default_rng(0).random((3, *shape), np.float32)
    values = np.asarray(network.kernel(jnp.asarray(images[:2]), jnp.asarray(images)))
    return hashlib.sha256(repr([f"{v:.4g}" for v in values.flat]).encode()).hexdigest()


def _parse(
    options: RunOptions, chosen: Mapping[str, Any] | None, network: InfiniteNetwork | None = None
) -> tuple[tuple[InfiniteNetwork, ...], tuple[Phase, ...]]:
    """The kernels and the phases that the options name, checked without any data."""
    _check(options)
    kernels = (
        _networks("--kernel", options.kernel, options, options.depth)
        if network is None
        else (network,)
    )
    raw = chosen is None or chosen.get(AUGMENTED_KEY) == RAW
    phases = _phases(options, kernels, augment_raw=raw) if isinstance(options, KipOptions) else ()
    if chosen is None:  # earlier versions ignored them, and such runs are continued
        _check_deviations(options, [*kernels, *(n for p in phases for n in p.objective.networks)])
    return kernels, phases


def _check_deviations(options: RunOptions, used: Sequence[InfiniteNetwork]) -> None:
    """Refuse deviations of weights and biases where no kernel of the run takes any."""
    own = all(each.features or each.engine is Engine.NEURAL_TANGENTS for each in used)
    if own and (options.w_std, options.b_std) != (RunOptions.w_std, RunOptions.b_std):
        raise UserError(
            f"the kernel {options.kernel} draws its weights in its own way: leave --w-std and "
            f"--b-std out, got {options.w_std:g} and {options.b_std:g}"
        )


def _assemble(
    options: RunOptions,
    kernels: tuple[InfiniteNetwork, ...],
    phases: tuple[Phase, ...],
    splits: Splits,
    init: DistilledSet | None,
    init_sha256: str | None,
    chosen: Mapping[str, Any] | None,
    encoder: Encoder | None = None,
) -> Prepared:
    """Check that data, kernels and initial set fit together, and fit the preprocessing."""
    _check_validation(options, splits)
    augmented = isinstance(options, KipOptions) and options.augment is not None
    if augmented and preprocess.is_features(splits.train.shape):
        raise UserError(
            f"--augment changes pictures, and {options.data} holds features: extract more views of "
            "the images with kd features --views"
        )
    shape = splits.train.shape
    if encoder is not None:
        shape = (1, 1, encoder.width)
    images_per_class = _images_per_class(options, splits, init)
    count = images_per_class * len(splits.train.classes)
    if encoder is not None and isinstance(options, KipOptions):
        count *= options.views
    # Each network once, in the order in which they are named.
    all_networks = tuple(
        dict.fromkeys([*kernels, *(n for p in phases for n in p.objective.networks)])
    )
    for network in all_networks:
        networks.check(network, shape)
        gram.plan_tile(network, 1, 1, shape, gradient=bool(phases))  # may raise
        for phase in phases:
            phase.objective.optimizer.check_network(network)
            _check_rank(network, shape, count, phase.objective.ridge)
    if chosen is None:
        chosen = {} if encoder is not None else _choose(options, kernels[0], splits)
    if encoder is not None:
        kind = "none"
    else:
        kind = options.preprocess or chosen.get(PREPROCESS_KEY) or _former_default(splits)
    amplify = chosen.get(UNSPANNED_KEY) != KEPT
    fitted = preprocess.fit(kind, splits.train.chunks, splits.train.shape, amplify)
    train, validation = Examples(splits.train, fitted), Examples(splits.validation, fitted)
    return Prepared(
        splits,
        train,
        validation,
        kernels[0],
        images_per_class,
        init,
        init_sha256,
        phases,
        all_networks,
        chosen,
        encoder,
        {"image_size": options.image_size, "channels": options.channels} if encoder else {},
    )


def _check_rank(
    network: InfiniteNetwork, shape: tuple[int, int, int], count: int, ridge: float
) -> None:
    """Refuse more images than a linear kernel has values: its matrix is singular, noise in float32.

    Args:
        network: The network of the kernel.
        shape: Height, width and channels of what the kernel sees.
        count: Number of images of the support, their views included.
        ridge: Relative ridge.

    Raises:
        UserError: If the ridge is too small to make up for it.
    """
    if network.feature_map is None or ridge >= MIN_SINGULAR_RIDGE:
        return
    values = math.prod(shape) + 1
    if count > values:
        raise UserError(
            f"the kernel {network.name} of {values - 1} values is singular for more than {values} "
            f"images, got {count}: lower --images-per-class, raise --ridge to "
            f"{MIN_SINGULAR_RIDGE:g}, or use --kernel fc"
        )


def _choose(options: RunOptions, network: InfiniteNetwork, splits: Splits) -> dict[str, Any]:
    """What a new run does with its images where an earlier version did something else."""
    chosen: dict[str, Any] = {}
    kind, (shape, count) = options.preprocess, (splits.train.shape, len(splits.train))
    if kind is None and (shape[-1] == 3 or preprocess.is_features(shape)):
        # A network of neural-tangents is taken for a convolutional one: others have a name.
        convolutional = network.engine is not Engine.CLOSED_FORM
        kind = chosen[PREPROCESS_KEY] = hosts.decide(
            lambda: preprocess.default_kind(shape, count, convolutional=convolutional)
        )
    if kind == "zca" and count < math.prod(shape):
        chosen[UNSPANNED_KEY] = KEPT
    if isinstance(options, KipOptions) and options.augment:
        chosen[AUGMENTED_KEY] = RAW
    return chosen


def _former_default(splits: Splits) -> preprocess.Kind:
    """The default of grayscale, and of colour in earlier versions."""
    return "zca" if splits.train.shape[-1] == 3 else "standardise"


def _networks(
    option: str, text: str, options: RunOptions, depth: int | None = None
) -> tuple[InfiniteNetwork, ...]:
    names = lists.parse_names(option, text)
    if depth is not None and len(names) > 1:
        raise UserError(
            f"--depth applies to one kernel, got {text}: write the depths into the names, such as "
            "fc(3),conv(2)"
        )
    std = {"w_std": options.w_std, "b_std": options.b_std}
    return tuple(networks.parse(name, depth, **std) for name in names)


def _phases(
    options: KipOptions, kernels: tuple[InfiniteNetwork, ...], *, augment_raw: bool
) -> tuple[Phase, ...]:
    assert options.steps is not None  # `with_defaults` has set it
    phases = [(_objective(options, kernels, options.steps, augment_raw=augment_raw), options.steps)]
    if options.warm_up is not None:
        name, steps = split_warm_up(options.warm_up)
        steps = max(options.steps // WARM_UP_DIVISOR, 1) if steps is None else steps
        if steps < 1:
            raise UserError(f"--warm-up must have at least 1 step, got {options.warm_up}")
        warm_up = _networks("--warm-up", name, options)
        phases.insert(0, (_objective(options, warm_up, steps, augment_raw=augment_raw), steps))
    if options.networks is not None and all(objective.source is None for objective, _ in phases):
        raise UserError(
            f"--networks {options.networks} is for kernels of features, got --kernel "
            f"{options.kernel}: leave it out, or choose --kernel features:convnet"
        )
    return tuple(Phase(objective, steps) for objective, steps in phases)


def split_warm_up(text: str) -> tuple[str, int | None]:
    """Split `KERNEL` or `KERNEL:STEPS` into kernel and steps."""
    match = re.fullmatch(r"(.+):(-?[0-9]+)", text)
    return (match[1], int(match[2])) if match else (text, None)


def _objective(
    options: KipOptions, kernels: tuple[InfiniteNetwork, ...], steps: int, *, augment_raw: bool
) -> kip.KipObjective:
    assert options.outer is not None  # the options are complete
    return kip.KipObjective(
        kernels,
        options.ridge,
        _optimizer(options),
        steps if options.schedule == "cosine" else None,
        options.learn_labels,
        augment.parse(options.augment),
        OUTER_LOSSES[options.outer],
        _network_source(options, kernels),
        options.support_flips,
        augment_raw=augment_raw,
    )


def _network_source(
    options: KipOptions, kernels: tuple[InfiniteNetwork, ...]
) -> NetworkSource | None:
    """Where the steps of a phase take their networks from; None for infinitely wide ones.

    Raises:
        UserError: If a finite network is one of several kernels.
    """
    network = next((kernel.features for kernel in kernels if kernel.features is not None), None)
    if network is None:
        return None
    if len(kernels) > 1:
        names = ",".join(kernel.name for kernel in kernels)
        raise UserError(f"a kernel of features stands alone, got {names}: name one kernel")
    fresh = options.networks == "fresh"
    return FreshNetworks(network) if fresh else NetworkPool(network, options.seed)


def _optimizer(options: KipOptions) -> Optimizer:
    """The optimizer that is asked for, with its rates.

    Raises:
        UserError: If a rate is of another optimizer, or out of its range.
    """
    rate = options.learning_rate
    assert rate is not None  # the options are complete
    if options.optimizer == "adam":
        return Adam(rate, options.label_learning_rate)
    if options.label_learning_rate is not None:
        raise UserError(
            "--label-learning-rate needs --optimizer adam: leave it out with gauss-newton"
        )
    if rate > 1:
        raise UserError(
            "--learning-rate is a fraction of the step with --optimizer gauss-newton, at most 1, "
            f"got {rate:g}"
        )
    return GaussNewton(rate, options.damping)


def _images_per_class(options: RunOptions, splits: Splits, init: DistilledSet | None) -> int:
    if init is not None:
        return initial_support.check(init, splits.train, options.images_per_class)
    count = options.images_per_class
    count = DEFAULT_IMAGES_PER_CLASS if count is None else count
    labeled_images.check_images_per_class(splits.train, count)
    return count


def _check(options: RunOptions) -> None:
    if not options.w_std > 0 or not options.b_std >= 0:
        raise UserError(
            f"--w-std must be positive and --b-std at least 0, got {options.w_std} and "
            f"{options.b_std}"
        )
    option_ranges.require_at_least(options, {"seed": 0, "images_per_class": 1})
    if isinstance(options, KipOptions | LabelSolveOptions):
        option_ranges.require_positive(options, "ridge")
    if (
        isinstance(options, LabelSolveOptions)
        and len(lists.parse_names("--kernel", options.kernel)) > 1
    ):
        raise UserError(f"Label Solve takes one --kernel, got {options.kernel}")
    if isinstance(options, KipOptions):
        _check_kip(options)


def _check_kip(options: KipOptions) -> None:
    if options.features is None:
        through_backbone.check_unused(options)
    option_ranges.require_at_least(options, {"steps": 1, "patience": 1, "validation_images": 1})
    option_ranges.require_positive(options, "learning_rate", "damping", "label_learning_rate")
    if options.label_learning_rate is not None and not options.learn_labels:
        raise UserError("--label-learning-rate needs --learn-labels")
    if options.support_flips and options.optimizer == "gauss-newton":
        raise UserError("--support-flips needs --optimizer adam: leave it out with gauss-newton")
    if not 0 <= options.corruption <= 1:
        raise UserError(f"--corruption must be a fraction in [0, 1], got {options.corruption}")
    assert options.target_batch is not None
    timing.parse_target_batch(options.target_batch)


def require_test_images(data: str, splits: Splits) -> None:
    """Refuse data without test images.

    Args:
        data: Name or path of the data, for the message.
        splits: The data.

    Raises:
        UserError: If there are none.
    """
    if not len(splits.test):
        raise UserError(
            f"{data} leaves no test images, since a fifth of so few images per class is "
            "none: give at least 3 images of each class, or a separate test part"
        )


def _check_validation(options: RunOptions, splits: Splits) -> None:
    """Refuse options that need validation images, and report classes without held-out images."""
    fraction, validation = options.validation_fraction, splits.validation
    if isinstance(options, KipOptions) and options.patience is not None and not len(validation):
        raise UserError(
            "--patience needs validation images, and there are none: raise --validation-fraction "
            f"(now {fraction:g})"
        )
    if fraction > 0 and not len(validation):
        progress.say(
            "note: no class has any validation images, since "
            f"--validation-fraction {fraction:g} of so few images is none; "
            "the last step's images are kept"
        )
    note_held_out(options.data, fraction, type(options), splits)


def note_held_out(data: str, fraction: float, kind: type[Any], splits: Splits) -> None:
    """Say where `--validation-fraction` has no effect, and which classes have no held-out images.

    Args:
        data: Name or path of the data.
        fraction: Value of the option.
        kind: Class of the options, which has its default.
        splits: The data.
    """
    if splits.brings_validation and fraction != kind.validation_fraction:
        progress.say(
            f"note: --validation-fraction {fraction:g} has no effect on {data}, which has "
            "a validation part of its own"
        )
    for part, images in (("validation", splits.validation), ("test", splits.test)):
        if line := labeled_images.describe_missing_classes(part, images.labels, images.classes):
            progress.say(f"note: {line}")
