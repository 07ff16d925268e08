"""The options of the commands, as frozen values; the strings below the fields are the help texts.

This module imports nothing heavy, so that `dsdistill --help` answers at once.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import tyro

from dsdistill.harness import command_line, help_page, paths
from dsdistill.harness.help_page import Layout, Shown
from dsdistill.kernels import notation
from dsdistill.published_sets.stated_format import AxisOrder, LabelKind, PixelKind

Data = Annotated[str, tyro.conf.Positional, Shown("DATA")]
Options = TypeVar("Options")
OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {  # optimizer -> option -> default
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
THROUGH_BACKBONE_DEFAULTS: dict[str, Any] = {
    "outer": "ce",
    "steps": 400,
    "learning_rate": 0.05,
    "schedule": "cosine",
}
# What runs did before there was such an option; their `config.json` lacks it.
EARLIER: dict[str, Any] = {"outer": "mse"}


def _by_optimizer(metavar: str, option: str) -> Shown:
    """The default of an option that depends on the optimizer."""
    shown = (
        f"{help_page.format_default(defaults[option])} with {optimizer}"
        for optimizer, defaults in OPTIMIZER_DEFAULTS.items()
    )
    return Shown(metavar, ", ".join(shown))


# Headings of the help pages that several commands share, with their options.
_DATA = "image_size channels preprocess validation_fraction data_root"
_OUTPUT = "out resume seed"


@dataclass(frozen=True)
class RunOptions:
    """Which images, and how a kernel sees them."""

    data: Data = "digits"
    """digits, mnist, fashion-mnist, cifar10, cifar100, svhn, a folder with one folder of images per
    class, or an .npz file with images and labels, or with features that kd features wrote"""

    data_root: Path = field(default_factory=paths.data_root)
    """Folder of the named data sets, downloaded when missing; the environment variable
    DSDISTILL_DATA sets it too"""

    image_size: Annotated[int | None, Shown(default="as they are")] = None
    """Resize all images to this height and width in pixels"""

    channels: Annotated[
        Literal[1, 3] | None, Shown(default="as they are; colour where a folder has both")
    ] = None
    """1 makes all images grayscale, 3 makes them colour"""

    preprocess: Annotated[
        Literal["standardise", "zca", "none", "centre"] | None,
        Shown(
            default="zca for colour and a convolutional kernel, centre for features, else "
            "standardise"
        ),
    ] = None
    """Normalisation: mean 0 and deviation 1 of each channel, ZCA whitening, none, or centre: mean 0
    and one scale for all channels. As a default, zca gives way to standardise, with a note, where
    it does not fit into memory"""

    out: Annotated[Path | None, Shown(default="the next free runs/<method>-<data>-<n>")] = None
    """Folder of the run"""

    images_per_class: Annotated[int | None, Shown(default="10")] = None
    """Size of the distilled set"""

    kernel: Annotated[str, Shown("KERNEL")] = "fc"
    """fc, linear (for features), conv, convnet, convnet3, myrtle; or a sequence such as
    CR-3xCRP-flatten (C: 3x3 convolution, R: ReLU, P: 2x2 pooling; flatten or gap ends it);
    features:convnet or features:convnet:WIDTH for the features of finite networks; or
    module:attribute for a network of neural-tangents, whose module is imported and run, from the
    current folder first"""

    depth: Annotated[int | None, Shown(default="fc and conv 1, convnet 3, myrtle 5")] = None
    """Hidden layers of fc and conv, blocks of convnet, or the variant of myrtle: 5, 7 or 10"""

    w_std: float = 2**0.5
    """Standard deviation of the network's weights, before division by the root of the fan-in"""

    b_std: float = 0.1
    """Standard deviation of the network's biases"""

    validation_fraction: float = 0.1
    """Share of the training images held out to choose the best step"""

    seed: int = 0
    """Seed of all random choices: starting images, noise and target batches"""

    resume: bool = False
    """Continue the unfinished run in --out, with the options and the data it was started with"""

    hosts: Annotated[
        str | None,
        Shown("HOSTS", "as launched by SLURM, Open MPI, Kubernetes or Cloud TPU, else alone"),
    ] = None
    """ADDRESS:PORT,INDEX/COUNT shares the work among hosts, such as 10.0.0.1:9876,0/2: run the same
    command on each host with its own INDEX from 0; host 0 listens at the address. none: this host
    works alone, however it was launched"""


@dataclass(frozen=True)
class KipOptions(RunOptions):
    """Learn a few images with Kernel Inducing Points.

    Gradient descent changes the images until kernel ridge regression on them predicts the labels
    of the training images.
    """

    LAYOUT: ClassVar = Layout(
        groups={
            "Distilled set": "images_per_class init learn_labels support_flips corruption",
            "Output and resuming": _OUTPUT,
            "Kernel": "kernel networks depth w_std b_std ridge",
            "Through a backbone": "features layer views real_views min_scale device trust_module",
            "Optimisation": "outer optimizer steps learning_rate label_learning_rate schedule "
            "target_batch augment warm_up damping",
            "Validation": "validation_images patience",
            "Data": _DATA,
            "Several hosts": "hosts",
        },
        examples=(
            "dsdistill kip digits --images-per-class 5 --out runs/kip",
            "dsdistill kip photos/ --features runs/backbone --images-per-class 1",
        ),
    )

    images_per_class: Annotated[
        int | None, Shown(default="10, or the size of the set given to --init")
    ] = None
    """Size of the distilled set"""

    kernel: Annotated[str, Shown("KERNEL")] = "fc"
    """fc, linear (for features), conv, convnet, convnet3, myrtle; or a sequence such as
    CR-3xCRP-flatten (C: 3x3 convolution, R: ReLU, P: 2x2 pooling; flatten or gap ends it);
    features:convnet or features:convnet:WIDTH for the features of finite networks, see --networks;
    or module:attribute for a network of neural-tangents, whose module is imported and run, from the
    current folder first. Of several, separated by commas, each step draws one; the first validates
    and is stored"""

    networks: Annotated[
        Literal["fresh", "pool"] | None, Shown(default="pool, with --kernel features:convnet")
    ] = None
    """Where the steps take the networks of --kernel features:convnet from: random ones, drawn
    afresh for every step; or a pool of ten that are trained on the distilled set meanwhile"""

    features: Annotated[str | None, Shown("RUN|NAME")] = None
    """Distil through this trained network, a run of kd train or a name with published weights: the
    kernel is one of its features, and pixels in [0, 1] are learned through it"""

    layer: Annotated[str, Shown("NAME")] = "embedding"
    """With --features, the layer whose output is the feature; embedding is the input of the
    classifier"""

    views: int = 3
    """With --features, random crops and flips of each distilled image in a step"""

    real_views: int = 2
    """With --features, views of each training image whose features are targets: the plain image and
    random crops and flips; they are computed once, into the folder of the run"""

    min_scale: float = 0.5
    """With --features, smallest share of an image's area in a random crop"""

    device: Annotated[str, Shown("DEVICE")] = "auto"
    """Device of the backbone: auto (a GPU where there is one), cpu, cuda or cuda:N"""

    trust_module: Annotated[str | None, Shown("NAME,...")] = None
    """Code that the backbone's run may name as its network, as module:attribute with its arguments;
    what only a file names is never imported"""

    outer: Annotated[Literal["mse", "ce"] | None, Shown(default="mse, or ce with --features")] = (
        None
    )
    """Loss of the predicted training images that the steps lower: the squared error, as in the
    papers; or the cross-entropy of the predictions times the scale that fits them best, better for
    ridge regression and no better for networks"""

    optimizer: Literal["adam", "gauss-newton"] = "adam"
    """adam, as in the papers; or gauss-newton, which solves for the step that fits each target
    batch best and needs far fewer steps (closed-form and exact convolutional kernels only)"""

    steps: Annotated[int | None, _by_optimizer("N", "steps")] = None
    """Steps of the optimizer"""

    warm_up: Annotated[str | None, Shown("KERNEL[:STEPS]")] = None
    """First minimise with this cheaper kernel, for STEPS or a quarter of --steps; these steps come
    on top of --steps"""

    target_batch: Annotated[int | str | None, _by_optimizer("N|TIME", "target_batch")] = None
    """Training images per step, class-balanced; or the time of a step, such as 2s or 500ms: the
    number of images that takes about that long is measured first"""

    learning_rate: Annotated[float | None, _by_optimizer("X", "learning_rate")] = None
    """Learning rate of adam; with gauss-newton, the part of the solved step that is taken"""

    label_learning_rate: Annotated[float | None, Shown(default="that of the images")] = None
    """Learning rate of adam for the labels, with --learn-labels"""

    damping: float = 0.01
    """Damping of gauss-newton, relative to the mean curvature; raised automatically after a poor
    step"""

    schedule: Annotated[
        Literal["constant", "cosine"] | None, _by_optimizer("constant|cosine", "schedule")
    ] = None
    """Course of the learning rates; cosine falls to 0 over --steps, and over the warm-up before"""

    ridge: float = 0.01
    """Ridge of the regression, relative to the mean of the kernel's diagonal; 1e-6 in the papers,
    with which networks learn more slowly from the set"""

    learn_labels: bool = False
    """Learn the labels as well as the images"""

    support_flips: bool = False
    """Count the mirror images of the distilled images as further images, which cost no bytes; for
    colour photographs, and wherever a mirror image is of the same class"""

    augment: Annotated[str | None, Shown("CHANGES")] = None
    """Change the target images at random, before --preprocess: flip, shift, rotate, separated by
    commas, or all"""

    init: Annotated[str, Shown("real|noise|PATH")] = "real"
    """Start from real images, from noise, or from a distilled set (its .safetensors file or the
    folder of its run), whose labels are kept too"""

    corruption: float = 0.0
    """Share of each image's pixels that stay noise and are never learned"""

    patience: Annotated[int | None, Shown(default="never")] = None
    """Stop after N validations in a row without a better one; a run has forty"""

    validation_images: int = 1000
    """Validation images, class-balanced, that judge during the run; at its end all of them do"""


def with_defaults(options: Options) -> Options:
    """The options with the defaults that depend on others."""
    if not isinstance(options, KipOptions):
        return options
    defaults = OPTIMIZER_DEFAULTS[options.optimizer] | {"outer": "mse"}
    if options.features is not None:
        defaults = defaults | THROUGH_BACKBONE_DEFAULTS
    if notation.is_finite(options.kernel):
        defaults = defaults | {"networks": "pool"}
    missing = {name: value for name, value in defaults.items() if getattr(options, name) is None}
    return replace(options, **missing)


@dataclass(frozen=True)
class LabelSolveOptions(RunOptions):
    """Keep real images and solve for their labels with Label Solve.

    The labels are those with which kernel ridge regression fits all training images best.
    """

    LAYOUT: ClassVar = Layout(
        groups={
            "Distilled set": "images_per_class",
            "Output and resuming": _OUTPUT,
            "Kernel": "kernel depth w_std b_std ridge",
            "Data": _DATA,
            "Several hosts": "hosts",
        },
        examples=("dsdistill ls digits --images-per-class 10 --out runs/ls",),
    )

    validation_fraction: float = 0.0
    """Share of the training images held out; nothing is chosen, so none by default"""

    seed: int = 0
    """Seed of the choice of images"""

    ridge: float = 1e-6
    """Ridge of the solve: absolute, divided by the number of images"""


@dataclass(frozen=True)
class SelectOptions:
    """Choose real images, or crops of them, by the features of a trained network.

    No pixel is optimised. What such a set is worth is what a distilled one has to beat.
    """

    LAYOUT: ClassVar = Layout(
        groups={
            "Selection": "features by images_per_class ridge sweeps crops candidates",
            "Output and resuming": _OUTPUT,
            "Network": "layer device trust_module",
            "Data": "image_size channels validation_fraction data_root",
        },
        examples=(
            "dsdistill select photos/ --features runs/backbone --images-per-class 1",
            "dsdistill select photos/ --features timm:resnet18 --by crops --image-size 224",
        ),
    )

    data: Data = "digits"
    """digits, mnist, fashion-mnist, cifar10, cifar100, svhn, a folder with one folder of images per
    class, or an .npz file with images and labels"""

    data_root: Path = field(default_factory=paths.data_root)
    """Folder of the named data sets, downloaded when missing; the environment variable
    DSDISTILL_DATA sets it too"""

    features: Annotated[str | None, Shown("NAME|RUN", "must be given")] = None
    """The network that sees the images: the folder of a run of kd train, or a network with
    published weights (any of timm, torchvision:NAME, hf:NAME), NAME@FILE, or module:attribute"""

    by: Literal["ridge", "centre", "crops"] = "ridge"
    """ridge: the images from which ridge regression on the features predicts all training images
    best, found greedily and by exchanges; centre: the images whose mean feature is nearest to that
    of their class (herding; of one image, the class's central one); crops: as RDED, four crops in
    each image, the easiest ones for the network's own classifier, or for a probe on its features"""

    images_per_class: Annotated[int | None, Shown(default="10")] = None
    """Size of the set"""

    ridge: float = 0.1
    """Ridge of the regression on features, relative to the mean of the kernel's diagonal"""

    sweeps: Annotated[int | None, Shown(default="5")] = None
    """How often --by ridge tries to exchange every image for a better one; it ends where nothing
    changes. 0: greedily alone"""

    crops: Annotated[int | None, Shown(default="5")] = None
    """Random crops of each image that --by crops scores"""

    candidates: Annotated[int | None, Shown(default="300, or as many as are needed")] = None
    """Images of each class whose crops are scored"""

    image_size: Annotated[int | None, Shown(default="as they are")] = None
    """Resize all images to this height and width in pixels: those of the set, which the network
    sees at the size that it takes"""

    channels: Annotated[
        Literal[1, 3] | None, Shown(default="as they are; colour where a folder has both")
    ] = None
    """1 makes all images grayscale, 3 makes them colour"""

    layer: Annotated[str, Shown("NAME")] = "embedding"
    """Layer whose output is the feature, averaged over positions; embedding is the input of the
    classifier"""

    device: Annotated[str, Shown("DEVICE")] = "auto"
    """Where the network computes: auto (a GPU where there is one), cpu, cuda or cuda:N"""

    trust_module: Annotated[str | None, Shown("NAME")] = None
    """Code that the run of --features may name as its network, as module:attribute with its
    arguments; what only a file names is never imported"""

    validation_fraction: float = 0.1
    """Share of the training images held out: they judge the set, and are not chosen"""

    seed: int = 0
    """Seed of the crops, and of the random images that the set is compared with"""

    out: Annotated[Path | None, Shown(default="the next free runs/select-<data>-<n>")] = None
    """Folder of the run"""

    resume: bool = False
    """Continue the unfinished run in --out, with the options and the data it was started with"""


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure what learners reach on a distilled set.

    The same learners are trained the same way on random images, coresets and all training images,
    for comparison. The result is a page, report.html, with its figures as JSON beside it.
    """

    LAYOUT: ClassVar = Layout(
        groups={
            "Comparison": "also learners controls seeds steps augment",
            "Teacher": "teacher teacher_class_map trust_module",
            "Output and resuming": "out resume cache",
            "Hardware": "device",
            "Data": "data data_root image_size channels",
            "Format of a set from another project": "pixels mean std tiles labels layout",
        },
        examples=(
            "dsdistill evaluate runs/kip --learners ridge,mlp --controls random,full",
            "dsdistill evaluate runs/kip --also runs/ls --learners convnet:32 --seeds 1",
        ),
        notes={
            "Data": "Only for a set from another project, apart from --data-root: a set made by "
            "dsdistill names its own data.",
        },
    )

    run: Annotated[Path, tyro.conf.Positional, Shown("RUN")]
    """Folder of a run, or a distilled .safetensors file; with --data also a set that another
    project has published: a .pt or .npz file, or a folder with one folder of images per class"""

    also: Annotated[tuple[Path, ...], Shown("RUN ...")] = ()
    """Further sets of the same data, to be compared with the first one and named by their folders;
    their images are brought to its preprocessing"""

    learners: Annotated[str, Shown("NAME,...")] = "ridge,convnet"
    """ridge (with the set's own kernel), ridge:KERNEL (with another one, such as ridge:linear; a
    module:attribute must be written so, for it is never imported because a file names it),
    linear-probe (multinomial logistic regression, for features above all), convnet, mlp, resnet18,
    vgg11, vit, kip-convnet, kip-fc, with a width as in convnet:32, and any student of kd train,
    such as module:attribute for a network of your own code. linear-probe@BACKBONE and
    ridge:linear@BACKBONE are trained on the features of a network: the folder of a run of kd train,
    or a name with published weights. kip-convnet and kip-fc are centred: the
    function that they start as is subtracted. centred:NAME trains any network so, uncentred:NAME
    leaves that function in"""

    controls: Annotated[str, Shown("NAME,..."), command_line.MAY_BE_EMPTY] = (
        "random,k-means,herding,full"
    )
    """What to compare with: random images, the coresets k-means and herding, all images (full);
    random images with one soft label of --teacher for each (random-soft), or with the labels that
    Label Solve with the set's kernel gives them (random-solved); "" compares with nothing"""

    teacher: Annotated[str | None, Shown("NAME|RUN")] = None
    """A teacher as for kd train: labels the distilled images anew in a further comparison, and its
    answers are compared with those of every learner"""

    teacher_class_map: Annotated[Path | None, Shown("FILE")] = None
    """JSON file, class of the data -> class of the teacher (name or number), where they differ"""

    trust_module: Annotated[str | None, Shown("NAME")] = None
    """Code that the run of the teacher or of a backbone may name as its network, as
    module:attribute with its arguments; what only a file names is never imported"""

    augment: Literal["none", "crop", "crop-flip"] = "none"
    """Train networks also with these random changes of the images, beside the training without"""

    seeds: int = 5
    """Trainings of each learner on each set of images, with the seeds 0, 1, ..."""

    steps: Annotated[
        int | None, Shown(default="the learner's: 300, for kip-convnet and kip-fc 5000")
    ] = None
    """Steps of every training of a network"""

    data: Annotated[str | None, Shown("DATA")] = None
    """Data set that a published set was distilled from"""

    image_size: Annotated[int | None, Shown(default="as they are")] = None
    """Resize the images of --data to this height and width in pixels"""

    channels: Annotated[
        Literal[1, 3] | None, Shown(default="as they are; colour where a folder has both")
    ] = None
    """1 makes all images of --data grayscale, 3 makes them colour"""

    pixels: Annotated[PixelKind, Shown("KIND")] = "auto"
    """What the pixels are: standardised by --mean and --std, imagenet (standardised by the
    constants of ImageNet), signed (-1 to 1), unit (0 to 1), bytes (0 to 255), or whitened as in
    KIP's paper (zca), zca-mtt, zca-rfad or zca-frepo; auto: what the file says or proves"""

    tiles: Annotated[int | None, Shown(default="2 where the pixels show it, as in IDC")] = None
    """Each image holds N by N smaller ones: the factor of IDC"""

    labels: LabelKind = "auto"
    """What the labels are"""

    mean: Annotated[
        tuple[float, ...] | None, Shown(default="of the project's constants, or of the data")
    ] = None
    """Mean of standardised pixels, one value per channel, of images in [0, 1]"""

    std: Annotated[
        tuple[float, ...] | None, Shown(default="of the project's constants, or of the data")
    ] = None
    """Standard deviation of standardised pixels, one value per channel, of images in [0, 1]"""

    layout: AxisOrder = "auto"
    """Order of the axes of the images"""

    device: Annotated[str, Shown("DEVICE")] = "cpu"
    """Where networks are trained: cpu, auto (a GPU where there is one), cuda or cuda:N"""

    out: Annotated[Path | None, Shown(default="evaluation-<n> in the folder of the run")] = None
    """Folder of the report"""

    resume: bool = False
    """Continue the unfinished evaluation in --out"""

    cache: Annotated[Path | None, Shown("PATH|none")] = field(default_factory=paths.evaluations)
    """Folder of results that later evaluations can use; with none, nothing is kept"""

    data_root: Path = field(default_factory=paths.data_root)
    """Folder of the named data sets, downloaded when missing; the environment variable
    DSDISTILL_DATA sets it too"""


@dataclass(frozen=True)
class ReportOptions:
    """Compare evaluations, or distilled sets, on one HTML page."""

    LAYOUT: ClassVar = Layout(
        groups={"Output": "out"},
        examples=("dsdistill report runs/kip runs/ls --out page.html",),
    )

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, Shown("RUN ...")]
    """Folders of evaluations, or of runs, whose newest evaluation counts"""

    out: Path = Path("report.html")
    """Page to write"""


@dataclass(frozen=True)
class InspectOptions:
    """Show what a distilled set holds and how it was made."""

    LAYOUT: ClassVar = Layout(
        groups={"Output": "json"}, examples=("dsdistill inspect runs/kip --json",)
    )

    file: Annotated[Path, tyro.conf.Positional, Shown("RUN")]
    """Folder of a run, or a distilled .safetensors file"""

    json: bool = False
    """Print one JSON object instead of a table"""


@dataclass(frozen=True)
class ExportOptions:
    """Write the images of a distilled set for other programs."""

    LAYOUT: ClassVar = Layout(
        groups={"Output": "format out"},
        examples=("dsdistill export runs/kip --format npz --out set.npz",),
    )

    file: Annotated[Path, tyro.conf.Positional, Shown("RUN")]
    """Folder of a run, or a distilled .safetensors file"""

    format: Literal["folder", "npz", "torch"]
    """folder: PNG files in one folder per class, to look at; npz: arrays; torch: tensors for
    torch.load(weights_only=True). npz and torch keep everything: evaluate reads them as the set"""

    out: Annotated[Path | None, Shown(default="<file>-<format> beside the file")] = None
    """File or folder to write"""


@dataclass(frozen=True)
class CacheOptions:
    """List or clear decoded images and results that are kept for later runs."""

    LAYOUT: ClassVar = Layout(
        groups={"Clearing": "clear older_than"},
        examples=("dsdistill cache", "dsdistill cache --clear --older-than 30"),
    )

    clear: bool = False
    """Remove them; later runs make them again when they need them"""

    older_than: Annotated[float | None, Shown("DAYS")] = None
    """Only what was not used for this number of days"""
