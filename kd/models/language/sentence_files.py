"""The folder of a model of sentence-transformers: what stands after its transformer.

`modules.json` lists the modules, each with a folder: the transformer, the pooling, linear layers
(Dense) and the division by the length (Normalize). Files are written as version 2 of the library
does, which later ones read too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from dsdistill.harness import files
from dsdistill.harness.errors import UserError, first_line
from kd.models.language.sentence_encoder import (
    POOLINGS,
    EmbeddingHead,
    LinearLayer,
    Pooling,
    SentenceEncoder,
)
from kd.models.zoo.huggingface import import_transformers

MODULES, CONFIG, WEIGHTS, OLD_WEIGHTS = (
    *("modules.json", "config.json", "model.safetensors", "pytorch_model.bin"),
)
_LIBRARY = "sentence_transformers.models."
_POOLING_KEYS: Mapping[Pooling, str] = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
}
_OTHER_POOLING_KEYS = (
    *("pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens"),
    "pooling_mode_lasttoken",
)
_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.Tanh": "tanh",
}


@dataclass(frozen=True)
class SavedHead:
    """The head that a folder describes.

    Attributes:
        head: The head; the mean over the tokens where the folder describes none.
        folders: Folder of each linear layer.
    """

    head: EmbeddingHead
    folders: tuple[str, ...] = ()


def read_head(name: str) -> SavedHead:
    """Read what stands after the transformer.

    Args:
        name: Folder, or name on the hub.

    Raises:
        UserError: If there is a module or a pooling that is not known here.
    """
    listed = _read_json(name, MODULES)
    if listed is None:  # a plain transformer, of which the library takes the mean too
        return SavedHead(EmbeddingHead())
    steps = [(str(x["type"]).rpartition(".")[2], str(x["path"])) for x in listed]
    kinds = [kind for kind, _ in steps]
    inner = kinds[2:-1] if kinds[-1] == "Normalize" else kinds[2:]
    if kinds[:2] != ["Transformer", "Pooling"] or set(inner) - {"Dense"}:
        raise UserError(
            f"hf:{name} has the modules {', '.join(kinds)}: known are a Transformer, a Pooling, "
            "Dense layers, and Normalize at the end"
        )
    folders = tuple(path for kind, path in steps if kind == "Dense")
    head = EmbeddingHead(
        _pooling(name, _require(name, f"{steps[1][1]}/{CONFIG}")),
        tuple(_layer(name, _require(name, f"{folder}/{CONFIG}")) for folder in folders),
        kinds[-1] == "Normalize",
    )
    return SavedHead(head, folders)


def load_layers(name: str, saved: SavedHead, network: SentenceEncoder) -> None:
    """Load the weights of the linear layers.

    Args:
        name: Folder, or name on the hub.
        saved: What `read_head` read there.
        network: Encoder with this head.

    Raises:
        UserError: If they are missing or do not fit.
    """
    for layer, folder in zip(network.layers, saved.folders, strict=True):
        weights = _read_weights(name, folder)
        try:
            layer.load_state_dict({key.removeprefix("linear."): x for key, x in weights.items()})
        except RuntimeError as error:
            raise UserError(
                f"the weights in {folder} of hf:{name} do not fit: {first_line(error)}"
            ) from error


def write(folder: Path, network: SentenceEncoder, max_length: int) -> None:
    """Write what makes the folder of a transformer one of sentence-transformers.

    Args:
        folder: Folder with the transformer and its tokenizer.
        network: The encoder.
        max_length: Largest number of tokens of a text.
    """
    head = network.head
    kinds = ["Transformer", "Pooling", *("Dense" for _ in head.layers)]
    kinds += ["Normalize"] if head.normalise else []
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds[1:], start=1))]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{_LIBRARY}{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    for path in paths[1:]:
        (folder / path).mkdir(exist_ok=True)
    modes = {key: pooling == head.pooling for pooling, key in _POOLING_KEYS.items()}
    modes |= dict.fromkeys(_OTHER_POOLING_KEYS, False)
    size = {"word_embedding_dimension": network.hidden_size}
    files.write_json(folder / paths[1] / CONFIG, size | modes)
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    for path, step, layer in zip(paths[2:], head.layers, network.layers, strict=False):
        config = {"in_features": step.inputs, "out_features": step.outputs, "bias": step.bias}
        config |= {"activation_function": names[step.activation]}
        files.write_json(folder / path / CONFIG, config)
        files.write_bytes(folder / path / WEIGHTS, _pack(layer))
    files.write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": max_length, "do_lower_case": False},
    )
    files.write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})
    files.write_json(folder / MODULES, modules)


def _pack(layer: nn.Module) -> bytes:
    tensors = {f"linear.{key}": value.contiguous() for key, value in layer.state_dict().items()}
    return safetensors.torch.save(tensors)


def _pooling(name: str, config: Mapping[str, Any]) -> Pooling:
    named = config.get("pooling_mode")
    if named is None:
        own = {key: mode for mode, key in _POOLING_KEYS.items()}
        keys = [key for key, on in config.items() if key.startswith("pooling_mode") and on is True]
        modes = [own.get(key, key) for key in keys]
    else:
        modes = [named] if isinstance(named, str) else list(named)
    known: list[Pooling] = [mode for mode in POOLINGS if modes == [mode]]
    if not known:
        raise UserError(
            f"hf:{name} pools by {' and '.join(map(str, modes)) or 'nothing'}: known are "
            f"{', '.join(POOLINGS)}, one of them"
        )
    return known[0]


def _layer(name: str, config: Mapping[str, Any]) -> LinearLayer:
    activation = _ACTIVATIONS.get(config.get("activation_function", ""))
    if activation is None or config.get("use_residual"):
        raise UserError(
            f"hf:{name} has a Dense layer with "
            f"{'a residual' if config.get('use_residual') else config.get('activation_function')}: "
            "known are Identity and Tanh"
        )
    inputs, outputs = config["in_features"], config["out_features"]
    return LinearLayer(inputs, outputs, config.get("bias", True), activation)  # pyright: ignore


def _read_weights(name: str, folder: str) -> dict[str, Tensor]:
    if path := _find(name, f"{folder}/{WEIGHTS}"):
        return safetensors.torch.load_file(path)
    if path := _find(name, f"{folder}/{OLD_WEIGHTS}"):
        return torch.load(path, map_location="cpu", weights_only=True)
    raise UserError(f"hf:{name} has no {folder}/{WEIGHTS}")


def _require(name: str, file: str) -> Any:
    content = _read_json(name, file)
    if content is None:
        raise UserError(f"hf:{name} has no {file}, which its {MODULES} names")
    return content


def _read_json(name: str, file: str) -> Any:
    """Content of a file; None if there is none."""
    path = _find(name, file)
    try:
        return None if path is None else json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file} of hf:{name} cannot be read: {first_line(error)}") from error


def _find(name: str, file: str) -> str | None:
    find: Any = import_transformers().utils.cached_file
    try:
        return find(name, file, _raise_exceptions_for_missing_entries=False)
    except Exception as error:  # hub and network errors share no base class
        raise UserError(f"cannot get {file} of hf:{name}: {first_line(error)}") from error
