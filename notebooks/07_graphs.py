# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A student that needs no graph
#
# A graph neural network knows a paper by the papers that it cites. You will train one on a graph of
# citations, and from it a perceptron that reads the paper's words alone. At the end you know how
# much of the graph the perceptron has taken over, on papers that the teacher saw and on papers that
# it never saw, and what is left when the teacher's answers are put to the wrong papers.
#
# With Cora, 2708 papers, this takes about five minutes on two CPU cores. `FILE` is an `.npz` as
# `docs/graphs.md` describes it, which also says how to write one; `None` makes a small graph.

# %%
FILE = "graphs/cora.npz"  # under the folder of data sets, DSDISTILL_DATA
SEEDS, EPOCHS = range(3), 500

# %%
import numpy as np

from dsdistill.harness.paths import data_root
from kd.graphs import graph


def small_graph(n=120):
    """Three classes, whose words overlap and whose papers cite their own class more often."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 3
    words = rng.random((n, 30)) < 0.1 + 0.1 * (labels[:, None] == np.arange(30) % 3)
    cited = rng.random((n, n)) < np.where(labels[:, None] == labels, 0.08, 0.01)
    parts = dict(zip(graph.PARTS, np.split(np.arange(n), [15, 45]), strict=True))
    return graph.make(words.astype(np.float32), np.argwhere(cited), labels, **parts)


papers = graph.load(data_root() / FILE) if FILE else small_graph()
papers = papers.with_unit_rows()
f"{len(papers)} nodes, {papers.width} features, {len(papers.edges)} edges, {papers.classes} classes"

# %% [markdown]
# ## Teacher and students
#
# A fifth of the test papers is held out of the graph first: the teacher trains without their words
# and without their citations. The perceptron alone learns the labels of a few papers; the student
# learns the teacher's answers for all papers of the smaller graph, and no labels.

# %%
import torch

from kd.graphs import training
from kd.graphs.networks import Gcn, GraphNetwork, Perceptron


class Permuted(GraphNetwork):
    """The answers of a teacher, each for another paper."""

    def __init__(self, teacher, papers, seed):
        super().__init__()
        order = torch.randperm(len(papers), generator=torch.Generator().manual_seed(seed))
        self.answers = training.predict(teacher, papers)[order]

    def forward(self, papers):
        return self.answers


def train(network, teacher, seen, seed):
    training.distill(network, teacher, seen, seed=seed, epochs=EPOCHS, progress=False)
    return network


accuracies = {}
for seed in SEEDS:
    seen, unseen = papers.hold_out(0.2, seed=seed)
    known = papers.test[~torch.isin(papers.test, unseen)]
    size = papers.width, papers.classes
    teacher = train(Gcn(*size, dropout=0.8, seed=seed), None, seen, seed)
    networks = {
        "GCN, the teacher": teacher,
        "perceptron on labels": train(Perceptron(*size, seed=seed), None, seen, seed),
        "perceptron from the GCN": train(Perceptron(*size, seed=seed), teacher, seen, seed),
        "from permuted answers": train(
            Perceptron(*size, seed=seed), Permuted(teacher, seen, seed), seen, seed
        ),
    }
    for name, network in networks.items():
        found = [training.accuracy(network, papers, nodes) for nodes in (known, unseen)]
        accuracies.setdefault(name, []).append(found)

# %% [markdown]
# ## What the perceptron has taken over
#
# "Seen" are test papers whose words and citations were in the graph, without their labels; "unseen"
# are those that were held out. The GCN is asked about the unseen with their citations at hand.

# %%
from IPython.display import Markdown

lines = ["| network | seen papers, % | unseen papers, % |", "|---|---|---|"]
for name, found in accuracies.items():
    means, deviations = 100 * np.mean(found, 0), 100 * np.std(found, 0, ddof=1)
    cells = [f"{m:.1f} ± {d:.1f}" for m, d in zip(means, deviations, strict=True)]
    lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
Markdown("\n".join(lines))

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
for offset, (part, colour) in enumerate((("seen", "#0072B2"), ("unseen", "#E69F00"))):
    means = [100 * np.mean(found, 0)[offset] for found in accuracies.values()]
    places = np.arange(len(means)) + 0.35 * offset
    axes.barh(places, means, height=0.33, color=colour, label=part)
axes.set_yticks(np.arange(len(accuracies)) + 0.18, accuracies)
axes.invert_yaxis()
axes.set_xlabel("test accuracy, %")
_ = axes.legend(loc="lower right")

# %% [markdown]
# ## Without the graph
#
# The student is an ordinary module of a paper's words.

# %%
student = networks["perceptron from the GCN"]
student(papers.features[unseen[:1]]).softmax(1)

# %% [markdown]
# ## What to take from it
#
# - Most of what the graph says of papers that the teacher has seen can be learned from their words,
#   once the teacher has answered for all of them.
# - On papers that it never saw the student is worse, and still above the perceptron on labels:
#   judge it there if new papers are what it is for.
# - The permuted teacher shows that the gain is in which answer belongs to which paper.
# - `benchmarks/graphs.py` measures ten seeds of Cora and Citeseer.
