"""The networks that the evaluation protocol trains, and how it trains them."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import kd_support as support
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, PartialState

from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluation.protocol import Augmentable, Learner, Tunable
from kd import recipes
from kd.evaluation import learners
from kd.evaluation.learners import NetworkLearner, network_learner
from kd.models import networks
from kd.models.networks import Shape

SHAPES: tuple[Shape, ...] = ((8, 8, 1), (28, 28, 1), (32, 32, 3))
EASY = support.easy()


def _kip(shape: Shape, w: int) -> int:
    h, side, c = shape
    readout = w * (h // 8) * (side // 8) * 10 + 10
    return 9 * c * w + w + 3 * (9 * w * w + w) + readout


def _resnet18(shape: Shape, w: int) -> int:
    """Every convolution is followed by a scale and a shift; the first stage has no projection."""
    count, before = 9 * shape[2] * w + 2 * w, w
    for stage in (w, 2 * w, 4 * w, 8 * w):
        count += 9 * before * stage + 3 * 9 * stage * stage + 4 * 2 * stage
        count += (before * stage + 2 * stage) * (before != stage)
        before = stage
    return count + 8 * w * 10 + 10


def _vgg11(shape: Shape, w: int) -> int:
    widths = (shape[2], w, 2 * w, 4 * w, 4 * w, 8 * w, 8 * w, 8 * w, 8 * w)
    layers = sum(9 * a * b + 3 * b for a, b in pairwise(widths))
    return layers + 8 * w * 10 + 10


def _vit(shape: Shape, w: int) -> int:
    patch = math.ceil(shape[0] / 8)
    embedding = patch**2 * shape[2] * w + w + math.ceil(shape[0] / patch) ** 2 * w
    block = 2 * 2 * w + (3 * w * w + 3 * w) + (w * w + w) + (2 * 4 * w * w + 5 * w)
    return embedding + 6 * block + 2 * w + w * 10 + 10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("name", "count", "width"),
    [
        ("kip-convnet", _kip, 8),
        ("small-resnet18", _resnet18, 4),
        ("small-vgg11", _vgg11, 4),
        ("small-vit", _vit, 12),
    ],
)
def test_networks_on_small_images(name, count, width, shape) -> None:
    h, w, c = shape
    classifier = networks.build(f"{name}:{width}", shape, 10)
    assert networks.parameter_count(classifier) == count(shape, width)
    outputs = classifier(torch.randn(3, c, h, w))
    assert outputs.shape == (3, 10)
    outputs.square().mean().backward()
    assert all(p.grad is not None for p in classifier.parameters())


def test_networks_of_the_usual_width() -> None:
    # The counts that published code of these networks for CIFAR-10 prints.
    assert networks.parameter_count(networks.build("small-resnet18", (32, 32, 3), 10)) == 11_173_962
    assert networks.parameter_count(networks.build("small-vgg11", (32, 32, 3), 10)) == 9_231_114
    assert _kip((28, 28, 1), 1024) == networks.parameter_count(
        networks.build("kip-convnet", (28, 28, 1), 10)
    )


@pytest.mark.parametrize(("side", "last"), [(8, 1), (28, 4), (32, 4), (64, 8)])
def test_resnet18_keeps_the_resolution_of_small_images(side, last) -> None:
    network = networks.build("small-resnet18:4", (side, side, 1), 10).network
    features = network.forward_features(torch.zeros(2, 1, side, side))  # pyright: ignore[reportCallIssue]
    assert features.shape == (2, 32, last, last)


@pytest.mark.parametrize(("side", "poolings"), [(8, 3), (16, 4), (28, 4), (32, 5), (64, 5)])
def test_vgg11_pools_as_long_as_there_is_something_to_pool(side, poolings) -> None:
    modules = list(networks.build("small-vgg11:4", (side, side, 1), 10).modules())
    assert sum(isinstance(m, torch.nn.MaxPool2d) for m in modules) == poolings


def test_vit_fills_its_last_patches_with_zeros() -> None:
    part, whole = (networks.build("small-vit:12", (s, 32, 1), 10).eval() for s in (30, 32))
    images = torch.randn(2, 1, 30, 32)
    assert torch.equal(part(images), whole(F.pad(images, [0, 0, 0, 2])))


def test_what_the_networks_refuse() -> None:
    with pytest.raises(UserError, match=r"kip-convnet .* at least 8x8 pixels, got 7x8"):
        networks.build("kip-convnet:4", (7, 8, 1), 10)
    with pytest.raises(UserError, match="multiple of 3, got 16"):
        network_learner("vit:16")
    with pytest.raises(UserError, match="positive whole number"):
        network_learner("resnet18:0")


def _nngp(image: np.ndarray) -> float:
    """Output variance of the infinite KIP ConvNet, by covariances of all pairs of pixels."""

    def convolved(k: np.ndarray) -> np.ndarray:
        h, w = k.shape[:2]
        padded = np.pad(k, 1)
        near = [
            padded[i : i + h, j : j + w, i : i + h, j : j + w] for i in range(3) for j in range(3)
        ]
        return 2 / 9 * np.sum(near, axis=0) + 0.01

    def rectified(k: np.ndarray) -> np.ndarray:
        std = np.sqrt(np.einsum("ijij->ij", k))
        scale = std[:, :, None, None] * std
        angle = np.arccos(np.clip(k / scale, -1, 1))
        return scale * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)

    def pooled(k: np.ndarray) -> np.ndarray:
        h, w = k.shape[0] // 2, k.shape[1] // 2
        return k.reshape(h, 2, w, 2, h, 2, w, 2).mean((1, 3, 5, 7))

    k = rectified(convolved(np.einsum("ijc,klc->ijkl", image, image) / image.shape[-1]))
    for _ in range(3):
        k = pooled(rectified(convolved(k)))
    return 2 * np.einsum("ijij->ij", k).mean() + 0.01


def test_kip_convnet_starts_as_its_infinite_network() -> None:
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
    expected = [_nngp(image) for image in images]
    nchw = torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.no_grad():
        drawn = [networks.build("kip-convnet:128", (8, 8, 3), 300, seed=s)(nchw) for s in range(60)]
    # The variance of one network deviates by 22 %, so their mean by 3 %.
    assert torch.stack(drawn).var(2).mean(0).tolist() == pytest.approx(expected, rel=0.1)


def test_a_network_meets_the_protocol() -> None:
    found = network_learner("mlp:16")
    assert all(isinstance(found, kind) for kind in (Tunable, Augmentable))
    tuned: Learner = found.with_rate(0.1)
    assert (tuned.name, tuned.limit) == ("mlp:16", None)


def test_a_network_on_a_gpu_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    found = network_learner("mlp:16")
    assert found.accelerator is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the GPU of {device}")
    assert replace(found, device="cuda:1").accelerator == "the GPU of cuda:1"


def test_rates() -> None:
    found = network_learner("mlp:16")
    lr = recipes.SMALL.lr
    assert found.rates == pytest.approx((lr / 3, lr, 3 * lr))
    assert found.with_rate(0.1).recipe == replace(recipes.SMALL, lr=0.1)
    assert found.with_rate(0.1).rates == (0.1,)


def test_uncentred_kip_convnet_has_its_papers_recipe() -> None:
    names = "uncentred:kip-convnet", "uncentred:kip-convnet:64"
    wide, narrow = map(network_learner, names)
    recipe = wide.recipe
    assert (recipe.optimizer, recipe.momentum, recipe.batch_size) == ("momentum", 0.9, 100)
    assert (recipe.steps, recipe.schedule, recipe.final, recipe.warmup) == (5000, "cosine", 0, 0)
    assert recipe.decay_all
    assert recipe.augment == "none"
    # Theirs of 0.001 is of a loss that is a tenth of ours.
    assert recipe.weight_decay == 10 * 0.001
    # Their largest stable rate on CIFAR-10, of the same loss, is inside.
    assert min(wide.rates) < 0.006775 / 10 < max(wide.rates)
    assert max(wide.rates) / min(wide.rates) == pytest.approx(100)
    assert narrow.rates == pytest.approx([16 * rate for rate in wide.rates])


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("convnet", recipes.SMALL),
        ("resnet18:8", recipes.SMALL),
        ("vgg11:8", recipes.SMALL),
        ("vit:12", recipes.SMALL_LAYER_NORM),
        ("timm:test_vit", recipes.SMALL_LAYER_NORM),
        ("timm:test_resnet", recipes.SMALL),
    ],
)
def test_networks_with_layer_norm_have_their_own_recipe(name, base) -> None:
    assert network_learner(name).recipe == base


def test_steps_keep_the_shares_of_a_recipe() -> None:
    recipe = network_learner("mlp", steps=60).recipe
    assert (recipe.steps, recipe.warmup) == (60, recipes.SMALL.warmup / 5)
    with pytest.raises(UserError, match="--steps must be at least 1"):
        network_learner("mlp", steps=0)


def test_aliases() -> None:
    found = network_learner("resnet18:8", steps=2)
    assert found.name == "resnet18:8"
    trained = found(EASY, EASY, 0)
    assert networks.parameter_count(trained.network) == networks.parameter_count(
        networks.build("small-resnet18:8", (8, 8, 1), 4)
    )
    built_in = {"convnet", "mlp", "kip-convnet", "kip-fc"}
    assert built_in | {"resnet18", "vgg11", "vit"} == set(learners.names())


def test_no_global_setting_is_left_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    states = AcceleratorState._shared_state, PartialState._shared_state
    before = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        network_learner("mlp:8", steps=1)(EASY, EASY, 0)(EASY.images())
        assert not any(states)
    finally:
        for state, values in zip(states, before, strict=True):
            state.update(values)
    assert not torch.backends.cudnn.deterministic


def test_the_seed_decides_the_predictions() -> None:
    # Not resnet18:4: in torch, the gradient of its 1x1 convolutions of 4 channels is not the same.
    for name in ("mlp:8", "resnet18:8", "vgg11:4", "vit:12", "kip-convnet:4"):
        found = network_learner(name, steps=3).with_augmentation()
        a, b, c = (found(EASY, EASY, seed)(EASY.images()) for seed in (1, 1, 2))
        assert a.shape == (40, 4)
        assert np.array_equal(a, b), name
        assert not np.array_equal(a, c), name


def test_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    augment_batches = learners.augment.augment_batches

    def spy(source, recipe, classes):
        seen.append((recipe.augment, recipe.crop_padding, recipe.hflip))
        return augment_batches(source, recipe, classes)

    monkeypatch.setattr(learners.augment, "augment_batches", spy)
    plain = network_learner("mlp:8", steps=3)
    augmented = plain.with_augmentation()
    assert augmented.name == plain.name
    a, b = (network(EASY, EASY, 0)(EASY.images()) for network in (plain, augmented))
    assert not np.array_equal(a, b)
    large = support.easy(size=28)
    augmented(large, large, 0)
    network_learner("mlp:8", steps=3, flip=True).with_augmentation()(EASY, EASY, 0)
    assert [kind for kind, *_ in seen] == ["none", *["crop-flip"] * 3]
    assert [options for _, *options in seen[1:]] == [[1, 0.0], [3, 0.0], [1, 0.5]]


@pytest.mark.parametrize("name", ["kip-convnet:4", "uncentred:kip-convnet:4", "convnet:4"])
def test_a_loss_that_overflows_is_an_error(name) -> None:
    with pytest.raises(UserError, match=r"loss term 'mse' is (nan|inf)"):
        network_learner(name, steps=20).with_rate(1e30)(EASY, EASY, 0)


def test_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def latency(network, shape):
        calls.append(shape)
        return {"latency_ms_batch_1": 0.5, "latency_ms_batch_64": 2.0}

    monkeypatch.setattr(learners.scoring, "latency", latency)
    found = network_learner("mlp:17", steps=150)
    first, second = (found(EASY, EASY, seed) for seed in (0, 1))
    assert not calls  # measured when asked for
    facts = json.loads(json.dumps(first.facts))
    assert facts == first.facts
    assert facts["latency_ms"] == second.facts["latency_ms"] == {"1": 0.5, "64": 2.0}
    assert calls == [(8, 8, 1)]
    weights = 64 * 17 + 17 * 17 + 17 * 4
    assert facts["parameters"] == weights + 17 + 17 + 4
    assert facts["flops"] == 2 * weights
    steps, losses = zip(*facts["curve"], strict=True)
    assert len(steps) == learners.CURVE_POINTS
    assert list(steps) == sorted(set(steps))
    assert steps[-1] == 150
    assert losses[-1] < losses[0]


def test_flops_of_attention_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {"latency_ms_batch_1": 0.0, "latency_ms_batch_64": 0.0}
    monkeypatch.setattr(learners.scoring, "latency", lambda network, shape: nothing)
    w, tokens = 15, 64
    block = tokens * (3 * w * w + w * w + 8 * w * w) + 2 * tokens * tokens * w
    products = tokens * w + 6 * block + w * 4
    assert network_learner(f"vit:{w}", steps=1)(EASY, EASY, 0).facts["flops"] == 2 * products


def test_latency_is_measured() -> None:
    found = network_learner("mlp:4", steps=1)(EASY, EASY, 0).facts["latency_ms"]
    assert set(found) == {"1", "64"}
    assert all(0 < value < 1000 for value in found.values())


def test_the_curve_begins_with_the_loss_of_the_fresh_network() -> None:
    first = network_learner("mlp:8", steps=2)(EASY, EASY, 5).curve[0]
    fresh = networks.build("mlp:8", (8, 8, 1), 4, seed=5)
    with torch.no_grad():
        outputs = fresh(torch.from_numpy(EASY.images().transpose(0, 3, 1, 2))).numpy()
    loss = 0.5 * ((outputs - EASY.labels()) ** 2).sum(1).mean()  # one batch holds all images
    assert first == (1, pytest.approx(loss, rel=1e-5))


def test_identity() -> None:
    found = network_learner("mlp:8", steps=5)
    others = [
        network_learner("mlp:9", steps=5),
        network_learner("mlp:8", steps=6),
        network_learner("mlp:8", steps=5, flip=True),
        found.with_rate(0.5),
        found.with_augmentation(),
    ]
    texts = [json.dumps(each.identity, sort_keys=True) for each in (found, *others)]
    assert len(set(texts)) == len(texts)
    same = NetworkLearner("mlp:8", replace(found.recipe))
    assert same.identity == found.identity
    found(EASY, EASY, 3)
    assert json.dumps(found.identity, sort_keys=True) == texts[0]


def test_weights_from_a_file_have_no_identity() -> None:
    """The file may change under its name, and results of the old one must not be taken."""
    assert NetworkLearner("convnet@weights.pt").identity is None
    assert NetworkLearner("convnet").identity is not None
