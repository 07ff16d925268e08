"""The options of `kd evaluate`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from dsdistill.harness import paths
from dsdistill.harness.help_page import Layout, Shown
from kd import attack
from kd.options.shared import (
    NamesArg,
)

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a trained student on test images or texts."""

    LAYOUT: ClassVar = Layout(
        groups={
            "Comparison": "teacher teacher_data class_map teacher_class_map data_root device",
            "Attacks": "robust",
            "Texts": "text label",
            "Code of your own": "trust_module",
            "Output": "json",
        },
        examples=(
            "kd evaluate runs/student --json",
            "kd evaluate runs/student --robust pgd:eps=8/255:steps=50,autoattack:images=200",
        ),
    )

    run: Annotated[tyro.conf.Positional[Path], Shown("RUN")]
    """Folder of a finished run"""

    data: Annotated[
        tyro.conf.Positional[str | None], Shown("DATA", "what the student was trained for")
    ] = None
    """Data set to test on. Of other data than the student's own, all images are judged, unless they
    have a test part, such as a folder with train/ and test/; of texts the test part, or else the
    validation part, or else all"""

    teacher: Annotated[str | None, Shown("NAME|RUN", "the one of the training")] = None
    """Measure the agreement with this teacher"""

    teacher_data: Annotated[Path | None, Shown("DIR", "of the run's own data, the training's")] = (
        None
    )
    """Folder with another picture of every image for the teacher"""

    class_map: Annotated[Path | None, Shown("FILE")] = None
    """JSON file, class of the data -> class of the student (name or number)"""

    teacher_class_map: Annotated[
        str | None, Shown("FILE", "for the run's own teachers, the one of the training")
    ] = None
    """JSON file, class of the data -> class of the teacher; of several teachers as for kd train"""

    robust: Annotated[str | None, Shown("ATTACK,...")] = None
    """Measure the accuracy under attacks that know the network: pgd:eps=8/255:steps=20:step=2/255,
    projected gradient ascent, or autoattack:eps=8/255, the standard version of AutoAttack; eps, the
    largest change of a pixel in [0, 1], is by default that of the training, else 8/255. Each takes
    images=N, how many test images are attacked, by default 1000 spread evenly over all; of several
    attacks the smallest number counts, for they attack the same images"""

    text: Annotated[str | None, Shown("COLUMN[,COLUMN]", "as in the training")] = None
    """Column of the texts, or two columns of pairs"""

    label: Annotated[str | None, Shown("COLUMN", "as in the training")] = None
    """Column of the classes, scores or tags"""

    trust_module: NamesArg = None
    """Code that the run, or the run of a teacher, may name as its network, as module:attribute with
    its arguments; what only a file names is never imported"""

    data_root: Path = field(default_factory=paths.data_root)
    """Folder of the named data sets, downloaded when missing; the environment variable
    DSDISTILL_DATA sets it too"""

    device: Annotated[str, Shown("DEVICE")] = "auto"
    """Where accuracy is measured: auto (a GPU where there is one), cpu, cuda or cuda:N; latency is
    always measured on the CPU"""

    json: bool = False
    """Print one JSON object instead of a table"""

    def check(self) -> None:
        """Refuse attacks that are unknown or out of range.

        Raises:
            UserError: With the attack, the rule and the value.
        """
        if self.robust is not None:
            attack.parse_robust(self.robust)
