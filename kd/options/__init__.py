"""The options of the commands, as frozen values; the strings below the fields are help texts."""

from kd.options.augment import AugmentOptions
from kd.options.evaluate import EvaluateOptions
from kd.options.export import ExportOptions
from kd.options.features import FeaturesOptions
from kd.options.quantize import QuantizeOptions
from kd.options.report import ReportOptions
from kd.options.shared import DEFAULT_WORKERS, TEACHER_INPUT_OPTIONS, teacher_inputs
from kd.options.synthesize import SynthesizeOptions
from kd.options.train import (
    IMAGE_FIELDS,
    IMAGE_OPTIONS,
    TEXT_FIELDS,
    TEXT_OPTIONS,
    Overrides,
    TrainOptions,
)

__all__ = [
    "DEFAULT_WORKERS",
    "IMAGE_FIELDS",
    "IMAGE_OPTIONS",
    "TEACHER_INPUT_OPTIONS",
    "TEXT_FIELDS",
    "TEXT_OPTIONS",
    "AugmentOptions",
    "EvaluateOptions",
    "ExportOptions",
    "FeaturesOptions",
    "Overrides",
    "QuantizeOptions",
    "ReportOptions",
    "SynthesizeOptions",
    "TrainOptions",
    "teacher_inputs",
]
