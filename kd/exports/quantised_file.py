"""Figures of a quantised student's ONNX file beside the same student in float32.

Both files are written to a temporary folder, and run in onnxruntime's default session on the same
images in the same process.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsdistill.harness.data import preprocess
from dsdistill.harness.errors import first_line
from dsdistill.harness.evaluation import metrics
from dsdistill.harness.runs import progress
from kd.data.batching import EvaluationBatches
from kd.data.data_source import DataSource
from kd.data.files.file_source import FileSource
from kd.evaluation import scoring
from kd.exports import export_formats, quantised_formats
from kd.models import saved_models
from kd.models.quantised import quantised_network
from kd.models.saved_models import Model
from kd.recipe import Recipe

FILE, FLOAT_FILE = "file", "float_file"  # keys of the figures in a report


def describe(student: Model, method: str) -> dict[str, Any]:
    """How a student is quantised, for its report.

    Args:
        student: The student, with quantisers.
        method: `training` or `calibration`.
    """
    assert student.bits is not None
    covered = quantised_network.coverage(student.classifier.network)
    bits = saved_models.describe_bits(student.bits)
    return {**bits, "method": method, "layers": covered.layers, "share": covered.share}


def figures(
    student: Model,
    original: Model | None,
    source: DataSource | FileSource,
    recipe: Recipe,
) -> dict[str, Any]:
    """Measure both files: accuracy on test images, bytes, and latency of one image.

    That they cannot be written or run is no error of the training, which may have taken days.

    Args:
        student: The student, with quantisers.
        original: The student in float32 that it was made of; None for one that was never trained
            so, whose file then has no accuracy.
        source: Data whose test images count.
        recipe: Recipe of the training, which says how images are read.

    Returns:
        The figures of both files; empty, with a line that says why, where there are none.
    """
    plain = preprocess.identity(student.shape[2])  # the files prepare the images themselves
    batches = source.test(recipe, plain, torch.device("cpu"))
    try:
        return _measure(student, original, batches)
    except Exception as error:  # a network of a user may raise anything
        progress.say(f"note: no figures of the exported file ({first_line(error)})")
        return {}


def _measure(
    student: Model, original: Model | None, batches: EvaluationBatches | None
) -> dict[str, Any]:
    classifier = student.classifier
    network = quantised_network.float_copy(classifier.network)
    same_size = replace(student, classifier=classifier.with_network(network).eval(), bits=None)
    measured: dict[str, dict[str, Any]] = {}
    runners: dict[str, nn.Module] = {}
    with tempfile.TemporaryDirectory() as folder:
        for key, model in ((FILE, student), (FLOAT_FILE, original or same_size)):
            path = Path(folder, f"{key}.onnx")
            on_cpu = replace(model, classifier=model.classifier.cpu().eval())
            export_formats.prepare_onnx(on_cpu)(path, {})
            measured[key] = {"bytes": path.stat().st_size}
            runners[key] = _FileNetwork(path)
        for key, runner in runners.items():
            known = batches is not None and (key == FILE or original is not None)
            measured[key]["test_accuracy"] = _accuracy(runner, batches) if known else None
        for key, milliseconds in scoring.latencies_in_turn(runners, student.shape).items():
            measured[key]["latency_ms_batch_1"] = milliseconds
    return measured


class _FileNetwork(nn.Module):
    """The file of a network, as a module of images in [0, 1]."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._run = quantised_formats.run_onnx(path, export_formats.INPUT_NAME)

    def forward(self, images: Tensor) -> Tensor:
        return self._run(images.contiguous())


def _accuracy(network: nn.Module, batches: EvaluationBatches | None) -> float:
    assert batches is not None
    return metrics.accuracy(*scoring.outputs_and_labels(network, batches))
