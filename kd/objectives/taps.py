"""Read the features of named layers, and bring them to a common shape.

Convolutional layers return maps, transformers tokens, heads vectors. `Taps` reads the features of a
forward pass; `probe` finds out once how the features of each layer lie in memory; `as_map`,
`as_tokens` and `as_vector` bring them to the shape that a loss needs.

Of a transformer, whose blocks are a list of modules of one class, a number is a block and
`embeddings` what the first block takes.

The hooks sit on the layers: a later wrapper of the network, DDP or a compiler, calls them too.
"""

import copy
import difflib
import itertools
import math
import re
import weakref
from collections.abc import Mapping, Sequence, ValuesView
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dsdistill.harness.errors import UserError
from kd.models.language import blocks
from kd.models.networks import Shape
from kd.models.token_inputs import TokenInputs
from kd.models.zoo import embedding_layer
from kd.models.zoo.modes import evaluation_mode

# What a network is tried on: the shape of an image, height, width and channels, or a few texts.
Sample = Shape | TokenInputs

EMBEDDING = embedding_layer.EMBEDDING
OUTPUT = "output"  # what the network returns, unless a layer has this name
EMBEDDINGS = "embeddings"  # of a transformer: what its first block takes
SQUARE_SHAPE = (1, 1, 1)  # proportions after the resize in front of some networks


@dataclass(frozen=True)
class FeatureLayout:
    """How the features of a layer lie in memory.

    Attributes:
        layer: Name of the layer, for messages.
        kind: `nchw` and `nhwc` are maps, `tokens` are (n t c), a `vector` is (n c).
        channels: Number of channels c.
        size: Height and width of the grid of positions, 1x1 for a vector; None for tokens on no
            known grid, which cannot be made a map.
        prefix: Number of tokens before those of the grid: class, distillation, registers.
    """

    layer: str
    kind: Literal["nchw", "nhwc", "tokens", "vector"]
    channels: int
    size: tuple[int, int] | None = (1, 1)
    prefix: int = 0


class Taps:
    """Reads the features of some layers of a network after it has run.

    For a layer that runs several times in a forward pass, the last output counts; of several
    outputs, the first tensor. Once the taps are deleted, and in a deep copy of the network without
    them, the hooks do nothing; a deep copy of an object with both network and taps has hooks and
    taps of its own.

    Attributes:
        layers: Names of the layers, each once.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        """Put hooks on the layers.

        Args:
            network: Network that is called as a whole: calls of its parts are not recorded.
            layers: Names as in `network.named_modules()`; or `embedding`, the input of the
                classifier, which is the last linear layer unless the network names another, or
                the output of a network without one; or `output`; or, of a transformer, the number
                of a block (-1 is the last one) and `embeddings`.

        Raises:
            UserError: If there is no such layer.
        """
        self.layers = tuple(dict.fromkeys(layers))
        self._pass = ForwardPass()
        network.register_forward_pre_hook(StartPass(self._pass))
        for name in self.layers:
            keep = _KeepFeature(self._pass, name)
            if name == EMBEDDING and not embedding_layer.is_removed(network):
                embedding_layer.find_classifier(network).register_forward_pre_hook(keep)
            elif name == EMBEDDING or (name == OUTPUT and not hasattr(network, OUTPUT)):
                network.register_forward_hook(keep)
            elif name == EMBEDDINGS and _is_tapped_before_blocks(network):
                # The sum of all embeddings is the output of no module in some transformers.
                first = network.get_submodule(blocks.name_of(network, 0))
                first.register_forward_pre_hook(keep)
            else:
                _find_layer(network, name).register_forward_hook(keep)

    def read(self) -> dict[str, Tensor]:
        """Read the features of the last forward pass by layer, and forget them.

        They are part of the autograd graph, in autocast's dtype.

        Raises:
            UserError: If a layer did not run: its loss would be silently zero.
        """
        features, self._pass.features = self._pass.features, None
        assert features is not None, "the network has not run since the taps were last read"
        for name in self.layers:
            if name not in features:
                raise UserError(f"layer {name!r} did not run, or gave no tensor: tap another one")
        return {name: features[name] for name in self.layers}


def probe(
    network: nn.Module, taps: Taps, sample: Sample, *, trained: bool = False
) -> dict[str, FeatureLayout]:
    """Find the layouts of the tapped layers, with one image of zeros, or texts, in evaluation mode.

    The two axes of a map with the proportions of the image, or of a square, are its height and
    width; where both orders fit, the channels come last if the network has timm's attribute
    `output_fmt` of NHWC. Tokens lie on the grid of the patch embedding, or else on a grid with the
    proportions of the image or a square; the remaining tokens are the prefix. Those of texts lie on
    no grid.

    Args:
        network: The tapped network, or one that calls it; not compiled yet.
        taps: Taps on the network.
        sample: Height, width and channels of an image; or texts.
        trained: Whether the layers must depend on a weight that is trained.

    Raises:
        UserError: If a layer did not run, has features of no known kind, or, with `trained`,
            depends on no trained weight.
    """
    try_out(network, sample, trained=trained)
    features = taps.read()
    fixed = [layer for layer, feature in features.items() if not feature.requires_grad]
    if trained and fixed:
        raise UserError(f"no trained weight comes before layer {fixed[0]!r}: tap a later one")
    if isinstance(sample, TokenInputs):
        return {layer: _text_layout(layer, x, sample) for layer, x in features.items()}
    return {
        layer: _infer_layout(layer, feature, network, sample) for layer, feature in features.items()
    }


def try_out(network: nn.Module, sample: Sample, *, trained: bool = False) -> Any:
    """Run a network in evaluation mode on one image of zeros, or on texts; return its outputs.

    Args:
        network: The network.
        sample: Height, width and channels of an image; or texts.
        trained: Whether to record the graph.
    """
    like = next(network.parameters(), torch.zeros(()))
    if isinstance(sample, TokenInputs):
        inputs = sample.to(like.device)
    else:
        inputs = like.new_zeros(1, sample[2], *sample[:2])
    with evaluation_mode(network), torch.set_grad_enabled(trained):
        return network(inputs)


def remove(network: nn.Module) -> None:
    """Remove the hooks of all taps from a network; other hooks stay."""
    for module in network.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Hook)]:
                del hooks[key]


def as_map(feature: Float[Tensor, "n ..."], layout: FeatureLayout) -> Float[Tensor, "n c h w"]:
    """Bring a feature to a map, without prefix tokens; a vector is a map of one position.

    Raises:
        UserError: For tokens on no known grid.
    """
    if layout.kind == "nchw":
        return feature
    if layout.kind == "nhwc":
        return feature.permute(0, 3, 1, 2)
    if layout.kind == "vector":
        return feature[:, :, None, None]
    if layout.size is None:
        raise UserError(
            f"the tokens of layer {layout.layer!r} lie on no known grid, so they are no map: "
            "tap another layer, or use a loss on vectors"
        )
    grid = feature[:, layout.prefix :].unflatten(1, layout.size)  # (n, h, w, c)
    return grid.permute(0, 3, 1, 2)


def as_tokens(feature: Float[Tensor, "n ..."], layout: FeatureLayout) -> Float[Tensor, "n t c"]:
    """Bring a feature to tokens: a map row by row, a vector as one token; without prefix tokens."""
    if layout.kind == "tokens":
        return feature[:, layout.prefix :]
    return as_map(feature, layout).flatten(2).transpose(1, 2)


def as_vector(
    feature: Float[Tensor, "n ..."],
    layout: FeatureLayout,
    mask: Bool[Tensor, "n t"] | None = None,
) -> Float[Tensor, "n c"]:
    """Average a feature over all positions, without prefix tokens and padding.

    Args:
        feature: Features of a layer.
        layout: How they lie in memory.
        mask: Of texts, which tokens are real.
    """
    tokens = as_tokens(feature, layout)
    if mask is None or layout.kind != "tokens":
        return tokens.mean(1)
    # Padding is left out and not multiplied by 0: what stands there may be no number.
    sums = torch.where(mask[..., None], tokens.float(), 0.0).sum(1)
    return (sums / mask.sum(1, keepdim=True).clamp_min(1)).to(tokens.dtype)


class ForwardPass:
    """The features of a forward pass; None after they are read, until the next pass begins.

    Attributes:
        features: Features, or what else the taps read, by name.
    """

    features: dict[str, Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "ForwardPass":
        # Features in a graph cannot be copied, and the copy's next pass has its own.
        return ForwardPass()


class Hook:
    """Holds only a weak reference to the pass, which its taps own.

    So the hooks of a deep copy do nothing unless the taps were copied with it: deepcopy's memo
    creates one new pass, and drops it at the end if nothing else holds it.
    """

    def __init__(self, owner: ForwardPass, name: str = "") -> None:
        self.owner = weakref.ref(owner)
        self.name = name

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        owner = self.owner()
        return type(self)(ForwardPass() if owner is None else copy.deepcopy(owner, memo), self.name)


class StartPass(Hook):
    """Runs before the network: starts a new pass, so that no feature of an earlier one remains."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        owner = self.owner()
        if owner is not None:
            owner.features = {}


class _KeepFeature(Hook):
    """Keeps a layer's output if it runs after the layer, and its input if it runs before."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], *output: Any) -> None:
        owner = self.owner()
        # With activation checkpointing a layer also runs between two passes.
        if owner is None or owner.features is None:
            return
        value = _first_tensor(output or inputs)
        if value is not None:
            # A copy, since the next layer may work in place: torchvision's ReLU and residual sums.
            owner.features[self.name] = value.clone()


def _first_tensor(value: Any) -> Tensor | None:
    """The first tensor in nested outputs, such as those of transformers."""
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value
    if not isinstance(parts, tuple | list | ValuesView):
        return None
    tensors = map(_first_tensor, parts)
    return next((tensor for tensor in tensors if tensor is not None), None)


def _is_tapped_before_blocks(network: nn.Module) -> bool:
    """Whether `embeddings` is no layer's name, and there are blocks before which to tap."""
    return not hasattr(network, EMBEDDINGS) and blocks.exist(network)


def _find_layer(network: nn.Module, name: str) -> nn.Module:
    layers = dict(network.named_modules(remove_duplicate=False))
    layers.pop("")
    if name not in layers and re.fullmatch(r"-?\d+", name) and blocks.exist(network):
        return layers[blocks.name_of(network, int(name))]
    if name not in layers:
        near = difflib.get_close_matches(name, [*layers, EMBEDDING, OUTPUT], n=4, cutoff=0)
        raise UserError(
            f"unknown layer {name!r} of {type(network).__name__}: the nearest of its {len(layers)} "
            f"are {', '.join(near)}"
        )
    return layers[name]


def _text_layout(layer: str, feature: Tensor, sample: TokenInputs) -> FeatureLayout:
    n, length = sample.ids.shape
    shape = tuple(feature.shape)
    if feature.is_floating_point() and shape[:2] == (n, length) and feature.ndim == 3:
        return FeatureLayout(layer, "tokens", shape[2], None)
    if feature.is_floating_point() and shape[:1] == (n,) and feature.ndim == 2:
        return FeatureLayout(layer, "vector", shape[1])
    raise UserError(
        f"layer {layer!r} gives {shape} for {n} texts of {length} tokens, which is neither tokens "
        "(n, l, c) nor a vector (n, c): tap another layer"
    )


def _infer_layout(layer: str, feature: Tensor, network: nn.Module, shape: Shape) -> FeatureLayout:
    if feature.ndim not in (2, 3, 4) or len(feature) != 1 or not feature.is_floating_point():
        raise UserError(
            f"layer {layer!r} gives {tuple(feature.shape)} for one image, which is neither a map "
            "(1, c, h, w), nor tokens (1, t, c), nor a vector (1, c): tap another layer"
        )
    if feature.ndim == 2:
        return FeatureLayout(layer, "vector", feature.shape[1])
    if feature.ndim == 3:
        size, prefix = _token_grid(feature.shape[1], network, shape)
        return FeatureLayout(layer, "tokens", feature.shape[2], size, prefix)
    _, a, b, c = feature.shape
    if _has_channels_last(a, b, c, network, shape):
        return FeatureLayout(layer, "nhwc", c, (a, b))
    return FeatureLayout(layer, "nchw", a, (b, c))


def _has_channels_last(a: int, b: int, c: int, network: nn.Module, shape: Shape) -> bool:
    for height, width, _ in (shape, SQUARE_SHAPE):
        # Each axis of a map is rounded to whole positions separately.
        slack = 0 if height == width else max(height, width)
        first, last = (abs(h * width - w * height) <= slack for h, w in ((a, b), (b, c)))
        if first or last:
            return first and (not last or _module_attribute(network, "output_fmt", str) == "NHWC")
    return False


def _token_grid(count: int, network: nn.Module, shape: Shape) -> tuple[tuple[int, int] | None, int]:
    """Size of the grid of `count` tokens, None if unknown; and the number of prefix tokens."""
    grid = _module_attribute(network, "grid_size", tuple)
    prefix_tokens = _module_attribute(network, "num_prefix_tokens", int)
    # Class; class and distillation; class and four registers.
    prefixes = (0, 1, 2, 5) if prefix_tokens is None else (prefix_tokens, 0, 1, 2, 5)
    for proportions, prefix in itertools.product((shape, SQUARE_SHAPE), prefixes):
        for size in (grid, _proportional_grid(count - prefix, proportions)):
            if size is not None and count - prefix == size[0] * size[1]:
                return size, prefix
    return None, prefixes[0]


def _proportional_grid(count: int, shape: Shape) -> tuple[int, int] | None:
    height, width, _ = shape
    h = math.isqrt(max(count, 0) * height // width)
    w = h * width // height
    return (h, w) if h > 0 and h * width == w * height else None


def _module_attribute(network: nn.Module, name: str, kind: Any) -> Any:
    """The attribute, as timm's networks have it, of the network or its first part with one."""
    values = (getattr(module, name, None) for module in network.modules())
    return next((value for value in values if isinstance(value, kind)), None)
