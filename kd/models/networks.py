"""Build networks by name: built in or from a zoo; freshly initialised, pretrained, or from a file.

convnet, convnet:32, mlp        built in
resnet18, timm:resnet18         timm's; also hf-hub:ID and local-dir:DIR, as timm knows them
resnet18(drop_path_rate=0.1)    timm's with arguments
torchvision:resnet18            torchvision's classifiers
hf:microsoft/resnet-50, hf:DIR  Hugging Face's image classifiers
module:attribute(width=32)      a network of the user's own code
NAME@FILE                       any of these, with the weights in a file
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError, first_line
from kd.models import network_names, wrapped_network
from kd.models.centred import InitialFunction
from kd.models.network_names import NetworkName
from kd.models.quantised import quantised_network
from kd.models.student_view import StudentView
from kd.models.wrapped_network import WrappedNetwork
from kd.models.zoo import (
    allocation,
    builtin,
    exported,
    user_modules,
    weight_files,
    weights,
)
from kd.models.zoo.protocol import Interpolation, PretrainedConfig, Shape


class Classifier(WrappedNetwork):
    """A network that takes images of the data's shape, whatever shape it was built for.

    Nothing in front of the network is trained; the resize and the repeated channel have no buffers.

    Attributes:
        network: The module that is trained and saved.
        size: Height and width to which images are resized (antialiased); None for a network that
            takes images as they are.
        channels: Number of channels to which grayscale images are repeated; None for a network
            that takes the data's channels.
        interpolation: Interpolation of the resize.
        config, notes: As for any network.
        code: SHA-256 of the module's file, for a network of the user's own code; a buffer, so
            that a hash of the state covers it. Else None.
        view: Poorer view of the images that the network gets, before the resize; None for whole
            images.
        initial: Function that the network started as, which `forward` subtracts; None unless
            `centre` was called.
    """

    code: Tensor | None
    initial: InitialFunction | None
    view: StudentView | None

    def __init__(
        self,
        network: nn.Module,
        size: tuple[int, int] | None = None,
        *,
        channels: int | None = None,
        interpolation: Interpolation = "bilinear",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(network, config)
        self.size = size
        self.channels = channels
        self.interpolation: Interpolation = interpolation
        self.register_buffer("code", None)
        self.initial = None
        self.view = None

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        seen = images if self.view is None else self.view(images)
        resized = resize(seen, self.size, self.interpolation)
        prepared = repeat_channels(resized, self.channels)
        logits = wrapped_network.logits(self.network(prepared))
        if self.initial is None:
            return logits
        return logits - wrapped_network.logits(self.initial(prepared))

    def centre(self) -> "Classifier":
        """Subtract from now on what the network is now: f(x; theta) - f(x; theta_0).

        Call it before hooks are put on the network's layers. One more forward pass.

        Returns:
            This classifier, changed in place.
        """
        self.initial = InitialFunction(self.network)
        return self

    def with_network(self, network: nn.Module) -> "Classifier":
        """Return a copy around another network of this architecture, such as averaged weights."""
        other = Classifier(
            network,
            self.size,
            channels=self.channels,
            interpolation=self.interpolation,
            config=self.config,
        )
        other.initial, other.view = self.initial, self.view
        return other


def build(
    name: str,
    shape: Shape,
    classes: int,
    *,
    seed: int = 0,
    pretrained: bool = False,
    config: Mapping[str, Any] | None = None,
    adapt: bool = True,
    view: StudentView | None = None,
) -> Classifier:
    """Build a classifier for images of a shape: fresh, pretrained, or with the weights of a file.

    timm's networks are built for the channels of the images. Those of torchvision and Hugging Face
    take three, to which grayscale images are repeated. For a network that takes only one size,
    images are resized to it.

    Args:
        name: Name as in the module's docstring.
        shape: Height, width and channels of the images.
        classes: Number of outputs.
        seed: Seed of the initial weights.
        pretrained: Whether to load the published weights; the last layer is new if `classes`
            differs.
        config: A `Classifier.config`; nothing is then looked up elsewhere.
        adapt: Whether weights in a file may be for another number of classes, without a last layer,
            or for other channels: the last layer is then new, and the first one adapted.
        view: View of the images that the network gets, which is built for that view.

    Raises:
        UserError: For an unknown name, a bad width, a network that would not fit into memory,
            images of a shape that it cannot take, or weights that cannot be obtained or belong to
            another network.
    """
    parts = network_names.parse(name)
    shape = shape if view is None else view.output_shape
    if pretrained and parts.file:
        raise UserError(f"{parts.file} has the weights of {parts.text}: leave --pretrained out")
    with torch.random.fork_rng(), allocation.limited(parts.text):
        torch.manual_seed(seed)
        if parts.zoo is not None:
            classifier = _build_from_zoo(parts, shape, classes, pretrained, config)
        elif pretrained:
            raise UserError(f"{parts.base} has no published weights: leave --pretrained out")
        else:
            classifier = Classifier(builtin.network(parts.base, shape, classes))
    if parts.file:
        stored, convert = weight_files.read(parts.file), parts.convert
        notes = weights.load_into(
            classifier.network, stored, parts.text, classes, convert=convert, adapt=adapt
        )
        classifier.notes = tuple(notes)
    elif pretrained:
        classifier.notes = _adaptation_notes(parts, classes, shape[-1], classifier)
    classifier.view = view
    return classifier


def build_as_it_is(name: str, shape: Shape, classes: int) -> tuple[Classifier, int]:
    """Build a network of the user's own code with its own number of classes.

    Args:
        name: A `module:attribute`, without a file of weights.
        shape: Height, width and channels of the images.
        classes: Number of classes, where the code takes one and has no default.

    Returns:
        The classifier, and its number of outputs.

    Raises:
        UserError: If it cannot be built, or cannot take images of the shape.
    """
    parts = network_names.parse(name)
    with torch.random.fork_rng(), allocation.limited(parts.text):
        torch.manual_seed(0)
        network = user_modules.network_as_it_is(parts.base, shape[-1], classes)
        return _user_classifier(parts, network, shape)


def is_user_module(name: str) -> bool:
    """Whether a name means a network of the user's own code."""
    return not name.endswith(exported.SUFFIX) and network_names.parse(name).zoo is user_modules


def require_typed(where: str, name: str, typed: Iterable[str]) -> None:
    """Refuse a `module:attribute` that a file names and the user has not typed.

    Args:
        where: The file, for the message.
        name: A name that was read from the file.
        typed: Names that the user has typed, of any kind.

    Raises:
        UserError: If the name would be imported, and is not among those typed.
    """
    if is_user_module(name):
        bases = [network_names.parse(other).base for other in typed if is_user_module(other)]
        user_modules.require_typed(where, network_names.parse(name).base, bases)


def check_name(name: str) -> None:
    """Refuse a name that `build` does not know, and suggest the closest known ones."""
    parts = network_names.parse(name)
    if parts.file:
        weight_files.require_file(parts.file)
    if parts.zoo is None:
        builtin.width(parts.base)
    else:
        parts.zoo.check(parts.base)


def pretrained_preprocess(name: str, channels: int) -> Preprocess:
    """The normalisation that a network's published weights expect.

    For another number of channels every channel gets the mean of the published values, since the
    first layer's weights are then summed or repeated, or the channel is.

    Raises:
        UserError: If the name is unknown, or no weights were published.
    """
    return pretrained_config(name).preprocess(channels)


def pretrained_config(name: str) -> PretrainedConfig:
    """The images that published weights expect, and their classes.

    Raises:
        UserError: If the name is unknown, or no weights were published.
    """
    parts = network_names.parse(name)
    if parts.zoo is None:
        raise UserError(f"{name} has no published weights: train it with `kd train` first")
    parts.zoo.origin(parts.base)
    return parts.zoo.pretrained_config(parts.base)


def parameter_count(network: nn.Module) -> int:
    """Number of trainable weights; neither a centred network's start nor learned steps count."""
    counted = network.network if isinstance(network, Classifier) else network
    steps = quantised_network.step_names(counted)
    return sum(p.numel() for name, p in counted.named_parameters() if name not in steps)


def resize(
    images: Float[Tensor, "n c h w"],
    size: tuple[int, int] | None,
    interpolation: Interpolation = "bilinear",
) -> Float[Tensor, "n c H W"]:
    """Resize images with antialiasing; return them as they are if `size` is None or theirs."""
    if size is None or images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode=interpolation, antialias=True, align_corners=False)


def repeat_channels(
    images: Float[Tensor, "n c h w"], channels: int | None
) -> Float[Tensor, "n C h w"]:
    """Repeat the channel of grayscale images; return them as they are if `channels` is None."""
    return images if channels is None else images.expand(-1, channels, -1, -1)


def _build_from_zoo(
    parts: NetworkName,
    shape: Shape,
    classes: int,
    pretrained: bool,
    config: Mapping[str, Any] | None,
) -> Classifier:
    zoo, name = parts.zoo, parts.base
    assert zoo is not None
    if config is None:
        zoo.check(name)
    where = zoo.origin(name) if pretrained else ""
    try:
        network = zoo.network(name, shape[-1], classes, pretrained=pretrained, config=config)
    except UserError:
        raise
    except Exception as error:  # hub, network, file and the zoos' own errors share no base class
        download = f"get the weights of {parts.text} (looked for {where})" if pretrained else ""
        raise UserError(
            f"cannot {download or f'make {parts.text}'}: {first_line(error)}"
        ) from error
    if zoo is user_modules:
        classifier, outputs = _user_classifier(parts, network, shape)
        user_modules.require_classes(parts.text, outputs, classes)
        return classifier
    h, w, c = zoo.input_shape(network, shape)
    size = None if (h, w) == shape[:2] else (h, w)
    classifier = Classifier(
        network,
        size,
        channels=None if c == shape[2] else c,
        # Only where images are resized: finding it may need a download.
        interpolation=zoo.pretrained_config(name).interpolation
        if size and config is None
        else "bilinear",
        config=config or zoo.config(name, network),
    )
    if shape[2] not in (1, c):
        raise UserError(f"{parts.text} takes images of {c} channels, the data have {shape[2]}")
    _check_image_size(classifier, parts.text, shape)
    return classifier


def _user_classifier(
    parts: NetworkName, network: nn.Module, shape: Shape
) -> tuple[Classifier, int]:
    """Wrap a network of the user's own code, and count its outputs."""
    taken = user_modules.input_shape(network, shape)
    outputs = user_modules.count_outputs(parts.text, network, taken)
    classifier = Classifier(network, channels=None if taken == shape else taken[-1])
    digest = user_modules.code_digest(parts.base)
    if digest is not None:
        classifier.code = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)
    return classifier, outputs


def _adaptation_notes(
    parts: NetworkName, classes: int, channels: int, classifier: Classifier
) -> tuple[str, ...]:
    """Lines about where a network differs from the published one."""
    assert parts.zoo is not None
    try:
        published = parts.zoo.pretrained_config(parts.base)
    except UserError:  # a Hugging Face folder may lack the files that only a teacher needs
        return ()
    notes, theirs = [], len(published.mean)
    if published.count != classes:
        notes.append(
            f"a new last layer for {classes} classes, "
            f"since the published one is for {published.count}"
        )
    if classifier.channels is None and channels != theirs:
        notes.append(f"first layer adapted from {theirs} to {channels} channels, as timm does")
    return tuple(notes)


def _check_image_size(classifier: Classifier, name: str, shape: Shape) -> None:
    """Refuse a network that cannot take images of this size, before any training."""
    h, w, c = shape
    was = classifier.training
    try:
        with torch.no_grad():
            classifier.eval()(torch.zeros(1, c, h, w))
    except UserError:  # the allocation limit
        raise
    except Exception as error:  # a network may raise anything
        raise UserError(
            f"{name} cannot take {h}x{w} images ({first_line(error)}): "
            f"{_image_size_remedy(classifier.network, h, w)}"
        ) from error
    classifier.train(was)


def _image_size_remedy(network: nn.Module, h: int, w: int) -> str:
    """Which images a network could take: whole patches of a ViT, or larger ones."""
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if not isinstance(patch, tuple) or len(patch) != 2 or not (h % patch[0] or w % patch[1]):
        return "use larger images"
    up, across = (math.ceil(size / step) * step for size, step in zip((h, w), patch, strict=True))
    return (
        f"its patches are {patch[0]}x{patch[1]}, so use a size that is a multiple of that, such as "
        f"{up}x{across}"
    )
