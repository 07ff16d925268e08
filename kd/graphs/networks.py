"""Networks on nodes: GCN and GraphSAGE, which look at neighbours, and a perceptron, which does not.

A `GraphNetwork` maps a graph to logits of all its nodes. Any other module maps the features (n, d)
of nodes to their logits, and needs no graph when it is used. Dropout stands before each layer, the
first one too.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsdistill.harness.errors import UserError
from kd.graphs.graph import Graph


class GraphNetwork(nn.Module):
    """Base of the networks that look at neighbours; one of your own derives from it."""

    def hidden(self, graph: Graph) -> Float[Tensor, "n w"]:
        """What the last layer takes: an embedding of each node."""
        raise NotImplementedError

    def last(self, hidden: Float[Tensor, "n w"], graph: Graph) -> Float[Tensor, "n k"]:
        """Logits from what `hidden` gives."""
        raise NotImplementedError

    def forward(self, graph: Graph) -> Float[Tensor, "n k"]:
        """Logits of all nodes."""
        return self.last(self.hidden(graph), graph)


class Convolution(nn.Module):
    """Â x W + b, where Â is `Graph.normalized_adjacency`."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = _Linear(width, outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Float[Tensor, "n d"], graph: Graph) -> Float[Tensor, "n w"]:
        return torch.sparse.mm(graph.normalized_adjacency, self.linear(x)) + self.bias


class MeanAggregation(nn.Module):
    """x W + m V + b, where m is the mean of x over a node's neighbours, 0 without any."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.own = _Linear(width, outputs)
        self.neighbours = _Linear(width, outputs, bias=False)

    def forward(self, x: Float[Tensor, "n d"], graph: Graph) -> Float[Tensor, "n w"]:
        return self.own(x) + torch.sparse.mm(graph.mean_adjacency, self.neighbours(x))


class _Linear(nn.Linear):
    """A linear map of rows that may be sparse, with Glorot's initial weights."""

    def __init__(self, width: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__(width, outputs, bias=bias)
        nn.init.xavier_uniform_(self.weight)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, input: Float[Tensor, "n d"]) -> Float[Tensor, "n w"]:
        if not input.is_sparse:
            return super().forward(input)
        # A sparse product of a transposed view takes three times as long.
        product = torch.sparse.mm(input, self.weight.T.contiguous())
        return product if self.bias is None else product + self.bias


def _dropout(x: Float[Tensor, "n d"], probability: float, training: bool) -> Float[Tensor, "n d"]:
    """Dropout of rows that may be sparse: what is 0 stays 0."""
    if not x.is_sparse:
        return F.dropout(x, probability, training)
    values = F.dropout(x.values(), probability, training)
    dropped = torch.sparse_coo_tensor(x.indices(), values, x.shape, check_invariants=False)
    return dropped._coalesced_(True)


class _Layers(GraphNetwork):
    """Layers of one kind with ReLU between them."""

    def __init__(
        self,
        layer: type[Convolution] | type[MeanAggregation],
        width: int,
        classes: int,
        hidden: int,
        layers: int,
        dropout: float,
        seed: int,
    ) -> None:
        super().__init__()
        sizes = _sizes(width, classes, hidden, layers, dropout)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(layer(a, b) for a, b in pairwise(sizes))
        self.dropout = dropout

    def hidden(self, graph: Graph) -> Float[Tensor, "n w"]:
        x = graph.inputs
        for layer in list(self.layers)[:-1]:
            x = layer(_dropout(x, self.dropout, self.training), graph).relu()
        return x

    def last(self, hidden: Float[Tensor, "n w"], graph: Graph) -> Float[Tensor, "n k"]:
        return self.layers[-1](_dropout(hidden, self.dropout, self.training), graph)


class Gcn(_Layers):
    """Graph convolutional network.

    Source: Kipf and Welling (2017), arXiv:1609.02907, equation 9, with their initial weights
    (Glorot's uniform distribution).
    """

    def __init__(
        self,
        width: int,
        classes: int,
        *,
        hidden: int = 64,
        layers: int = 2,
        dropout: float = 0.5,
        seed: int = 0,
    ) -> None:
        """Make the network.

        Args:
            width: Number of features of a node.
            classes: Number of classes.
            hidden: Number of units of a hidden layer.
            layers: Number of layers; each sees one edge further.
            dropout: Probability that an input of a layer is 0 in training.
            seed: Seed of the initial weights.

        Raises:
            UserError: If a number is out of its range.
        """
        super().__init__(Convolution, width, classes, hidden, layers, dropout, seed)


class Sage(_Layers):
    """GraphSAGE with the mean of all neighbours.

    Source: Hamilton, Ying and Leskovec (2017), arXiv:1706.02216, algorithm 1 with the mean
    aggregator. Deviations: all neighbours count and not a sample of them, and embeddings are not
    divided by their length.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        *,
        hidden: int = 64,
        layers: int = 2,
        dropout: float = 0.5,
        seed: int = 0,
    ) -> None:
        """Make the network; the arguments are those of `Gcn`."""
        super().__init__(MeanAggregation, width, classes, hidden, layers, dropout, seed)


class Perceptron(nn.Module):
    """A perceptron of a node's own features: the student of GLNN.

    It maps features (n, d), which may be sparse, to logits (n, k), and needs no graph.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        *,
        hidden: int = 128,
        layers: int = 2,
        dropout: float = 0.5,
        seed: int = 0,
    ) -> None:
        """Make the network; the arguments are those of `Gcn`."""
        super().__init__()
        sizes = _sizes(width, classes, hidden, layers, dropout)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(_Linear(a, b) for a, b in pairwise(sizes))
        self.dropout = dropout

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        x = features
        for number, layer in enumerate(self.layers):
            x = layer(_dropout(x.relu() if number else x, self.dropout, self.training))
        return x


def _sizes(width: int, classes: int, hidden: int, layers: int, dropout: float) -> list[int]:
    """Widths before, between and after the layers."""
    counts = {"width": width, "classes": classes, "hidden": hidden, "layers": layers}
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name} must be at least 1, got {count}")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout must be in [0, 1), got {dropout}")
    return [width, *[hidden] * (layers - 1), classes]
