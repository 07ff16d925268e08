"""Fake quantisers: integer arithmetic, the gradients of LSQ, ranges, networks with quantisers."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from dsdistill.harness.errors import UserError
from kd.models.quantised import batch_norm_folding, bit_widths, calibration, quantised_network
from kd.models.quantised.bit_widths import BitWidths
from kd.models.quantised.calibration import InputSample
from kd.models.quantised.quantisers import Quantiser, fake_quantise, first_weight_steps
from kd.training.optimization import WeightAverage

RANDOM = torch.Generator().manual_seed(0)
IMAGES = torch.rand(6, 1, 8, 8, generator=RANDOM)
LOW, HIGH = torch.tensor(-3), torch.tensor(4)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    ).eval()


def quantised(text: str = "w4a4") -> nn.Sequential:
    network = small()
    quantised_network.quantise(network, network, [IMAGES], bit_widths.parse("--b", text))
    return network


def test_the_value_is_integer_arithmetic_to_the_bit() -> None:
    values = torch.randn(1000, generator=RANDOM)
    step = torch.tensor([0.125])  # a power of two: no product is rounded
    expected = np.clip(np.rint(values.double().numpy() / 0.125), -3, 4) * 0.125
    assert np.array_equal(fake_quantise(values, step, LOW, HIGH).numpy(), expected)


def test_the_gradient_of_the_step_is_equation_3_of_lsq() -> None:
    values = torch.tensor([-9.0, -0.26, 0.1, 0.6, 9.0], requires_grad=True)
    step = torch.tensor([0.5], requires_grad=True)
    each = torch.eye(5)
    for i, expected in enumerate((-3, round(-0.52) + 0.52, 0 - 0.2, 1 - 1.2, 4)):
        result = fake_quantise(values, step, LOW, HIGH)
        of_values, of_step = torch.autograd.grad(result, (values, step), each[i])
        assert of_step.item() == pytest.approx(expected, abs=1e-6)
        assert of_values[i] == (0 if i in (0, 4) else 1)  # straight through, inside alone


def test_the_step_follows_lsq_under_sgd_whatever_its_start() -> None:
    quantiser = Quantiser(torch.tensor([0.02]), 0, 15, per_channel=False)
    values = torch.rand(3, 50, generator=RANDOM)
    quantiser(values).square().sum().backward()
    assert quantiser.scale.grad is not None
    plain = torch.tensor([0.02], requires_grad=True)
    bounds = torch.tensor(0), torch.tensor(15)
    fake_quantise(values, plain, *bounds, 1 / np.sqrt(50 * 15)).square().sum().backward()
    assert plain.grad is not None
    # A step of SGD moves `start · scale` by as much as it moves LSQ's step.
    assert (0.02 * quantiser.scale.grad).item() == pytest.approx(plain.grad.item(), rel=1e-5)


def test_steps_of_weights_are_the_best_of_their_channel() -> None:
    weights = torch.randn(3, 40, generator=RANDOM) * torch.tensor([[0.01], [1.0], [0.0]])
    steps = first_weight_steps(weights, 1)
    for row, step in zip(weights[:2], steps, strict=False):
        finer = torch.linspace(0.02, 1, 2000) * row.abs().max()
        codes = (row / finer[:, None]).round().clamp(-1, 1) * finer[:, None]
        least = (codes - row).square().sum(1).min()
        own = ((row / step).round().clamp(-1, 1) * step - row).square().sum()
        assert own <= 1.02 * least  # of 40 candidates against 2000
    assert torch.isfinite(steps).all()
    assert (steps > 0).all()


@pytest.mark.parametrize("rule", ["mse", "percentile", "max"])
def test_ranges_hold_zero_exactly(rule: calibration.RangeRule) -> None:
    sample = InputSample()
    sample.add(torch.randn(20000, generator=RANDOM) - 1, torch.Generator())
    chosen = calibration.choose_range(sample, 256, rule)
    assert chosen.low <= 0 <= chosen.high
    assert chosen.high - chosen.low == 255
    if rule == "max":
        assert chosen.low * chosen.step == pytest.approx(sample.low, abs=chosen.step)
    positive = InputSample()
    positive.add(torch.rand(500, generator=RANDOM), torch.Generator())
    assert calibration.choose_range(positive, 16, rule).low == 0


def test_the_rule_decides_what_becomes_of_an_outlier() -> None:
    sample = InputSample()
    values = torch.cat([torch.rand(30000, generator=RANDOM), torch.tensor([100.0])])
    sample.add(values, torch.Generator())
    steps = {r: calibration.choose_range(sample, 256, r).step for r in ("max", "percentile")}
    assert steps["max"] == pytest.approx(100 / 255)
    assert steps["percentile"] == pytest.approx(1 / 255, rel=0.01)


def test_codes_of_weights_cannot_saturate_16_bits_unless_asked_for() -> None:
    assert 2 * 255 * BitWidths(8, 8).largest_weight_code < 2**15
    assert BitWidths(8, 8, full_range=True).largest_weight_code == 127
    assert BitWidths(4, 4).largest_weight_code == 7
    assert BitWidths(2, 2).largest_weight_code == 1


def test_sums_of_two_products_stay_below_16_bits_with_reduced_codes() -> None:
    """As CPUs without VNNI add: products of neighbours, in pairs, cut off at 16 bits."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(200, 256, (20, 64))  # large ones, as outliers make them
    for full_range, saturates in ((False, False), (True, True)):
        high = BitWidths(8, 8, full_range=full_range).largest_weight_code
        weights = rng.integers(high - 5, high + 1, 64)
        pairs = (inputs * weights).reshape(20, 32, 2).sum(2)
        cut = np.clip(pairs, -(2**15), 2**15 - 1).sum(1)
        assert np.array_equal(cut, inputs @ weights) != saturates


@pytest.mark.parametrize("text", ["", "w8", "8", "a8w8", "w9a8", "w1a8", "w8a16", "W8A8"])
def test_bits_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--quantize must be wNaM, .* from 2 to 8"):
        bit_widths.parse("--quantize", text)


def test_first_and_last_layer_have_eight_bits() -> None:
    layers = quantised_network.quantised_layers(quantised("w2a2"))
    bounds = [[q.codes for q in quantised_network.quantisers(m)] for m in layers.values()]
    assert bounds == [[(-63, 63), (0, 255)], [(-1, 1), (0, 3)], [(-63, 63), (bounds[2][1])]]
    assert bounds[2][1][1] - bounds[2][1][0] == 255


def test_every_weight_has_a_code_and_eight_bits_change_little() -> None:
    network, plain = quantised("w2a2"), small()
    layer = network[3]
    weight, _ = quantised_network.quantisers(layer)
    codes = layer.weight / weight.step.view(-1, 1, 1, 1)  # pyright: ignore
    assert set(codes.unique().tolist()) <= {-1.0, 0.0, 1.0}
    difference = (quantised("w8a8")(IMAGES) - plain(IMAGES)).abs().max()
    assert 0 < difference < 0.02 * (plain(IMAGES).max() - plain(IMAGES).min())


def test_a_copy_is_independent_and_float_copies_are_the_network_before() -> None:
    network, plain = quantised(), small()
    expected = network(IMAGES)
    other = copy.deepcopy(network)
    restored = quantised_network.float_copy(network)
    assert torch.equal(other(IMAGES), expected)
    assert torch.equal(restored(IMAGES), plain(IMAGES))
    assert restored.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(network(IMAGES), expected)  # the copies took nothing from it


def test_steps_and_codes_are_stored_and_put_back() -> None:
    network = quantised()
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name in quantised_network.step_names(network):
                value.mul_(1.3)
    restored = quantised_network.float_copy(network)
    quantised_network.attach_state(restored, quantised_network.quantiser_state(network))
    assert torch.equal(restored(IMAGES), network(IMAGES))


def test_steps_of_another_network_are_refused() -> None:
    state = quantised_network.quantiser_state(quantised())
    with pytest.raises(ValueError, match="no layer 3"):
        quantised_network.attach_state(nn.Sequential(nn.Conv2d(1, 4, 3)), state)
    state["3.weight.step"][0] = float("nan")
    with pytest.raises(ValueError, match="layer 3 do not fit"):
        quantised_network.attach_state(small(), state)


def test_a_weight_of_two_layers_has_one_quantiser() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    network = nn.Sequential(nn.Linear(8, 8), first, second, nn.Linear(8, 2))
    inputs = torch.rand(4, 8, generator=RANDOM)
    quantised_network.quantise(network, network, [inputs], BitWidths(4, 4))
    one, two = (quantised_network.quantisers(m)[0] for m in (network[1], network[2]))
    assert one is two
    assert len(list(network.parameters())) == 3 + 4 + 3 + 4  # weights, biases, steps of each
    plain = quantised_network.float_copy(network)
    assert plain[1].weight is plain[2].weight  # pyright: ignore


def test_networks_without_such_layers_are_refused() -> None:
    network = nn.Sequential(nn.Flatten(), nn.ReLU())
    with pytest.raises(UserError, match="only these can be quantised"):
        quantised_network.quantise(network, network, [IMAGES], BitWidths(8, 8))


def test_the_average_is_of_the_weights_and_not_of_their_codes() -> None:
    from kd.recipe import Recipe

    network = quantised("w2a2")
    average = WeightAverage(network, Recipe(steps=4, ema=0.5, ema_ramp=1e9), 4)
    with torch.no_grad():
        network[3].parametrizations.weight.original.add_(0.01)  # pyright: ignore
    average.update(network, 1)
    mean = quantised_network.trained_weight(average.network[3])  # pyright: ignore
    expected = small()[3].weight + 0.005  # pyright: ignore
    assert torch.allclose(mean, expected, atol=1e-6)


def test_folding_a_batch_norm_commutes_with_rounding() -> None:
    network = small()
    norm = network[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.5, -0.7, 0.2, -3.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
        norm.running_mean.copy_(torch.tensor([0.5, -0.1, 0.0, 1.0]))  # pyright: ignore
        norm.running_var.copy_(torch.tensor([2.0, 0.3, 1.0, 0.5]))  # pyright: ignore
    assert batch_norm_folding.find_pairs(network, IMAGES[:2]) == {"0": "1"}
    affine = batch_norm_folding.affine(norm)
    outputs = network[0](IMAGES)
    shape = 1, -1, 1, 1
    folded = outputs * affine.factor.view(shape) + affine.shift.view(shape)
    assert torch.allclose(folded, norm(outputs), atol=1e-6)


def test_a_convolution_that_something_else_reads_too_is_not_folded() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            outputs = self.conv(images)
            return outputs + self.norm(outputs)

    assert batch_norm_folding.find_pairs(Branch().eval(), IMAGES[:2]) == {}
