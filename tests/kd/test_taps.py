"""Taps read what the layers gave, whatever wraps, copies or compiles the network."""

import copy
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.multiprocessing.spawn import spawn

from dsdistill.harness.errors import UserError
from kd.models import networks
from kd.objectives.taps import FeatureLayout, Taps, as_map, as_tokens, as_vector, probe

IMAGE = (32, 32, 3)


def _images(n: int = 2, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def _convnet() -> Any:
    return networks.build("convnet:8", IMAGE, 4).network


def _resnet() -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=4)


def _beit() -> nn.Module:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
    }
    return timm.create_model("beit_base_patch16_224", num_classes=4, **small)


def _swin() -> nn.Module:
    torch.manual_seed(0)
    small: dict[str, Any] = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12}
    name = "swin_tiny_patch4_window7_224"
    return timm.create_model(name, num_classes=4, depths=(1, 1), num_heads=(2, 2), **small)


class Reused(nn.Module):
    """Runs one layer twice, another never, and works in place on the output of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.scaled = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.pair = Pair()
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(x))
        x = self.scaled(x)
        x *= 0
        return self.head(self.pair(x)["states"][0])


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, object]:
        return {"states": (x + 1, x + 2), "none": None}


def test_features_are_those_of_the_layers_in_the_order_asked_for() -> None:
    network, x = _resnet().eval(), _images()
    taps = Taps(network, ["layer2", "conv1", "layer2"])
    network(x)
    features = taps.read()
    assert list(features) == ["layer2", "conv1"]
    stem = network.conv1(x)
    torch.testing.assert_close(features["conv1"], stem, rtol=0, atol=0)
    deep = network.layer2(network.layer1(network.maxpool(network.act1(network.bn1(stem)))))
    torch.testing.assert_close(features["layer2"], deep, rtol=0, atol=0)


@pytest.mark.parametrize("make", [_convnet, _resnet, _beit, _swin])
def test_the_embedding_is_what_the_classifier_is_applied_to(make) -> None:
    network = make().eval()
    taps = Taps(network, ["embedding"])
    logits = network(_images())
    embedding = taps.read()["embedding"]
    assert embedding.ndim == 2
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    torch.testing.assert_close(last(embedding), logits)


def test_the_embedding_of_a_fully_convolutional_network_is_a_map() -> None:
    network = torchvision.models.squeezenet1_1(num_classes=4).eval()
    taps = Taps(network, ["embedding"])
    assert probe(network, taps, (64, 64, 3))["embedding"] == FeatureLayout(
        "embedding", "nchw", 512, (3, 3)
    )
    with pytest.raises(UserError, match=r"ReLU has no linear layer, so no 'embedding'"):
        Taps(nn.ReLU(), ["embedding"])


def test_an_unknown_layer_is_refused_with_the_nearest_names() -> None:
    expected = r"^unknown layer 'layr2' of ResNet: the nearest of its \d+ are layer2, "
    with pytest.raises(UserError, match=expected) as caught:
        Taps(_resnet(), ["layr2"])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="embedding"):
        Taps(_resnet(), ["embeding"])
    with pytest.raises(UserError, match="unknown layer ''"):  # the network itself is no layer
        Taps(_resnet(), [""])


def test_a_layer_that_does_not_run_is_an_error_and_not_a_loss_of_zero() -> None:
    network = Reused()
    taps = Taps(network, ["scaled", "never"])
    network(torch.ones(1, 4))
    with pytest.raises(UserError, match="layer 'never' did not run"):
        taps.read()


def test_features_are_read_once() -> None:
    network = _convnet()
    taps = Taps(network, ["3"])
    network(_images())
    taps.read()
    with pytest.raises(AssertionError, match="has not run since"):
        taps.read()


def test_features_of_an_earlier_pass_are_not_taken_for_those_of_the_last() -> None:
    # The second pass leaves layer "1" out: what it gave in the first must not come back.
    class Sometimes(nn.Sequential):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self[1](self[0](input)) if len(input) > 1 else self[0](input)

    network = Sometimes(nn.Linear(2, 2), nn.Linear(2, 2))
    taps = Taps(network, ["1"])
    network(torch.ones(2, 2))
    network(torch.ones(1, 2))
    with pytest.raises(UserError, match="layer '1' did not run"):
        taps.read()


def test_the_last_of_several_runs_and_the_first_of_several_outputs_count() -> None:
    network, x = Reused(), torch.ones(1, 4)
    taps = Taps(network, ["twice", "pair"])
    network(x)
    features = taps.read()
    torch.testing.assert_close(features["twice"], network.twice(network.twice(x)))
    torch.testing.assert_close(features["pair"], torch.ones(1, 4))  # 0 + 1


def test_later_work_in_place_does_not_change_what_was_read() -> None:
    network, x = Reused(), torch.ones(1, 4)
    taps = Taps(network, ["scaled"])
    network(x)
    found = taps.read()["scaled"]  # first: a call of the layer itself would be kept too
    torch.testing.assert_close(found, network.scaled(network.twice(network.twice(x))))
    # A real one: torchvision adds the shortcut to this output in place, and rectifies the sum.
    resnet = torchvision.models.resnet18(num_classes=4).eval()
    taps = Taps(resnet, ["layer1.0.bn2"])
    resnet(_images())
    assert taps.read()["layer1.0.bn2"].min() < 0


def test_gradients_flow_through_what_was_read_and_no_graph_without_them() -> None:
    network = _convnet()
    taps = Taps(network, ["3"])
    network(_images())
    taps.read()["3"].square().sum().backward()
    first = next(network.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    with torch.no_grad():
        network(_images())
    assert not taps.read()["3"].requires_grad


def test_autocast_features_have_its_dtype() -> None:
    network = _convnet()
    taps = Taps(network, ["0", "embedding"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network(_images())
    assert taps.read()["0"].dtype == torch.bfloat16


def test_a_copy_of_the_network_leaves_the_taps_of_the_original_alone() -> None:
    network, x = _convnet(), _images()
    taps = Taps(network, ["3"])
    network(x)
    twin = copy.deepcopy(network)  # with features in a graph waiting to be read
    twin(_images(seed=1))
    found = taps.read()["3"]
    expected = nn.Sequential(*list(network)[:4])(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_copy_of_both_has_taps_of_its_own() -> None:
    class Owner(nn.Module):
        def __init__(self, first: str) -> None:
            super().__init__()
            # deepcopy meets whichever attribute comes first, first.
            if first == "taps":
                self.taps = None
            self.network = _convnet()
            self.taps = Taps(self.network, ["3"])

    for first in ("network", "taps"):
        owner = Owner(first)
        twin, x, y = copy.deepcopy(owner), _images(), _images(seed=1)
        gc.collect()
        owner.network(x)
        twin.network(y)
        for each, images in ((owner, x), (twin, y)):
            assert each.taps is not None
            found = each.taps.read()["3"]
            expected = nn.Sequential(*list(owner.network)[:4])(images)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_taps_that_are_gone_keep_nothing_alive() -> None:
    network = _convnet()
    taps = Taps(network, ["3"])
    network(_images())
    feature = taps._pass.features
    assert feature is not None
    before = [weak for weak in gc.get_referrers(feature["3"]) if weak is feature]
    assert before
    del taps, feature, before
    network(_images())  # the hooks are still there, and do nothing
    shapes = [tuple(o.shape) for o in gc.get_objects() if type(o) is torch.Tensor]
    assert (2, 8, 16, 16) not in shapes


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_network_is_read_without_a_graph_break(backend: str) -> None:
    torch._dynamo.reset()
    network, x = _convnet(), _images()
    taps = Taps(network, ["3", "embedding"])

    def step() -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        network.zero_grad()
        logits, features = network(x), taps.read()
        loss = logits.sum() + features["3"].square().mean() + features["embedding"].sum()
        loss.backward()
        return features, [p.grad for p in network.parameters() if p.grad is not None]

    plain = step()
    network.compile(backend=backend, fullgraph=True)  # a break would be an error
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        torch.testing.assert_close(step(), plain)
    # Reading does not make the compiler start again at each step.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_checkpointed_blocks_give_the_same_gradients_and_leave_nothing_behind() -> None:
    network, x = _resnet(), _images()
    layer = "layer2.0.conv1"
    taps, runs, gradients = Taps(network, [layer]), [], []
    network.get_submodule(layer).register_forward_hook(lambda *_: runs.append(1))
    for checkpointing in (False, True):
        network.set_grad_checkpointing(checkpointing)
        network.zero_grad()
        (network(x).sum() + taps.read()[layer].square().sum()).backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
        assert taps._pass.features is None
    assert len(runs) == 3  # once, and again in the second backward pass
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


class Objective(nn.Module):
    """What DDP wraps: a network, its taps, and a loss on logits and features."""

    def __init__(self) -> None:
        super().__init__()
        self.network = _convnet()
        self.taps = Taps(self.network, ["3", "embedding"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.network(x)
        features = self.taps.read()
        return sum((v.square().mean() for v in features.values()), logits.square().mean())


def _rank(rank: int, folder: str) -> None:
    """One of two processes: a backward pass through DDP on its half of the images."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/store"
    dist.init_process_group("gloo", rendezvous, rank=rank, world_size=2)
    objective = Objective()
    wrapped = nn.parallel.DistributedDataParallel(objective)
    wrapped(_images(4)[2 * rank : 2 * rank + 2]).backward()
    found: dict[str, Any] = {
        n: p.grad.numpy() for n, p in objective.named_parameters() if p.grad is not None
    }
    np.savez(f"{folder}/{rank}.npz", **found)
    dist.destroy_process_group()


def test_under_ddp_the_gradients_of_features_are_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    spawn(_rank, (str(tmp_path),), nprocs=2)
    objective = Objective()
    objective(_images(4)).backward()
    whole = {n: p.grad.numpy() for n, p in objective.named_parameters() if p.grad is not None}
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz") as found:
            assert set(found) == set(whole)
            for name, value in whole.items():
                # float32 sums of other orders
                np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6)


def test_layouts_of_real_networks() -> None:
    vit = timm.create_model("test_vit", num_classes=4)
    resnet18 = torchvision.models.resnet18(num_classes=4)
    cases = [
        (_convnet(), {"3": ("nchw", 8, (16, 16)), "embedding": ("vector", 128)}, IMAGE),
        (_resnet(), {"layer2": ("nchw", 48, (4, 4)), "layer4": ("nchw", 96, (1, 1))}, IMAGE),
        (resnet18, {"layer3": ("nchw", 256, (2, 2)), "embedding": ("vector", 512)}, IMAGE),
        (vit, {"blocks.3": ("tokens", 64, (10, 10), 1)}, (160, 160, 3)),
        (
            _beit(),
            {
                "blocks.1": ("tokens", 24, (4, 4), 1),
                "patch_embed": ("tokens", 24, (4, 4), 0),  # before the class token joins
                "patch_embed.proj": ("nchw", 24, (4, 4)),
            },
            IMAGE,
        ),
        (
            _swin(),
            {
                "layers.0": ("nhwc", 12, (16, 16)),
                "layers.1": ("nhwc", 24, (8, 8)),
                "patch_embed.proj": ("nchw", 12, (16, 16)),
            },
            IMAGE,
        ),
    ]
    for network, expected, shape in cases:
        found = probe(network, Taps(network, list(expected)), shape)
        assert found == {name: FeatureLayout(name, *values) for name, values in expected.items()}


def test_a_map_that_could_be_read_both_ways_is_read_as_timm_says() -> None:
    torch.manual_seed(0)
    small: dict[str, Any] = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8}
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=4, depths=(1,), num_heads=(2,), **small
    )
    cubic = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(512, 2))
    for network, layer, kind in ((swin, "layers.0", "nhwc"), (cubic, "0", "nchw")):
        assert probe(network, Taps(network, [layer]), IMAGE)[layer].kind == kind


def test_images_that_are_not_square() -> None:
    shape = (32, 64, 3)
    vit = timm.create_model(
        "test_vit", num_classes=4, img_size=(32, 64), patch_size=(16, 8), class_token=True
    )
    found = probe(vit, Taps(vit, ["blocks.0"]), shape)["blocks.0"]
    assert (found.size, found.prefix) == ((2, 8), 1)  # known from the patch embedding alone
    resnet = _resnet()
    assert probe(resnet, Taps(resnet, ["layer1"]), shape)["layer1"].size == (8, 16)
    # 50 columns are 3 patches of 16 and a rest: kinds must not be confused by the rounding.
    assert probe(resnet, Taps(resnet, ["layer2"]), (32, 50, 3))["layer2"].kind == "nchw"


def test_images_that_the_classifier_makes_square() -> None:
    swin, tokens = _swin(), Tokens(17)
    for network, layer, kind, size in (
        (swin, "layers.1", "nhwc", (8, 8)),
        (tokens, "layer", "tokens", (4, 4)),
    ):
        outer, taps = networks.Classifier(network, (32, 32)), Taps(network, [layer])
        found = probe(outer, taps, (32, 48, 3))[layer]
        assert (found.kind, found.size) == (kind, size)


class Tokens(nn.Module):
    """Answers with some tokens, whatever the image."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.layer, self.head = count, nn.Identity(), nn.Linear(3, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = images.flatten(2).transpose(1, 2)[:, : self.count]
        return self.head(self.layer(tokens).mean(1))


@pytest.mark.parametrize(
    ("count", "size", "prefix"),
    [(16, (4, 4), 0), (17, (4, 4), 1), (18, (4, 4), 2), (201, (14, 14), 5), (1, (1, 1), 0)],
)
def test_tokens_of_unknown_networks_lie_on_a_square(count: int, size: object, prefix: int) -> None:
    network = Tokens(count)
    found = probe(network, Taps(network, ["layer"]), IMAGE)["layer"]
    assert (found.size, found.prefix) == (size, prefix)


def test_the_proportions_of_the_image_come_before_a_square() -> None:
    network = Tokens(9)  # 2 x 4 and a class token, not 3 x 3
    found = probe(network, Taps(network, ["layer"]), (32, 64, 3))["layer"]
    assert (found.size, found.prefix) == ((2, 4), 1)


def test_tokens_on_no_grid_are_no_map_but_have_a_mean() -> None:
    network = Tokens(15)
    layout = probe(network, Taps(network, ["layer"]), IMAGE)["layer"]
    feature = torch.arange(90.0).view(2, 15, 3)
    torch.testing.assert_close(as_vector(feature, layout), feature.mean(1))
    with pytest.raises(UserError, match="tokens of layer 'layer' lie on no known grid") as caught:
        as_map(feature, layout)
    assert "\n" not in str(caught.value)


def test_features_of_windows_are_refused() -> None:
    swin = _swin()  # attention sees 16 windows of one image as 16 rows
    taps = Taps(swin, ["layers.0.blocks.0.attn"])
    with pytest.raises(UserError, match=r"gives \(16, 16, 12\) for one image"):
        probe(swin, taps, IMAGE)


def test_all_kinds_hold_the_same_numbers() -> None:
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    tokens = x.flatten(2).transpose(1, 2)
    prefixed = torch.cat([torch.full((2, 2, 5), 1e6), tokens], 1)
    kinds = [
        (x, FeatureLayout("", "nchw", 5, (3, 4))),
        (x.permute(0, 2, 3, 1), FeatureLayout("", "nhwc", 5, (3, 4))),
        (tokens, FeatureLayout("", "tokens", 5, (3, 4))),
        (prefixed, FeatureLayout("", "tokens", 5, (3, 4), 2)),
    ]
    for feature, layout in kinds:
        torch.testing.assert_close(as_map(feature, layout), x, rtol=0, atol=0)
        torch.testing.assert_close(as_tokens(feature, layout), tokens, rtol=0, atol=0)
        torch.testing.assert_close(as_vector(feature, layout), x.mean((2, 3)))
    vector, layout = x[:, :, 0, 0], FeatureLayout("", "vector", 5)
    assert as_map(vector, layout).shape == (2, 5, 1, 1)
    assert as_tokens(vector, layout).shape == (2, 1, 5)
    torch.testing.assert_close(as_vector(vector, layout), vector, rtol=0, atol=0)


def test_probing_restores_each_mode_and_changes_no_statistics() -> None:
    network = _resnet().train()
    network.bn1.eval()  # frozen by its owner
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    probe(network, Taps(network, ["layer1"]), IMAGE)
    assert [module.training for module in network.modules()] == modes
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_transformer_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_hidden_layers=2, **sizes)
    network = transformers.ViTForImageClassification(config)
    names = [name for name, _ in network.named_modules()]
    layer = next(name for name in names if name.endswith(("layer.1", "layers.1")))
    found = probe(network, Taps(network, [layer, "embedding", "vit"]), IMAGE)
    assert found[layer] == FeatureLayout(layer, "tokens", 16, (4, 4), 1)
    assert found["vit"] == FeatureLayout("vit", "tokens", 16, (4, 4), 1)  # its first output
    assert found["embedding"] == FeatureLayout("embedding", "vector", 16)
