"""A trained network as a map from images to the features of one of its layers."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.data import feature_file, preprocess
from dsdistill.harness.errors import UserError
from kd.data import teacher_cache
from kd.data.files.transforms import Views
from kd.models import network_names, networks, saved_models, seals, teachers
from kd.models.adapters import PreprocessLayer, check_channels
from kd.models.saved_models import Model
from kd.models.zoo import exported
from kd.models.zoo.class_names import Match
from kd.models.zoo.protocol import Shape
from kd.objectives.taps import EMBEDDING, FeatureLayout, Taps, as_vector, probe
from kd.parallel import engine
from kd.recipe import Recipe

STREAMED_INTERPOLATION = "bicubic"  # of the validation images of a run with `random`
absolute_name = network_names.absolute_name
__all__ = ["EMBEDDING", "Backbone", "absolute_name", "load"]


@dataclass(frozen=True)
class InputRecord:
    """How images are brought to the size that a backbone takes.

    Attributes:
        size: Height and width in pixels.
        interpolation: Interpolation of the resize.
        crop: Side of the central crop as a share of the resized image.
    """

    size: tuple[int, int]
    interpolation: str
    crop: float


class FeatureNetwork(Protocol):
    """A network as a map from images in [0, 1] of its size to features.

    Attributes:
        inputs: How images become those of its size.
        channels: Channels of these images.
        width: Number of values d of a feature.
    """

    @property
    def inputs(self) -> InputRecord: ...

    @property
    def channels(self) -> int: ...

    @property
    def width(self) -> int: ...

    def __call__(self, images: Float[Tensor, "n c h w"], /) -> Float[Tensor, "n d"]: ...

    def views(self, **random: Any) -> Views:
        """The views of an image file for this network, not normalised: values in [0, 1]."""
        ...

    def record(self) -> dict[str, Any]:
        """All that its features depend on besides the images, JSON-compatible."""
        ...


class Backbone(nn.Module):
    """Maps images in [0, 1] of the model's size to features: vectors, one for each image.

    Maps and tokens are averaged over their positions. All parts stay in evaluation mode: batch norm
    has the statistics of its training, so that a feature does not depend on the images beside it.

    Attributes:
        model: The trained model.
        inputs: How images become those of its size.
        width: Number of values d of a feature.
    """

    def __init__(self, model: Model, layer: str, inputs: InputRecord) -> None:
        """Put taps on a layer of a model.

        Args:
            model: The trained model; frozen here.
            layer: Name of the layer, or `embedding`, the input of the classifier.
            inputs: How images become those of its size.

        Raises:
            UserError: If there is no such layer, or its output is no feature.
        """
        super().__init__()
        self.model, self.inputs, self.layer = model, inputs, layer
        self.prepare = PreprocessLayer(model.preprocess)
        self.classifier = model.classifier
        self.eval().requires_grad_(False)
        self._taps = Taps(self.classifier.network, [layer])
        h, w, c = model.shape
        self._layout: FeatureLayout = probe(self.classifier, self._taps, (h, w, c))[layer]
        self.width = self._layout.channels

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        self.logits(images)
        return as_vector(self._taps.read()[self.layer], self._layout)

    def logits(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """The answers of the model's own classifier."""
        return self.classifier(self.prepare(networks.repeat_channels(images, self.channels)))

    @property
    def channels(self) -> int:
        """Channels of the images that the model takes."""
        return self.model.shape[2]

    def views(self, **random: Any) -> Views:
        """The views of an image file for this backbone, not normalised: values in [0, 1].

        Args:
            **random: What random views are, as in `Views`.
        """
        return views(self.inputs, self.channels, **random)

    def record(self) -> dict[str, Any]:
        """All that its features depend on besides the images, JSON-compatible."""
        fitted = self.model.preprocess
        return {
            "backbone": self.model.name,
            "weights_sha256": teacher_cache.fingerprint(self),
            feature_file.LAYERS: teacher_cache.architecture(self),
            feature_file.PACKAGES: teacher_cache.packages(self),
            "layer": self.layer,
            "preprocess": {
                "kind": fitted.kind,
                "mean": fitted.mean.tolist(),
                "std": fitted.std.tolist(),
            }
            | describe_inputs(self.inputs),
        }


def views(inputs: InputRecord, channels: int, **random: Any) -> Views:
    """The views of an image file for a network, not normalised: values in [0, 1].

    Args:
        inputs: How images become those of the network's size.
        channels: Channels of these images.
        **random: What random views are, as in `Views`.
    """
    return Views(
        inputs.size,
        (0.0,) * channels,
        (1.0,) * channels,
        interpolation=inputs.interpolation,
        train_interpolation=inputs.interpolation,
        crop_pct=inputs.crop,
        **random,
    )


def describe_inputs(inputs: InputRecord) -> dict[str, Any]:
    """How images become those of a network's size, JSON-compatible."""
    return {
        "size": list(inputs.size),
        "interpolation": inputs.interpolation,
        "crop": inputs.crop,
    }


def device(name: str) -> torch.device:
    """The device that a name means.

    Raises:
        UserError: If it is not available.
    """
    with engine.temporary(name) as on:
        return on.device


def is_code(name: str) -> bool:
    """Whether the name of a network is that of code of the user's own, which is imported."""
    base = name.partition("@")[0]
    return bool(base) and not Path(name).is_dir() and networks.is_user_module(base)


def check_name(name: str) -> None:
    """Refuse the name of a network that nothing knows, before anything is loaded.

    Raises:
        UserError: If it is neither a folder nor a known name.
    """
    if not Path(name).is_dir():
        networks.check_name(name)


def load(
    name: str,
    layer: str,
    shape: Shape,
    *,
    image_size: int | None = None,
    convertible: bool = False,
    typed: Iterable[str] = (),
) -> Backbone:
    """Load a trained network as a backbone.

    Args:
        name: Folder of a run of `kd train`; a name as in `kd.models.networks`, whose published
            weights are loaded; NAME@FILE; or a `module:attribute`, which is imported: pass only
            what the user has typed.
        layer: Name of the layer, or `embedding`.
        shape: Height, width and channels of the images, for a network that does not say its own.
        image_size: Height and width of the images that such a network takes, in place of these.
        convertible: Whether the images are read with as many channels as the network takes.
        typed: Names that the user has typed, as for `saved_models.load_run`.

    Raises:
        UserError: If there is no such network or layer, it has no trained weights, or it takes
            images of other channels.
    """
    if name.endswith(exported.SUFFIX):
        raise UserError(f"{name} is an exported program, of which no layer can be read: use a run")
    is_run = Path(name).is_dir()
    if is_run and image_size is not None:
        raise UserError(f"{name} brings the size of its images: leave --image-size out")
    if is_run:
        model = saved_models.load_run(Path(name), typed=typed)
        inputs = _inputs_of_run(Path(name), model)
    else:
        plain = preprocess.identity(shape[2])
        model, _ = teachers.load_model(
            name, plain, shape, 2, lambda _: Match("as it is"), image_size=image_size
        )
        h, w, _ = model.shape
        inputs = InputRecord((h, w), model.interpolation, _published_crop(name))
    if not convertible:
        check_channels(f"backbone {name}", model.shape[2], shape[2])
    return Backbone(model, layer, inputs)


def _inputs_of_run(run: Path, model: Model) -> InputRecord:
    """Bring images to a run's size as its validation images were."""
    stored = seals.read(run, "recipe.json") if (run / "recipe.json").is_file() else {}
    known = {
        key: stored[key] for key in ("augment", "interpolation", "crop_share") if key in stored
    }
    recipe, (h, w, _) = Recipe(**known), model.shape
    if not recipe.streams_files:
        return InputRecord((h, w), "bilinear", 1.0)  # as `dsdistill.harness.data.folders` does
    random = recipe.interpolation == "random"
    interpolation = STREAMED_INTERPOLATION if random else recipe.interpolation
    return InputRecord((h, w), interpolation, recipe.crop_share)


def _published_crop(name: str) -> float:
    """Share of the central crop that published weights expect; all of the image for own code."""
    parts = network_names.parse(name)
    if parts.zoo is None or networks.is_user_module(name):
        return 1.0
    return parts.zoo.pretrained_config(parts.base).crop
