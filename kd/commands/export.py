"""`kd export`: a finished student for other programs, written only if it agrees with the student.

The files are written to a hidden folder, read again the way their user would, and compared with the
student on random and on real images, before they are moved to their place.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dsdistill.harness import files
from dsdistill.harness.errors import UserError, unknown_name
from kd.exports import checked_export, export_check, export_formats, quantised_check, text_export
from kd.exports.checked_export import RELATIVE_TOLERANCE, Writer
from kd.exports.export_check import ReferenceOutputs
from kd.exports.export_formats import FORMATS, ExportFormat
from kd.exports.quantised_check import QuantisedAgreement
from kd.models import headless, network_names, networks, saved_models
from kd.models.saved_models import Model
from kd.options import ExportOptions
from kd.recipe import Recipe
from kd.runs import run_data


@dataclass(frozen=True)
class Comparison:
    """Agreement of an exported file with the student.

    Attributes:
        largest_difference: Largest absolute difference of any output, on any image.
        tolerance: Largest difference that counts as agreement.
        argmax_agreement: Fraction of the images with the same largest output.
        batch_sizes: Sizes of the batches that were run.
        random_images: Number of images of uniformly random pixels.
        real_images: Number of real images.
        data: Name of the data that the real images are from; None if there are none.
        note: Reason why there are no real images; None if there are some.
        quantised: More about a student with quantisers, whose largest difference is that without
            optimisations; None of one in float32.
    """

    largest_difference: float
    tolerance: float
    argmax_agreement: float
    batch_sizes: tuple[int, ...]
    random_images: int
    real_images: int
    data: str | None
    note: str | None
    quantised: QuantisedAgreement | None = None


def export(options: ExportOptions) -> dict[str, Any]:
    """Write a student in one format, after comparing the files with the student.

    Args:
        options: Options of the command.

    Returns:
        The path written, and the fields of the `Comparison`.

    Raises:
        UserError: If the run holds no complete student, the format does not fit it, a package is
            missing, the output exists, or the files disagree with the student.
    """
    if saved_models.is_text_run(options.run):
        return text_export.export(options)
    if options.format not in FORMATS:
        if options.format in text_export.FORMATS:
            raise UserError(
                f"--format {options.format} is for students of texts: use {', '.join(FORMATS)}"
            )
        raise unknown_name("format", options.format, FORMATS)
    export_format = FORMATS[options.format]
    model = saved_models.load_run(options.run, typed=network_names.names_in(options.trust_module))
    model.classifier.eval()
    suffix, sidecar = export_format.suffix, export_format.sidecar_suffix
    out = checked_export.free_path(options, model.name, suffix, sidecar)
    writer = export_format.prepare(model)
    if options.format == "safetensors":
        writer = _with_recipe(writer, run_data.read_recipe(options.run))
    count = export_check.REAL_IMAGES if model.bits is None else quantised_check.REAL_IMAGES
    reference = export_check.gather(options.run, model, options.data_root, count)
    return checked_export.write(
        options,
        out,
        writer,
        _card(options, model, export_format),
        lambda path: (
            _compare_quantised(options, path, export_format, model, reference)
            if model.bits is not None and export_format.graph
            else compare(path, export_format, reference)
        ),
    )


def _with_recipe(write: Writer, recipe: Recipe) -> Writer:
    """Write the recipe beside the weights: it says how `kd evaluate` prepares images."""
    stored = {**asdict(recipe), "student": None, "teacher": None}  # names of networks and folders

    def write_both(path: Path, card: Mapping[str, Any]) -> None:
        write(path, card)
        files.write_json(path / "recipe.json", stored)

    return write_both


def _compare_quantised(
    options: ExportOptions,
    path: Path,
    export_format: ExportFormat,
    model: Model,
    reference: ReferenceOutputs,
) -> Comparison:
    """Compare the file of a quantised student as `quantised_check` says."""
    read = export_format.read_quantised or export_format.read
    outputs = export_check.run(read(path), reference)
    plain = _comparison(outputs, reference, quantised_check.BOUND)
    return replace(
        plain,
        quantised=quantised_check.check(path, options.format, outputs, model, reference),
    )


def compare(path: Path, export_format: ExportFormat, reference: ReferenceOutputs) -> Comparison:
    """Run an exported file on the reference images and compare the outputs.

    Args:
        path: The file or folder.
        export_format: Its format.
        reference: Images and the student's outputs.
    """
    outputs = export_check.run(export_format.read(path), reference)
    return _comparison(outputs, reference, RELATIVE_TOLERANCE)


def _comparison(
    actual: Float[np.ndarray, "n k"], reference: ReferenceOutputs, tolerance: float
) -> Comparison:
    """Compare outputs with the student's, within a share of their range."""
    expected = np.concatenate(reference.expected)
    sizes = [len(images) for images in reference.batches]
    return Comparison(
        largest_difference=float(np.abs(actual - expected).max()),
        tolerance=tolerance * float(np.ptp(expected)),
        argmax_agreement=float((actual.argmax(1) == expected.argmax(1)).mean()),
        batch_sizes=tuple(sorted(set(sizes))),
        random_images=export_check.RANDOM_IMAGES,
        real_images=0 if reference.data is None else sizes[-1],
        data=reference.data,
        note=reference.note,
    )


def _card(options: ExportOptions, model: Model, export_format: ExportFormat) -> dict[str, Any]:
    """Description of the files, for the people and programs that use them."""
    h, w, c = model.shape
    fitted, view = model.preprocess, model.classifier.view
    recordings = {} if model.mel is None else {"recordings": model.mel.describe()}
    return {
        "format": options.format,
        "student": model.name,
        "classes": model.classes,
        "input": {
            "name": export_formats.INPUT_NAME,
            "dtype": "float32",
            "layout": "NCHW",
            "shape": ["batch", c, h, w],
            "values": "pixels in [0, 1]" + ("" if export_format.graph else ", preprocessed"),
            "files": _file_resize(run_data.read_recipe(options.run)),
            **recordings,
        },
        "preprocess": {
            "kind": fitted.kind,
            "mean": fitted.mean.tolist(),
            "std": fitted.std.tolist(),
            "included": export_format.graph,
        },
        **({} if view is None else {"view": {"steps": view.text, "included": export_format.graph}}),
        "resize": {
            "size": model.classifier.size,
            "mode": model.interpolation,
            "antialias": True,
            "repeat_channels_to": model.classifier.channels,
            "included": export_format.graph,
        },
        "outputs": {
            "name": export_formats.OUTPUT_NAME,
            "dtype": "float32",
            "shape": ["batch", _output_width(model)],
            "kind": model.outputs,
        },
        "output_temperature": model.output_temperature,
        "use": usage(model, export_format),
        "parameters": networks.parameter_count(model.classifier),
        **({"layer_channels": model.layer_channels} if model.layer_channels else {}),
        **({} if model.bits is None else {"quantized": saved_models.describe_bits(model.bits)}),
        "versions": {name: version(name) for name in ("torch", "timm", "numpy")},
    }


def _output_width(model: Model) -> int:
    """Number of values for each image."""
    if model.has_head:
        return len(model.classes)
    return headless.embedding_width(model.name, model.classifier, model.shape)


def usage(model: Model, export_format: ExportFormat) -> str:
    """How the files are used, and what their outputs mean, in a sentence."""
    prepare = "preprocess and resize the images as described; "
    if model.layer_channels:
        prepare += "kd.models.layer_channels.apply(network, layer_channels); "
    first = "" if export_format.graph else prepare
    if not model.has_head:
        return f"{first}embeddings = {export_format.use}; the student has no head and no classes"
    if model.has_several_labels:
        return (
            f"{first}outputs = {export_format.use}; sigmoid(outputs) are the probabilities of the "
            "classes, in their order, each by itself: an image has any number of them"
        )
    meaning = (
        "unnormalised log-probabilities"
        if model.gives_logits
        else "estimates of one-hot labels minus 1/k, which only the temperature makes probabilities"
    )
    return (
        f"{first}outputs = {export_format.use}; softmax(outputs / {model.output_temperature:g}) "
        f"are the probabilities of the classes, in their order; the outputs are {meaning}"
    )


def _file_resize(recipe: Recipe) -> dict[str, Any]:
    """How evaluation brought image files to the shape of the input."""
    if not recipe.streams_files:
        return {"crop": 1.0, "interpolation": "bilinear"}
    # As `kd.data.files.file_source` cuts them.
    interpolation = "bicubic" if recipe.interpolation == "random" else recipe.interpolation
    return {"crop": recipe.crop_share, "interpolation": interpolation}
