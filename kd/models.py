"""A classifier with all that is needed to use it, and its form on disk.

A run's folder holds the network's weights alone (`student.safetensors`, loadable into the bare
network), `model.json`, and for ZCA the whitening matrices (`preprocess.safetensors`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
from torch import Tensor, nn

from dsdistill.harness import runs
from dsdistill.harness.errors import UserError
from dsdistill.harness.preprocess import KINDS, Preprocess
from kd import networks
from kd.networks import Classifier
from kd.zoo.wants import Interpolation, Shape

Outputs = Literal["logits", "centred labels"]

WEIGHTS, CARD, WHITENING = "student.safetensors", "model.json", "preprocess.safetensors"


@dataclass(frozen=True, eq=False)
class Model:
    """A classifier with all that is needed to use it on images.

    Attributes:
        classifier: Takes images after `preprocess`.
        name: `convnet:32`, `resnet18`, ...; what `build` made it from.
        classes: Names in the order of the outputs.
        shape: Of the images before any resize of the classifier's own.
        preprocess: From images in [0, 1] to the classifier's input.
        outputs: `logits`; or estimates of centred labels, for a network trained by MSE.
        output_temperature: softmax(outputs / this) are calibrated probabilities; 1 for logits.
    """

    classifier: Classifier
    name: str
    classes: tuple[str, ...]
    shape: Shape
    preprocess: Preprocess
    outputs: Outputs = "logits"
    output_temperature: float = 1.0

    @property
    def interpolation(self) -> Interpolation:
        """How images of another size are brought to the size of the model's."""
        return self.classifier.interpolation


def save_run(folder: Path, model: Model) -> None:
    """Write weights and `model.json` of a trained student, each atomically."""
    # contiguous: safetensors refuses strided views
    weights = {k: v.detach().cpu().contiguous() for k, v in _state(model).items()}
    runs.write_bytes(folder / WEIGHTS, safetensors.torch.save(weights))
    fitted = model.preprocess
    if fitted.whiten is not None and fitted.unwhiten is not None:
        matrices = {"whiten": fitted.whiten, "unwhiten": fitted.unwhiten}
        runs.write_bytes(folder / WHITENING, safetensors.numpy.save(matrices))
    runs.write_json(folder / CARD, card(model))


def card(model: Model) -> dict[str, Any]:
    """All about a model but its arrays: what `model.json` holds."""
    fitted = model.preprocess
    return {
        # The weights are here now, wherever they came from at first.
        "name": networks.parse(model.name).text,
        "classes": model.classes,
        "input": {"shape": model.shape, "layout": "height, width, channels"},
        "preprocess": {
            "kind": fitted.kind,
            "mean": fitted.mean.tolist(),
            "std": fitted.std.tolist(),
            "contrast": fitted.contrast,
        },
        "interpolation": model.interpolation,
        "config": model.classifier.config,
        "outputs": model.outputs,
        "output_temperature": model.output_temperature,
        "parameters": networks.parameters(model.classifier),
    }


def load_run(folder: Path) -> Model:
    """Load what `save_run` wrote.

    Raises:
        UserError: If the folder holds no finished student, or a damaged one.
    """
    if not (folder / CARD).is_file():
        raise UserError(f"{folder} holds no finished student: it has no {CARD}{_hint(folder)}")
    found = runs.read_json(folder / CARD)
    try:
        name, classes = found["name"], tuple(found["classes"])
        shape = tuple(found["input"]["shape"])
        classifier = networks.build(name, shape, len(classes), config=found.get("config"))
        classifier.interpolation = found.get("interpolation", "bilinear")
        _state_into(classifier.network, folder / WEIGHTS)
        preprocess = preprocessing(found["preprocess"], folder)
        temperature = float(found["output_temperature"])
        return Model(classifier, name, classes, shape, preprocess, found["outputs"], temperature)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / CARD} is not a whole model description: {error!r}") from error


def class_order(student: str) -> tuple[str, ...] | None:
    """The class names of an earlier run's student, in label order; None where it is no run."""
    path = Path(student) / CARD
    names = runs.read_json(path).get("classes") if path.is_file() else None
    return tuple(map(str, names)) if isinstance(names, list) else None


def preprocessing(card: Mapping[str, Any], folder: Path) -> Preprocess:
    """What a card's `preprocess` describes; the matrices of ZCA lie in the folder.

    Raises:
        UserError: If it is of an unknown kind, or the matrices are not readable.
    """
    if card["kind"] not in KINDS:
        raise UserError(f"{folder / CARD}: unknown preprocessing {card['kind']!r}")
    matrices: dict[str, np.ndarray] = {}
    if card["kind"] == "zca":
        try:
            matrices = safetensors.numpy.load_file(folder / WHITENING)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{folder / WHITENING} is not readable: {error}") from error
    return Preprocess(
        card["kind"],
        np.asarray(card["mean"], np.float32),
        np.asarray(card["std"], np.float32),
        matrices.get("whiten"),
        matrices.get("unwhiten"),
        card["contrast"],
    )


def check_fit(who: str, model: Model, shape: Shape, classes: tuple[str, ...]) -> None:
    """Refuse a model whose images or classes are not those of the data.

    Args:
        who: How the message calls the model.
        shape, classes: Of the data.
    """
    if model.shape != shape:
        raise UserError(f"{who} takes images of shape {model.shape}, the data have {shape}")
    check_classes(who, model.classes, classes)


def check_classes(who: str, its: tuple[str, ...], classes: tuple[str, ...]) -> None:
    """Refuse a model whose classes are not those of the data, in the same order."""
    check_count(who, len(its), classes)
    for i, (a, b) in enumerate(zip(its, classes, strict=True)):
        if a != b:
            raise UserError(f"{who} calls class {i} {a!r}, the data call it {b!r}: they must match")


def check_count(who: str, count: int, classes: tuple[str, ...]) -> None:
    """Refuse a model of another number of classes than the data."""
    if count != len(classes):
        raise UserError(f"{who} has {count} classes, the data have {len(classes)}: they must match")


def _state(model: Model) -> dict[str, Tensor]:
    return model.classifier.network.state_dict()


def _state_into(network: nn.Module, path: Path) -> None:
    try:
        network.load_state_dict(safetensors.torch.load_file(path))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path} does not hold the weights of this network: {first}") from error


def _hint(folder: Path) -> str:
    """How the folder of a zoo's model is named."""
    try:
        found = runs.read_json(folder / "config.json")
    except UserError:
        return ""
    known = {"model_type": ("Hugging Face", "hf"), "architecture": ("timm", "local-dir")}
    for key, (whose, prefix) in known.items():
        if isinstance(found, dict) and key in found:
            return f"; a model of {whose} is named {prefix}:{folder}"
    return ""
