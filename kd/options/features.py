"""The options of `kd features`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from dsdistill.harness import paths
from dsdistill.harness.help_page import Layout, Shown
from kd.options.shared import DEFAULT_WORKERS, NamesArg, option_name, require

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class FeaturesOptions:
    """Write the features of a data set's images through a trained network to one file.

    `dsdistill` distils and evaluates features as it does images.
    """

    LAYOUT: ClassVar = Layout(
        groups={
            "Backbone": "student layer image_size trust_module",
            "Views": "views min_scale hflip seed",
            "Output and resuming": "out resume",
            "Data": "data_root",
            "Speed": "device batch_size workers",
        },
        examples=(
            "kd features FOLDER --student runs/backbone --out features.npz",
            "kd features cifar10 --student timm:resnet18 --views 4",
        ),
    )

    data: Annotated[tyro.conf.Positional[str], Shown("DATA")]
    """Data set name, folder of class folders, or .npz file of images and labels. Image files are
    read as they are needed, however many there are"""

    student: Annotated[str, Shown("NAME|RUN")]
    """Folder of a run of kd train, or the name of a network with published weights: any of timm,
    torchvision:NAME, hf:NAME; NAME@FILE with the weights in a file; module:attribute for code that
    returns a trained network"""

    layer: Annotated[str, Shown("NAME")] = "embedding"
    """Layer whose output is the feature, averaged over positions; embedding is the input of the
    classifier"""

    image_size: Annotated[int | None, Shown(default="as the backbone's weights need")] = None
    """Height and width of the images of a network that does not say it itself"""

    trust_module: NamesArg = None
    """Code that the run may name as its network, as module:attribute with its arguments; what only
    a file names is never imported"""

    views: int = 1
    """Views of each training image: the plain image, and random crops and flips of it. Validation
    and test images have the plain view alone"""

    min_scale: float = 0.25
    """Smallest share of an image's area in a random crop"""

    hflip: float = 0.5
    """Probability of a horizontal flip in a random view"""

    seed: int = 0
    """Seed of the random views"""

    out: Annotated[Path | None, Shown("FILE", "features-<data>-<backbone>.npz")] = None
    """File to write; until it is whole, its features are in the folder FILE.partial"""

    resume: bool = False
    """Continue a file that was stopped, with the same options; the result is the same to the bit"""

    data_root: Path = field(default_factory=paths.data_root)
    """Folder of the named data sets, downloaded when missing; the environment variable
    DSDISTILL_DATA sets it too"""

    device: Annotated[str, Shown("DEVICE")] = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N"""

    batch_size: int = 64
    """Images in a forward pass"""

    workers: Annotated[int | None, Shown(default=str(DEFAULT_WORKERS))] = None
    """Processes that read image files"""

    @property
    def readers(self) -> int:
        """Processes that read image files."""
        return DEFAULT_WORKERS if self.workers is None else self.workers

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            UserError: With the option, the rule and the value.
        """
        for name in ("views", "batch_size", "image_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{option_name(name)} must be at least 1", value)
        for name in ("seed", "readers"):
            shown = option_name("workers" if name == "readers" else name)
            require(getattr(self, name) >= 0, f"{shown} must be 0 or more", getattr(self, name))
        require(0 < self.min_scale <= 1, "--min-scale must be in (0, 1]", self.min_scale)
        require(0 <= self.hflip <= 1, "--hflip must be in [0, 1]", self.hflip)
        require(self.out is None or self.out.suffix == ".npz", "--out must end in .npz", self.out)
