"""A finished student for other programs: `kd export`. Nothing is written that does not agree.

The files are made in a hidden folder, read again as their user would, and compared with the student
on random and on real images, before they get their names.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsdistill.harness.errors import UserError, first_line, unknown_name
from kd.commands import export_check, export_formats, run_data
from kd.commands.export_check import ReferenceOutputs
from kd.commands.export_formats import FORMATS, ExportFormat
from kd.data import batching
from kd.models import networks, saved_models
from kd.models.saved_models import Model
from kd.options import ExportOptions
from kd.recipe import Recipe

# Of the spread of the outputs. Another order of float32 sums changes them by 1e-7 to 1e-5 of it, a
# forgotten normalisation or another way to resize by 1e-2 and more.
RELATIVE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Comparison:
    """How well an exported file agrees with the student.

    Attributes:
        largest_difference: Of any output, on any image.
        tolerance: What it may be.
        argmax_agreement: Share of the images with the same largest output.
        batch_sizes: That were run.
        random_images: How many, of uniform pixels.
        real_images: How many.
        data: Where those are from.
        note: Why there are none.
    """

    largest_difference: float
    tolerance: float
    argmax_agreement: float
    batch_sizes: tuple[int, ...]
    random_images: int
    real_images: int
    data: str | None
    note: str | None


def export(options: ExportOptions) -> dict[str, Any]:
    """Write a student in one format.

    Returns:
        The path written, and the fields of the `Comparison`.

    Raises:
        UserError: If the run holds no whole student, the format does not fit it, a package is
            missing, the output exists, or what was written disagrees with the student.
    """
    if options.format not in FORMATS:
        raise unknown_name("format", options.format, FORMATS)
    chosen = FORMATS[options.format]
    model = saved_models.load_run(options.run)
    model.classifier.eval()
    out = _free_path(options, model, chosen)
    write = chosen.prepare(model)
    trialled = export_check.gather(options.run, model, options.data_root)
    card = _card(options, model, chosen)
    with _staging_path(out) as path:
        write(path, card)
        found = _require_agreement(path, trialled, options)
        write(path, card | {"check": asdict(found)})
        _require_agreement(path, trialled, options)  # the very file that is kept
        _place(path, out)
    return {"written": str(out), **asdict(found)}


def compare(path: Path, chosen: ExportFormat, trialled: ReferenceOutputs) -> Comparison:
    """Run what was written on all trials.

    Args:
        path: The file or folder.
        chosen: What it was written as.
        trialled: Images and the student's outputs.
    """
    run = chosen.read(path)
    with torch.inference_mode():
        answers = [run(batching.to_nchw(images)).numpy() for images in trialled.batches]
    got, expected = np.concatenate(answers), np.concatenate(trialled.expected)
    sizes = [len(images) for images in trialled.batches]
    return Comparison(
        largest_difference=float(np.abs(got - expected).max()),
        tolerance=RELATIVE_TOLERANCE * float(np.ptp(expected)),
        argmax_agreement=float((got.argmax(1) == expected.argmax(1)).mean()),
        batch_sizes=tuple(sorted(set(sizes))),
        random_images=export_check.RANDOM_IMAGES,
        real_images=0 if trialled.data is None else sizes[-1],
        data=trialled.data,
        note=trialled.note,
    )


def _require_agreement(
    path: Path, trialled: ReferenceOutputs, options: ExportOptions
) -> Comparison:
    try:
        found = compare(path, FORMATS[options.format], trialled)
    except Exception as error:  # of another program's reader, which raises whatever it likes
        raise UserError(
            f"as {options.format} the student of {options.run} cannot be run "
            f"({first_line(error)}): nothing was written; use another --format"
        ) from error
    # Not `>`, which is false for NaN.
    if not found.largest_difference <= found.tolerance:
        raise UserError(
            f"as {options.format} the student of {options.run} would answer differently, by up to "
            f"{found.largest_difference:.2g} where {found.tolerance:.2g} is rounding: nothing was "
            "written; use another --format"
        )
    return found


def _card(options: ExportOptions, model: Model, chosen: ExportFormat) -> dict[str, Any]:
    """What a person or a program needs to use the files."""
    h, w, c = model.shape
    fitted = model.preprocess
    return {
        "format": options.format,
        "student": model.name,
        "classes": model.classes,
        "input": {
            "name": export_formats.INPUT_NAME,
            "dtype": "float32",
            "layout": "NCHW",
            "shape": ["batch", c, h, w],
            "values": "pixels in [0, 1]" if chosen.graph else "pixels in [0, 1], preprocessed",
            "files": _file_resize(run_data.read_recipe(options.run)),
        },
        "preprocess": {
            "kind": fitted.kind,
            "mean": fitted.mean.tolist(),
            "std": fitted.std.tolist(),
            "included": chosen.graph,
        },
        "resize": {
            "size": model.classifier.size,
            "mode": model.interpolation,
            "antialias": True,
            "repeat_channels_to": model.classifier.channels,
            "included": chosen.graph,
        },
        "outputs": {
            "name": export_formats.OUTPUT_NAME,
            "dtype": "float32",
            "shape": ["batch", len(model.classes)],
            "kind": model.outputs,
        },
        "output_temperature": model.output_temperature,
        "use": _usage(model, chosen),
        "parameters": networks.parameter_count(model.classifier),
        "versions": {name: version(name) for name in ("torch", "timm", "numpy")},
    }


def _usage(model: Model, chosen: ExportFormat) -> str:
    first = "" if chosen.graph else "preprocess and resize the images as described; "
    meaning = (
        "unnormalised log-probabilities"
        if model.outputs == "logits"
        else "estimates of one-hot labels minus 1/k, which only the temperature makes probabilities"
    )
    return (
        f"{first}outputs = {chosen.use}; softmax(outputs / {model.output_temperature:g}) are the "
        f"probabilities of the classes, in their order; the outputs are {meaning}"
    )


def _file_resize(recipe: Recipe) -> dict[str, Any]:
    """How image files were brought to the shape of the input, in evaluation."""
    if recipe.augment != "imagenet":
        return {"crop": 1.0, "interpolation": "bilinear"}
    # As `kd.data.files.file_source` cuts them.
    interpolation = "bicubic" if recipe.interpolation == "random" else recipe.interpolation
    return {"crop": recipe.crop_share, "interpolation": interpolation}


def _free_path(options: ExportOptions, model: Model, chosen: ExportFormat) -> Path:
    """Where to write; nothing is there yet."""
    name = re.sub(r"\W+", "-", model.name)[-60:] + chosen.suffix
    out = Path(os.path.abspath(options.out or options.run / "export" / name))
    suffixes = ("", chosen.sidecar_suffix) if chosen.sidecar_suffix else ("",)
    for path in (out.with_name(out.name + suffix) for suffix in suffixes):
        if os.path.lexists(path):
            raise UserError(f"{path} exists already: choose another --out")
    return out


@contextmanager
def _staging_path(out: Path) -> Iterator[Path]:
    """A path of the same name in a hidden folder of the same disk, which is gone afterwards."""
    parent = next(folder for folder in out.parents if folder.is_dir())
    with tempfile.TemporaryDirectory(dir=parent, prefix=".export-") as folder:
        yield Path(folder) / out.name


def _place(path: Path, out: Path) -> None:
    """Give what was written its name, and last the file that the others describe."""
    missing = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    placed: list[Path] = []
    try:
        for file in sorted(path.parent.iterdir(), key=lambda file: file == path):
            placed.append(out.with_name(file.name))
            os.rename(file, placed[-1])
    except OSError:
        for other in placed[:-1]:  # the card of what is not there
            other.unlink()
        for folder in missing:  # the deepest first
            folder.rmdir()
        raise
