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
# # Choosing a knowledge-distillation loss
#
# You will train one teacher, and from it the same small student with several losses: of the
# answers (KD, DKD, DIST), of the layers (attention transfer), of the relations between images
# (RKD), and from labels alone. At the end you know which of them help this student, by how much
# more than another seed would, and what they cost.
#
# With Fashion-MNIST this takes about forty minutes on two CPU cores; with `DATA = "digits"` two.

# %%
DATA = "fashion-mnist"
TEACHER, TEACHER_EPOCHS = "convnet:64", 3
STUDENT, EPOCHS = "convnet:8", 2
SEEDS = range(3)
LAYERS = "2,6,10"  # the ReLUs after the three blocks, in teacher and student alike

# %% [markdown]
# ## The teacher

# %%
import tempfile
from pathlib import Path

from kd.commands import train
from kd.options import Overrides, TrainOptions

folder = Path(tempfile.mkdtemp())
teacher = folder / "teacher"
options = TrainOptions(
    DATA, student=TEACHER, out=teacher, overrides=Overrides(epochs=TEACHER_EPOCHS)
)
report = train.run(options)
f"teacher: {report['test_accuracy']:.2%} of the test images, {report['parameters']:,} parameters"

# %% [markdown]
# ## The students
#
# A loss is the sum of its terms, `NAME:WEIGHT`. The weights are the published ones; tuning each of
# them on validation images would be fairer still, and dearer.

# %%
LOSSES = {
    "labels alone": None,
    "KD": "ce:0.1,kd:0.9:temperature=4",
    "DKD": "ce:1,dkd:1",
    "DIST": "ce:1,dist:2",
    "AT": f"ce:1,at:1000@{LAYERS}",
    "RKD": "ce:1,rkd-distance:25,rkd-angle:50",
}
students = {}
for name, loss in LOSSES.items():
    taught = {"teacher": str(teacher)} if loss else {}
    # Answers can be kept from one training to the next; layers cannot.
    cached = {"cache": folder / "answers"} if name in ("KD", "DKD", "DIST") else {}
    for seed in SEEDS:
        options = TrainOptions(
            DATA,
            student=STUDENT,
            seed=seed,
            out=folder / f"{name}-{seed}",
            overrides=Overrides(epochs=EPOCHS, loss=loss),
            **taught,
            **cached,
        )
        students[name, seed] = train.run(options)

# %% [markdown]
# ## What helped
#
# The difference from the student of labels alone is taken seed by seed, since a seed fixes the
# initial weights and the order of the images for all losses. An interval that holds 0 says: no
# difference was seen.

# %%
from IPython.display import Markdown

from dsdistill.harness.evaluation import statistics

scratch = [students["labels alone", seed]["test_accuracy"] for seed in SEEDS]
lines = [
    "| loss | test accuracy, % | against labels alone, points (95 %) | calibration error | s |",
    "|---|---|---|---|---|",
]
differences = {}
for name in LOSSES:
    found = [students[name, seed] for seed in SEEDS]
    accuracies = [report["test_accuracy"] for report in found]
    mean = statistics.summary(accuracies)
    words = "-"
    if name != "labels alone":
        gained = differences[name] = statistics.paired_difference(accuracies, scratch).difference
        words = f"{100 * gained.mean:+.2f} ({100 * gained.low:+.2f} to {100 * gained.high:+.2f})"
    error = statistics.summary([report["calibration_error"] for report in found]).mean
    seconds = statistics.summary([report["seconds"] for report in found]).mean
    lines.append(
        f"| {name} | {100 * mean.mean:.2f} ± {100 * mean.std:.2f} | {words} | {error:.3f} | "
        f"{seconds:.0f} |"
    )
Markdown("\n".join(lines))

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for place, (_, gained) in enumerate(differences.items()):
    axes.plot([100 * gained.low, 100 * gained.high], [place, place], color="#0072B2")
    axes.plot(100 * gained.mean, place, "o", color="#0072B2")
axes.axvline(0, color="grey", linewidth=1)
axes.set_yticks(range(len(differences)), differences)
_ = axes.set_xlabel("difference from labels alone (points of test accuracy, 95 % interval)")

# %% [markdown]
# ## What to take from it
#
# - Look at the intervals, not at the order of the means: with three seeds, losses a tenth of a
#   point apart are not told apart.
# - A loss of answers needs nothing of the teacher but its logits, works between any two networks,
#   and can be cached: then an epoch does not run the teacher at all.
# - A loss of layers needs the teacher in every step, and layers that correspond.
# - A teacher does not always help. `docs/kd.md` lists all losses and schemes;
#   `benchmarks/kd_methods.py` measures ten of them with five seeds.
