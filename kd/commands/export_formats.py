"""A student in the forms that other programs read: ONNX, a torch program, safetensors, timm.

Each form is made once, which may take seconds, then written with a card that says how to use it,
and read again the way its user would. The first two are graphs that take images in [0, 1]; the
others are weights, and leave the preprocessing to their user.
"""

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.data import preprocess
from dsdistill.harness.errors import UserError, first_line
from dsdistill.harness.runs import run_folder
from kd.models import networks, saved_models
from kd.models.adapters import PreprocessLayer
from kd.models.saved_models import Model
from kd.models.zoo import exported, timm_zoo

Card = Mapping[str, Any]
Writer = Callable[[Path, Card], None]  # may be called again, with another card
Runner = Callable[[Float[Tensor, "n c h w"]], Float[Tensor, "n k"]]  # from images in [0, 1]

INPUT_NAME, OUTPUT_NAME, CARD_FILE = "images", "outputs", "card.json"
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
MAX_ONNX_BYTES = 2**31  # a protobuf message has no more


@dataclass(frozen=True)
class ExportFormat:
    """One of the forms.

    Attributes:
        prepare: Gives what writes the student, to a file or a folder. Refuses one that the form
            is not for with a `UserError`.
        read: What answers for it, from the file or folder that was written.
        suffix: Of the default name.
        beside: What the name of a second file appends to that of the first.
        graph: Whether preprocessing and resize are inside.
        use: For a person who has the files alone.
    """

    prepare: Callable[[Model], Writer]
    read: Callable[[Path], Runner]
    suffix: str
    sidecar_suffix: str | None
    graph: bool
    use: str


def prepare_onnx(model: Model) -> Writer:
    """An ONNX graph, with the card in its metadata and in a JSON file beside it."""
    _check_onnx(model)
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
            verbose=False,
        ),
    )
    proto = program.model_proto

    def write(path: Path, card: Card) -> None:
        onnx.helper.set_model_props(proto, header_strings(card))
        run_folder.write_bytes(path, proto.SerializeToString())
        run_folder.write_json(path.with_name(path.name + ".json"), card)

    return write


def read_onnx(path: Path) -> Runner:
    """The graph in onnxruntime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(
        session.run([OUTPUT_NAME], {INPUT_NAME: images.numpy()})[0]
    )


def prepare_pt2(model: Model) -> Writer:
    """A program of `torch.export`, with the card as an extra file inside.

    A second one, in the form of a run's `model.json`, makes it a teacher for `kd train`.
    """
    program = _trace_graph(
        model,
        lambda graph, example, sizes: torch.export.export(graph, example, dynamic_shapes=sizes),
    )

    # Where the code lies on this machine is nobody else's business.
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    # As a teacher it takes plain images: its own preprocessing is a part of it.
    plain = replace(model, preprocess=preprocess.identity(model.shape[2]))
    described = json.dumps(saved_models.card(plain))

    def write(path: Path, card: Card) -> None:
        content = io.BytesIO()
        inside = {CARD_FILE: json.dumps(card), exported.CARD: described}
        torch.export.save(program, content, extra_files=inside)
        run_folder.write_bytes(path, content.getvalue())

    return write


def read_pt2(path: Path) -> Runner:
    """The program as another process gets it."""
    return torch.export.load(path).module()


def prepare_safetensors(model: Model) -> Writer:
    """A folder like a run's, with the card in the header of the weights."""

    def write(path: Path, card: Card) -> None:
        path.mkdir(exist_ok=True)
        saved_models.save_run(path, model, header_strings(card))

    return write


def read_safetensors(path: Path) -> Runner:
    """A student made anew from the folder."""
    found = saved_models.load_run(path)
    return nn.Sequential(PreprocessLayer(found.preprocess), found.classifier).eval()


def prepare_timm(model: Model) -> Writer:
    """A folder for `timm.create_model("local-dir:...", pretrained=True)`."""
    _check_timm(model)

    def write(path: Path, card: Card) -> None:
        path.mkdir(exist_ok=True)
        weights = {k: v.contiguous() for k, v in model.classifier.network.state_dict().items()}
        run_folder.write_bytes(
            path / "model.safetensors", safetensors.torch.save(weights, _TIMM_HEADER)
        )
        run_folder.write_json(path / "config.json", _timm_config(model, card))
        run_folder.write_json(path / CARD_FILE, card)

    return write


def read_timm(path: Path) -> Runner:
    """What timm makes of the folder, its input prepared as the folder's config says."""
    import timm

    network = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    config: Any = network.pretrained_cfg
    mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    size, how = tuple(config["input_size"][1:]), config["interpolation"]
    return lambda images: network(networks.resize((images - mean) / std, size, how))


def header_strings(card: Card) -> dict[str, str]:
    """The card for headers that hold strings alone: what is no string becomes JSON."""
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in card.items()}
    # A path may hold bytes that are no text; no header takes them.
    return {k: v.encode("utf-8", "backslashreplace").decode() for k, v in texts.items()}


FORMATS: Mapping[str, ExportFormat] = {
    "onnx": ExportFormat(
        prepare_onnx,
        read_onnx,
        suffix=".onnx",
        sidecar_suffix=".json",
        graph=True,
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

_TIMM_HEADER = {"format": "pt"}  # what programs of the same family expect there

_Tracer = Callable[[nn.Module, tuple[Tensor], tuple[dict[int, Any]]], Any]


def _trace_graph(model: Model, trace: _Tracer) -> Any:
    """Preprocessing, resize and network as one graph for any number of images."""
    h, w, c = model.shape
    graph = nn.Sequential(PreprocessLayer(model.preprocess), model.classifier).eval()
    # Two images: a size of 1 would be taken for a constant.
    example, sizes = (torch.zeros(2, c, h, w),), ({0: torch.export.Dim("batch", min=1)},)
    level = logging.getLogger("torch.onnx").level
    try:
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter, about its own code
            return trace(graph, example, sizes)
    except Exception as error:  # tracing fails in as many ways as there are networks
        raise UserError(
            f"{model.name} cannot be made into a graph ({first_line(error)}): "
            "use --format safetensors"
        ) from error
    finally:
        logging.getLogger("torch.onnx").setLevel(level)


def _check_onnx(model: Model) -> None:
    """Refuse where a package is missing, and a network that is too large."""
    if any(importlib.util.find_spec(name) is None for name in ONNX_PACKAGES):
        raise UserError(
            f"--format onnx needs {', '.join(ONNX_PACKAGES)}: pip install 'dsdistill[onnx]'"
        )
    needed = 4 * networks.parameter_count(model.classifier)
    if needed >= MAX_ONNX_BYTES:
        raise UserError(
            f"an ONNX file holds less than {MAX_ONNX_BYTES} bytes, and {model.name} has {needed} of "
            "weights: use --format pt2 or safetensors"
        )


def _check_timm(model: Model) -> None:
    """Refuse what timm cannot make or prepare images for."""
    if model.preprocess.whiten is not None:
        raise UserError(
            "timm cannot whiten images, and this student needs it: "
            "use --format onnx, pt2 or safetensors"
        )
    if not _timm_architecture(model):
        raise UserError(
            f"{model.name} is not one of timm's architectures: "
            "use --format onnx, pt2 or safetensors"
        )


def _timm_architecture(model: Model) -> str | None:
    """timm's name for the network; None for one that is not timm's."""
    config = getattr(model.classifier.network, "pretrained_cfg", None)
    return config.get("architecture") if isinstance(config, Mapping) else None


def _timm_arguments(model: Model) -> dict[str, Any]:
    """What timm's function for the network is given."""
    found = networks.parse(model.name)
    own = timm_zoo.split_arguments(found.base)[1] if found.zoo is timm_zoo else {}
    return (model.classifier.config or {}).get("arguments", {}) | own


def _timm_config(model: Model, card: Card) -> dict[str, Any]:
    classifier, (h, w, c) = model.classifier, model.shape
    network: Any = classifier.network
    made, files = network.pretrained_cfg, card["input"]["files"]
    return {
        "architecture": _timm_architecture(model),
        "num_classes": len(model.classes),
        "num_features": network.num_features,
        "label_names": model.classes,
        "model_args": _timm_arguments(model),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": (c, *(classifier.size or (h, w))),
            "fixed_input_size": bool(made.get("fixed_input_size")),
            "interpolation": model.interpolation if classifier.size else files["interpolation"],
            "crop_pct": files["crop"],
            "crop_mode": "center",
            "mean": model.preprocess.mean.tolist(),
            "std": model.preprocess.std.tolist(),
            "num_classes": len(model.classes),
            "pool_size": None,
            # The layers that timm may adapt to other channels and classes. The first is adapted
            # from three channels alone.
            "first_conv": made.get("first_conv") if c == 3 else None,
            "classifier": made.get("classifier"),
        },
    }
