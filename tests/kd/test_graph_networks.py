"""Networks on nodes against loops over neighbours, and against torch_geometric where it is."""

from dataclasses import replace

import graph_support
import numpy as np
import pytest
import torch

from dsdistill.harness.errors import UserError
from kd.graphs.graph import Graph
from kd.graphs.networks import Gcn, Perceptron, Sage

GRAPH = graph_support.small(12)


def _neighbours(graph: Graph) -> list[list[int]]:
    near: list[list[int]] = [[] for _ in range(len(graph))]
    for a, b in graph.edges.tolist():
        near[a].append(b)
        near[b].append(a)
    return near


def _weights(layer: torch.nn.Module) -> dict[str, np.ndarray]:
    return {k: v.detach().double().numpy() for k, v in layer.named_parameters()}


def _convolve(x: np.ndarray, w: dict[str, np.ndarray], near: list[list[int]]) -> np.ndarray:
    degrees = [len(others) + 1 for others in near]
    mapped, out = x @ w["linear.weight"].T, np.zeros((len(x), len(w["bias"])))
    for i, others in enumerate(near):
        for j in (*others, i):
            out[i] += mapped[j] / np.sqrt(degrees[i] * degrees[j])
    return out + w["bias"]


def _aggregate(x: np.ndarray, w: dict[str, np.ndarray], near: list[list[int]]) -> np.ndarray:
    mean = np.stack([x[j].mean(0) if j else np.zeros(x.shape[1]) for j in near])
    return x @ w["own.weight"].T + w["own.bias"] + mean @ w["neighbours.weight"].T


@pytest.mark.parametrize(("kind", "oracle"), [(Gcn, _convolve), (Sage, _aggregate)])
def test_two_layers_are_those_of_a_loop_over_neighbours(kind, oracle) -> None:
    network = kind(GRAPH.width, 3, hidden=4, seed=1).eval()
    with torch.no_grad():
        for layer in network.layers:  # biases that are not zero
            for name, weight in layer.named_parameters():
                if "bias" in name:
                    weight.normal_(generator=torch.Generator().manual_seed(2))
        logits = network(GRAPH).double().numpy()
    near, x = _neighbours(GRAPH), GRAPH.features.double().numpy()
    hidden = np.maximum(oracle(x, _weights(network.layers[0]), near), 0)
    expected = oracle(hidden, _weights(network.layers[1]), near)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Gcn, Sage])
def test_renumbered_nodes_have_the_same_logits(kind) -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    network = kind(GRAPH.width, 2, seed=0).eval()
    torch.testing.assert_close(network(GRAPH.subgraph(order)), network(GRAPH)[order])


@pytest.mark.parametrize("kind", [Gcn, Sage])
def test_a_node_depends_on_nodes_two_edges_away_and_no_further(kind) -> None:
    near = _neighbours(GRAPH)
    reached = {0, *near[0], *(k for j in near[0] for k in near[j])}
    assert 1 < len(reached) < 12
    features = GRAPH.features.clone().requires_grad_()
    kind(GRAPH.width, 2, seed=0).eval()(replace(GRAPH, features=features))[0].sum().backward()
    assert features.grad is not None
    seen = features.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert set(seen) <= reached
    assert set(near[0]) & set(seen)


@pytest.mark.parametrize("kind", [Gcn, Sage, Perceptron])
def test_sparse_features_have_the_logits_and_gradients_of_dense_ones(kind) -> None:
    rare = GRAPH.features * (torch.rand(12, 5, generator=torch.Generator().manual_seed(0)) < 0.08)
    graph = replace(GRAPH, features=rare)
    dense = replace(GRAPH, features=rare)
    dense.__dict__["inputs"] = rare
    assert graph.inputs.is_sparse
    results = []
    for each in (graph, dense):
        network = kind(GRAPH.width, 2, seed=0, dropout=0.0)
        logits = network(each.inputs if kind is Perceptron else each)
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for p in network.parameters())])
    for sparse, full in zip(*results, strict=True):
        torch.testing.assert_close(sparse, full)


def test_dropout_of_sparse_features_keeps_their_mean() -> None:
    features = torch.zeros(4000, 20)
    features[:, 0] = 1
    network = Perceptron(20, 1, layers=1, dropout=0.75)
    with torch.no_grad():
        network.layers[0].weight.fill_(1.0)
        torch.manual_seed(0)
        values = network(features.to_sparse().coalesce())
    assert set(values.unique().tolist()) == {0.0, 4.0}
    # 4000 draws of variance 3: five deviations of the mean are 0.14.
    assert values.mean().item() == pytest.approx(1, abs=0.14)


def test_the_seed_fixes_the_weights_and_leaves_other_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, same, other = (Gcn(5, 2, seed=seed).layers[0].bias.shape for seed in (0, 0, 1))
    assert first == same == other
    assert torch.rand(1) == expected
    weights = [Sage(5, 2, seed=seed).state_dict()["layers.0.own.weight"] for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("kind", [Gcn, Sage, Perceptron])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_sizes_out_of_range_are_refused(kind, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        kind(5, 2, **arguments)


@pytest.mark.parametrize("kind", [Gcn, Sage])
def test_a_layer_is_that_of_torch_geometric(kind) -> None:
    geometric = pytest.importorskip("torch_geometric.nn")
    layer = kind(GRAPH.width, 3, layers=1, seed=0).eval()
    weights = layer.layers[0].state_dict()
    if kind is Gcn:
        oracle = geometric.GCNConv(GRAPH.width, 3)
        names = {"lin.weight": "linear.weight", "bias": "bias"}
    else:
        oracle = geometric.SAGEConv(GRAPH.width, 3)
        names = {
            "lin_l.weight": "neighbours.weight",
            "lin_l.bias": "own.bias",
            "lin_r.weight": "own.weight",
        }
    oracle.load_state_dict({theirs: weights[ours] for theirs, ours in names.items()})
    torch.testing.assert_close(layer(GRAPH), oracle(GRAPH.features, GRAPH.neighbours.T))
