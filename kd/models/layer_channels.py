"""The channels of a network's layers, by which a pruned network is built again.

The name of a network says how many channels its layers have; pruning leaves fewer in most of them.
So `model.json` of a pruned student holds, layer by layer, how many are left: the inputs and outputs
of a convolution or linear layer, the channels of a norm, and the shape of a parameter that belongs
to no such layer. A network of that name is cut to these, and then takes the weights.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

LayerChannels = Mapping[str, tuple[int, ...]]

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
BatchNorm = nn.modules.batchnorm._NormBase  # of instances too
TENSORS = ("weight", "bias", "running_mean", "running_var")


def read(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """The channels of all layers of a network, by the names of the layers."""
    channels: dict[str, tuple[int, ...]] = {}
    for name, layer in network.named_modules():
        if (known := _channels(layer)) is not None:
            channels[name] = known
            continue
        for own, parameter in layer.named_parameters(recurse=False):
            channels[f"{name}.{own}" if name else own] = tuple(parameter.shape)
    return channels


def changed(network: nn.Module, original: nn.Module) -> dict[str, tuple[int, ...]]:
    """The channels of those layers of a network that has others in the original."""
    before = read(original)
    return {name: sizes for name, sizes in read(network).items() if before[name] != sizes}


def apply(network: nn.Module, channels: LayerChannels) -> None:
    """Cut the layers of a network, whose weights are to be loaded afterwards.

    Args:
        network: The network, changed in place.
        channels: Channels of its layers; those not named keep theirs.

    Raises:
        ValueError: If they do not fit the network.
    """
    modules, parameters = dict(network.named_modules()), dict(network.named_parameters())
    for name, sizes in channels.items():
        layer = modules.get(name)
        now = None if layer is None else _channels(layer)
        if layer is not None and now is not None:
            _check(name, sizes, now)
            _cut(layer, sizes)
        elif name in parameters:
            _check(name, sizes, tuple(parameters[name].shape))
            owner, _, own = name.rpartition(".")
            _replace(modules[owner], own, sizes)
        else:
            raise ValueError(f"it has no layer {name}")


def _channels(layer: nn.Module) -> tuple[int, ...] | None:
    """The channels of a layer; None of a module of another kind."""
    if isinstance(layer, Convolution):
        return layer.in_channels, layer.out_channels
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, BatchNorm):
        return (layer.num_features,)
    if isinstance(layer, nn.GroupNorm):
        return (layer.num_channels,)
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return tuple(layer.normalized_shape)
    return None


def _check(name: str, sizes: Iterable[int], now: tuple[int, ...]) -> None:
    """Refuse sizes of another number, and more channels than there are."""
    sizes = tuple(sizes)
    fit = len(sizes) == len(now) and all(
        type(size) is int and 1 <= size <= most for size, most in zip(sizes, now, strict=True)
    )
    if not fit:
        raise ValueError(f"layer {name} cannot have {sizes} of its {now} channels")


def _cut(layer: nn.Module, sizes: tuple[int, ...]) -> None:
    """Give a layer its channels, and tensors of that size."""
    at: Any = layer
    if isinstance(layer, Convolution):
        depthwise = layer.groups == layer.in_channels
        at.in_channels, at.out_channels = sizes
        at.groups = at.in_channels if depthwise else layer.groups
        if at.in_channels % at.groups or at.out_channels % at.groups:
            raise ValueError(f"{sizes} channels are not in {at.groups} groups")
        shape = (at.out_channels, at.in_channels // at.groups, *layer.kernel_size)
    elif isinstance(layer, nn.Linear):
        at.in_features, at.out_features = sizes
        shape = (at.out_features, at.in_features)
    elif isinstance(layer, BatchNorm):
        (at.num_features,) = shape = sizes
    elif isinstance(layer, nn.GroupNorm):
        if layer.num_groups == layer.num_channels:  # norms of single channels
            at.num_groups = sizes[0]
        (at.num_channels,) = shape = sizes
    else:
        at.normalized_shape = shape = sizes
    for name in TENSORS:
        if getattr(layer, name, None) is not None:
            _replace(layer, name, shape if name == "weight" else shape[:1])


def _replace(layer: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Replace a tensor by one of another shape, with values to be loaded."""
    tensor = getattr(layer, name)
    empty = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    if isinstance(tensor, nn.Parameter):
        setattr(layer, name, nn.Parameter(empty, requires_grad=tensor.requires_grad))
    else:
        setattr(layer, name, empty)
