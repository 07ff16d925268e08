"""Graph-less students (GLNN) on Cora and Citeseer: ten seeds, two settings, a permuted teacher.

    python benchmarks/graphs.py cora.npz citeseer.npz

The files are those of `docs/graphs.md`, with the public split of 20 labels per class. Each seed has
its own teacher. In the transductive setting every network is trained on the whole graph; in the
inductive one a fifth of the test nodes is held out of it, and these are judged apart. The control
is a teacher whose answers are permuted among the nodes. Test nodes are read once, at the end of
each training. The last lines are a table for docs/results.md.
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from kd.graphs import graph, training
from kd.graphs.graph import Graph
from kd.graphs.networks import Gcn, GraphNetwork, Perceptron

SEEDS = 10
HEAD = ("| graph, network | transductive, % | inductive: seen / unseen nodes, % |", "|---|---|---|")


class FixedAnswers(GraphNetwork):
    """A teacher whose logits of all nodes are given."""

    def __init__(self, answers: Float[Tensor, "n k"]) -> None:
        super().__init__()
        self.register_buffer("answers", answers)

    def forward(self, graph: Graph) -> Tensor:
        return self.get_buffer("answers")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.npz")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    lines: list[str] = [*HEAD]
    for file in options.files:
        began, whole = time.perf_counter(), graph.load(file).with_unit_rows()
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        found = [measure(whole, seed) for seed in seeds]
        for name in found[0]:
            columns = [summary([each[name][i] for each in found]) for i in range(3)]
            lines.append(f"| {file.stem}, {name} | {columns[0]} | {columns[1]} / {columns[2]} |")
        print(f"{file.stem}: {time.perf_counter() - began:.0f} s", flush=True)
        print("\n".join(lines), flush=True)


def measure(whole: Graph, seed: int) -> Mapping[str, tuple[float, float, float]]:
    """Test accuracies of a seed by network: all, then the seen and the unseen of `hold_out`."""
    seen, unseen = whole.hold_out(0.2, seed=seed)
    of_whole, of_seen = train_all(whole, seed), train_all(seen, seed)
    known = whole.test[~torch.isin(whole.test, unseen)]
    # A network on neighbours sees the edges of the new nodes when it is asked about them.
    return {
        name: (
            training.accuracy(of_whole[name], whole, whole.test),
            training.accuracy(of_seen[name], whole, known),
            training.accuracy(of_seen[name], whole, unseen),
        )
        for name in of_whole
    }


def train_all(seen: Graph, seed: int) -> Mapping[str, nn.Module]:
    """Train every network of the table on one graph."""
    sizes = seen.width, seen.classes
    teacher = train(Gcn(*sizes, dropout=0.8, seed=seed), None, seen, seed)
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed))
    permuted = FixedAnswers(training.predict(teacher, seen)[order])
    return {
        "GCN": teacher,
        "perceptron": train(Perceptron(*sizes, seed=seed), None, seen, seed),
        "GLNN": train(Perceptron(*sizes, seed=seed), teacher, seen, seed),
        "GLNN, permuted teacher": train(Perceptron(*sizes, seed=seed), permuted, seen, seed),
    }


def train(network: nn.Module, teacher: nn.Module | None, seen: Graph, seed: int) -> nn.Module:
    """Train a network; return it."""
    training.distill(network, teacher, seen, seed=seed, device="cpu", progress=False)
    return network


def summary(values: list[float]) -> str:
    """Mean and deviation of accuracies in percent."""
    return f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}"


if __name__ == "__main__":
    main()
