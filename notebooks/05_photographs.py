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
# # Photographs, condensed through a network
#
# You will condense a folder of photographs into one image per class through a network that has
# never seen these classes, look at the images beside real ones, and ask whether a classifier learns
# more from them than from as many real images: random ones, each class's central one, and those
# that `dsdistill select` chooses.
#
# Kernels of pixels see little in a photograph. A network that was trained on many others, the
# *backbone*, has made their content linear: the kernel here is one of its features, and the images
# are learned through it.
#
# Without a folder of your own, one is made of the two photographs that come with scikit-learn: each
# is cut into regions, and the regions are the classes. The backbone is trained on some of them, and
# the others are condensed. Then this takes about five minutes on two CPU cores. Pieces of one
# region overlap, so the accuracies flatter; the comparisons hold.

# %%
FOLDER = None  # such as "photos"; with sub-folders photos/cat, photos/dog, ...
BACKBONE = None  # such as "timm:resnet18", whose weights are downloaded; or a run of kd train
PIECES = 120  # of each region, where the folder is made here
EPOCHS, STEPS = 20, 400  # of the backbone's training, and of the distillation

# %%
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image as Pictures
from sklearn.datasets import load_sample_images

SIDE, ROWS, COLUMNS = 48, 2, 4  # of a piece in pixels, and regions of a photograph
work = Path(tempfile.mkdtemp())
photos, others = Path(FOLDER) if FOLDER else work / "photos", work / "others"
rng = np.random.default_rng(0)
for name, whole in zip(("temple", "flower"), load_sample_images().images, strict=True):
    height, width = whole.shape[0] // ROWS, whole.shape[1] // COLUMNS
    for region in range(ROWS * COLUMNS):
        top, left = region // COLUMNS * height, region % COLUMNS * width
        # Every other region is condensed; the backbone is trained on the rest.
        folder = (photos if region % 2 else others) / f"{name} {region + 1}"
        if FOLDER and folder.parent == photos:
            continue
        folder.mkdir(parents=True)
        for piece in range(PIECES):
            y, x = top + rng.integers(height - SIDE), left + rng.integers(width - SIDE)
            Pictures.fromarray(whole[y : y + SIDE, x : x + SIDE]).save(folder / f"{piece}.jpg")
sorted(path.name for path in photos.iterdir())

# %% [markdown]
# ## A backbone
#
# Any network of timm, torchvision or Hugging Face with published weights will do, or one that you
# have trained, as here.

# %%
from kd.commands import train
from kd.options import Overrides, TrainOptions

backbone = BACKBONE or str(work / "backbone")
if not BACKBONE:
    options = TrainOptions(
        str(others),
        student="resnet18(channels=(16,32,64,128))",
        out=Path(backbone),
        overrides=Overrides(epochs=EPOCHS, lr=0.05, augment="crop-flip"),
    )
    print(f"the backbone: {train.run(options)['test_accuracy']:.1%} on its own classes")

# %% [markdown]
# ## Condense
#
# Each step takes random crops and flips of the synthetic images through the backbone, predicts real
# images from their features by ridge regression, and moves the pixels so that it predicts better.
# Labels are hard: the images are all that is learned.

# %%
from IPython.display import Image

from dsdistill.commands.distil import run_kip
from dsdistill.options import KipOptions

options = KipOptions(
    data=str(photos),
    features=backbone,
    kernel="linear",
    images_per_class=1,
    steps=STEPS,
    out=work / "condensed",
)
condensed = run_kip(options)
Image(condensed / "distilled.png", width=500)

# %% [markdown]
# Left, the real images that it started from; right, what it made of them. The change is small to
# the eye and large to the network.
#
# ## Choose
#
# The baseline that it must beat: real images, chosen in the same feature space.

# %%
from dsdistill.commands.select import run as run_select
from dsdistill.options import SelectOptions

chosen = [
    run_select(
        SelectOptions(
            str(photos), features=backbone, by=way, images_per_class=1, out=work / f"by-{way}"
        )
    )
    for way in ("centre", "ridge")
]

# %% [markdown]
# ## Compare
#
# A linear probe on the backbone's features, trained on each set and judged on the same test images;
# random images are drawn three times.

# %%
from IPython.display import Markdown

from dsdistill.commands import evaluate
from dsdistill.harness.reports import markdown, report
from dsdistill.options import EvaluateOptions

evaluation = evaluate.run(
    EvaluateOptions(
        condensed,
        also=tuple(chosen),
        learners=f"linear-probe@{backbone}",
        controls="random,full",
        seeds=3,
        cache=work,
    )
)
found = report.load(evaluation)
Markdown(markdown.table(report.COLUMNS, [report.row_cells(row) for row in found.rows]))

# %% [markdown]
# ## What to take from it
#
# - The commands do the same: `dsdistill kip photos --features BACKBONE`, `dsdistill select photos
#   --features BACKBONE`, `dsdistill evaluate RUN --also RUN --learners linear-probe@BACKBONE`.
# - What such images are worth is a question of the network that learns from them: judge them on
#   another backbone too (`linear-probe@OTHER`), and by a network from scratch.
# - With solved or learned labels, as many images as a feature has values carry the whole probe
#   whatever they show (docs/features.md). That is why labels are hard here.
