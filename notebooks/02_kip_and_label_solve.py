# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Kernel Inducing Points and Label Solve
#
# You will see what a neural tangent kernel sees, solve for the labels of ten images a class (Label
# Solve), learn the pixels instead (Kernel Inducing Points), learn both, and keep a part of the
# pixels as noise that is never learned. At the end you know what each of them is good for, and
# what the images look like.
#
# With Fashion-MNIST this takes about a minute on two CPU cores.

# %%
DATA = "fashion-mnist"
IMAGES_PER_CLASS = 10
STEPS = 300
KERNEL = "fc"

# %% [markdown]
# ## What the kernel sees
#
# A kernel is a similarity of two images: of how alike an infinitely wide network treats them.
# Sorted by class, the similarities of a few images show blocks, where images of one class resemble
# each other, and where two classes are mistaken for each other.

# %%
import numpy as np

from dsdistill.harness import paths
from dsdistill.harness.data import datasets, preprocess
from dsdistill.harness.data.labeled_images import draw_per_class
from dsdistill.kernels import networks

train = datasets.load(DATA, root=paths.data_root()).train
rows = draw_per_class(train, 8, np.random.default_rng(0))
fitted = preprocess.fit("standardise", train.chunks, train.shape)
images = fitted.apply(train.images(rows))
similar = np.asarray(networks.parse(KERNEL).kernel(images, images))
scale = np.sqrt(np.diag(similar))
similar = similar / scale / scale[:, None]

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(5.4, 4.6), layout="constrained")
shown = axes.imshow(similar, cmap="cividis")
axes.set_xticks([])
axes.set_yticks(4 + 8 * np.arange(len(train.classes)), train.classes)
axes.set_title(f"{KERNEL} kernel, eight images a class")
_ = figure.colorbar(shown, label="kernel, divided by both lengths")

# %% [markdown]
# ## Four ways to make a set
#
# *Label Solve* keeps the real images and solves for the labels with which they predict all
# training images best: one pass, closed form. *KIP* moves the pixels by gradient descent through
# the same prediction. With learned labels it does both. *Corruption* keeps a share of the pixels
# as noise.

# %%
import tempfile
from pathlib import Path

from dsdistill.commands.distil import run_kip, run_label_solve
from dsdistill.options import KipOptions, LabelSolveOptions

folder = Path(tempfile.mkdtemp())
common = {"data": DATA, "images_per_class": IMAGES_PER_CLASS, "kernel": KERNEL}
steps = {"steps": STEPS}
made = {
    "Label Solve": run_label_solve(LabelSolveOptions(**common, out=folder / "ls")),
    "KIP": run_kip(KipOptions(**common, **steps, out=folder / "kip")),
    "KIP, labels learned": run_kip(
        KipOptions(**common, **steps, learn_labels=True, out=folder / "kip-labels")
    ),
    "KIP, 90 % of the pixels noise": run_kip(
        KipOptions(**common, **steps, init="noise", corruption=0.9, out=folder / "kip-corrupted")
    ),
}

# %%
from IPython.display import Markdown

from dsdistill.harness.data import distilled_set

sets = {name: distilled_set.load(run / distilled_set.FILE_NAME) for name, run in made.items()}
lines = ["| set | test accuracy before | after | time |", "|---|---|---|---|"]
for name, found in sets.items():
    metrics, seconds = found.provenance["metrics"], found.provenance["seconds"]
    lines.append(
        f"| {name} | {metrics['initial_test_accuracy']:.1%} | {metrics['test_accuracy']:.1%} | "
        f"{seconds:.0f} s |"
    )
Markdown("\n".join(lines))

# %% [markdown]
# ## What the images look like

# %%
from IPython.display import Image

Image(made["KIP"] / "distilled.png", width=760)

# %% [markdown]
# The set whose pixels are mostly noise hides what it was made from, and still teaches:

# %%
Image(made["KIP, 90 % of the pixels noise"] / "distilled.png", width=760)

# %% [markdown]
# ## What the labels say
#
# The solved labels of Label Solve, averaged over the images of a class. A natural label would be
# 0.9 on the diagonal and -0.1 elsewhere. Solved labels lean on what images of other classes have
# in common with this one.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9.6, 4), layout="constrained", sharey=True)
for ax, name in zip(axes, ("Label Solve", "KIP, labels learned"), strict=True):
    found = sets[name]
    k = len(found.classes)
    means = found.labels.reshape(k, -1, k).mean(1)
    largest = abs(means).max()
    shown = ax.imshow(means, cmap="PuOr", vmin=-largest, vmax=largest)
    ax.set_title(name)
    ax.set_xlabel("entry of the label")
    figure.colorbar(shown, ax=ax, label="mean value")
axes[0].set_ylabel("class of the image")
_ = axes[0].set_yticks(range(k), found.classes)

# %% [markdown]
# ## What to take from it
#
# - Label Solve costs one pass and no search. It is the first thing to try, and a good start for KIP
#   (`--init`).
# - Moving the pixels gains more than solving for the labels, and learned labels add a little.
# - Nine tenths of the pixels as noise cost accuracy, here about eleven points, and still leave more
#   than as many real images have with their natural labels.
# - All of these accuracies are of ridge regression with the same kernel. What other learners make
#   of the sets is the question of the first notebook.
