"""The options of the commands, as frozen values; their comments are the help texts.

This module imports nothing heavy, so that `dsdistill --help` answers at once.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from dsdistill.harness import command_line, paths

Data = Annotated[str, tyro.conf.Positional]
Options = TypeVar("Options")
OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {  # of an optimizer
    "adam": {
        "steps": 1000,
        "target_batch": 5000,
        "learning_rate": 0.04,
        "schedule": "constant",
    },
    "gauss-newton": {
        "steps": 100,
        "target_batch": 1000,
        "learning_rate": 0.3,
        "schedule": "cosine",
    },
}


@dataclass(frozen=True)
class RunOptions:
    """Which images, and how a kernel sees them."""

    data: Data = "digits"
    """digits, mnist, fashion-mnist, cifar10, cifar100, svhn, a folder of class folders, or an .npz
    file with images and labels"""

    data_root: Path = field(default_factory=paths.data_root)
    """where named data sets lie or are downloaded to (environment: DSDISTILL_DATA)"""

    image_size: int | None = None
    """resize images to this height and width in pixels"""

    channels: Literal[1, 3] | None = None
    """1 makes all images grayscale, 3 colour; default: as they are, and colour where a folder has
    both"""

    preprocess: Literal["standardise", "zca", "none"] | None = None
    """default: zca for colour, standardise for grayscale"""

    out: Path | None = None
    """the run's folder; default: the next free runs/<method>-<data>-<n>"""

    images_per_class: int | None = None
    """size of the distilled set; default: 10"""

    kernel: str = "fc"
    """fc, conv, convnet, convnet3, myrtle; a sequence such as CR-3xCRP-flatten (C: 3x3 convolution,
    R: ReLU, P: 2x2 pooling; flatten or gap ends it); or module:attribute for a neural-tangents
    network, whose module is imported and run, from the current folder first. kip takes several,
    comma-separated: each step draws one, the first judges and is stored"""

    depth: int | None = None
    """hidden layers of fc and conv (1), blocks of convnet (3), variant of myrtle (5, 7, 10)"""

    w_std: float = 2**0.5
    """deviation of the network's weights, before the division by the root of the fan-in"""

    b_std: float = 0.1
    """deviation of its biases"""

    validation_fraction: float = 0.1
    """share of the training images held out to choose by"""

    seed: int = 0
    """of the drawn images, the noise and the target batches"""

    resume: bool = False
    """continue the unfinished run in --out, with the options and the data it was started with"""

    hosts: str | None = None
    """ADDRESS:PORT,INDEX/COUNT to share the work with other hosts, such as 10.0.0.1:9876,0/2: the
    same command runs on each, with its own index from 0, and host 0 listens at the address.
    default: as SLURM, Open MPI, Kubernetes or Cloud TPU launched it; none: alone whatever they did
    """


@dataclass(frozen=True)
class KipOptions(RunOptions):
    """Kernel Inducing Points: learn a few images by gradient descent through ridge regression."""

    images_per_class: int | None = None
    """size of the distilled set; default: 10, or as many as the set given to --init has"""

    optimizer: Literal["adam", "gauss-newton"] = "adam"
    """adam, as in the papers; gauss-newton: solves for the step that fits each target batch best,
    and needs far fewer of them (kernels in closed form or of exact planes)"""

    steps: int | None = None
    """of the optimizer; default: 1000 of adam, 100 of gauss-newton"""

    warm_up: str | None = None
    """KERNEL or KERNEL:STEPS: first minimise with this cheaper kernel, for a quarter of --steps or
    for STEPS, which come on top of --steps"""

    target_batch: int | str | None = None
    """training images a step, class-balanced; or the time of a step, such as 2s or 500ms: the
    batch that takes about so long is measured first. default: 5000 for adam, 1000 for gauss-newton
    """

    learning_rate: float | None = None
    """of adam (default: 0.04); of gauss-newton the part of the solved step that is taken (0.3)"""

    label_learning_rate: float | None = None
    """of adam for the labels; default: that of the images"""

    damping: float = 0.01
    """of gauss-newton: what holds a step near its start, relative to the mean curvature; it grows
    by itself where steps are too long"""

    schedule: Literal["constant", "cosine"] | None = None
    """of the learning rates; cosine: down to 0 over --steps, and over the warm-up before it.
    default: constant for adam, cosine for gauss-newton"""

    ridge: float = 1e-6
    """relative to the mean of the kernel's diagonal"""

    learn_labels: bool = False
    """learn the labels as well as the images"""

    augment: str | None = None
    """change the target images at random: flip, shift, rotate, comma-separated, or all"""

    init: str = "real"
    """what the images start from: real, noise, or a distilled set (its .safetensors file or its
    run's folder), whose labels are kept too"""

    corruption: float = 0.0
    """fraction of each image's pixels kept as noise and never learned"""

    patience: int | None = None
    """stop when so many validations in a row, of forty in a run, have found nothing better"""

    validation_images: int = 1000
    """validation images, class-balanced, that judge during the run; all of them at its end"""


def with_defaults(options: Options) -> Options:
    """The options with the defaults that depend on others."""
    if not isinstance(options, KipOptions):
        return options
    defaults = OPTIMIZER_DEFAULTS[options.optimizer]
    missing = {name: value for name, value in defaults.items() if getattr(options, name) is None}
    return replace(options, **missing)


@dataclass(frozen=True)
class LabelSolveOptions(RunOptions):
    """Label Solve: keep real images and solve for the labels that fit all training images best."""

    validation_fraction: float = 0.0
    """share of the training images held out; nothing is chosen, so none by default"""

    ridge: float = 1e-6
    """of the solve: absolute, divided by the number of images"""


@dataclass(frozen=True)
class EvaluateOptions:
    """Train learners on a distilled set and, the same way, on random, coreset and full data."""

    run: Annotated[Path, tyro.conf.Positional]
    """a run's folder, a distilled .safetensors file; with --data also what other projects publish:
    a .pt or .npz file, a folder of class folders"""

    learners: str = "ridge,convnet"
    """comma-separated: ridge (with the set's own kernel), ridge:KERNEL (with another, and needed
    for a module:attribute, which is never imported because a file names it), convnet,
    kip-convnet, mlp, resnet18, vgg11, vit, with a width as convnet:32; any student of `kd train`"""

    controls: Annotated[str, command_line.MAY_BE_EMPTY] = "random,k-means,herding,full"
    """comma-separated: what to compare with; "" compares with nothing"""

    teacher: str | None = None
    """a teacher of `kd train`: relabels the distilled images in one more arm, and is compared with
    every learner"""

    teacher_class_map: Path | None = None
    """JSON file, class of the data -> class of the teacher (name or number), where they differ"""

    augment: Literal["none", "crop", "crop-flip"] = "none"
    """networks are trained with these changes too, beside the training without"""

    seeds: int = 5
    """trainings of each learner on each data: the seeds 0, 1, ..."""

    steps: int | None = None
    """of every network's training on every data; default: the learner's (300; kip-convnet 5000)"""

    data: str | None = None
    """what a set from elsewhere was distilled from; of our own sets it is known"""

    image_size: int | None = None
    """of a set from elsewhere: resize the images of --data to this height and width in pixels"""

    channels: Literal[1, 3] | None = None
    """of a set from elsewhere: 1 makes all images of --data grayscale, 3 colour; default: as they
    are, and colour where a folder has both"""

    pixels: Literal[
        "auto",
        "standardised",
        "imagenet",
        "signed",
        "unit",
        "bytes",
        "zca",
        "zca-mtt",
        "zca-rfad",
        "zca-frepo",
    ] = "auto"
    """of a set from elsewhere: mean 0 and deviation 1 by --mean and --std (default: the project's
    constants, or the data's own) or by ImageNet's constants, in [-1, 1], in [0, 1], 0 to 255, or
    whitened as by KIP's paper, MTT, RFAD or FRePo"""

    tiles: int | None = None
    """of a set from elsewhere: smaller images in a row and a column of each (IDC's factor);
    default: IDC's 2 where the numbers show it"""

    labels: Literal["auto", "index", "one-hot", "centred", "probabilities", "logits"] = "auto"
    """of a set from elsewhere"""

    mean: tuple[float, ...] | None = None
    """of a set from elsewhere with standardised pixels: one value a channel, of images in [0, 1]"""

    std: tuple[float, ...] | None = None
    """the same"""

    layout: Literal["auto", "nchw", "nhwc"] = "auto"
    """of the images of a set from elsewhere"""

    device: str = "cpu"
    """of the networks: cpu, auto (a GPU where there is one), cuda or cuda:N"""

    out: Path | None = None
    """folder of the report; default: evaluation-<n> in the run's folder"""

    resume: bool = False
    """go on with an evaluation that was stopped"""

    cache: Path | None = field(default_factory=paths.evaluations)
    """where results that other evaluations can use are kept; None: nowhere"""

    data_root: Path = field(default_factory=paths.data_root)
    """where named data sets lie (environment: DSDISTILL_DATA)"""


@dataclass(frozen=True)
class ReportOptions:
    """Compare evaluations, or distilled sets, on one page."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of evaluations, or of runs, of which the newest evaluation counts"""

    out: Path = Path("report.html")
    """the page to write"""


@dataclass(frozen=True)
class InspectOptions:
    """Print what a distilled set holds and how it was made."""

    file: Annotated[Path, tyro.conf.Positional]
    """a distilled .safetensors file, or a run's folder"""

    json: bool = False
    """as one JSON object"""


@dataclass(frozen=True)
class ExportOptions:
    """Write the images of a distilled set for other programs."""

    file: Annotated[Path, tyro.conf.Positional]
    """a distilled .safetensors file, or a run's folder"""

    format: Literal["folder", "npz", "torch"]
    """folder: PNGs in class folders, for the eye; npz: arrays; torch: tensors,
    torch.load(weights_only=True). The last two keep everything: evaluate reads them as the set"""

    out: Path | None = None
    """default: <file>-<format> beside the file"""


@dataclass(frozen=True)
class CacheOptions:
    """List or clear decoded images and results that are kept for later runs."""

    clear: bool = False
    """remove them; they are made again when they are needed"""

    older_than: float | None = None
    """only those that were not used for this number of days"""
