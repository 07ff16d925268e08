"""Export formats: ONNX, a torch program, safetensors and timm.

Each is prepared once, which may take seconds, then written with a card that says how to use it, and
read again the way its user would. The first two are graphs that take images in [0, 1]; the others
are weights, and leave the preprocessing to their user.
"""

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness import files
from dsdistill.harness.data import preprocess
from dsdistill.harness.errors import UserError, first_line
from kd.exports import quantised_formats
from kd.exports.checked_export import Writer
from kd.models import network_names, networks, saved_models, seals
from kd.models.adapters import PreprocessLayer
from kd.models.quantised import qdq_network
from kd.models.quantised.qdq_network import Dialect
from kd.models.saved_models import Model
from kd.models.zoo import exported, timm_zoo

Card = Mapping[str, Any]
Runner = Callable[[Float[Tensor, "n c h w"]], Float[Tensor, "n k"]]  # from images in [0, 1]

INPUT_NAME, OUTPUT_NAME, CARD_FILE = "images", "outputs", "card.json"
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
MAX_ONNX_BYTES = 2**31  # limit of a protobuf message


@dataclass(frozen=True)
class ExportFormat:
    """One export format.

    Attributes:
        prepare: Function from the student to a writer of a file or folder. It raises `UserError`
            for a student that does not fit the format.
        read: Function from the written file or folder to a runner.
        suffix: Suffix of the default name.
        sidecar_suffix: Suffix that a second file adds to the name of the first; None without one.
        graph: Whether the file contains preprocessing and resizing.
        use: Python expression for a person who has nothing but the files.
        read_quantised: As `read`, without optimisations that change what is computed, where the
            reader of a quantised student has them.
    """

    prepare: Callable[[Model], Writer]
    read: Callable[[Path], Runner]
    suffix: str
    sidecar_suffix: str | None
    graph: bool
    use: str
    read_quantised: Callable[[Path], Runner] | None = None


def prepare_onnx(model: Model) -> Writer:
    """Prepare an ONNX graph, with the card in its metadata and in a JSON file beside it."""
    # A centred network is two.
    require_onnx(model.name, sum(p.numel() for p in model.classifier.parameters()))
    import onnx

    program: Any = _trace_graph(
        model,
        lambda graph, example, sizes: torch.onnx.export(
            graph,
            example,
            dynamo=True,
            dynamic_shapes=sizes,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            opset_version=None if model.bits is None else quantised_formats.OPSET,
            verbose=False,
        ),
        qdq_network.OnnxDialect(),
    )
    proto = program.model_proto
    without_traces(proto.graph)
    if model.bits is not None:
        quantised_formats.store_codes(proto.graph)

    def write(path: Path, card: Card) -> None:
        onnx.helper.set_model_props(proto, header_strings(card))
        files.write_bytes(path, proto.SerializeToString())
        files.write_json(path.with_name(path.name + ".json"), card)

    return write


def read_onnx(path: Path) -> Runner:
    """Load the graph in onnxruntime, on the CPU."""
    return quantised_formats.run_onnx(path, INPUT_NAME)


def read_quantised_onnx(path: Path) -> Runner:
    """Load the graph in onnxruntime as it stands, without integer kernels."""
    return quantised_formats.run_onnx(path, INPUT_NAME, optimised=False)


def prepare_pt2(model: Model) -> Writer:
    """Prepare a program of `torch.export`, with the card as an extra file inside.

    A second extra file, in the form of a run's `model.json`, makes it a teacher for `kd train`;
    one of a quantised student has operators that the reader of teachers does not know.
    """
    if model.bits is not None:
        quantised_formats.register_torch_operators()
    program = _trace_graph(
        model,
        lambda graph, example, sizes: torch.export.export(graph, example, dynamic_shapes=sizes),
        qdq_network.TorchDialect(),
    )

    # As a teacher the program takes unprocessed images: it contains its own preprocessing.
    without_preprocess = replace(model, preprocess=preprocess.identity(model.shape[2]))
    model_card = json.dumps(saved_models.card(without_preprocess))

    def write(path: Path, card: Card) -> None:
        extra_files = {CARD_FILE: json.dumps(card)}
        if model.bits is None:
            extra_files[exported.CARD] = model_card
        files.write_bytes(path, pack_program(program, extra_files))

    return write


def read_pt2(path: Path) -> Runner:
    """Load the program as another process would."""
    return torch.export.load(path).module()


def prepare_safetensors(model: Model) -> Writer:
    """Prepare a folder like that of a run, with the card in the header of the weights."""

    def write(path: Path, card: Card) -> None:
        path.mkdir(exist_ok=True)
        saved_models.save_run(path, model, header_strings(card))

    return write


def read_safetensors(path: Path) -> Runner:
    """Rebuild the student from the folder, which this process has written."""
    name = seals.read(path, seals.CARD)["name"]
    model = saved_models.load_run(path, typed=[name])
    return nn.Sequential(PreprocessLayer(model.preprocess), model.classifier).eval()


def prepare_timm(model: Model) -> Writer:
    """Prepare a folder for `timm.create_model("local-dir:...", pretrained=True)`."""
    _check_timm(model)

    def write(path: Path, card: Card) -> None:
        path.mkdir(exist_ok=True)
        weights = {k: v.contiguous() for k, v in model.classifier.network.state_dict().items()}
        files.write_bytes(path / "model.safetensors", safetensors.torch.save(weights, _TIMM_HEADER))
        files.write_json(path / "config.json", _timm_config(model, card))
        files.write_json(path / CARD_FILE, card)

    return write


def read_timm(path: Path) -> Runner:
    """Load the folder in timm, with inputs prepared according to its config."""
    import timm

    network = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    config: Any = network.pretrained_cfg
    mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    size, mode = tuple(config["input_size"][1:]), config["interpolation"]
    return lambda images: network(networks.resize((images - mean) / std, size, mode))


@contextmanager
def tracing(name: str) -> Iterator[None]:
    """Trace a network without gradients and without the exporters' own warnings.

    Args:
        name: Name of the network in messages.

    Raises:
        UserError: If that fails.
    """
    level = logging.getLogger("torch.onnx").level
    try:
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter warns about its own code
            yield
    except Exception as error:  # tracing fails in as many ways as there are networks
        raise UserError(
            f"{name} cannot be traced as a graph ({first_line(error)}): use --format safetensors"
        ) from error
    finally:
        logging.getLogger("torch.onnx").setLevel(level)


def require_onnx(name: str, values: int) -> None:
    """Refuse a missing package and a network that is too large.

    Args:
        name: Name of the network in messages.
        values: Number of its values.

    Raises:
        UserError: If it cannot be written as ONNX.
    """
    if any(importlib.util.find_spec(name) is None for name in ONNX_PACKAGES):
        raise UserError(
            f"--format onnx needs {', '.join(ONNX_PACKAGES)}: pip install 'dsdistill[onnx]'"
        )
    if (size := 4 * values) >= MAX_ONNX_BYTES:
        raise UserError(
            f"an ONNX file must be smaller than {MAX_ONNX_BYTES} bytes, and the weights of "
            f"{name} have {size}: use --format pt2 or safetensors"
        )


def without_traces(graph: Any) -> None:
    """Remove the exporter's notes from a graph of ONNX.

    Stack traces reveal paths on this machine, and the names of modules and functions are a fifth of
    a quantised file of half a million weights.
    """
    for node in graph.node:
        del node.metadata_props[:]
        for attribute in node.attribute:
            without_traces(attribute.g)


def pack_program(program: Any, extra_files: dict[str, str]) -> bytes:
    """The file of a program of `torch.export`, without stack traces."""
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", program.graph).nodes:
            node.meta.pop("stack_trace", None)
    content = io.BytesIO()
    torch.export.save(program, content, extra_files=extra_files)
    return content.getvalue()


def header_strings(card: Card) -> dict[str, str]:
    """Convert the card for headers of strings: values of other types become JSON."""
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in card.items()}
    # A path may contain bytes that are not UTF-8, which headers refuse.
    return {k: v.encode("utf-8", "backslashreplace").decode() for k, v in texts.items()}


FORMATS: Mapping[str, ExportFormat] = {
    "onnx": ExportFormat(
        prepare_onnx,
        read_onnx,
        suffix=".onnx",
        sidecar_suffix=".json",
        graph=True,
        read_quantised=read_quantised_onnx,
        use="onnxruntime.InferenceSession(FILE).run(None, {'images': images})[0]",
    ),
    "pt2": ExportFormat(
        prepare_pt2,
        read_pt2,
        suffix=".pt2",
        sidecar_suffix=None,
        graph=True,
        use="torch.export.load(FILE).module()(images)",
    ),
    "safetensors": ExportFormat(
        prepare_safetensors,
        read_safetensors,
        suffix="-safetensors",
        sidecar_suffix=None,
        graph=False,
        use="network.load_state_dict("
        f"safetensors.torch.load_file('FOLDER/{saved_models.WEIGHTS}')), "
        "network(images); the folder is a RUN for every command of kd",
    ),
    "timm": ExportFormat(
        prepare_timm,
        read_timm,
        suffix="-timm",
        sidecar_suffix=None,
        graph=False,
        use="timm.create_model('local-dir:FOLDER', pretrained=True).eval()(images)",
    ),
}

_TIMM_HEADER = {"format": "pt"}  # expected by timm and Hugging Face

_Tracer = Callable[[nn.Module, tuple[Tensor], tuple[dict[int, Any]]], Any]


def _trace_graph(model: Model, trace: _Tracer, dialect: Dialect) -> Any:
    """Trace preprocessing, resizing and network as one graph for any number of images.

    Args:
        model: The student.
        trace: Traces a module.
        dialect: How quantisation is written, where the student has it.
    """
    h, w, c = model.shape
    # Two images: a size of 1 would be taken for a constant.
    example, sizes = (torch.zeros(2, c, h, w),), ({0: torch.export.Dim("batch", min=1)},)
    with tracing(model.name):
        classifier = model.classifier
        if model.bits is not None:
            classifier = quantised_formats.with_codes(model, dialect)
        graph = nn.Sequential(PreprocessLayer(model.preprocess), classifier).eval()
        return trace(graph, example, sizes)


def _check_timm(model: Model) -> None:
    """Refuse a network that timm cannot build or prepare images for."""
    if model.bits is not None:
        raise UserError(
            "timm has no quantised networks, and this student is one: use --format onnx, pt2 or "
            "safetensors"
        )
    if model.layer_channels:
        raise UserError(
            "timm has no network with the channels that pruning has left, and this student is "
            "pruned: use --format onnx, pt2 or safetensors"
        )
    if not model.has_head:
        raise UserError(
            "timm's folder is of a classifier, and this student has no head: use --format onnx, "
            "pt2 or safetensors"
        )
    if model.preprocess.whiten is not None:
        raise UserError(
            "timm cannot whiten images, and this student needs it: "
            "use --format onnx, pt2 or safetensors"
        )
    if model.classifier.initial is not None:
        raise UserError(
            "timm has no network that subtracts the function it started as, and this student is "
            "centred: use --format onnx, pt2 or safetensors"
        )
    if model.classifier.view is not None:
        raise UserError(
            f"timm takes whole images, and this student their view {model.classifier.view.text}: "
            "use --format onnx, pt2 or safetensors"
        )
    if not _timm_architecture(model):
        raise UserError(
            f"{model.name} is not one of timm's architectures: "
            "use --format onnx, pt2 or safetensors"
        )


def _timm_architecture(model: Model) -> str | None:
    """timm's name of the network; None for a network of another library."""
    config = getattr(model.classifier.network, "pretrained_cfg", None)
    return config.get("architecture") if isinstance(config, Mapping) else None


def _timm_arguments(model: Model) -> dict[str, Any]:
    """Keyword arguments of timm's function for the network."""
    parsed = network_names.parse(model.name)
    named = timm_zoo.split_arguments(parsed.base)[1] if parsed.zoo is timm_zoo else {}
    return (model.classifier.config or {}).get("arguments", {}) | named


def _timm_config(model: Model, card: Card) -> dict[str, Any]:
    classifier, (h, w, c) = model.classifier, model.shape
    network: Any = classifier.network
    pretrained, files = network.pretrained_cfg, card["input"]["files"]
    return {
        "architecture": _timm_architecture(model),
        "num_classes": len(model.classes),
        "num_features": network.num_features,
        "label_names": model.classes,
        "model_args": _timm_arguments(model),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": (c, *(classifier.size or (h, w))),
            "fixed_input_size": bool(pretrained.get("fixed_input_size")),
            "interpolation": model.interpolation if classifier.size else files["interpolation"],
            "crop_pct": files["crop"],
            "crop_mode": "center",
            "mean": model.preprocess.mean.tolist(),
            "std": model.preprocess.std.tolist(),
            "num_classes": len(model.classes),
            "pool_size": None,
            # Layers that timm adapts to other channels and classes; the first one only if it has
            # three input channels.
            "first_conv": pretrained.get("first_conv") if c == 3 else None,
            "classifier": pretrained.get("classifier"),
        },
    }
