"""A graph whose nodes have features and labels, its three parts, and its file.

The file is an `.npz` of arrays, read without unpickling anything:

    features                   (n, d), or in place of it the entries that are not 0:
    rows, cols, values, shape  node, feature and value of each, and (n, d)
    edges                      (m, 2) node numbers; an edge joins both ways
    labels                     (n,) classes 0, 1, ...; -1 where the class is not known
    train, validation, test    node numbers of the three parts
"""

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsdistill.harness import memory
from dsdistill.harness.errors import UserError, one_line

PARTS = ("train", "validation", "test")
_COORDINATES = ("rows", "cols", "values", "shape")
_SPARSE_BELOW = 0.1  # share of features that are not 0
UNKNOWN = -1  # label of a node whose class is not known


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes with features and labels, the edges between them, and their parts.

    Attributes:
        features: A row for each node, float32.
        edges: The two nodes of each edge, smaller number first, each edge once, none from a node to
            itself.
        labels: Class of each node, `UNKNOWN` without one.
        train, validation, test: Numbers of the nodes of each part; all have labels.
    """

    features: Float[Tensor, "n d"]
    edges: Int[Tensor, "m 2"]
    labels: Int[Tensor, " n"]
    train: Int[Tensor, " a"]
    validation: Int[Tensor, " b"]
    test: Int[Tensor, " c"]

    def __len__(self) -> int:
        return len(self.features)

    @property
    def width(self) -> int:
        """Number of features d of a node."""
        return self.features.shape[1]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.labels.max()) + 1

    @cached_property
    def neighbours(self) -> Int[Tensor, "e 2"]:
        """Each edge in both directions, ordered by the first node: a node and its neighbour."""
        both = torch.cat([self.edges, self.edges.flip(1)])
        return both[torch.argsort(both[:, 0] * len(self) + both[:, 1])]

    @cached_property
    def normalized_adjacency(self) -> Float[Tensor, "n n"]:
        """Sparse D^-1/2 (A + I) D^-1/2, where D has the degrees of A + I.

        Source: Kipf and Welling (2017), arXiv:1609.02907, equation 2.
        """
        nodes = torch.arange(len(self), device=self.features.device)
        pairs = torch.cat([self.neighbours, torch.stack([nodes, nodes], 1)])
        scale = self._degrees.add(1).rsqrt()
        return self._sparse(pairs, scale[pairs[:, 0]] * scale[pairs[:, 1]])

    @cached_property
    def mean_adjacency(self) -> Float[Tensor, "n n"]:
        """Sparse D^-1 A: the mean over a node's neighbours, 0 for a node without any."""
        return self._sparse(self.neighbours, 1 / self._degrees[self.neighbours[:, 0]])

    @cached_property
    def inputs(self) -> Float[Tensor, "n d"]:
        """The features, sparse where few are not 0: bags of words take a fiftieth of the time."""
        if (self.features != 0).float().mean() > _SPARSE_BELOW:
            return self.features
        with torch.inference_mode(False):
            return self.features.to_sparse().coalesce()

    @property
    def _degrees(self) -> Float[Tensor, " n"]:
        return torch.bincount(self.neighbours[:, 0], minlength=len(self)).float()

    def _sparse(self, pairs: Int[Tensor, "e 2"], values: Float[Tensor, " e"]) -> Tensor:
        size = len(self), len(self)
        with torch.inference_mode(False):  # kept, and needed by later trainings
            matrix = torch.sparse_coo_tensor(pairs.T, values, size, check_invariants=True)
            return matrix.coalesce()

    def to(self, device: torch.device | str) -> Self:
        """The graph with its tensors on a device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def with_unit_rows(self) -> Self:
        """The graph with features divided by their sum in each node, as is usual for bags of words.

        Rows whose values sum to 0 are left as they are.
        """
        sums = self.features.sum(1, keepdim=True)
        return replace(self, features=self.features / torch.where(sums == 0, 1.0, sums))

    def subgraph(self, nodes: Int[Tensor, " s"]) -> Self:
        """The graph of some nodes and of the edges between them; they get the numbers 0, 1, ...

        Args:
            nodes: Their numbers, each once.
        """
        place = torch.full((len(self),), -1, dtype=torch.long)
        place[nodes] = torch.arange(len(nodes))
        edges = place[self.edges]
        parts = {name: place[getattr(self, name)] for name in PARTS}
        return replace(
            self,
            features=self.features[nodes],
            edges=edges[(edges >= 0).all(1)].sort(1).values,
            labels=self.labels[nodes],
            **{name: numbers[numbers >= 0] for name, numbers in parts.items()},
        )

    def hold_out(self, share: float = 0.2, *, seed: int = 0) -> tuple[Self, Int[Tensor, " u"]]:
        """Hold test nodes out of the graph, for the inductive setting.

        A teacher that is trained on the smaller graph has seen neither their features nor their
        edges; with the whole graph it can answer for them, and a student without a graph from
        their features alone.

        Args:
            share: Share of the test nodes that is held out, in (0, 1).
            seed: Seed of the choice.

        Returns:
            The graph without these nodes, in which the others have new numbers, and the numbers of
            these nodes in this graph.

        Raises:
            UserError: If the share is not in (0, 1), or leaves one of both sides without nodes.
        """
        if not 0 < share < 1:
            raise UserError(f"share must be in (0, 1), got {share}")
        count = round(share * len(self.test))
        if not 0 < count < len(self.test):
            raise UserError(
                f"a share of {share:g} of {len(self.test)} test nodes is {count}: give another one"
            )
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.test), generator=generator)[:count]
        unseen = self.test[chosen.sort().values]
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[unseen] = False
        return self.subgraph(kept.nonzero()[:, 0]), unseen


def make(
    features: Float[np.ndarray, "n d"],
    edges: Int[np.ndarray, "m 2"],
    labels: Int[np.ndarray, " n"],
    *,
    train: Int[np.ndarray, " a"],
    validation: Int[np.ndarray, " b"],
    test: Int[np.ndarray, " c"],
) -> Graph:
    """Make a graph from arrays.

    Args:
        features: A row of finite numbers for each node.
        edges: Node numbers; an edge may stand there twice or in both directions, and counts once,
            and an edge from a node to itself is left out, since the networks add their own.
        labels: Class of each node, -1 where it is not known.
        train, validation, test: Node numbers of the parts, which share no node.

    Raises:
        UserError: With the array, the rule that it breaks and the value.
    """
    features = np.asarray(features)
    _require(features.ndim == 2 and features.dtype.kind in "fiub", "features", "numbers (n, d)")
    n = len(features)
    _require(features.size > 0, "features", "one row or more of one number or more")
    _require(bool(np.isfinite(features).all()), "features", "finite")
    edges, labels = np.asarray(edges), np.asarray(labels)
    _require(edges.ndim == 2 and edges.shape[1:] == (2,), "edges", "node numbers (m, 2)")
    _require_nodes("edges", edges, n)
    whole = labels.dtype.kind in "iu" and labels.shape == (n,)
    _require(whole, "labels", f"whole numbers ({n},), one for each row of features")
    _require(bool((labels >= UNKNOWN).all()), "labels", "classes 0, 1, ..., or -1 for none")
    _require(bool(labels.max() >= 1), "labels", "of two classes or more")
    taken: dict[int, str] = {}
    parts = {"train": train, "validation": validation, "test": test}
    for name, numbers in parts.items():
        numbers = parts[name] = np.asarray(numbers)
        _require(numbers.ndim == 1, name, "node numbers (m,)")
        _require_nodes(name, numbers, n)
        for node in numbers.tolist():
            if node in taken:
                raise UserError(f"node {node} is in {taken[node]} and in {name}: leave one out")
            if labels[node] == UNKNOWN:
                raise UserError(f"node {node} of {name} has no label (-1): leave it out")
            taken[node] = name
    _require(len(parts["train"]) > 0, "train", "one node or more")
    pairs = np.unique(np.sort(edges.astype(np.int64), axis=1), axis=0).reshape(-1, 2)
    return Graph(
        torch.from_numpy(features.astype(np.float32)),
        torch.from_numpy(pairs[pairs[:, 0] != pairs[:, 1]]),
        torch.from_numpy(labels.astype(np.int64)),
        **{name: torch.from_numpy(np.sort(part.astype(np.int64))) for name, part in parts.items()},
    )


def load(path: str | os.PathLike[str]) -> Graph:
    """Read a graph's `.npz` file; the format stands at the head of this module.

    Raises:
        UserError: If the file is missing or damaged, or an array breaks a rule.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise UserError(f"{path} is no .npz of arrays of numbers: {one_line(error)}") from error
    try:
        missing = [name for name in ("edges", "labels", *PARTS) if name not in arrays]
        if missing:
            raise UserError(f"{missing[0]} is missing")
        parts = {name: arrays[name] for name in PARTS}
        return make(_features(arrays), arrays["edges"], arrays["labels"], **parts)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _features(arrays: Mapping[str, np.ndarray]) -> Float[np.ndarray, "n d"]:
    """The features of a file, dense."""
    if "features" in arrays:
        return arrays["features"]
    missing = [name for name in _COORDINATES if name not in arrays]
    if missing:
        raise UserError(f"features is missing, or {missing[0]} of {', '.join(_COORDINATES)}")
    rows, cols, values, shape = (arrays[name] for name in _COORDINATES)
    whole = shape.shape == (2,) and shape.dtype.kind in "iu" and bool((shape > 0).all())
    _require(whole, "shape", "two whole numbers, of nodes and of features")
    n, d = map(int, shape)
    _require_nodes("rows", rows, n)
    _require_nodes("cols", cols, d, "features")
    _require(values.dtype.kind in "fiub", "values", "numbers")
    flat = rows.ndim == 1 and rows.shape == cols.shape == values.shape
    _require(flat, "rows, cols and values", "of one length")
    memory.require(4 * n * d, f"features of {n} nodes", "give fewer features")
    features = np.zeros((n, d), np.float32)
    features[rows, cols] = values
    return features


def _require_nodes(name: str, numbers: np.ndarray, count: int, kind: str = "nodes") -> None:
    _require(numbers.dtype.kind in "iu" or not numbers.size, name, "whole numbers")
    if numbers.size and (numbers.min() < 0 or numbers.max() >= count):
        wrong = numbers.min() if numbers.min() < 0 else numbers.max()
        raise UserError(f"{name} has {wrong}, and the {count} {kind} are 0 to {count - 1}")


def _require(holds: bool, name: str, rule: str) -> None:
    if not holds:
        raise UserError(f"{name} must be {rule}")
