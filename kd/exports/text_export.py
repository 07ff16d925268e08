"""`kd export` of a student of texts.

What is written is read again the way its user would, tokenizer included, and compared with the
student on random tokens and on texts of the run's data, one by one and padded in batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsdistill.harness import paths
from dsdistill.harness.errors import UserError, unknown_name
from kd.data.text import corpus, embedding_texts, part_files, tokenization
from kd.data.text.corpus import TextPart
from kd.data.text.token_batches import TokenBatches
from kd.exports import checked_export, text_export_formats
from kd.exports.checked_export import RELATIVE_TOLERANCE
from kd.exports.text_export_formats import FORMATS, Runner, TextFormat
from kd.models import networks, seals
from kd.models.language import saved_text_models, tokenizer
from kd.models.language.task import ALIGNED, OF_TOKENS
from kd.models.language.text_model import TextModel
from kd.models.token_inputs import TokenInputs
from kd.options import ExportOptions

TEXTS, TEXTS_OF_VOCABULARY = 48, 8  # of the data; fewer where each token has as many outputs
RANDOM_ROWS = 4  # rows of each batch of random tokens
SEED = 0


@dataclass(frozen=True, eq=False)
class ReferenceOutputs:
    """Inputs with the student's outputs.

    Attributes:
        batches: Random tokens of several lengths, then texts of the data, if there are any.
        expected: The student's outputs for the real tokens, or the texts, of each batch.
        texts: Texts on which tokenizers are compared.
        data: Name of the data that the texts are from; None if there are none.
        note: Reason why there are no texts; None if there are some.
    """

    batches: tuple[TokenInputs, ...]
    expected: tuple[Float[Tensor, "m k"], ...]
    texts: tuple[str, ...]
    data: str | None
    note: str | None


@dataclass(frozen=True)
class TextComparison:
    """Agreement of an export with the student.

    Attributes:
        largest_difference: Largest absolute difference of any output.
        tolerance: Largest difference that counts as agreement.
        argmax_agreement: Share of the texts, or of their tokens, with the same largest output.
        batch_sizes: Sizes of the batches that were run.
        lengths: Lengths in tokens of the batches that were run.
        texts: Number of texts of the data.
        data: Name of the data that they are from; None if there are none.
        note: Reason why there are none; None if there are some.
    """

    largest_difference: float
    tolerance: float
    argmax_agreement: float
    batch_sizes: tuple[int, ...]
    lengths: tuple[int, ...]
    texts: int
    data: str | None
    note: str | None


def export(options: ExportOptions) -> dict[str, Any]:
    """Write a student of texts in one format, after comparing it with the student.

    Args:
        options: Options of the command.

    Returns:
        The path written, and the fields of the `TextComparison`.

    Raises:
        UserError: If the run holds no whole student, the format does not fit it, a package is
            missing, the output exists, or what was written disagrees with the student.
    """
    if options.format not in FORMATS:
        if options.format == "timm":
            raise UserError(f"--format timm is for students of images: use {', '.join(FORMATS)}")
        raise unknown_name("format", options.format, FORMATS)
    export_format = FORMATS[options.format]
    model = saved_text_models.load_run(options.run)
    model.network.eval()
    out = checked_export.free_path(options, model.name.rstrip("]"), f"-{options.format}")
    writer = export_format.prepare(model)
    reference = gather(options.run, model, options.data_root)
    return checked_export.write(
        options,
        out,
        writer,
        _card(options.format, model),
        lambda path: compare(path, model, export_format, reference),
    )


def gather(run: Path, model: TextModel, root: Path | None) -> ReferenceOutputs:
    """Collect random tokens and texts of the data, single and in batches.

    Args:
        run: Folder of the student's run, which names its data.
        model: The student, in evaluation mode.
        root: Folder of the data sets; None for the one used in training.

    Raises:
        UserError: If the student's outputs are not finite.
    """
    rng = np.random.default_rng(SEED)
    batches, texts = _random_batches(model, rng), ()
    name, note = None, None
    try:
        name, part = _part_of_run(run, model, root, rng)
        batches += _text_batches(part, model)
        texts = tuple(x if isinstance(x, str) else " ".join(x) for x in part.texts[0])
    except (UserError, OSError) as error:
        note = str(error)
    expected = tuple(_outputs(model.network, model, inputs) for inputs in batches)
    if not all(outputs.isfinite().all() for outputs in expected):
        raise UserError(f"the student of {run} has outputs that are not finite: train it again")
    return ReferenceOutputs(tuple(batches), expected, texts, name, note)


def compare(
    path: Path, model: TextModel, export_format: TextFormat, reference: ReferenceOutputs
) -> TextComparison:
    """Run what was exported on the reference inputs and compare the outputs.

    Args:
        path: The folder.
        model: The student.
        export_format: The format of the folder.
        reference: Inputs and the student's outputs.

    Raises:
        UserError: If its tokenizer gives other ids.
    """
    own = tokenizer.load(str(path / export_format.tokenizer))
    if not tokenizer.same_ids(own, model.tokenizer, reference.texts):
        raise UserError("its tokenizer gives other ids")
    run = export_format.read(path, model)
    actual = torch.cat([_outputs(run, model, inputs) for inputs in reference.batches])
    expected = torch.cat(reference.expected)
    shapes = [inputs.ids.shape for inputs in reference.batches]
    return TextComparison(
        largest_difference=float((actual - expected).abs().max()),
        tolerance=RELATIVE_TOLERANCE * float(expected.max() - expected.min()),
        argmax_agreement=float((actual.argmax(-1) == expected.argmax(-1)).float().mean()),
        batch_sizes=tuple(sorted({rows for rows, _ in shapes})),
        lengths=tuple(sorted({length for _, length in shapes})),
        texts=len(reference.texts),
        data=reference.data,
        note=reference.note,
    )


@torch.inference_mode()
def _outputs(run: Runner, model: TextModel, inputs: TokenInputs) -> Float[Tensor, "m k"]:
    """Outputs of texts; of tasks with outputs for tokens those of real tokens, in one row each."""
    outputs = run(inputs).float()
    return outputs[inputs.mask] if model.task in ALIGNED else outputs


def _random_batches(model: TextModel, rng: np.random.Generator) -> list[TokenInputs]:
    """Random tokens from one to the most that the student was trained on, with padding."""
    batches, most = [], model.max_length
    for rows, longest in ((1, 1), (1, most), (RANDOM_ROWS, (most + 1) // 2)):
        lengths = torch.from_numpy(rng.integers(1, longest + 1, rows))
        lengths[0] = longest
        steps = torch.arange(longest)
        ids = torch.from_numpy(rng.integers(len(model.tokenizer), size=(rows, longest)))
        types = (steps >= (lengths[:, None] + 1) // 2).long() * (steps < lengths[:, None])
        batches.append(TokenInputs(ids, steps < lengths[:, None], types))
    return batches


def _text_batches(part: TextPart, model: TextModel) -> list[TokenInputs]:
    """The first text alone, and all together."""
    encoded = tokenization.encode(part, model.tokenizer, model.max_length)
    padding, cpu = (model.tokenizer.pad_token_id,), torch.device("cpu")
    batches = []
    for size in (1, len(part)):
        batches.append(next(TokenBatches((encoded,), padding, None, size, cpu).in_order()).inputs)
    return batches


def _part_of_run(
    run: Path, model: TextModel, root: Path | None, rng: np.random.Generator
) -> tuple[str, TextPart]:
    """Name of the run's data and some of its texts, from the test part where it has one.

    Raises:
        UserError: If they are missing or do not fit the student.
    """
    path = run / "config.json"
    config: Mapping[str, Any] = seals.read(run, path.name) if path.is_file() else {}
    name = config.get("data")
    if not isinstance(name, str):
        raise UserError(f"{run} does not say what it was trained on")
    root = root or Path(config.get("data_root") or paths.data_root())
    data = corpus.load(
        part_files.locate(name, root),
        task=model.task,
        text=config.get("text"),
        label=config.get("label"),
        classes=model.classes or None,
    )
    part = next(x for x in (data.test, data.validation, data.train) if len(x))
    if model.task != "tag" and not isinstance(part.texts[0][0], str):
        raise UserError(f"{data.name} has conversations, which are not compared")
    count = TEXTS_OF_VOCABULARY if model.task in OF_TOKENS else TEXTS
    part = part.select(np.sort(rng.permutation(len(part))[:count]))
    return data.name, embedding_texts.of_student(part) if model.task == "embed" else part


def _card(format_name: str, model: TextModel) -> dict[str, Any]:
    """Description of the files, for the people and programs that use them."""
    outputs = [] if not model.classes else [len(model.classes)]
    outputs = [model.embedding_width] if model.task == "embed" else outputs
    return {
        "format": format_name,
        "student": model.name,
        "task": model.task,
        "classes": model.classes,
        "inputs": {
            "names": text_export_formats.input_names(model),
            "dtype": "int64",
            "shape": ["batch", "length"],
        },
        "max_length": model.max_length,
        "pairs": model.pairs,
        "outputs": {
            "name": text_export_formats.output_name(model),
            "dtype": "float32",
            "shape": ["batch", *(["length"] if model.task in ALIGNED else []), *outputs],
            "meaning": text_export_formats.meaning(model),
        },
        "use": text_export_formats.usage(model, format_name),
        "parameters": networks.parameter_count(model.network.network),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }
