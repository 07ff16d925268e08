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
# # Your own images: from a folder of JPEGs to a deployed student
#
# You will take a folder with one sub-folder of JPEGs a class, distil it to a few images a class,
# train a timm network on all of it as teacher, train a small student from that teacher, write the
# student as an ONNX file, and measure how long it takes for an image. At the end you have a file
# that any ONNX runtime can serve.
#
# Without a folder of your own, one is made here of Fashion-MNIST. Then this takes about two
# minutes on two CPU cores.

# %%
FOLDER = None  # such as "photos"; with sub-folders photos/cat, photos/dog, ...
IMAGE_SIZE = 32
EXAMPLES = 200  # JPEGs a class, where the folder is made here
TEACHER, TEACHER_EPOCHS = "resnet10t", 12
STUDENT, EPOCHS = "convnet:16", 20

# %%
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image as Pictures

from dsdistill.harness import paths
from dsdistill.harness.data import datasets
from dsdistill.harness.data.labeled_images import draw_per_class

work = Path(tempfile.mkdtemp())
photos = Path(FOLDER) if FOLDER else work / "photos"
if not FOLDER:
    source = datasets.load("fashion-mnist", root=paths.data_root()).train
    for row in draw_per_class(source, EXAMPLES, np.random.default_rng(0)):
        name = source.classes[source.labels[row]].replace("/", " or ")
        (photos / name).mkdir(parents=True, exist_ok=True)
        pixels = source.images(np.array([row]))[0, ..., 0]
        Pictures.fromarray(pixels).save(photos / name / f"{row}.jpg", quality=95)
sorted(path.name for path in photos.iterdir())

# %% [markdown]
# ## Distil
#
# A few images a class that stand for the folder: for a look at what it holds, and for experiments
# that take seconds.

# %%
from IPython.display import Image

from dsdistill.commands.distil import run_kip
from dsdistill.options import KipOptions

options = KipOptions(
    data=str(photos), image_size=IMAGE_SIZE, images_per_class=5, steps=200, out=work / "distilled"
)
Image(run_kip(options) / "distilled.png", width=700)

# %% [markdown]
# ## A teacher from timm
#
# `--pretrained` would start it from published weights, where they can be downloaded; here it
# starts from scratch. Any name of timm, torchvision or Hugging Face will do.

# %%
from kd.commands import train
from kd.options import Overrides, TrainOptions

# Of sizes other than the network's own the images are resized.
size = {"image_size": IMAGE_SIZE}
teacher = work / "teacher"
options = TrainOptions(
    str(photos),
    student=TEACHER,
    out=teacher,
    overrides=Overrides(epochs=TEACHER_EPOCHS, lr=0.02, augment="crop-flip", **size),
)
taught = train.run(options)
f"teacher: {taught['test_accuracy']:.1%}, {taught['parameters']:,} parameters"

# %% [markdown]
# ## The student
#
# It learns from the labels and from the teacher's answers to the very same crops.

# %%
student = work / "student"
options = TrainOptions(
    str(photos),
    student=STUDENT,
    teacher=str(teacher),
    out=student,
    overrides=Overrides(
        epochs=EPOCHS, loss="ce:0.5,kd:0.5:temperature=4", augment="crop-flip", **size
    ),
)
learned = train.run(options)
f"student: {learned['test_accuracy']:.1%}, {learned['parameters']:,} parameters"

# %%
Image(student / "curves.png", width=760)

# %% [markdown]
# ## Deploy
#
# The file takes plain images in [0, 1], prepared inside as in training, and answers with logits.
# It has been compared with the student on real and on random images before it is written.

# %%
from kd.commands.export import export
from kd.options import ExportOptions

written = export(ExportOptions(student, "onnx"))
{name: written[name] for name in ("written", "largest_difference", "argmax_agreement")}

# %%
import time

import onnxruntime

runner = onnxruntime.InferenceSession(str(written["written"]))
shape = runner.get_inputs()[0].shape
batch = np.random.default_rng(0).random((1, *shape[1:]), np.float32)
name = runner.get_inputs()[0].name
times = []
for _ in range(200):
    began = time.perf_counter()
    runner.run(None, {name: batch})
    times.append(time.perf_counter() - began)
size = sum(path.stat().st_size for path in Path(written["written"]).parent.glob("*.onnx*"))
f"{1e3 * np.median(times):.2f} ms an image (median of 200), {size / 2**10:.0f} KiB"

# %% [markdown]
# ## What to take from it
#
# - The commands do the same: `dsdistill kip photos --image-size 32`, `kd train photos --student ...
#   --teacher ...`, `kd export RUN --format onnx`.
# - For photographs larger than memory, `--augment imagenet` reads and crops files as it goes.
# - Judge the student on images of its own use. The test images here come from the same folder.
