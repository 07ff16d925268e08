"""Structured pruning: whole channels are removed, and a smaller network of the same kind is left.

A channel is removed from all layers that it passes through together, which torch-pruning finds in
the graph of the network. Each group of layers loses the same share of its channels, those of the
smallest weights; the outputs stay. After a short training the choice of channels hardly matters,
and the structure does.

Source: Fang, Ma, Song, Bi Mi and Wang (2023), arXiv:2301.12900 (dependency graph); Li, Kadav,
Durdanovic, Samet and Graf (2017), arXiv:1608.08710 (by the norm of the weights).
"""

import copy
import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dsdistill.harness.errors import UserError, first_line
from kd.models import layer_channels
from kd.models.layer_channels import LayerChannels
from kd.models.networks import Classifier
from kd.models.zoo.protocol import Shape

PACKAGE = "torch_pruning"
RATIOS = 100  # the share of channels that a layer loses is a multiple of 1 / RATIOS


@dataclass(frozen=True)
class Pruning:
    """What was removed from a network.

    Attributes:
        channels: Channels of the layers that have fewer now.
        macs_before: Multiply-accumulates of one image before.
        macs_after: The same afterwards.
    """

    channels: LayerChannels
    macs_before: int
    macs_after: int

    @property
    def share(self) -> float:
        """Share of the multiply-accumulates that are gone."""
        return 1 - self.macs_after / self.macs_before


def count_macs(classifier: nn.Module, shape: Shape) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image.

    Args:
        classifier: Network of images (n, c, h, w), on any device.
        shape: Height, width and channels of its images.
    """
    was_training = classifier.training
    images = _example(shape).to(next(classifier.parameters()).device)
    # With gradients: without them transformers take a shortcut that nothing counts.
    with FlopCounterMode(display=False) as counter:
        classifier.eval()(images)
    classifier.train(was_training)
    return counter.get_total_flops() // 2


def prune(name: str, classifier: Classifier, shape: Shape, share: float) -> Pruning:
    """Remove channels until a share of the multiply-accumulates is gone.

    Args:
        name: Name of the network in messages.
        classifier: The network on the CPU, before hooks are put on it; changed in place.
        shape: Height, width and channels of its images.
        share: Share in (0, 1); at least so much is removed, and as little more as whole channels
            allow.

    Returns:
        What was removed.

    Raises:
        UserError: If torch-pruning is missing, cannot follow the network, or so much cannot go.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError("--prune needs torch-pruning: pip install 'dsdistill[prune]'")
    was_training, original = classifier.training, copy.deepcopy(classifier.network)
    classifier.eval()
    before = count_macs(classifier, shape)
    try:
        ratio = _choose_ratio(classifier, shape, (1 - share) * before)
        _remove_channels(classifier, shape, ratio)
        channels = layer_channels.changed(classifier.network, original)
        pruning = Pruning(channels, before, count_macs(classifier, shape))
        same = _is_same(original, classifier, pruning.channels, shape)
    except Exception as error:  # networks of a user raise anything
        raise UserError(
            f"torch-pruning cannot remove channels of {name} ({first_line(error)}): "
            "choose another student"
        ) from error
    if pruning.share < share:
        raise UserError(
            f"--prune {share:g} removes that share of the multiply-accumulates, and of {name} at "
            f"most {pruning.share:.3f} can go: use a smaller share"
        )
    if not same:
        raise UserError(
            f"{name} counts its channels elsewhere than in its layers, and would not load again "
            "after pruning: choose another student"
        )
    classifier.train(was_training)
    return pruning


def _choose_ratio(classifier: Classifier, shape: Shape, most: float) -> float:
    """The smallest ratio of channels, in hundredths, without which at most so much is multiplied.

    Args:
        classifier: The network, of which copies are pruned.
        shape: Height, width and channels of its images.
        most: Multiply-accumulates that may be left.
    """
    low, high = 0, _largest_ratio(classifier, shape)
    while high - low > 1:
        middle = (low + high) // 2
        tried = copy.deepcopy(classifier)
        _remove_channels(tried, shape, middle / RATIOS)
        if count_macs(tried, shape) > most:
            low = middle
        else:
            high = middle
    return high / RATIOS


def _largest_ratio(classifier: Classifier, shape: Shape) -> int:
    """The largest ratio, in hundredths, that leaves a channel everywhere.

    A group of layers that would lose all of its channels is left as it is, so that a larger ratio
    removes less.
    """
    kept = {part for layer in _kept_layers(classifier, shape) for part in layer.modules()}
    outputs = [
        layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels // layer.groups
        for layer in classifier.modules()
        if layer not in kept and isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    # One channel in each group is left as it is: that of depthwise convolutions, too.
    fewest = min((count for count in outputs if count > 1), default=1)
    return RATIOS * (fewest - 1) // fewest


def _remove_channels(classifier: Classifier, shape: Shape, ratio: float) -> None:
    """Remove this share of the channels of all layers that may lose some."""
    import torch_pruning as tp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about parameters outside of layers, which are cut too
        pruner = tp.pruner.BasePruner(
            classifier,
            _example(shape),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=_kept_layers(classifier, shape),
            customized_pruners=_norms_of_channels(tp, classifier),
            # Its defaults are dictionaries that all pruners share.
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
        )
        pruner.step()


def _kept_layers(classifier: Classifier, shape: Shape) -> list[nn.Module]:
    """Layers whose outputs stay: the last one, and attention, whose heads are cut elsewhere."""
    called: list[nn.Module] = []
    layers = [m for m in classifier.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [m.register_forward_hook(lambda m, *_: called.append(m)) for m in layers]
    try:
        with torch.no_grad():
            classifier(_example(shape))
    finally:
        for hook in hooks:
            hook.remove()
    attention = [m for m in classifier.modules() if _has_heads(m)]
    return [*called[-1:], *attention]


def _has_heads(module: nn.Module) -> bool:
    return any(hasattr(module, name) for name in ("num_heads", "num_attention_heads"))


def _norms_of_channels(tp: Any, network: nn.Module) -> dict[type[nn.Module], Any]:
    """What removes channels from group norms, also from those with a group for each channel."""

    class GroupNormPruner(tp.pruner.function.GroupNormPruner):
        def prune_out_channels(self, layer: nn.GroupNorm, idxs: list[int]) -> nn.Module:
            single = layer.num_groups == layer.num_channels
            super().prune_out_channels(layer, idxs)
            if single:
                layer.num_groups = layer.num_channels
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channel_groups(self, layer: nn.GroupNorm) -> int:
            return 1 if layer.num_groups == layer.num_channels else layer.num_groups

        get_in_channel_groups = get_out_channel_groups

    kinds = {type(m) for m in network.modules() if isinstance(m, nn.GroupNorm)}
    return {kind: GroupNormPruner() for kind in kinds}


def _is_same(
    original: nn.Module, classifier: Classifier, channels: LayerChannels, shape: Shape
) -> bool:
    """Whether the original, cut to these channels, answers to the bit as the pruned network."""
    layer_channels.apply(original, channels)
    original.load_state_dict(classifier.network.state_dict())
    copied = classifier.with_network(original).eval()
    images = _example(shape)
    with torch.no_grad():
        return torch.equal(classifier(images), copied(images))


def _example(shape: Shape) -> Float[Tensor, "1 c h w"]:
    h, w, c = shape
    return torch.rand(1, c, h, w, generator=torch.Generator().manual_seed(0))
