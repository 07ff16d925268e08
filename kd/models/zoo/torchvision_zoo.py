"""torchvision's classifiers by name: `torchvision:resnet50`, with its best published weights.

A zoo of `kd.models.networks`: it has the functions of `kd.models.zoo.protocol.Zoo`.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from dsdistill.harness.errors import unknown_name
from kd.models.zoo import class_names, weights
from kd.models.zoo.protocol import PretrainedConfig, Shape, nearest_interpolation

CHANNELS = 3
# Their auxiliary heads, for training only, would add outputs that no loss here takes.
_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
# Attributes that published weights may set, and that building the network again needs.
_CONFIG_KEYS = ("image_size", "transform_input")


def check(name: str) -> None:
    """Refuse a name that is not a classifier of torchvision, and suggest the closest ones."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise unknown_name("torchvision classifier", name, known)


def pretrained_config(name: str) -> PretrainedConfig:
    """The images that the published weights expect, and their classes."""
    published = _default_weights(name)
    prepare = published.transforms()
    (side,), (resized,) = prepare.crop_size, prepare.resize_size
    return PretrainedConfig(
        tuple(prepare.mean),
        tuple(prepare.std),
        (side, side),
        nearest_interpolation(prepare.interpolation.value),
        side / resized,
        class_names.with_synonyms(tuple(published.meta["categories"])),
    )


def origin(name: str) -> str:
    """Address of the published weights."""
    return _default_weights(name).url


def network(
    name: str,
    channels: int,
    classes: int,
    *,
    pretrained: bool = False,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a network for images of three channels, the only number in torchvision.

    Args:
        config: Value that `config` returned for such a network.
    """
    from torchvision import models

    check(name)
    if pretrained:
        published = _default_weights(name)
        model = models.get_model(name, weights=published, progress=False)
        return _replace_head(model, len(published.meta["categories"]), classes)
    extra: dict[str, Any] = dict(config or {})
    if name in _WITH_AUXILIARY_HEADS:
        extra |= {"aux_logits": False, "init_weights": True}
    return models.get_model(name, weights=None, num_classes=classes, **extra)


def input_shape(network: nn.Module, shape: Shape) -> Shape:
    """The shape to which images of `shape` must be resized, always with three channels."""
    from torchvision.models import MaxVit, VisionTransformer

    h, w, _ = shape
    if isinstance(network, VisionTransformer):
        h = w = network.image_size
    elif isinstance(network, MaxVit):
        h = w = 224  # its window attention takes this size only, and no attribute has it
    return h, w, CHANNELS


def config(name: str, network: nn.Module) -> dict[str, Any] | None:
    """Values needed beside the name to build the network again."""
    return {key: getattr(network, key) for key in _CONFIG_KEYS if hasattr(network, key)} or None


def _default_weights(name: str) -> Any:
    from torchvision import models

    check(name)
    return models.get_model_weights(name).DEFAULT  # pyright: ignore[reportAttributeAccessIssue]


def _replace_head(network: nn.Module, old: int, new: int) -> nn.Module:
    """Give the network a new last layer, unless the number of classes stays."""
    if new == old:
        return network
    name, layer = weights.layers_with_outputs(network, old)[-1]
    parent, _, attribute = name.rpartition(".")
    if isinstance(layer, nn.Conv2d):  # SqueezeNet
        fresh: nn.Module = nn.Conv2d(layer.in_channels, new, layer.kernel_size)  # pyright: ignore[reportArgumentType]
    else:
        assert isinstance(layer, nn.Linear)
        fresh = nn.Linear(layer.in_features, new)
    setattr(network.get_submodule(parent), attribute, fresh)
    return network
