"""Accuracy under attack: exact for linear classifiers, and in the order that theory demands."""

import importlib.util

import numpy as np
import pytest
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from dsdistill.harness.data.preprocess import Preprocess
from dsdistill.harness.errors import UserError
from kd.attack import AutoAttack, Pgd
from kd.data import batching
from kd.data.batching import ResidentBatches
from kd.evaluation import robustness
from kd.parallel import engine

CLASSES = 5
FITTED = Preprocess("standardise", np.array([0.4], np.float32), np.array([0.25], np.float32))
ENSEMBLE = pytest.mark.skipif(
    importlib.util.find_spec("pyautoattack") is None, reason="needs the extra `robust`"
)


def linear(classes: int = CLASSES) -> nn.Sequential:
    """A linear classifier of preprocessed 4x4 images, with a bias."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, classes))


def data(network: nn.Module, n: int = 40, wrong: int = 5) -> ResidentBatches:
    """Images that a network gets right, but for every eighth."""
    images = np.random.default_rng(0).random((n, 4, 4, 1), np.float32)
    with torch.no_grad():
        inputs = torch.from_numpy(FITTED.apply(images)).permute(0, 3, 1, 2)
        scores = network(inputs)
    labels, classes = scores.argmax(1).numpy(), scores.shape[1]
    labels[:: n // wrong] = (labels[:: n // wrong] + 1) % classes
    names = tuple(map(str, range(classes)))
    examples = Examples(LabeledImages(images, labels, names), FITTED)
    return batching.prepare_resident(examples, 16, torch.device("cpu"))


def exactly(network: nn.Sequential, batches: ResidentBatches, eps: float) -> Bool[np.ndarray, " n"]:
    """Which images no change of at most eps makes wrong, by the margin to each other class.

    Of the margin (w_y - w_k) x + b_y - b_k the smallest value in the ball, cut at [0, 1], is at
    x - eps sign(w_y - w_k): in NumPy, in float64.
    """
    head = network[1]
    assert isinstance(head, nn.Linear)
    weight, bias = (x.detach().double().numpy() for x in (head.weight, head.bias))
    weight, bias = weight / 0.25, bias - weight.sum(1) * 0.4 / 0.25  # of pixels
    pixels = batches.examples.data.images().reshape(-1, 16).astype(np.float64)
    labels, safe = batches.labels.numpy(), np.ones(len(batches.labels), bool)
    for k in range(head.out_features):
        direction = weight[labels] - weight[k]
        worst = np.clip(pixels - eps * np.sign(direction), 0, 1)
        margin = (worst * direction).sum(1) + bias[labels] - bias[k]
        safe &= (margin > 0) | (labels == k)
    return safe


def test_pgd_finds_exactly_those_of_two_classes() -> None:
    network = linear(2)
    batches = data(network)
    measured = robustness.measure(network, batches, [Pgd(0.02, 20), Pgd(0.01, 20)], FITTED)
    safe, safer = (exactly(network, batches, eps).mean() for eps in (0.02, 0.01))
    assert measured.images == 40
    assert measured.clean == 35 / 40
    assert list(measured.attacks.values()) == [safe, safer]
    assert 0 < safe < safer < measured.clean
    assert measured.accuracy == safe


@ENSEMBLE
def test_autoattack_is_no_weaker_than_pgd_nor_pgd_than_none() -> None:
    """Of several classes the gradient of the cross-entropy is no exact direction."""
    network = linear()
    batches = data(network)
    measured = robustness.measure(network, batches, [Pgd(0.02, 20), AutoAttack(0.02)], FITTED)
    pgd, ensemble = measured.attacks.values()
    assert exactly(network, batches, 0.02).mean() == ensemble == measured.accuracy
    assert ensemble < pgd < measured.clean


def test_nothing_is_right_where_every_image_can_become_any_other() -> None:
    network = linear()
    measured = robustness.measure(network, data(network), [Pgd(1.0, 20)], FITTED)
    assert measured.accuracy == 0


def test_an_attack_that_changes_next_to_nothing_leaves_what_is_right() -> None:
    network = linear()
    measured = robustness.measure(network, data(network), [Pgd(1e-6, 2)], FITTED)
    assert measured.accuracy == measured.clean


def test_the_images_are_spread_over_the_data() -> None:
    network, seen = linear(), []
    batches = data(network)
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    measured = robustness.measure(
        network, batches, [Pgd(0.01, 1, images=10), Pgd(0.02, 1, images=7)], FITTED
    )
    assert measured.images == 7
    rows = [int((batches.images == image).flatten(1).all(1).nonzero()) for image in seen[0]]
    assert rows == [i * 40 // 7 for i in range(7)]


def test_groups_of_images_may_be_smaller_or_larger_than_batches(monkeypatch) -> None:
    network = linear()
    batches = data(network)
    whole = robustness.measure(network, batches, [Pgd(0.02, 20)], FITTED)
    for group in (3, 16, 25):
        monkeypatch.setattr(robustness, "GROUP", group)
        assert robustness.measure(network, batches, [Pgd(0.02, 20)], FITTED) == whole


def test_the_accuracy_that_chooses_an_epoch_is_that_of_all_images() -> None:
    network = linear()
    batches = data(network)
    on = engine.make("cpu")
    accuracy = robustness.validation_accuracy(network, batches, Pgd(0.02, 20), FITTED, on)
    measured = robustness.measure(network, batches, [Pgd(0.02, 20)], FITTED)
    assert accuracy == measured.accuracy


class _Scaled(nn.Module):
    """Outputs so large that the softmax of float32 has no gradient where the answer is right."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return 1e4 * self.network(images)


def test_the_temperature_of_the_outputs_counts() -> None:
    """Without it a scale would hide the gradient, and pass for robustness."""
    network = linear()
    batches = data(network)
    plain = robustness.measure(network, batches, [Pgd(0.02, 20)], FITTED)
    scaled = _Scaled(network)
    masked = robustness.measure(scaled, batches, [Pgd(0.02, 20)], FITTED)
    assert masked.accuracy > plain.accuracy
    told = robustness.measure(scaled, batches, [Pgd(0.02, 20)], FITTED, temperature=1e4)
    assert told.accuracy == plain.accuracy


def test_what_cannot_be_attacked_is_refused(monkeypatch) -> None:
    zca = Preprocess("zca", FITTED.mean, FITTED.std, np.eye(16), np.eye(16))
    with pytest.raises(UserError, match="the preprocessing zca mixes them"):
        robustness.check([Pgd()], zca, 10)
    if importlib.util.find_spec("pyautoattack"):
        with pytest.raises(UserError, match="needs 4 classes or more, and the data have 3"):
            robustness.check([AutoAttack()], FITTED, 3)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dsdistill\[robust\]'"):
        robustness.check([AutoAttack()], FITTED, 10)
