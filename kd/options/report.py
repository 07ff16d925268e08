"""The options of `kd report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from dsdistill.harness.help_page import Layout, Shown

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class ReportOptions:
    """Compare finished runs on one HTML page."""

    LAYOUT: ClassVar = Layout(
        groups={"Output": "out"},
        examples=("kd report runs/teacher runs/student --out students.html",),
    )

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, Shown("RUN ...")]
    """Folders of finished runs; runs that differ only in their seed are put together"""

    out: Path = Path("report.html")
    """Page to write"""
