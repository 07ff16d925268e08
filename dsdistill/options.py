"""The options of the commands, as frozen values; their comments are the help texts.

This module imports nothing heavy, so that `dsdistill --help` answers at once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dsdistill.harness import places

Data = Annotated[str, tyro.conf.Positional]


@dataclass(frozen=True)
class Source:
    """Which images, and how a kernel sees them."""

    data: Data = "digits"
    """digits, mnist, fashion-mnist, cifar10, cifar100, svhn, a folder of class folders, or an .npz
    file with images and labels"""

    data_root: Path = field(default_factory=places.data_root)
    """where named data sets lie or are downloaded to (environment: DSDISTILL_DATA)"""

    image_size: int | None = None
    """resize images to this height and width in pixels"""

    preprocess: Literal["standardise", "zca", "none"] | None = None
    """default: zca for colour, standardise for grayscale"""

    out: Path | None = None
    """the run's folder; default: the next free runs/<method>-<data>-<n>"""

    images_per_class: int = 10
    """size of the distilled set"""

    kernel: str = "fc"
    """fc, conv, convnet, convnet3, myrtle, or module:attribute for a neural-tangents network"""

    depth: int | None = None
    """hidden layers of fc and conv (1), blocks of convnet (3), variant of myrtle (5, 7, 10)"""

    validation_fraction: float = 0.1
    """share of the training images held out to choose by"""

    seed: int = 0
    """of the drawn images, the noise and the target batches"""

    resume: bool = False
    """continue the unfinished run in --out"""


@dataclass(frozen=True)
class Kip(Source):
    """Kernel Inducing Points: learn a few images by gradient descent through ridge regression."""

    steps: int = 1000
    """steps of Adam"""

    target_batch: int = 5000
    """training images a step, class-balanced"""

    learning_rate: float = 0.04
    """of Adam"""

    ridge: float = 1e-6
    """relative to the mean of the kernel's diagonal"""

    learn_labels: bool = False
    """learn the labels as well as the images"""

    augment: bool = False
    """flip and shift the target images at random"""

    init: Literal["real", "noise"] = "real"
    """what the images start from"""

    corruption: float = 0.0
    """fraction of each image's pixels kept as noise and never learned"""


@dataclass(frozen=True)
class LabelSolve(Source):
    """Label Solve: keep real images and solve for the labels that fit all training images best."""

    validation_fraction: float = 0.0
    """share of the training images held out; nothing is chosen, so none by default"""

    ridge: float = 1e-6
    """of the solve: absolute, divided by the number of images"""


@dataclass(frozen=True)
class Evaluate:
    """Train learners on a distilled set and, the same way, on random, coreset and full data."""

    run: Annotated[Path, tyro.conf.Positional]
    """a run's folder, or a distilled .safetensors file"""

    learners: str = "ridge,convnet"
    """comma-separated: ridge (with the set's own kernel), convnet, mlp, or any timm model"""

    controls: str = "random,coreset,full"
    """comma-separated: what to compare with"""

    seeds: int = 5
    """trainings of each learner on each data"""

    out: Path | None = None
    """folder of report.json and report.md; default: evaluation-<n> in the run's folder"""

    data_root: Path = field(default_factory=places.data_root)
    """where named data sets lie (environment: DSDISTILL_DATA)"""


@dataclass(frozen=True)
class Inspect:
    """Print what a distilled set holds and how it was made."""

    file: Annotated[Path, tyro.conf.Positional]
    """a distilled .safetensors file, or a run's folder"""

    json: bool = False
    """as one JSON object"""


@dataclass(frozen=True)
class Export:
    """Write the images of a distilled set for other programs."""

    file: Annotated[Path, tyro.conf.Positional]
    """a distilled .safetensors file, or a run's folder"""

    format: Literal["folder", "npz", "torch"]
    """folder: PNGs in class folders; npz: arrays; torch: tensors, torch.load(weights_only=True)"""

    out: Path | None = None
    """default: <file>-<format> beside the file"""
