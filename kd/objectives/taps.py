"""Features of named layers, and what brings them to a common shape.

Convolutional networks answer with maps, transformers with tokens, heads with vectors. `Taps` reads
the features of a forward pass; `probe` finds out once how those of each layer lie in memory;
`as_map`, `as_tokens` and `as_vector` bring them to the shape that a loss needs.

The hooks sit on the layers: whatever wraps the network later, DDP or a compiler, calls them too.
"""

import copy
import difflib
import itertools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.errors import UserError
from kd.models.networks import Shape

EMBEDDING = "embedding"  # the input of the classifier, whatever else a network calls so
SQUARE_SHAPE = (1, 1, 1)  # proportions that a network may give an image first


@dataclass(frozen=True)
class FeatureLayout:
    """How the features of a layer lie in memory.

    Attributes:
        layer: Its name, for messages.
        kind: `nchw` and `nhwc` are maps, `tokens` are (n t c), a `vector` is (n c).
        channels: c.
        size: Height and width of the grid of positions, 1x1 for a vector; None for tokens on no
            known grid, which cannot be made a map.
        prefix: Tokens before those of the grid: class, distillation, registers.
    """

    layer: str
    kind: Literal["nchw", "nhwc", "tokens", "vector"]
    channels: int
    size: tuple[int, int] | None = (1, 1)
    prefix: int = 0


class Taps:
    """Reads the features of some layers of a network after it has run.

    Of a layer that runs several times in a forward pass the last output counts, of several outputs
    the first tensor. Where the taps are gone, and in a deep copy of the network alone, the hooks
    do nothing; a deep copy of an object that holds both network and taps has its own.

    Attributes:
        layers: Their names, each once.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        """Put hooks on the layers.

        Args:
            network: Must be called itself: a call of its parts is not seen.
            layers: Names as in `network.named_modules()`; or `embedding`, the input of the
                classifier, which is the last linear layer where a network does not say.

        Raises:
            UserError: If there is no such layer.
        """
        self.layers = tuple(dict.fromkeys(layers))
        self._pass = _ForwardPass()
        network.register_forward_pre_hook(_StartPass(self._pass))
        for name in self.layers:
            keep = _KeepFeature(self._pass, name)
            if name == EMBEDDING:
                _find_classifier(network).register_forward_pre_hook(keep)
            else:
                _find_layer(network, name).register_forward_hook(keep)

    def read(self) -> dict[str, Tensor]:
        """The features of the last forward pass by layer, once: they are then forgotten.

        They belong to the graph, and have the dtype that autocast gave them.

        Raises:
            UserError: If a layer did not run, whose loss would be silently zero.
        """
        features, self._pass.features = self._pass.features, None
        assert features is not None, "the network has not run since the taps were last read"
        for name in self.layers:
            if name not in features:
                raise UserError(f"layer {name!r} did not run, or gave no tensor: tap another one")
        return {name: features[name] for name in self.layers}


def probe(
    network: nn.Module, taps: Taps, shape: Shape, *, trained: bool = False
) -> dict[str, FeatureLayout]:
    """The layouts of the tapped layers, from one image of zeros in evaluation mode.

    The two axes of a map that have the proportions of the image, or of a square, are its height and
    width; where both readings fit, the channels come last if timm says so of the network. Tokens
    lie on the grid of its patch embedding, or else one so proportioned; the rest are the prefix.

    Args:
        network: The tapped one, or one that calls it; not compiled yet.
        taps: Of it.
        shape: Height, width and channels of an image.
        trained: Whether the layers must depend on a weight that is trained.

    Raises:
        UserError: If a layer did not run, has features of no known kind, or nothing to train.
    """
    like = next(network.parameters(), torch.zeros(()))
    modes = [(module, module.training) for module in network.modules()]
    try:
        with torch.set_grad_enabled(trained):
            network.eval()(like.new_zeros(1, shape[2], *shape[:2]))
    finally:
        for module, training in modes:
            module.training = training
    found = taps.read()
    fixed = [layer for layer, feature in found.items() if not feature.requires_grad]
    if trained and fixed:
        raise UserError(f"no trained weight comes before layer {fixed[0]!r}: tap a later one")
    return {
        layer: _infer_layout(layer, feature, network, shape) for layer, feature in found.items()
    }


def as_map(feature: Float[Tensor, "n ..."], layout: FeatureLayout) -> Float[Tensor, "n c h w"]:
    """Without prefix tokens; a vector is a map of one position.

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
    """Row after row of a map; without prefix tokens; a vector is one token."""
    if layout.kind == "tokens":
        return feature[:, layout.prefix :]
    return as_map(feature, layout).flatten(2).transpose(1, 2)


def as_vector(feature: Float[Tensor, "n ..."], layout: FeatureLayout) -> Float[Tensor, "n c"]:
    """The mean over all positions, without prefix tokens."""
    return as_tokens(feature, layout).mean(1)


class _ForwardPass:
    """Features of a forward pass: None after they were read, until the next one begins."""

    features: dict[str, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_ForwardPass":
        return (
            _ForwardPass()
        )  # features in a graph cannot be copied, and those of another pass need not


class _Hook:
    """Knows a pass without keeping it: only its `Taps` do.

    So the hooks of a deep copy are dead unless its taps were copied with it: deepcopy's memo makes
    one new pass of one old one, and drops it at the end where nothing else holds it.
    """

    def __init__(self, owner: _ForwardPass, name: str = "") -> None:
        self.owner = weakref.ref(owner)
        self.name = name

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        owner = self.owner()
        return type(self)(
            _ForwardPass() if owner is None else copy.deepcopy(owner, memo), self.name
        )


class _StartPass(_Hook):
    """Before the network: forget another pass, of which nothing may be taken for this one's."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        owner = self.owner()
        if owner is not None:
            owner.features = {}


class _KeepFeature(_Hook):
    """After a layer: keep its output. Before it, where there is no output yet: its input."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], *output: Any) -> None:
        owner = self.owner()
        # Between two passes a layer runs when a checkpointed block is computed again.
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
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)


def _find_layer(network: nn.Module, name: str) -> nn.Module:
    layers = dict(network.named_modules(remove_duplicate=False))
    layers.pop("")
    if name not in layers:
        near = difflib.get_close_matches(name, [*layers, EMBEDDING], n=4, cutoff=0)
        raise UserError(
            f"unknown layer {name!r} of {type(network).__name__}: the nearest of its {len(layers)} "
            f"are {', '.join(near)}"
        )
    return layers[name]


def _find_classifier(network: nn.Module) -> nn.Module:
    said = _module_attribute(network, "get_classifier", Callable)
    found = said() if said else None
    if isinstance(found, tuple):  # DeiT: the heads of the class and of the distillation token
        found = found[0]
    if isinstance(found, nn.Module):
        return found
    for kind in (nn.Linear, nn.Conv2d):
        last = [module for module in network.modules() if isinstance(module, kind)]
        if last:
            return last[-1]
    raise UserError(
        f"{type(network).__name__} has no linear layer, so no {EMBEDDING!r}: name a layer instead"
    )


def _infer_layout(layer: str, feature: Tensor, network: nn.Module, shape: Shape) -> FeatureLayout:
    if feature.ndim not in (2, 3, 4) or len(feature) != 1 or not feature.is_floating_point():
        raise UserError(
            f"layer {layer!r} gives {tuple(feature.shape)} for one image, which is no map "
            "(1, c, h, w), tokens (1, t, c) or vector (1, c): tap another layer"
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
        # Each axis of a map is rounded to whole positions on its own.
        slack = 0 if height == width else max(height, width)
        first, last = (abs(h * width - w * height) <= slack for h, w in ((a, b), (b, c)))
        if first or last:
            return first and (not last or _module_attribute(network, "output_fmt", str) == "NHWC")
    return False


def _token_grid(count: int, network: nn.Module, shape: Shape) -> tuple[tuple[int, int] | None, int]:
    """Size of the grid of some tokens, and how many are left in front of it."""
    own = _module_attribute(network, "grid_size", tuple)
    said = _module_attribute(network, "num_prefix_tokens", int)
    # Class; class and distillation; class and four registers.
    prefixes = (0, 1, 2, 5) if said is None else (said, 0, 1, 2, 5)
    for like, prefix in itertools.product((shape, SQUARE_SHAPE), prefixes):
        for size in (own, _proportional_grid(count - prefix, like)):
            if size is not None and count - prefix == size[0] * size[1]:
                return size, prefix
    return None, prefixes[0]


def _proportional_grid(count: int, shape: Shape) -> tuple[int, int] | None:
    height, width, _ = shape
    h = math.isqrt(max(count, 0) * height // width)
    w = h * width // height
    return (h, w) if h > 0 and h * width == w * height else None


def _module_attribute(network: nn.Module, name: str, kind: Any) -> Any:
    """What a network, or the first of its parts that does, says of itself, as timm's do."""
    found = (getattr(module, name, None) for module in network.modules())
    return next((value for value in found if isinstance(value, kind)), None)
