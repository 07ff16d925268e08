"""`kd quantize`: a finished student with codes for weights and inputs, without training.

It is written as a run of its own, which `kd evaluate`, `kd export`, `kd report` and `kd train
--teacher` read like that of a training:

config.json              the options, and the data of the student's training
recipe.json              the recipe of that training
student.safetensors      the student's weights, in float32
quantisers.safetensors   steps and codes
model.json               description of the network
report.json              figures, and the checksums of all other files
"""

import copy
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dsdistill.harness import files, memory, paths
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress, run_folder
from kd.assembly import quantised_training
from kd.data.data_source import DataSource
from kd.data.files.file_source import FileSource
from kd.evaluation import scoring
from kd.exports import quantised_file
from kd.models import network_names, networks, saved_models, seals
from kd.models.quantised import bit_widths
from kd.models.saved_models import Model
from kd.models.seals import REPORT
from kd.options import QuantizeOptions
from kd.parallel import engine
from kd.recipe import Recipe
from kd.runs import finished_runs, run_data

COPIED = ("data", "seed", "validation_fraction", run_folder.INPUTS_KEY)  # of the student's options


def quantize(options: QuantizeOptions) -> dict[str, Any]:
    """Quantise a finished student, and write it as a run.

    Args:
        options: Options that passed `QuantizeOptions.check`.

    Returns:
        The folder, and the content of its `report.json`.

    Raises:
        UserError: If there is no such student, it cannot be quantised, or the folder is taken.
    """
    began = time.perf_counter()
    out = options.out or run_folder.next_free(f"kd-{options.run.resolve().name}-{options.bits}")
    run_folder.check_free(out, REPORT)
    if saved_models.is_text_run(options.run):
        raise UserError(f"{options.run} is a student of texts, and kd quantize takes one of images")
    on = engine.make(options.device)
    student = saved_models.load_run(options.run, typed=network_names.names_in(options.trust_module))
    if not student.has_head:
        raise UserError(
            f"{options.run} has no head, and kd quantize measures answers for classes: add a head "
            f"with kd train --student {options.run} first"
        )
    if student.has_several_labels:
        raise UserError(
            f"{options.run} learned any number of labels an image, and kd quantize measures the "
            "accuracy of one class each: leave it in float32"
        )
    if student.bits is not None:
        raise UserError(
            f"{options.run} is quantised already, with {student.bits.text}: give the run in "
            "float32 that it was made of"
        )
    config, recipe = run_data.read_config(options.run), run_data.read_recipe(options.run)
    source = _load_data(options, config, recipe, student)
    student = saved_models.match_classes(
        f"student {options.run}", student, source.shape, source.classes
    )
    original = replace(student, classifier=_copy(student))
    student.classifier.to(on.device).eval()
    bits = bit_widths.parse("--bits", options.bits, full_range=options.full_range)
    student = quantised_training.quantise_student(
        student,
        source,
        recipe,
        on,
        bits,
        rule=options.range,
        images=options.images,
        say=progress.say,
    )
    report = {
        **_figures(student, source, recipe, on.device),
        "student": student.name,
        "teacher": None,
        "data": source.name,
        "seed": config.get("seed", 0),
        "parameters": networks.parameter_count(student.classifier),
        "output_temperature": student.output_temperature,
        "quantized": quantised_file.describe(student, "calibration"),
        **quantised_file.figures(student, original, source, recipe),
        "seconds": time.perf_counter() - began,
        "peak_memory": memory.peak(),
        "device": str(on.device),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "timm", "numpy")},
    }
    _write(out, options, config, recipe, student, report)
    return {"folder": str(out), **report}


def _load_data(
    options: QuantizeOptions, config: Mapping[str, Any], recipe: Recipe, student: Model
) -> DataSource | FileSource:
    """The data of the student's training, with the same images held out."""
    name = config.get("data")
    if not isinstance(name, str):
        raise UserError(f"{options.run} does not say what it was trained on")
    root = options.data_root or Path(config.get("data_root") or paths.data_root())
    fraction = config.get("validation_fraction")
    return run_data.load(name, student, recipe, config, root=root, held_out=fraction)


def _copy(student: Model) -> networks.Classifier:
    """The student's classifier, which its quantisers do not change."""
    return copy.deepcopy(student.classifier)


def _figures(
    student: Model, source: DataSource | FileSource, recipe: Recipe, device: torch.device
) -> dict[str, Any]:
    """Figures on test images, and the accuracy on the validation images."""
    figures: dict[str, Any] = {"test_accuracy": None, "test_images": 0}
    fitted, temperature = student.preprocess, student.output_temperature
    if (test := source.test(recipe, fitted, device)) is not None:
        measured = scoring.evaluate(student.classifier, test, temperature=temperature)
        figures = {
            "test_accuracy": measured.pop("accuracy"),
            "test_images": measured.pop("images"),
            **measured,
        }
    validation = source.validation(recipe, fitted, device)
    accuracy = validation and scoring.evaluate(student.classifier, validation)["accuracy"]
    return {**figures, "validation_accuracy": accuracy, "note": source.note}


def _write(
    out: Path,
    options: QuantizeOptions,
    config: Mapping[str, Any],
    recipe: Recipe,
    student: Model,
    report: Mapping[str, Any],
) -> None:
    """Write the run to a hidden folder, and move it to its place."""
    given = {
        "command": finished_runs.QUANTIZE,
        "run": str(options.run.resolve()),
        "bits": options.bits,
        "full_range": options.full_range,
        "range": options.range,
        "images": options.images,
        "data_root": str(options.data_root or config.get("data_root") or paths.data_root()),
    }
    copied = {name: config[name] for name in COPIED if name in config}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".quantize-") as temporary:
        folder = Path(temporary, out.name)
        folder.mkdir()
        files.write_json(folder / "config.json", copied | given)
        files.write_json(folder / "recipe.json", asdict(recipe))
        saved_models.save_run(folder, student)
        seals.write(folder, REPORT, report, seals.SEALED_FILES)
        os.replace(folder, out)
