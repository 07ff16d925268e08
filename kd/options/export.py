"""The options of `kd export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from dsdistill.harness.help_page import Layout, Shown

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class ExportOptions:
    """Write a trained student for other programs, and check that its answers agree."""

    LAYOUT: ClassVar = Layout(
        groups={
            "Output": "format out",
            "Data": "data_root",
            "Code of your own": "trust_module",
        },
        examples=("kd export runs/student --format pt2",),
    )

    run: Annotated[tyro.conf.Positional[Path], Shown("RUN")]
    """Folder of a finished run"""

    format: Literal["onnx", "pt2", "safetensors", "timm", "huggingface"]
    """onnx: a program with its preprocessing, for onnxruntime and others; pt2: such a program for
    torch; safetensors: the weights alone; timm: a folder for timm.create_model; huggingface: one of
    a student of texts for transformers, of embeddings for sentence-transformers too. Those of texts
    are folders with the tokenizer"""

    out: Annotated[
        Path | None, Shown("PATH", "<run>/export/<student> with the suffix of the format")
    ] = None
    """File or folder to write"""

    trust_module: Annotated[str | None, Shown("NAME")] = None
    """Code that the run may name as its network, as module:attribute with its arguments; what only
    a file names is never imported"""

    data_root: Annotated[Path | None, Shown("DIR", "where they were in training")] = None
    """Folder of the run's data, some images of which the check uses"""
