"""Images made from a network alone: the terms, both methods, and that steps can be resumed."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import kd
from dsdistill.harness.errors import UserError
from kd.synthesis import making, plausibility, settings
from kd.synthesis.plausibility import KnownNetwork

MEAN, VARIANCE = torch.tensor([0.5, -1.0]), torch.tensor([0.04, 0.25])
CPU = torch.device("cpu")


def _network() -> nn.Module:
    """Knows the mean and variance of pixels, and tells classes by which half is brighter."""
    norm = nn.BatchNorm2d(2)
    norm.running_mean, norm.running_var = MEAN.clone(), VARIANCE.clone()
    last = nn.Linear(32, 2)
    with torch.no_grad():
        last.weight.copy_(torch.tensor([[1.0] * 16 + [-1.0] * 16, [-1.0] * 16 + [1.0] * 16]) / 8)
        last.bias.zero_()
    return nn.Sequential(norm, nn.Flatten(), last).eval()


def _known(bounds: tuple[float, float] | None = None) -> KnownNetwork:
    ends = None
    if bounds is not None:
        ends = torch.full((2, 1, 1), bounds[0]), torch.full((2, 1, 1), bounds[1])
    return KnownNetwork(_network(), (4, 4, 2), 2, bounds=ends)


def _settings(method: settings.Method, **given: float) -> settings.SynthesisSettings:
    small = {"steps": 8, "batch_size": 8} | ({"width": 4} if method == "generator" else {})
    chosen = settings.resolve(method, 20, small | given)
    return settings.fit(chosen, who="net", classes=2, has_batch_norm=True)


def test_the_distance_of_statistics_by_numpy() -> None:
    images = torch.randn(5, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    x = images.double().numpy()
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), ddof=1)
    expected = np.linalg.norm(mean - MEAN.numpy()) + np.linalg.norm(variance - VARIANCE.numpy())
    network = nn.Sequential(next(_network().children()), nn.Flatten())
    with plausibility.measure_statistics(network) as distances:
        network(images)
    assert [float(distance) for distance in distances] == [pytest.approx(expected, rel=1e-5)]
    network(images)
    assert len(distances) == 1  # no hook is left


def test_batch_norm_without_statistics_does_not_count() -> None:
    assert not plausibility.batch_norm_layers(nn.BatchNorm2d(3, track_running_stats=False))
    assert not plausibility.batch_norm_layers(nn.GroupNorm(1, 3))
    assert len(plausibility.batch_norm_layers(nn.Sequential(nn.BatchNorm1d(3)))) == 1


def test_total_variation_by_numpy() -> None:
    images = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    x = images.double().numpy()
    expected = (
        np.linalg.norm(x[..., 1:] - x[..., :-1])
        + np.linalg.norm(x[..., 1:, :] - x[..., :-1, :])
        + np.linalg.norm(x[..., 1:, 1:] - x[..., :-1, :-1])
        + np.linalg.norm(x[..., :-1, 1:] - x[..., 1:, :-1])
    )
    assert float(plausibility.total_variation(images)) == pytest.approx(expected, rel=1e-5)
    assert float(plausibility.total_variation(torch.ones(2, 3, 5, 4))) == 0


def test_the_balance_is_least_where_classes_are_even() -> None:
    even = plausibility.class_balance(100 * torch.eye(4))
    assert float(even) == pytest.approx(-math.log(4))
    assert float(plausibility.class_balance(100 * torch.eye(4)[[2, 2]])) == pytest.approx(0)


@pytest.mark.heavy  # seconds, on one core
@pytest.mark.parametrize("method", settings.METHODS)
def test_images_have_the_classes_and_the_statistics_that_the_network_knows(method) -> None:
    numbers = _settings(method, steps=60, batch_size=20, lr=0.1, bn_weight=3.0)
    known = _known()
    synthesis = making.begin(known, numbers, 0, CPU)
    making.run(synthesis, lambda done, loss: None)
    images = synthesis.images()
    judgement = making.judge(known, images, numbers, CPU)
    assert judgement.statistics_distance is not None
    assert judgement.statistics_distance < 0.15
    assert judgement.confidence > 0.9
    counts = np.bincount(judgement.classes, minlength=2)
    assert counts.min() >= 5
    if method == "inversion":
        assert judgement.classes.tolist() == [0, 1] * 10
        np.testing.assert_allclose(images.mean((0, 2, 3)), MEAN, atol=0.1)
        np.testing.assert_allclose(images.var((0, 2, 3)), VARIANCE, atol=0.1)


@pytest.mark.parametrize("method", settings.METHODS)
def test_pixels_stay_between_black_and_white(method) -> None:
    synthesis = making.begin(_known((-0.2, 0.3)), _settings(method), 0, CPU)
    making.run(synthesis, lambda done, loss: None)
    images = synthesis.images()
    assert images.min() >= -0.2
    assert images.max() <= 0.3
    assert images.std() > 0.01


@pytest.mark.parametrize("method", settings.METHODS)
@pytest.mark.parametrize("stop", [1, 5, 8])
def test_resumed_steps_end_in_the_same_bits(method, stop: int) -> None:
    numbers = _settings(method)
    whole = making.begin(_known(), numbers, 3, CPU)
    states = {}

    def keep(done: int, loss: float) -> None:
        if done == stop:
            states.update({name: array.copy() for name, array in whole.pack().items()})

    making.run(whole, keep)
    resumed = making.begin(_known(), numbers, 3, CPU)
    resumed.restore(states)
    making.run(resumed, lambda done, loss: None, stop)
    assert torch.equal(whole.images(), resumed.images())
    other = making.begin(_known(), numbers, 4, CPU)
    making.run(other, lambda done, loss: None)
    assert not torch.equal(whole.images(), other.images())


def test_a_generator_keeps_every_image_once_in_the_second_half() -> None:
    from kd.synthesis import generator

    kept = generator._schedule(settings.resolve("generator", 100, {"steps": 21, "batch_size": 16}))
    assert [rows.start for rows in kept.values()] == [0, *(r.stop for r in kept.values())][:-1]
    assert max(rows.stop - rows.start for rows in kept.values()) <= 16
    assert min(kept) >= 10
    assert max(kept) == 20
    assert list(kept.values())[-1].stop == 100


def test_a_loss_that_is_not_finite_is_refused() -> None:
    synthesis = making.begin(_known(), _settings("inversion", lr=1e20), 0, CPU)
    with pytest.raises(UserError, match=r"the loss is not finite at step \d+: use a smaller --lr"):
        making.run(synthesis, lambda done, loss: None)


@pytest.mark.parametrize(
    ("method", "images", "given", "line"),
    [
        ("generator", 9, {"tv_weight": 1.0}, "--tv-weight is for --method inversion"),
        ("inversion", 9, {"width": 8}, "--width is for --method generator"),
        ("inversion", 9, {"balance_weight": 0.0}, "--balance-weight is for --method generator"),
        ("inversion", 1, {}, "--images must be at least 2, got 1"),
        ("inversion", 9, {"steps": 0}, "--steps must be at least 1, got 0"),
        ("inversion", 9, {"batch_size": 1}, "--batch-size must be at least 2"),
        ("inversion", 9, {"lr": 0.0}, "--lr must be positive, got 0.0"),
        ("inversion", 9, {"lr": math.nan}, "--lr must be positive, got nan"),
        ("inversion", 9, {"bn_weight": -1.0}, "--bn-weight must be 0 or more, got -1.0"),
        ("generator", 99, {"steps": 5, "batch_size": 20}, "need --steps 10 or more, got 5"),
        ("dream", 9, {}, "--method must be inversion or generator, got dream"),
    ],
)
def test_numbers_out_of_range_are_refused(method, images: int, given: dict, line: str) -> None:
    with pytest.raises(UserError, match=line):
        settings.resolve(method, images, given)


def test_what_a_network_cannot_give_is_refused() -> None:

    def fit(numbers: settings.SynthesisSettings, classes: int = 3, norm: bool = False):
        return settings.fit(numbers, who="the net", classes=classes, has_batch_norm=norm)

    inversion, generator = (settings.resolve(method, 9, {}) for method in settings.METHODS)
    with pytest.raises(UserError, match=r"the net has no batch norm layers, .* add --bn-weight 0"):
        fit(inversion)
    without = settings.resolve("inversion", 9, {"bn_weight": 0.0})
    assert fit(without).bn_weight == 0
    assert fit(generator).bn_weight == 0
    assert fit(generator, norm=True).bn_weight == 1
    with pytest.raises(UserError, match="the net has no batch norm layers"):
        fit(settings.resolve("generator", 9, {"bn_weight": 2.0}))
    with pytest.raises(UserError, match="--images must be at least 10, one for each class"):
        fit(generator, classes=10)


def test_the_library_gives_the_network_back_as_it_was() -> None:
    network = _network().train()
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    given = {"images": 20, "steps": 5, "low": -2.0, "high": [1.0, 2.0], "device": "cpu"}
    made = kd.synthesize(network, (2, 4, 4), progress=False, **given)
    assert torch.equal(torch.randn(3), expected)
    assert network.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())
    assert made.images.shape == (20, 2, 4, 4)
    assert made.images[:, 0].max() <= 1
    assert torch.equal(made.labels, made.probabilities.argmax(1))
    probabilities = made.probabilities.double().mean(0)
    entropy = float(-(probabilities * probabilities.log()).sum())
    assert made.mean_answer_entropy == pytest.approx(entropy, rel=1e-5)
    again = kd.synthesize(network.eval(), (2, 4, 4), progress=False, **given)
    assert torch.equal(made.images, again.images)
    assert sum(len(labels) for _, labels in made.batches(8)) == 20


@pytest.mark.parametrize(
    ("shape", "given", "line"),
    [
        ((2, 4, 4), {"low": 0.0}, "high must be a number, or one for each of 2 channels"),
        ((2, 4, 4), {"low": 1.0, "high": 0.0}, "low must be below high, got 1.0 and 0.0"),
        ((2, 4, 4), {"width": 4}, 'width is for method="generator"'),
        ((2, 4, 4), {"seed": -1}, "seed must be a whole number of 0 or more, got -1"),
        ((3, 4, 4), {}, r"teacher cannot take images \(2, 3, 4, 4\)"),
    ],
)
def test_the_library_refuses_in_its_own_words(shape, given: dict, line: str) -> None:
    with pytest.raises(UserError, match=line):
        kd.synthesize(_network(), shape, device="cpu", progress=False, **given)
    with pytest.raises(UserError, match=r"teacher has no batch norm .*: give bn_weight=0, with"):
        kd.synthesize(nn.Flatten(), (1, 2, 2), device="cpu", progress=False)
