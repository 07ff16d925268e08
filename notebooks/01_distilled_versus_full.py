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
# # Distilled versus full data
#
# You will condense a data set into one, ten and fifty synthetic images a class with Kernel
# Inducing Points, and train the same students on them, on as many random real images, on as many
# chosen by k-means, and on all of them. At the end you know how much a few images can replace, for
# whom, and what it saves.
#
# With Fashion-MNIST this takes about twenty minutes on two CPU cores; with `DATA = "digits"` three.
# `DATA` may also be a folder of class folders.

# %%
DATA = "fashion-mnist"
IMAGES_PER_CLASS = (1, 10, 50)
STEPS = 300  # of the distillation
LEARNERS = "ridge,mlp,convnet:32"
SEEDS = 3

# %% [markdown]
# ## Distil
#
# The kernel is that of an infinitely wide network with one hidden layer. Each step predicts
# training images by ridge regression from the synthetic ones, and moves their pixels to predict
# better. The best step is chosen on validation images; the test images are read once, at the end.

# %%
import tempfile
from pathlib import Path

from dsdistill.commands.distil import run_kip
from dsdistill.harness.data import distilled_set
from dsdistill.options import KipOptions

folder = Path(tempfile.mkdtemp())
runs = [
    run_kip(KipOptions(data=DATA, images_per_class=k, steps=STEPS, out=folder / f"kip-{k}"))
    for k in IMAGES_PER_CLASS
]
for run in runs:
    distilled = distilled_set.load(run / distilled_set.FILE_NAME)
    made = distilled.provenance
    before, after = (made["metrics"][n] for n in ("initial_test_accuracy", "test_accuracy"))
    print(
        f"{len(distilled)} images, {made['seconds']:.0f} s: ridge regression {after:.1%} of the "
        f"test images, {before:.1%} from the real images they started as"
    )

# %%
from IPython.display import Image

Image(runs[-2 if len(runs) > 1 else 0] / "distilled.png", width=760)

# %% [markdown]
# ## Train students on distilled, random, chosen and full data
#
# A *learner* turns a training set into predictions: `ridge` is kernel ridge regression with the
# kernel of the distillation; `mlp` and `convnet` are finite networks trained by gradient descent.
# Each gets the same number of steps on every kind of data, a learning rate chosen on validation
# images from the same grid, and a few seeds.

# %%
from dsdistill.commands import evaluate
from dsdistill.options import EvaluateOptions

evaluations = [
    evaluate.run(
        EvaluateOptions(
            run, learners=LEARNERS, controls="random,k-means,full", seeds=SEEDS, cache=folder
        )
    )
    for run in runs
]

# %%
from IPython.display import Markdown

from dsdistill.harness.reports import markdown, report

reports = [report.load(evaluation) for evaluation in evaluations]
Markdown(markdown.table(report.COLUMNS, [report.row_cells(row) for row in reports[-1].rows]))

# %% [markdown]
# ## Accuracy against the number of images

# %%
# %matplotlib inline
from dsdistill.harness.reports import growth

growth.plot(reports)

# %% [markdown]
# ## The time that it saves
#
# A student of a few images takes as many steps as one of all images here, since every kind of data
# gets the same budget. What is saved is everything else: the images need not be stored, moved or
# labelled again. What it costs is the distillation, once.

# %%
from dsdistill.harness.reports import plots

plots.cost(reports[-1].rows, reports[-1].distilled["seconds"])

# %% [markdown]
# ## What to take from it
#
# - For the learner that it was made for, the distilled set is close to all the data.
# - For another learner it can be little better than random images of the same number. That is why
#   an accuracy on distilled data means little without the bars beside it, and why
#   `dsdistill evaluate` always measures them.
# - The mean hides the deviation between seeds: look at both before you call something better.
