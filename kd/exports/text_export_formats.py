"""Export formats of students of texts: ONNX, a torch program, safetensors, and transformers.

Each is a folder with the tokenizer beside the network, a `card.json` for programs and a `README.md`
for people. The first two take token ids of any number of texts of any length; the last is what
`from_pretrained` and `pipeline` of transformers open.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsdistill.harness import files
from dsdistill.harness.errors import UserError
from kd.exports.checked_export import Writer
from kd.exports.export_formats import (
    CARD_FILE,
    header_strings,
    pack_program,
    require_onnx,
    tracing,
    without_traces,
)
from kd.models.language import (
    bilstm,
    saved_text_models,
    sentence_files,
    tokenizer,
    transformer,
)
from kd.models.language.bilstm import BiLstm
from kd.models.language.language_model import LanguageModel
from kd.models.language.sentence_encoder import SentenceEncoder
from kd.models.language.text_model import TextModel
from kd.models.token_inputs import TokenInputs
from kd.models.zoo.huggingface import import_transformers

Runner = Callable[[TokenInputs], Float[Tensor, "n *l k"]]

IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
LOGITS, EMBEDDING = "logits", "sentence_embedding"  # names of the output
ONNX_FILE, PROGRAM_FILE, README = "model.onnx", "model.pt2", "README.md"
TRACED_LENGTH = 7  # of the example; neither 1, which is taken for a constant, nor the batch


@dataclass(frozen=True)
class TextFormat:
    """One export format of texts.

    Attributes:
        prepare: Function from the student to a writer of a folder. It raises `UserError` for a
            student that does not fit the format.
        read: Function from the written folder and the student to a runner, as its user would.
        tokenizer: Folder of the tokenizer's files inside; empty for the folder itself.
    """

    prepare: Callable[[TextModel], Writer]
    read: Callable[[Path, TextModel], Runner]
    tokenizer: str = ""


class Graph(nn.Module):
    """A network as a function of tensors, as exporters trace it."""

    def __init__(self, network: LanguageModel) -> None:
        """Take a network; a BiLSTM as scans, which have no fixed length."""
        super().__init__()
        if isinstance(network.network, BiLstm):
            network = network.with_network(bilstm.with_scans(network.network))
        self.network = network

    def forward(
        self,
        input_ids: Int[Tensor, "n l"],
        attention_mask: Int[Tensor, "n l"],
        token_type_ids: Int[Tensor, "n l"] | None = None,
    ) -> Float[Tensor, "n *l k"]:
        return self.network(TokenInputs(input_ids, attention_mask.bool(), token_type_ids))


def output_name(model: TextModel) -> str:
    """Name of the output of a student."""
    return EMBEDDING if model.task == "embed" else LOGITS


def input_names(model: TextModel) -> tuple[str, ...]:
    """Names of the inputs that a student takes of those that its tokenizer gives."""
    network = model.network
    single = isinstance(network.network, BiLstm) and not model.pairs
    types = network.takes_types and not single and TYPES in model.tokenizer("a")
    return (IDS, MASK, TYPES) if types else (IDS, MASK)


def prepare_onnx(model: TextModel) -> Writer:
    """Prepare an ONNX graph, with the card in its metadata too."""
    require_onnx(model.name, sum(p.numel() for p in model.network.parameters()))
    import onnx

    example, sizes = _example(model)
    with tracing(model.name):
        program: Any = torch.onnx.export(
            Graph(model.network).eval(),
            example,
            dynamo=True,
            dynamic_shapes=sizes,
            input_names=list(input_names(model)),
            output_names=[output_name(model)],
            verbose=False,
        )
    proto = program.model_proto
    without_traces(proto.graph)

    def write(path: Path, card: Mapping[str, Any]) -> None:
        _write_common(path, model, card)
        onnx.helper.set_model_props(proto, header_strings(card))
        files.write_bytes(path / ONNX_FILE, proto.SerializeToString())

    return write


def read_onnx(path: Path, model: TextModel) -> Runner:
    """Load the graph in onnxruntime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(path / ONNX_FILE), providers=["CPUExecutionProvider"]
    )
    names = [node.name for node in session.get_inputs()]

    def run(inputs: TokenInputs) -> Tensor:
        arrays = {name: x.numpy() for name, x in _tensors(inputs).items() if name in names}
        return torch.from_numpy(session.run([output_name(model)], arrays)[0])

    return run


def prepare_pt2(model: TextModel) -> Writer:
    """Prepare a program of `torch.export`, with the card as an extra file inside too."""
    example, sizes = _example(model)
    with tracing(model.name):
        program = torch.export.export(Graph(model.network).eval(), example, dynamic_shapes=sizes)

    def write(path: Path, card: Mapping[str, Any]) -> None:
        _write_common(path, model, card)
        content = pack_program(program, {CARD_FILE: json.dumps(card)})
        files.write_bytes(path / PROGRAM_FILE, content)

    return write


def read_pt2(path: Path, model: TextModel) -> Runner:
    """Load the program as another process would."""
    module, names = torch.export.load(path / PROGRAM_FILE).module(), input_names(model)
    return lambda inputs: module(*(_tensors(inputs)[name] for name in names))


def prepare_safetensors(model: TextModel) -> Writer:
    """Prepare a folder like that of a run, with the card in the header of the weights."""

    def write(path: Path, card: Mapping[str, Any]) -> None:
        path.mkdir(exist_ok=True)
        saved_text_models.save_run(path, model, header_strings(card))
        _write_texts(path, card)

    return write


def read_safetensors(path: Path, model: TextModel) -> Runner:
    """Rebuild the student from the folder."""
    return saved_text_models.load_run(path).network.eval()


def prepare_huggingface(model: TextModel) -> Writer:
    """Prepare a folder for `from_pretrained` and `pipeline` of transformers.

    That of a model of embeddings is also one of sentence-transformers.
    """
    if isinstance(model.network.network, BiLstm):
        raise UserError(
            f"transformers has no such network as {model.name}: use --format onnx, pt2 or "
            "safetensors"
        )
    network: Any = model.network.network

    def write(path: Path, card: Mapping[str, Any]) -> None:
        _write_common(path, model, card)
        if isinstance(network, SentenceEncoder):
            cast(Any, network.encoder).save_pretrained(path)
            sentence_files.write(path, network, model.max_length)
        else:
            network.save_pretrained(path)
        for file in path.glob("*.safetensors"):
            file.chmod(0o644)  # the library creates them private

    return write


def read_huggingface(path: Path, model: TextModel) -> Runner:
    """Load the folder in transformers, and what stands after the encoder as a teacher's is."""
    if model.task == "embed":
        return transformer.load(str(path), "embed", (), model.tokenizer).eval()
    auto = getattr(import_transformers(), transformer.CLASSES[model.task])
    return LanguageModel(auto.from_pretrained(path), vocabulary=model.network.vocabulary).eval()


def meaning(model: TextModel) -> str:
    """What the outputs are, in words."""
    return _MEANINGS[model.task]


def usage(model: TextModel, export_format: str) -> str:
    """Python code that runs what was written; `FOLDER` stands for its path."""
    if export_format == "huggingface":
        return _PIPELINES[model.task].format(call=_pipeline_call(model))
    if export_format == "safetensors":
        return _RUN
    names = ", ".join(f'"{name}"' for name in input_names(model))
    texts = {True: '["a text"], ["the text that it is compared with"]', False: '["a text"]'}
    arguments = texts[model.pairs]
    if model.task == "tag":
        arguments = '[["a", "list", "of", "words"]], is_split_into_words=True'
    return _PROGRAMS[export_format].format(
        arguments=arguments, names=names, output=output_name(model)
    )


FORMATS: Mapping[str, TextFormat] = {
    "onnx": TextFormat(prepare_onnx, read_onnx),
    "pt2": TextFormat(prepare_pt2, read_pt2),
    "safetensors": TextFormat(prepare_safetensors, read_safetensors, saved_text_models.TOKENIZER),
    "huggingface": TextFormat(prepare_huggingface, read_huggingface),
}

_TOKENIZE = """\
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
inputs = tokenizer({{arguments}}, padding=True, truncation=True, return_tensors="{tensors}")
"""
_PROGRAMS = {
    "onnx": "import onnxruntime\n"
    + _TOKENIZE.format(tensors="np")
    + f'session = onnxruntime.InferenceSession("FOLDER/{ONNX_FILE}")\n'
    + '{output} = session.run(["{output}"], {{n: inputs[n] for n in [{names}]}})[0]\n',
    "pt2": "import torch\n"
    + _TOKENIZE.format(tensors="pt")
    + f'network = torch.export.load("FOLDER/{PROGRAM_FILE}").module()\n'
    + "{output} = network(*(inputs[name] for name in [{names}]))\n",
}
_RUN = """\
from pathlib import Path

from kd.models.language import saved_text_models

student = saved_text_models.load_run(Path("FOLDER"))  # also a RUN for the commands of kd
"""
_PIPELINES = {
    task: f"""\
from transformers import pipeline

run = pipeline("{name}", "FOLDER"{options})
answer = run({{call}})
"""
    for task, name, options in (
        ("classify", "text-classification", ", truncation=True, top_k=None"),
        ("regress", "text-classification", ', truncation=True, function_to_apply="none"'),
        ("tag", "token-classification", ""),
        ("mlm", "fill-mask", ""),
        ("causal", "text-generation", ""),
    )
} | {
    "embed": """\
from sentence_transformers import SentenceTransformer

answer = SentenceTransformer("FOLDER").encode(["a text", "another one"])
"""
}
_MEANINGS = {
    "classify": "softmax(logits) are the probabilities of the classes, in their order",
    "regress": "the one logit of a text is its score",
    "tag": "the largest logit of a word's first token is its tag",
    "mlm": "softmax(logits) of a hidden token are the probabilities of the vocabulary",
    "causal": "softmax(logits) of a token are the probabilities of the next one",
    "embed": "texts are as similar as the cosine of their embeddings",
}


def _pipeline_call(model: TextModel) -> str:
    if model.task == "mlm":
        return f'"a {model.tokenizer.mask_token}"'
    if model.task == "causal":
        return '"a text", max_new_tokens=8'
    if not model.pairs:
        return '"a text"'
    return '{"text": "a text", "text_pair": "the text that it is compared with"}'


def _example(model: TextModel) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Inputs to trace with, and their sizes that may be any."""
    length = min(TRACED_LENGTH, model.positions or TRACED_LENGTH)
    ids = torch.ones(2, length, dtype=torch.long)
    types = torch.zeros_like(ids)
    types[:, length // 2 :] = 1
    names = input_names(model)
    tensors = _tensors(TokenInputs(ids, ids.bool(), types))
    sizes = {
        0: torch.export.Dim("batch", min=1),
        1: torch.export.Dim("length", min=1, max=model.positions),
    }
    return tuple(tensors[name] for name in names), (sizes,) * len(names)


def _tensors(inputs: TokenInputs) -> dict[str, Tensor]:
    types = torch.zeros_like(inputs.ids) if inputs.types is None else inputs.types
    return {IDS: inputs.ids, MASK: inputs.mask.long(), TYPES: types}


def _write_common(path: Path, model: TextModel, card: Mapping[str, Any]) -> None:
    """Write tokenizer, configuration, card and what people read."""
    path.mkdir(exist_ok=True)
    own = copy.deepcopy(model.tokenizer)
    own.model_max_length = model.max_length  # where `truncation=True` cuts
    tokenizer.save(own, path)
    if (config := getattr(model.network.network, "config", None)) is not None:
        config.save_pretrained(path)
    _write_texts(path, card)


def _write_texts(path: Path, card: Mapping[str, Any]) -> None:
    files.write_json(path / CARD_FILE, card)
    files.write_bytes(path / README, _readme(card).encode())


def _readme(card: Mapping[str, Any]) -> str:
    """What a person should know, as the front page of the folder."""
    classes = "\n".join(f"{i}. `{name}`" for i, name in enumerate(card["classes"]))
    return (
        "\n\n".join(
            part
            for part in (
                f"# {card['student']}",
                f"A network of texts for the task `{card['task']}` with {card['parameters']:,} "
                f"parameters, trained by `kd` on texts of up to {card['max_length']} tokens.",
                f"From Python, with the path of this folder for `FOLDER`:\n\n"
                f"```python\n{card['use']}```",
                f"Outputs `{card['outputs']['name']}`: {card['outputs']['meaning']}.",
                classes and f"Classes, by number:\n\n{classes}",
                "`card.json` says all of this to programs, and how well these files agree with the "
                "trained network.",
            )
            if part
        )
        + "\n"
    )
