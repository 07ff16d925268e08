"""A small graph of two communities, for the tests of `kd.graphs`."""

import numpy as np

from kd.graphs import graph
from kd.graphs.graph import Graph


def arrays(n: int = 60, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Two classes of n / 2 nodes, whose features say little and whose edges say much."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    features = (rng.normal(size=(n, 5)) + 0.4 * labels[:, None]).astype(np.float32)
    same = labels[:, None] == labels[None]
    near = np.triu(rng.random((n, n)) < np.where(same, 0.2, 0.02), 1)
    order = rng.permutation(n)
    return {
        "features": features,
        "edges": np.argwhere(near),
        "labels": labels,
        "train": order[:10],
        "validation": order[10:25],
        "test": order[25:55],
    }


def small(n: int = 60, *, seed: int = 0) -> Graph:
    return graph.make(**arrays(n, seed=seed))
