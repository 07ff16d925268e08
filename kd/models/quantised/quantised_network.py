"""Put fake quantisers into a network, take them out, and store their state apart from its weights.

The network keeps its class, its layers and their hooks, so that it is trained, tapped and averaged
like any other: a parametrization rounds the weight of a layer, a hook its input. Both follow a
deep copy. The trained weights stay in float32; `float_copy` has them under their own names.

Convolutions and linear layers are quantised, as far as a network calls them; norms, activations,
sums and biases stay in float32.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dsdistill.harness.errors import UserError
from kd.models.quantised import calibration
from kd.models.quantised.bit_widths import BitWidths
from kd.models.quantised.calibration import InputRange, RangeRule
from kd.models.quantised.quantisers import Quantiser, first_weight_steps

INPUT = "input_quantiser"  # attribute of a quantised layer
STEP, CODES = "step", "codes"  # ends of the names in `quantiser_state`


@dataclass(frozen=True)
class Coverage:
    """How much of a network is quantised.

    Attributes:
        layers: Number of quantised layers.
        share: Share of its parameters that have codes.
    """

    layers: int
    share: float


def quantise(
    network: nn.Module,
    run: Callable[[Tensor], object],
    batches: Iterable[Tensor],
    bits: BitWidths,
    rule: RangeRule = "mse",
) -> Coverage:
    """Quantise a network, with ranges from a few images.

    Args:
        network: The network, changed in place; one that is quantised already is calibrated anew.
        run: Calls it, or a classifier around it.
        batches: Images to calibrate on, a few hundred.
        bits: Numbers of bits; the first and the last layer called have 8.
        rule: Rule of the ranges of inputs; the steps of weights have the smallest squared error.

    Raises:
        UserError: If the network calls no convolution and no linear layer.
    """
    remove(network)
    was_training = network.training
    samples = calibration.observe(network.eval(), run, batches)
    network.train(was_training)
    if not samples:
        raise UserError(
            f"{type(network).__name__} calls no layers of torch.nn.Conv2d and torch.nn.Linear, "
            "and only these can be quantised: choose another student"
        )
    names = list(samples)
    for name, sample in samples.items():
        widths = bits.outer if name in (names[0], names[-1]) else bits
        chosen = calibration.choose_range(sample, widths.input_codes, rule)
        _attach(network, name, chosen, widths.largest_weight_code)
    return coverage(network)


def quantised_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The quantised layers of a network by their names; none of one in float32."""
    return {name: m for name, m in network.named_modules() if hasattr(m, INPUT)}


def is_quantised(network: nn.Module) -> bool:
    """Whether a network has quantisers."""
    return bool(quantised_layers(network))


def quantisers(layer: nn.Module) -> tuple[Quantiser, Quantiser]:
    """The quantisers of a quantised layer's weight and of its input."""
    weight, inputs = layer.parametrizations.weight[0], getattr(layer, INPUT)  # pyright: ignore
    assert isinstance(weight, Quantiser)
    assert isinstance(inputs, Quantiser)
    return weight, inputs


def tensors_of_outputs(layer: nn.Module) -> list[Tensor]:
    """Tensors of a layer, quantised or not, that have a slice for each of its outputs."""
    tensors: list[Tensor] = list(layer.parameters(recurse=False))
    if hasattr(layer, INPUT):
        weight, _ = quantisers(layer)
        tensors += [trained_weight(layer), weight.scale, weight.start]
    return tensors


def coverage(network: nn.Module) -> Coverage:
    """How much of a network is quantised."""
    plain, layers = float_copy(network), quantised_layers(network)
    coded = {id(plain.get_submodule(name).weight): plain.get_submodule(name) for name in layers}
    total = sum(p.numel() for p in plain.parameters())
    return Coverage(len(layers), sum(m.weight.numel() for m in coded.values()) / total)  # pyright: ignore


def float_copy(network: nn.Module) -> nn.Module:
    """A copy of a network without quantisers, with the weights that are rounded by them."""
    return remove(copy.deepcopy(network))


def remove(network: nn.Module) -> nn.Module:
    """Remove the quantisers of a network, changed in place."""
    for layer in quantised_layers(network).values():
        detach(layer)
    return network


def detach(layer: nn.Module) -> None:
    """Remove the quantisers of one layer."""
    weight = trained_weight(layer)
    # Not torch's remove_parametrizations: it changes the class of the layer, which a deep copy
    # shares with its original.
    layer.__class__ = type(layer).__bases__[0]
    delattr(layer, "parametrizations")
    delattr(layer, INPUT)
    layer.register_parameter("weight", weight)
    for key, hook in list(layer._forward_pre_hooks.items()):
        if hook is _quantise_input:
            del layer._forward_pre_hooks[key]


def trained_weight(layer: nn.Module) -> nn.Parameter:
    """The weight of a quantised layer that is trained, in float32."""
    weight = layer.parametrizations.weight.original  # pyright: ignore
    assert isinstance(weight, nn.Parameter)
    return weight


def quantiser_state(network: nn.Module) -> dict[str, Tensor]:
    """Steps and smallest and largest codes of all quantisers, by layer and kind."""
    state: dict[str, Tensor] = {}
    for name, layer in quantised_layers(network).items():
        for kind, quantiser in zip(("weight", "input"), quantisers(layer), strict=True):
            state[f"{name}.{kind}.{STEP}"] = quantiser.step.detach().cpu().clone()
            state[f"{name}.{kind}.{CODES}"] = quantiser.bounds.cpu().clone()
    return state


def attach_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put quantisers into a network in float32, as `quantiser_state` describes them.

    Args:
        network: The network with its weights, changed in place.
        state: Result of `quantiser_state`.

    Raises:
        ValueError: If they are of another network, or damaged.
    """
    end = f".input.{STEP}"
    names = [name.removesuffix(end) for name in state if name.endswith(end)]
    modules = dict(network.named_modules())
    for name in names:
        layer = modules.get(name)
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            raise ValueError(f"it has no layer {name}")
        step, codes = state[f"{name}.input.{STEP}"], state[f"{name}.input.{CODES}"].tolist()
        weight_step = state[f"{name}.weight.{STEP}"]
        if weight_step.shape != layer.weight.shape[:1] or not _are_steps(step, weight_step):
            raise ValueError(f"the steps of layer {name} do not fit")
        _, high = state[f"{name}.weight.{CODES}"].tolist()
        _attach(network, name, InputRange(step.item(), *codes), high, weight_step)


def step_names(network: nn.Module) -> set[str]:
    """Names of the learned steps among a network's parameters, which no decay should shrink."""
    return {
        f"{name}.scale" for name, module in network.named_modules() if isinstance(module, Quantiser)
    }


def _attach(
    network: nn.Module,
    name: str,
    chosen: InputRange,
    high: int,
    weight_step: Tensor | None = None,
) -> None:
    """Quantise one layer; a weight that another quantised layer shares has one quantiser."""
    layer = network.get_submodule(name)
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    shared = next(_quantisers_of(network, weight), None)
    if shared is None:
        start = first_weight_steps(weight, high) if weight_step is None else weight_step
        shared = Quantiser(start.to(weight.device), -high, high, per_channel=True)
    parametrize.register_parametrization(layer, "weight", shared, unsafe=True)
    step = torch.tensor([chosen.step], device=weight.device)
    inputs = Quantiser(step, chosen.low, chosen.high, per_channel=False)
    layer.register_module(INPUT, inputs)
    layer.register_forward_pre_hook(_quantise_input)
    for quantiser in (shared, inputs):
        quantiser.train(layer.training)


def _quantise_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    first, *rest = inputs
    return getattr(layer, INPUT)(first), *rest


def _quantisers_of(network: nn.Module, weight: nn.Parameter) -> Iterator[Quantiser]:
    for layer in quantised_layers(network).values():
        if trained_weight(layer) is weight:
            yield quantisers(layer)[0]


def _are_steps(*steps: Tensor) -> bool:
    return all(bool(torch.isfinite(step).all() and (step > 0).all()) for step in steps)
