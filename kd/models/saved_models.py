"""A classifier with everything needed to use it, and its form on disk.

A run's folder holds the network's weights alone (`student.safetensors`, loadable into the bare
network), `model.json`, for ZCA the whitening matrices (`preprocess.safetensors`), and for a
quantised student the steps of its quantisers (`quantisers.safetensors`). The card of a pruned
student says how many channels its layers have.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor, nn

from dsdistill.harness import files
from dsdistill.harness.data.mel_images import MelFormat, MelOptions
from dsdistill.harness.data.preprocess import KINDS, Preprocess
from dsdistill.harness.errors import UserError, first_line, one_line
from dsdistill.harness.reports import schema
from dsdistill.harness.runs import progress
from kd.models import layer_channels, network_names, networks, seals, student_view
from kd.models.layer_channels import LayerChannels
from kd.models.networks import Classifier
from kd.models.quantised import bit_widths, quantised_network
from kd.models.quantised.bit_widths import BitWidths
from kd.models.seals import ARRAY_FILES, CARD, INITIAL_WEIGHTS, QUANTISERS, WEIGHTS, WHITENING
from kd.models.zoo import class_names, embedding_layer, weights
from kd.models.zoo.protocol import Interpolation, Shape

OutputKind = Literal["logits", "independent logits", "centred labels", "embedding"]
TEXT = "text"  # kind of a student of texts in its `model.json`; one of images says none

CARD_KEYS = (  # all entries of `model.json`; any other one means that the file is damaged
    *("name", "classes", "input", "preprocess", "interpolation", "config", "outputs"),
    *("output_temperature", "parameters", "centred", "view", "recordings", "quantized"),
    *("layer_channels", "class_groups"),
    seals.CHECKSUMS_KEY,
)


@dataclass(frozen=True, eq=False)
class Model:
    """A classifier with everything needed to use it on images.

    Attributes:
        classifier: Network that takes images after `preprocess`.
        name: Name that `networks.build` built it from: `convnet:32`, `resnet18`, ...
        classes: Class names in the order of the outputs.
        shape: Height, width and channels of the images, before the classifier's own resize.
        preprocess: Preprocessing from images in [0, 1] to the classifier's input.
        outputs: `logits`; `independent logits`, whose sigmoid is the probability of each class by
            itself, where an image has any number of labels; `centred labels`, the estimates of a
            network trained by MSE; or `embedding`, of a network without a head, which has no
            classes.
        output_temperature: softmax(outputs / output_temperature) are calibrated probabilities; 1
            for logits.
        mel: Format of the images of recordings; None for a model of other images.
        bits: Bits of the weights and inputs of a network with quantisers; None in float32.
        layer_channels: Channels of the layers of a pruned network that has fewer there than its
            name says.
        class_groups: Class of the data -> the class that it is joined to; empty where the data's
            classes are the model's.
    """

    classifier: Classifier
    name: str
    classes: tuple[str, ...]
    shape: Shape
    preprocess: Preprocess
    outputs: OutputKind = "logits"
    output_temperature: float = 1.0
    mel: MelFormat | None = None
    bits: BitWidths | None = None
    layer_channels: LayerChannels = field(default_factory=dict)
    class_groups: Mapping[str, str] = field(default_factory=dict)

    @property
    def gives_logits(self) -> bool:
        """Whether the outputs are logits, whose softmax or sigmoid are probabilities."""
        return self.outputs in ("logits", "independent logits")

    @property
    def has_several_labels(self) -> bool:
        """Whether it answers for each class by itself: an image has any number of labels."""
        return self.outputs == "independent logits"

    @property
    def has_head(self) -> bool:
        """Whether the outputs are of classes, and not an embedding."""
        return self.outputs != "embedding"

    @property
    def interpolation(self) -> Interpolation:
        """Interpolation by which images are resized to the model's size."""
        return self.classifier.interpolation


def save_run(folder: Path, model: Model, metadata: Mapping[str, str] | None = None) -> None:
    """Write weights and `model.json` of a trained student, each atomically.

    Args:
        folder: The run's folder.
        model: The trained student.
        metadata: Entries for the header of the weights file.
    """
    header = None if metadata is None else dict(metadata)
    initial, network = model.classifier.initial, model.classifier.network
    if quantised_network.is_quantised(network):
        steps = quantised_network.quantiser_state(network)
        files.write_bytes(folder / QUANTISERS, safetensors.torch.save(steps, header))
        network = quantised_network.float_copy(network)
    files.write_bytes(folder / WEIGHTS, pack_weights(network, header))
    if initial is not None:
        files.write_bytes(folder / INITIAL_WEIGHTS, pack_weights(initial.network, header))
    fitted = model.preprocess
    if fitted.whiten is not None and fitted.unwhiten is not None:
        matrices = {"whiten": fitted.whiten, "unwhiten": fitted.unwhiten}
        files.write_bytes(folder / WHITENING, safetensors.numpy.save(matrices))
    # Only here: an exported program that has a card too contains the subtraction and the view.
    contained: dict[str, Any] = {} if initial is None else {"centred": True}
    if model.classifier.view is not None:
        contained["view"] = model.classifier.view.text
    if model.bits is not None:
        contained["quantized"] = describe_bits(model.bits)
    if model.layer_channels:
        contained["layer_channels"] = model.layer_channels
    seals.write(folder, CARD, card(model) | contained, ARRAY_FILES)


def card(model: Model) -> dict[str, Any]:
    """The description of a model without its arrays, as `model.json` holds it."""
    fitted = model.preprocess
    recordings = {} if model.mel is None else {"recordings": asdict(model.mel)}
    groups = {"class_groups": dict(model.class_groups)} if model.class_groups else {}
    return {
        # Without the file that the weights came from at first: they are in this folder now.
        "name": network_names.parse(model.name).text,
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
        "parameters": networks.parameter_count(model.classifier),
        **recordings,
        **groups,
    }


def describe_bits(bits: BitWidths) -> dict[str, Any]:
    """The description of a quantised network's bits, as `model.json` holds it."""
    return {"bits": bits.text, "full_range": bits.full_range}


def load_run(folder: Path, *, typed: Iterable[str] = ()) -> Model:
    """Load a student that `save_run` wrote.

    Args:
        folder: The run's folder.
        typed: Names that the user has typed: a student of the user's own code is built only if its
            name is among them, since building it runs that code.

    Raises:
        UserError: If the folder holds no finished student, a damaged one, or files of two runs.
    """
    description = read_card(folder, CARD_KEYS)
    seals.verify(folder, *ARRAY_FILES)
    try:
        return _build_model(folder, description, typed)
    except UserError:
        raise  # already one line
    except Exception as error:  # a file without a checksum may hold anything
        why = one_line(error, kind=True)
        raise UserError(f"{folder / CARD} is not a whole model description ({why})") from error


def read_card(folder: Path, keys: Collection[str], kind: str | None = None) -> dict[str, Any]:
    """Read the `model.json` of a run, whose students of texts say their kind and others none.

    Args:
        folder: The run's folder.
        keys: All entries that it may have.
        kind: The kind of student that is wanted.

    Raises:
        UserError: If there is none, it is of another kind, damaged, or of a later version.
    """
    if not (folder / CARD).is_file():
        raise UserError(f"{folder} holds no finished student: it has no {CARD}{_zoo_hint(folder)}")
    description = seals.read(folder, CARD)
    if (stored := description.get("kind")) != kind:
        of = {None: "images", TEXT: "texts"}
        raise UserError(
            f"{folder} holds a student of {of.get(stored, 'a later version')}, and one of "
            f"{of[kind]} is needed here"
        )
    if unknown := sorted(description.keys() - set(keys)):
        raise UserError(f"{folder / CARD} is damaged, or of a later version: unknown {unknown[0]}")
    return description


def _build_model(folder: Path, description: Mapping[str, Any], typed: Iterable[str]) -> Model:
    types = {"name": str, "classes": Sequence[str], "output_temperature": float, "view": str}
    schema.check(CARD, description, types)
    name, classes = description["name"], tuple(description["classes"])
    h, w, c = shape = tuple(description["input"]["shape"])
    if not all(type(size) is int and size > 0 for size in (h, w, c)):
        raise ValueError(f"images of shape {shape}")
    if description["outputs"] not in get_args(OutputKind):
        raise ValueError(f"outputs {description['outputs']!r}")
    is_headless = description["outputs"] == "embedding"
    if is_headless == bool(classes):
        raise ValueError(f"{len(classes)} classes of outputs {description['outputs']!r}")
    networks.require_typed(str(folder / CARD), name, typed)
    preprocess = load_preprocess(description["preprocess"], folder)
    view = description.get("view")
    try:
        seen = None if view is None else student_view.parse(view, shape, preprocess)
        config = description.get("config")
        count = embedding_layer.BUILT_CLASSES if is_headless else len(classes)
        classifier = networks.build(name, shape, count, config=config, view=seen)
        if is_headless:
            embedding_layer.remove(name, classifier.network)
    except UserError as error:
        raise UserError(
            f"{folder / CARD} describes a network that cannot be built here: {error}"
        ) from error
    classifier.interpolation = description.get("interpolation", "bilinear")
    stored = description.get("layer_channels", {}).items()
    channels = {layer: tuple(sizes) for layer, sizes in stored}
    layer_channels.apply(classifier.network, channels)
    if description.get("centred", False):
        initial = classifier.centre().initial
        assert initial is not None
        load_weights(initial.network, folder / INITIAL_WEIGHTS)
    load_weights(classifier.network, folder / WEIGHTS)
    bits = None
    if (quantized := description.get("quantized")) is not None:
        where, full_range = str(folder / CARD), quantized["full_range"] is True
        bits = bit_widths.parse(where, quantized["bits"], full_range=full_range)
        _load_quantisers(classifier.network, folder / QUANTISERS)
    outputs, temperature = description["outputs"], float(description["output_temperature"])
    mel = read_recordings(description)
    how = outputs, temperature, mel, bits, channels, _read_groups(description, classes)
    return Model(classifier, name, classes, shape, preprocess, *how)


def _read_groups(description: Mapping[str, Any], classes: Sequence[str]) -> dict[str, str]:
    """The groups in a card; empty where there are none.

    Raises:
        ValueError: If one is no class.
    """
    groups = description.get("class_groups", {})
    if not isinstance(groups, dict) or not {*groups.values()} <= {*classes}:
        raise ValueError("class_groups that are no classes")
    return groups


def read_recordings(description: Mapping[str, Any]) -> MelFormat | None:
    """The format of recordings in a card, or None.

    Raises:
        ValueError: If it is none; the message says why.
    """
    if (stored := description.get("recordings")) is None:
        return None
    types = {"rate": int, "seconds": float, "bands": int}
    schema.check(f"{CARD}: recordings", stored, types)
    MelOptions(**stored).check()
    return MelFormat(**stored)


def is_text_run(folder: Path) -> bool:
    """Whether a folder holds a finished student of texts."""
    path = folder / CARD
    content = files.read_json(path) if path.is_file() else None
    return isinstance(content, dict) and content.get("kind") == TEXT


def class_order(student: str) -> tuple[str, ...] | None:
    """The class names of an earlier run's student, in label order; None if there are none."""
    path = Path(student) / CARD
    names = files.read_json(path).get("classes") if path.is_file() else None
    return tuple(map(str, names)) if isinstance(names, list) and names else None


def load_preprocess(card: Mapping[str, Any], folder: Path) -> Preprocess:
    """Load the preprocessing that a card describes; the matrices of ZCA lie in the folder.

    Args:
        card: The `preprocess` entry of the card.
        folder: The run's folder.

    Raises:
        UserError: If the kind is unknown, or the matrices are not readable.
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


def match_classes(
    who: str,
    model: Model,
    shape: Shape,
    classes: tuple[str, ...],
    say: Callable[[str], None] = progress.say,
    option: str | None = None,
) -> Model:
    """Put a model's outputs in the order of the data's classes.

    Args:
        who: Name of the model in messages.
        model: The model; its last layer is changed in place where the order differs.
        shape: Height, width and channels of the data's images.
        classes: Class names of the data, in label order.
        say: Called with a line where the order was another one.
        option: Option of the class map, for messages; None where there is no such option.

    Raises:
        UserError: If the model's images or class names are not those of the data.
    """
    check_shape(who, model, shape)
    if model.classes == classes:
        return model
    matched = class_names.match(who, model.classes, classes, option=option)
    if matched.assumed:  # placeholder names are no evidence of an order
        raise UserError(
            f"{who} calls its classes {class_names.abbreviate(model.classes)}, "
            f"the data {class_names.abbreviate(classes)}: they must match"
            + ("" if option is None else f", or {option} FILE must say which are which")
        )
    if matched.outputs is None:
        return replace(model, classes=classes)
    say(f"{who}: classes matched {matched.how}")
    reorder_outputs(who, model.classifier, matched.outputs, model.shape)
    return replace(model, classes=classes)


def check_shape(who: str, model: Model, shape: Shape) -> None:
    """Refuse a model for images of another shape than the data's."""
    if model.shape != shape:
        raise UserError(f"{who} takes images of shape {model.shape}, the data have {shape}")


def check_label_kind(who: str, model: Model, several: bool) -> None:
    """Refuse a model of one class an image for images with several labels, and the reverse.

    Args:
        who: Name of the model in messages.
        model: The model; a headless one knows no labels.
        several: Whether an image of the data has any number of labels.

    Raises:
        UserError: If they differ.
    """
    if not model.has_head or model.has_several_labels == several:
        return
    kinds = ("one class an image", "any number of labels an image")
    own, other = (kinds[i] for i in (model.has_several_labels, several))
    raise UserError(f"{who} learned {own}, and the data have {other}: give it data of its kind")


def check_recordings(who: str, expected: MelFormat | None, mel: MelFormat | None) -> None:
    """Refuse a model of recordings for images that were made of them in another way.

    Images of the same size can have other bands at other times: nothing else would tell.

    Args:
        who: Name of the model in messages.
        expected: Format of the model's recordings; None for a model of images, which may know
            images of any recordings.
        mel: Format of the data's recordings; None for images.

    Raises:
        UserError: If they differ.
    """
    if expected is None or expected == mel:
        return
    if mel is None:
        raise UserError(f"{who} takes recordings, and the data are images: give it recordings")
    raise UserError(
        f"{who} takes {expected}, and the data are {mel}: give --seconds {expected.seconds:g} "
        f"--mel-bands {expected.bands} --sample-rate {expected.rate}"
    )


def reorder_outputs(
    who: str, classifier: Classifier, outputs: tuple[int, ...], shape: Shape
) -> None:
    """Permute the outputs of a network, in the weights of its last layer.

    Args:
        who: Name of the network in messages.
        classifier: The network, changed in place.
        outputs: The present output that becomes the first, the second, ...
        shape: Height, width and channels of its images.

    Raises:
        UserError: If no single layer's weights can be permuted to this effect.
    """
    h, w, c = shape
    images = torch.rand(2, c, h, w, generator=torch.Generator().manual_seed(0))
    copies = [classifier.network]
    copies += [] if classifier.initial is None else [classifier.initial.network]
    weights.reorder_outputs(who, classifier, copies, images, outputs)


def pack_weights(network: nn.Module, header: dict[str, str] | None = None) -> bytes:
    """The weights of a network as a file of safetensors, each tensor once.

    Args:
        network: The network.
        header: Entries for the header of the file.
    """
    # contiguous: safetensors refuses strided views
    tensors = {k: v.detach().cpu().contiguous() for k, v in _distinct_tensors(network).items()}
    return safetensors.torch.save(tensors, header)


def load_weights(network: nn.Module, path: Path) -> None:
    """Load the file that `pack_weights` made into a network of the same architecture.

    Raises:
        UserError: If it is not readable, or belongs to another network.
    """
    try:
        stored = safetensors.torch.load_file(path)
        # A tensor under several names is in the file once, and lacks under the other ones.
        strict = stored.keys() != _distinct_tensors(network).keys()
        network.load_state_dict(stored, strict=strict)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        first = first_line(error)
        raise UserError(f"{path} does not hold the weights of this network: {first}") from error


def _load_quantisers(network: nn.Module, path: Path) -> None:
    """Put the quantisers of a file into the network that they belong to."""
    try:
        state = safetensors.torch.load_file(path)
        quantised_network.attach_state(network, state)
    except (OSError, LookupError, ValueError, safetensors.SafetensorError) as error:
        first = first_line(error)
        raise UserError(f"{path} does not hold the quantisers of this network: {first}") from error


def _distinct_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The state of a network without the further names of tied weights."""
    distinct: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, value in network.state_dict(keep_vars=True).items():
        if id(value) not in known:
            distinct[name] = value
            known.add(id(value))
    return distinct


def _zoo_hint(folder: Path) -> str:
    """A hint, for a folder that holds a zoo's model, how to name it; else nothing."""
    try:
        config = files.read_json(folder / "config.json")
    except UserError:
        return ""
    known = {"model_type": ("Hugging Face", "hf"), "architecture": ("timm", "local-dir")}
    for key, (library, prefix) in known.items():
        if isinstance(config, dict) and key in config:
            return f"; a model of {library} is named {prefix}:{folder}"
    return ""
