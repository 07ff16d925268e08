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
# # From a TSV to a small student in ONNX
#
# You will fine-tune a teacher on a file of texts, distil it into a BiLSTM of a fraction of its
# size, compare that student with one that learned from the labels alone, and run it with
# onnxruntime. It takes about ten minutes on two CPU cores.
#
# Without a file of your own, one is made of what is installed here: sentences of documentation,
# whose class is the package that they come from. The teacher is then trained from scratch. With the
# internet, `TEACHER = "hf:google-bert/bert-base-uncased"` starts from a real BERT; a GPU helps.

# %%
DATA = None  # such as "reviews.tsv", or a folder with train.tsv, dev.tsv and test.tsv
TEACHER = "bert:3x128"  # fresh blocks; with weights: "hf:ID" or "hf:DIR"
STUDENT = "bilstm:64"
SENTENCES, EPOCHS = 800, 6  # of each package; of the teacher's training
COPIES, PASSES = 5, 3  # of each text; over the texts and their copies

# %%
import importlib
import inspect
import re
import tempfile
from pathlib import Path

import numpy as np

PACKAGES = ("scipy.stats", "scipy.signal", "scipy.special", "matplotlib.pyplot")
work = Path(tempfile.mkdtemp())


def sentences(package):
    """Sentences of the documentation of a package's functions and classes."""
    module, each = importlib.import_module(package), set()
    for name in dir(module):
        text = inspect.getdoc(getattr(module, name)) or ""
        for sentence in re.split(r"(?<=[.])\s+|\n\s*\n", text):
            words = " ".join(sentence.split())
            if re.fullmatch(r"[A-Z][a-z].{40,200}[.]", words) and not re.search(">>>|---", words):
                each.add(words)
    return sorted(each)


data = Path(DATA) if DATA else work / "documentation"
if not DATA:
    data.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for package in PACKAGES:
        own = rng.permutation(sentences(package))[:SENTENCES]
        rows += [f"{text}\t{package}" for text in own]
    rows = rng.permutation(rows)
    parts = np.split(rows, [len(rows) * 7 // 10, len(rows) * 8 // 10])
    for part, texts in zip(("train", "dev", "test"), parts, strict=True):
        (data / f"{part}.tsv").write_text("\n".join(["sentence\tlabel", *texts]))
    print(f"{len(rows)} sentences, such as {rows[0]!r}")

# %% [markdown]
# ## A teacher
#
# The columns are recognised by their names. The tokenizer here is one of the training texts' words;
# a model of Hugging Face brings its own.

# %%
from kd.commands import train
from kd.options import Overrides, TrainOptions

teacher, fresh = work / "teacher", TEACHER.startswith("bert:")
report = train.run(
    TrainOptions(
        str(data),
        student=TEACHER,
        tokenizer="words" if fresh else None,
        max_length=64,
        out=teacher,
        overrides=Overrides(epochs=EPOCHS if fresh else 3),
    )
)
print(f"teacher: {report['parameters']:,} parameters, {report['test_accuracy']:.1%}")

# %% [markdown]
# ## Copies for the teacher to answer
#
# A student learns from the teacher's answers, so it can learn from texts that nobody has labelled:
# here from copies in which words are hidden, exchanged for others of the same frequency, or left
# out, as Tang et al. made them.

# %%
from kd.commands import augment
from kd.options import AugmentOptions

for line in augment.preview(AugmentOptions(data, by="words", preview=2, copies=3)):
    print(line)

# %% [markdown]
# ## Two students
#
# The same BiLSTM, with as many steps: one sees the labels of the training texts, the other only
# what the teacher says of them and of their copies.

# %%
by_labels = train.run(
    TrainOptions(
        str(data),
        student=STUDENT,
        tokenizer=str(teacher / "tokenizer"),
        max_length=64,
        out=work / "by-labels",
        overrides=Overrides(epochs=PASSES * (COPIES + 1)),
    )
)
distilled = train.run(
    TrainOptions(
        str(data),
        student=STUDENT,
        teacher=str(teacher),
        recipe="bilstm",
        cache=work / "cache",
        out=work / "distilled",
        overrides=Overrides(epochs=PASSES, copies=COPIES),
    )
)

# %%
from IPython.display import Markdown

lines = ["| | parameters | accuracy | macro F1 |", "|---|---|---|---|"]
for name, row in (("teacher", report), ("by labels", by_labels), ("distilled", distilled)):
    lines.append(
        f"| {name} | {row['parameters']:,} | {row['test_accuracy']:.1%} "
        f"| {row['test_macro_f1']:.1%} |"
    )
Markdown("\n".join(lines))

# %% [markdown]
# ## ONNX
#
# The export holds the program and the tokenizer; it is compared with the student on real texts of
# several lengths before it is written.

# %%
from kd.commands.export import export
from kd.options import ExportOptions

written = export(ExportOptions(work / "distilled", format="onnx"))
folder = Path(written["written"])
print(sorted(path.name for path in folder.iterdir()), f"{written['largest_difference']:.1e}")

# %%
import json

import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(next(folder.glob("*.onnx")))
text = "Compute the power spectral density of a signal from its windowed segments."
names = {value.name for value in session.get_inputs()}
inputs = {k: v for k, v in tokenizer([text], return_tensors="np").items() if k in names}
scores = session.run(None, inputs)[0][0]
classes = json.loads((folder / "card.json").read_text())["classes"]
print(text, {name: round(float(score), 2) for name, score in zip(classes, scores, strict=True)})

# %% [markdown]
# ## What to take from it
#
# - The commands do the same: `kd train FILE --student hf:NAME`, `kd train FILE --student bilstm:64
#   --teacher RUN --recipe bilstm`, `kd export RUN --format onnx`.
# - One seed says little: repeat both students with `--seed 1` and `--seed 2`, and lay them side by
#   side with `kd report`.
# - `docs/language.md` has the other recipes: half the blocks of the teacher (`pkd`), a thin BERT in
#   two stages (`tinybert`), a corpus without labels (`distilbert`, `minilm`), and causal models
#   (`sequence`, `gkd`).
