"""What a training with `--quantize` adds: quantisers in the student."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from dsdistill.harness.errors import UserError
from kd.data.data_source import DataSource
from kd.data.files.file_source import FileSource
from kd.models.quantised import bit_widths, quantised_network
from kd.models.quantised.bit_widths import BitWidths
from kd.models.quantised.calibration import RangeRule
from kd.models.saved_models import Model
from kd.options import TrainOptions
from kd.parallel.engine import Engine
from kd.recipe import Recipe

CALIBRATION_IMAGES = 512


def quantise_student(
    student: Model,
    source: DataSource | FileSource,
    recipe: Recipe,
    on: Engine,
    bits: BitWidths,
    *,
    rule: RangeRule = "mse",
    images: int = CALIBRATION_IMAGES,
    readers: int = 0,
    say: Callable[[str], None],
) -> Model:
    """Put quantisers into a student, with ranges from training images.

    Args:
        student: The student, on its device; its network is changed in place.
        source: Its data.
        recipe: Recipe of the training.
        on: Device and processes.
        bits: Numbers of bits.
        rule: Rule of the ranges of inputs.
        images: Number of images.
        readers: Number of processes that read image files.
        say: Called with a line about what is quantised.

    Raises:
        UserError: If the student cannot be quantised, or there are no images.
    """
    if student.classifier.initial is not None:
        raise UserError(
            "the student is centred, and no codes describe the difference of two networks: "
            "quantize another student"
        )
    if on.is_fsdp2:
        raise UserError("FSDP would cut channels from their steps: leave --use_fsdp out")
    fitted = student.preprocess
    if isinstance(source, DataSource) and source.transfer is not None:
        batches = source.transfer_sample(images, fitted, on.device)
    elif source.distilled is None:
        batches = source.sample(images, recipe, fitted, on.device, readers)
    else:  # its own images alone: a distilled set may be all that there is
        batches = source.train(recipe, fitted, on, readers)
    if batches is None:
        raise UserError(
            "ranges of codes are chosen on training images, and none can be drawn from these data: "
            "use a folder of images"
        )
    classifier = student.classifier
    inputs = (batch.inputs for batch in batches.in_order() if isinstance(batch.inputs, Tensor))
    covered = quantised_network.quantise(classifier.network, classifier, inputs, bits, rule)
    say(
        f"{bits.text}: {covered.layers} layers with {100 * covered.share:.1f} % of the parameters "
        "have codes"
    )
    return replace(student, bits=bits)


def read_bits(options: TrainOptions) -> BitWidths | None:
    """The bits of the options; None without `--quantize`."""
    if options.quantize is None:
        return None
    return bit_widths.parse("--quantize", options.quantize, full_range=options.full_range)
