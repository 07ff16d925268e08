"""Removal of channels, and the channels by which a pruned network is built again."""

import copy

import pytest
import torch
from torch import nn

from dsdistill.harness.errors import UserError
from kd.models import layer_channels, networks, pruning
from kd.models.networks import Classifier

SHAPE = (8, 8, 1)


def _images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


class _Depthwise(nn.Module):
    """What has parameters outside of layers, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 12))
        self.whole = nn.LayerNorm(12)
        self.last = nn.Linear(12, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mixed = self.deep(self.norm(self.first(images)).relu()).permute(0, 2, 3, 1)
        return self.last(self.whole(self.scale * mixed).mean((1, 2)))


def test_multiplications_are_those_of_the_layers() -> None:
    classifier = networks.build("convnet:8", SHAPE, 10)
    convolutions = 9 * 8 * 64 + 8 * 9 * 8 * 16 + 8 * 9 * 8 * 4
    assert pruning.count_macs(classifier, SHAPE) == convolutions + 8 * 10


def test_channels_that_do_nothing_go_first_and_leave_the_outputs() -> None:
    classifier = networks.build("mlp:8", SHAPE, 10)
    network = classifier.network
    first, middle, last = network[1], network[3], network[5]  # pyright: ignore[reportIndexIssue]
    with torch.no_grad():
        for into, out, dead in ((first, middle, [1, 2, 5, 7]), (middle, last, [0, 3, 4, 6])):
            into.weight[dead] = into.bias[dead] = out.weight[:, dead] = 0
    expected, weight = classifier(_images()), first.weight[[0, 3, 4, 6]].clone()
    removed = pruning.prune("mlp:8", classifier, SHAPE, 0.5)
    assert removed.channels == {"1": (64, 4), "3": (4, 4), "5": (4, 10)}
    assert (removed.macs_before, removed.macs_after) == (656, 312)
    assert removed.share == 1 - 312 / 656
    assert torch.equal(classifier.network[1].weight, weight)  # pyright: ignore[reportIndexIssue]
    assert torch.allclose(classifier(_images()), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["convnet:8", "small-vit:24", "depthwise"])
def test_a_network_cut_to_the_channels_answers_to_the_bit(name: str) -> None:
    torch.manual_seed(0)
    whole = Classifier(_Depthwise()) if name == "depthwise" else networks.build(name, SHAPE, 10)
    pruned, rebuilt = copy.deepcopy(whole), copy.deepcopy(whole)
    removed = pruning.prune(name, pruned, SHAPE, 0.4)
    assert removed.share >= 0.4
    layer_channels.apply(rebuilt.network, removed.channels)
    rebuilt.load_state_dict(pruned.state_dict())
    for training in (False, True):
        both = pruned.train(training), rebuilt.train(training)
        first, second = (network(_images()) for network in both)
        assert first.shape == (3, 10)
        assert torch.equal(first, second)
    counts = (sum(p.numel() for p in network.parameters()) for network in (pruned, whole))
    assert next(counts) < next(counts)
    assert layer_channels.read(rebuilt.network) == layer_channels.read(pruned.network)


def test_single_channels_keep_their_norms_and_depthwise_convolutions_their_kind() -> None:
    classifier = Classifier(_Depthwise())
    removed = pruning.prune("depthwise", classifier, SHAPE, 0.4)
    network = classifier.network
    left = removed.channels["first"][1]
    assert left < 12
    assert removed.channels["deep"] == (left, left)
    assert removed.channels["scale"] == removed.channels["whole"] == (left,)
    assert network.deep.groups == left  # pyright: ignore[reportAttributeAccessIssue]
    convnet = networks.build("convnet:8", SHAPE, 10)
    pruning.prune("convnet:8", convnet, SHAPE, 0.5)
    norm = convnet.network[1]  # pyright: ignore[reportIndexIssue]
    assert norm.num_groups == norm.num_channels < 8


def test_too_large_a_share_and_networks_that_count_elsewhere_are_refused() -> None:
    with pytest.raises(UserError, match=r"of small-vit:24 at most 0\.\d+ can go"):
        pruning.prune("small-vit:24", networks.build("small-vit:24", SHAPE, 10), SHAPE, 0.9)

    class Sized(nn.Sequential):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            hidden = self[1](self[0](input))
            return self[2](hidden.view(len(input), 8).relu())

    sized = Sized(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 10))
    with pytest.raises(UserError, match="torch-pruning cannot remove channels of sized"):
        pruning.prune("sized", Classifier(sized), SHAPE, 0.5)


@pytest.mark.parametrize(
    ("channels", "said"),
    [
        ({"99": (1, 2)}, "it has no layer 99"),
        ({"0": (1, 9)}, "layer 0 cannot have"),
        ({"0": (1, 0)}, "layer 0 cannot have"),
        ({"0": (1,)}, "layer 0 cannot have"),
        ({"1": (2.5,)}, "layer 1 cannot have"),
    ],
)
def test_channels_that_do_not_fit_are_refused(channels, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        layer_channels.apply(networks.build("convnet:8", SHAPE, 10).network, channels)
